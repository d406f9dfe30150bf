"""SNELL: delta = S^T, the largest entries of a kernel matrix of distances, each times its own size (2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

from loratools._lazy import torch
from loratools.errors import AdapterError, UsageError
from loratools.families.base import NO_SETTINGS, Layout, Settings
from loratools.families.fitting import Fittable, Guarantee, Source
from loratools.families.lora import cast_to
from loratools.families.stated import number_of
from loratools.linalg.svd import truncate
from loratools.operators import Dense, LowRank, Operator

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.storage.base import TensorSpec

_COEFFICIENT = 0.1  # of the two distances, with either sign, in the authors' code
_MIXED = frozenset({"snell_alpha", "snell_gamma", "snell_beta"})
# How far the two sets of points lie apart, in sizes of the matrix that is wanted: the farther, the more nearly bilinear
# are differences of distances; but the authors' code takes them in float32, where they cancel.
_FAR = 300.0
_IMPUTED = 20  # sweeps over the entries that are to be dropped, and so may be anything small
_PACE = 5e-3  # of Adam, in mean sizes of the coordinates


@dataclass(frozen=True)
class SNELLOptions:
    """`rank`: low_rank_dim of the authors, twice the number of coordinates; `threshold`: the share of entries that is
    dropped, 0 for the plain kernel; `steps`: of Adam, 0 for none.
    """

    rank: int = 16
    threshold: float = 0.0
    steps: int = 200

    def __post_init__(self) -> None:
        if self.rank < 4 or self.rank % 2:
            raise UsageError(f"snell: rank is {self.rank}, where an even number from 4 on is needed")
        if not 0 <= self.threshold < 1 or self.steps < 0:
            raise UsageError(f"snell: threshold {self.threshold} and steps {self.steps} are no share and no number")


@final
@dataclass(frozen=True, eq=False)
class SNELL(Fittable):
    """snell_in (h, n, q / 2) and snell_out (h, m, q / 2), points of inputs and outputs; snell_coefficients (h, 1, 1),
    +-0.1 where they are not stored. M (n, m) is the sum over h of coefficient times distance, and in SNELLA
    M + alpha softmax(M / gamma) over outputs + beta, numbers that are then stored too.

    Entries of M that are not above the quantile `threshold` of its sizes become 0, the others M |M|: the authors
    multiply by what survives. Without a threshold (KLoRA, SNELL at 0) the delta is M^T itself. No threshold is in the
    authors' files: a setting states it, for SNELLA one for each module.
    """

    family: ClassVar[str] = "snell"
    required: ClassVar[frozenset[str]] = frozenset({"snell_in", "snell_out"})
    optional: ClassVar[frozenset[str]] = frozenset({"snell_coefficients"}) | _MIXED
    Options: ClassVar[type[SNELLOptions]] = SNELLOptions
    guarantee: ClassVar[Guarantee] = "local"
    formula: ClassVar[str] = "(M |M| where |M| > tau)^T, M = 0.1 dist(I_1, O_1) - 0.1 dist(I_2, O_2)"
    count: ClassVar[str] = "q (m + n)"
    paper: ClassVar[str] = "SNELL 2024, arXiv 2411.01800; SNELLA 2025, arXiv 2510.24037"
    most: ClassVar[int | None] = 2**20

    tensors: Mapping[str, Tensor]
    scale: float = 1.0
    layout: Layout = Layout()
    threshold: float | None = None
    is_kernel: bool = False  # the kernel itself, with nothing dropped or squared

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> SNELL:
        threshold = number_of(settings, "threshold")
        if threshold is not None and not 0 <= threshold <= 1:
            raise AdapterError(f"the threshold {threshold!r} is no share of its entries")
        return cls(dict(parameters), scale, layout, threshold, bool(settings.get("is_kernel", False)))

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        if any(not spec.numel for spec in specs.values()):
            return "it holds a tensor without numbers"
        points, others = specs["snell_in"].shape, specs["snell_out"].shape
        if len(points) != 3 or len(others) != 3 or (points[0], points[2]) != (others[0], others[2]):
            return f"points {points} of the inputs and {others} of the outputs are not in one space"
        if "snell_coefficients" in specs and specs["snell_coefficients"].numel != points[0]:
            return f"there are {specs['snell_coefficients'].numel} coefficients for {points[0]} distances"
        mixed = _MIXED & set(specs)
        if mixed and (mixed != _MIXED or any(specs[slot].numel != 1 for slot in mixed)):
            return "of alpha, gamma and beta there is not one number each"
        return None

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return 2 * specs["snell_in"].shape[2]

    @classmethod
    def base_shape(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> tuple[int, ...]:
        shape = (specs["snell_out"].shape[1], specs["snell_in"].shape[1])
        return layout.shape or (shape[::-1] if layout.transposed else shape)

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.tensors)

    def stated_settings(self) -> dict[str, Any]:
        if self.is_kernel:
            return {"is_kernel": True}
        return {} if self.threshold is None else {"threshold": self.threshold}

    def operator(self, base: Tensor | None = None) -> Operator:
        if not self.is_kernel and self.threshold is None:
            raise AdapterError(
                "the share of entries that it drops, init_thres of its training script, is not in the file; pass "
                "--snell-threshold"
            )
        kernel = self._kernel()
        if not self.is_kernel:
            kernel = sparsified(kernel, self.threshold or 0.0)
        return Dense(kernel.T * self.scale)

    def _kernel(self) -> Tensor:
        """M (n, m), float64."""
        held = {slot: tensor.double() for slot, tensor in self.tensors.items()}
        kernel = _kernel(held["snell_in"], held["snell_out"], held.get("snell_coefficients"))
        if "snell_alpha" in held:
            alpha, gamma, beta = (held[f"snell_{name}"].flatten() for name in ("alpha", "gamma", "beta"))
            kernel = kernel + alpha * torch.softmax(kernel / gamma, dim=1) + beta
        return kernel

    @classmethod
    def encode(cls, source: Source, options: SNELLOptions) -> SNELL:
        """An SVD of the roots of what is kept, filled in where nothing is, put into points; then steps of Adam.

        Every step costs q / 2 operations for each entry of the delta.
        """
        m, n = source.shape
        if options.steps and cls.most is not None and m * n > cls.most:
            raise AdapterError(f"{m} x {n} entries are more than a fit with steps is for; pass --set steps=0")
        wanted = source.delta.to(torch.float64).dense().T
        is_kernel = options.threshold == 0
        low = _bilinear(wanted, options, source.seed)
        points = _points(low, options.rank // 2)
        best, least = points, math.inf
        nothing = (torch.zeros_like(points[0]), torch.zeros_like(points[1]))
        for found in (nothing, *_descended(points, wanted, options)):
            error = float((_entries(_kernel(*found, None), options.threshold) - wanted).norm())
            if error < least:
                best, least = found, error
        stored = {slot: cast_to(t, source.stored) for slot, t in zip(("snell_in", "snell_out"), best, strict=True)}
        return cls(stored, 1.0, source.layout, None if is_kernel else options.threshold, is_kernel)

    @classmethod
    def within(cls, source: Source, nbytes: int) -> SNELLOptions | None:
        rank = nbytes // (source.stored.itemsize * sum(source.shape)) // 2 * 2
        return SNELLOptions(min(rank, 2 * min(source.shape) + 2)) if rank >= 4 else None

    @classmethod
    def size(cls, source: Source, options: SNELLOptions) -> int:
        return options.rank * sum(source.shape) * source.stored.itemsize


def sparsified(kernel: Tensor, threshold: float) -> Tensor:
    """M |M| where |M| is above the quantile of all |M|, with linear interpolation; 0 elsewhere."""
    sizes = kernel.detach().abs()
    return torch.where(sizes > quantile(sizes, threshold), kernel * kernel.abs(), 0.0)


def quantile(values: Tensor, share: float) -> Tensor:
    """As torch.quantile, which takes no more than 16 million numbers."""
    flat = values.flatten()
    place = share * (flat.numel() - 1)
    low, high = (flat.kthvalue(int(k) + 1).values for k in (math.floor(place), math.ceil(place)))
    return low + (place - math.floor(place)) * (high - low)


def _kernel(points: Tensor, others: Tensor, coefficients: Tensor | None) -> Tensor:
    """(n, m); distances one by one, for products of coordinates would cancel."""
    distances = torch.cdist(points, others, compute_mode="donot_use_mm_for_euclid_dist")
    if coefficients is None:
        coefficients = torch.tensor([_COEFFICIENT, -_COEFFICIENT], dtype=distances.dtype)
    return (coefficients.reshape(-1, 1, 1) * distances).sum(dim=0)


def _entries(kernel: Tensor, threshold: float) -> Tensor:
    return sparsified(kernel, threshold) if threshold else kernel


def _bilinear(wanted: Tensor, options: SNELLOptions, seed: int) -> LowRank:
    """The product of rank q / 2 - 1 nearest to the kernel that is wanted, as far as it matters."""
    n, m = wanted.shape
    rank = min(options.rank // 2 - 1, n, m)
    roots = wanted if not options.threshold else wanted.sign() * wanted.abs().sqrt()
    kept = torch.ones_like(wanted, dtype=torch.bool)
    if options.threshold:
        kept = roots.abs() > quantile(roots.abs(), options.threshold)
    asked = torch.where(kept, roots, 0.0)
    least = float(roots[kept].abs().min()) if bool(kept.any()) else 0.0
    found = _nearest(asked, rank, seed)
    for _ in range(_IMPUTED if options.threshold else 0):
        found = _nearest(torch.where(kept, roots, found.dense().clamp(-least, least)), rank, seed)
    return found


def _nearest(matrix: Tensor, rank: int, seed: int) -> LowRank:
    found = truncate(Dense(matrix), rank, seed=seed).operator
    assert isinstance(found, LowRank)
    return found


def _points(low: LowRank, size: int) -> tuple[Tensor, Tensor]:
    """Points (2, n, size) and (2, m, size) whose kernel is nearly the product, as they lie far apart in a coordinate.

    0.1 (|p + q| - |p - q|) is 0.2 p q / far where the distances are nearly `far`, for p and q scaled by its root.
    """
    p, q = low.left, low.right.T
    far = _FAR * float(p.norm(dim=1).max() * q.norm(dim=1).max())
    factor = math.sqrt(far / (2 * _COEFFICIENT))
    inputs, outputs = (t.new_zeros(2, len(t), size) for t in (p, q))
    inputs[:, :, : p.shape[1]] = factor * p
    outputs[0, :, : q.shape[1]], outputs[1, :, : q.shape[1]] = -factor * q, factor * q
    outputs[:, :, -1] = far
    return inputs, outputs


def _descended(points: tuple[Tensor, Tensor], wanted: Tensor, options: SNELLOptions) -> list[tuple[Tensor, Tensor]]:
    """The points, and those that Adam makes of them, with the pace falling to nothing."""
    moved = [p.clone().requires_grad_(True) for p in points]
    found = [points]
    pace = _PACE * float(points[0].square().mean().sqrt())
    if not options.steps or not pace:
        return found
    adam = torch.optim.Adam(moved, lr=pace)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, options.steps)
    inputs, outputs = (p.detach() for p in moved)  # of the same numbers, which Adam changes in place
    for _ in range(options.steps):
        for p, slope in zip(moved, slopes(inputs, outputs, wanted, options.threshold), strict=True):
            p.grad = slope
        adam.step()
        schedule.step()
    return [*found, (inputs, outputs)]


def slopes(inputs: Tensor, outputs: Tensor, wanted: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The gradients of the squared error by the points, in products of matrices: a third of the time of autograd's."""
    distances = torch.cdist(inputs, outputs, compute_mode="donot_use_mm_for_euclid_dist")
    kernel = _COEFFICIENT * (distances[0] - distances[1])
    slope = 2 * (_entries(kernel, threshold) - wanted)
    if threshold:
        sizes = kernel.abs()
        slope = torch.where(sizes > quantile(sizes, threshold), slope * 2 * sizes, 0.0)
    found = []
    for points, others, distance, sign in zip(inputs, outputs, distances, (1, -1), strict=True):
        pulls = torch.where(distance > 0, slope / distance, 0.0) * (sign * _COEFFICIENT)
        found.append(
            (
                pulls.sum(1, keepdim=True) * points - pulls @ others,
                pulls.sum(0).unsqueeze(1) * others - pulls.T @ points,
            )
        )
    of_inputs, of_outputs = zip(*found, strict=True)
    return torch.stack(of_inputs), torch.stack(of_outputs)
