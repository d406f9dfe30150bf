"""LoRA: delta = scale * up @ down, on linear, convolution and embedding weights and on stacks of experts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.families.base import NO_SETTINGS, Layout, LowRankUpdate, Settings
from loratools.families.fitting import Fittable, Guarantee, Source, check_rank
from loratools.linalg.svd import truncate
from loratools.operators import BlockDiagonal, LowRank, Operator
from loratools.storage.base import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


@dataclass(frozen=True)
class LoRAOptions:
    """`rank`: of the factors; None for the rank that the delta has, where it is a product of factors."""

    rank: int | None = None

    def __post_init__(self) -> None:
        check_rank(self.rank)


@final
@dataclass(frozen=True, eq=False)
class LoRA(LowRankUpdate, Fittable):
    """Hu et al. 2021; with `mid`, the Tucker form of LyCORIS; with experts, PEFT's `target_parameters`.

    Shapes: linear down (r, n), up (m, r); convolution down (r, n, *kernel), up (m, r, *ones), or down (r, n, *ones) and
    mid (r, r, *kernel); grouped convolution up (m, r / groups, *ones); experts down (experts * r, n), expert-major, and
    up (m, r * experts), expert-minor.
    """

    family: ClassVar[str] = "lora"
    required: ClassVar[frozenset[str]] = frozenset({"down", "up"})
    optional: ClassVar[frozenset[str]] = frozenset({"mid", "up_bias"})
    scaled: ClassVar[tuple[str, ...]] = ("up", "up_bias")
    Options: ClassVar[type[LoRAOptions]] = LoRAOptions
    guarantee: ClassVar[Guarantee] = "optimal"
    formula: ClassVar[str] = "B A"
    count: ClassVar[str] = "r (m + n)"
    paper: ClassVar[str] = "Hu et al. 2021, arXiv 2106.09685"

    down: Tensor
    up: Tensor
    scale: float
    layout: Layout = Layout()
    mid: Tensor | None = None
    up_bias: Tensor | None = None

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> LoRA:
        return cls(scale=scale, layout=layout, **parameters)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        down, up = specs["down"].shape, specs["up"].shape
        if any(not s.dtype.startswith(("F", "BF")) for s in specs.values()):
            return f"factors must hold floating-point numbers, not {', '.join({s.dtype: 0 for s in specs.values()})}"
        if len(down) < 2 or len(up) < 2 or 0 in down or 0 in up:
            return f"factors of shape {up} and {down} hold no rank"
        if "up_bias" in specs and specs["up_bias"].numel != up[0]:
            return f"the bias holds {specs['up_bias'].numel} numbers where {up[0]} are needed"
        if layout.experts > 1:
            rows, columns = down[0], up[1]
            fits = len(down) == len(up) == 2 and rows == columns and rows % layout.experts == 0
            return None if fits else f"up {up} and down {down} do not hold {layout.experts} experts"
        if "mid" in specs:
            mid = specs["mid"].shape
            chains = mid[:2] == (up[1], down[0]) and math.prod(up[2:]) == math.prod(down[2:]) == 1
            return None if chains else f"up {up}, mid {mid} and down {down} do not chain"
        if math.prod(up[2:]) != 1:  # the kernel lies in `down`
            return f"up {up} and down {down} do not chain"
        if up[1] == down[0]:
            return None
        grouped = len(down) > 2 and down[0] % up[1] == 0 and up[0] % (down[0] // up[1]) == 0
        return None if grouped else f"up {up} and down {down} do not chain"

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return specs["up"].shape[1] if "mid" in specs else specs["down"].shape[0] // layout.experts

    @classmethod
    def rank_step(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        if layout.experts > 1 or "mid" in specs:
            return 1
        return specs["down"].shape[0] // specs["up"].shape[1]

    @classmethod
    def bytes_per_rank(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        kernel = specs["mid"].shape[2:] if "mid" in specs else specs["down"].shape[2:]
        down = TensorSpec(specs["down"].dtype, (specs["down"].shape[1], *kernel)).nbytes
        up = TensorSpec(specs["up"].dtype, (specs["up"].shape[0],)).nbytes
        return layout.experts * (down + up // cls.rank_step(specs, layout))

    @classmethod
    def base_shape(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> tuple[int, ...]:
        kernel = specs["mid"].shape[2:] if "mid" in specs else specs["down"].shape[2:]
        shape = (specs["up"].shape[0], specs["down"].shape[1], *kernel)
        if layout.transposed:
            shape = (shape[1], shape[0], *kernel)
        return (layout.experts, *shape) if layout.experts > 1 else shape

    @property
    def groups(self) -> int:
        """Groups of the convolution; 1 for everything else."""
        return 1 if self.layout.experts > 1 or self.mid is not None else self.down.shape[0] // self.up.shape[1]

    def parameters(self) -> dict[str, Tensor]:
        slots = {"down": self.down, "up": self.up, "mid": self.mid, "up_bias": self.up_bias}
        return {slot: tensor for slot, tensor in slots.items() if tensor is not None}

    def operator(self, base: Tensor | None = None) -> Operator:
        experts, groups = self.layout.experts, self.groups
        if experts > 1:
            lefts = self.up.reshape(self.up.shape[0], -1, experts).permute(2, 0, 1)  # (experts, m, r)
            rights = self.down.reshape(experts, -1, self.down.shape[1])  # (experts, r, n)
        elif groups > 1:
            lefts = self.up.reshape(groups, self.up.shape[0] // groups, -1)
            rights = self.down.reshape(groups, self.up.shape[1], -1)
        elif self.mid is not None:
            return LowRank(self.up.flatten(1).double(), self._composed_down().flatten(1), self.scale)
        else:
            return LowRank(self.up.flatten(1), self.down.flatten(1), self.scale)
        return BlockDiagonal(tuple(LowRank(le, ri, self.scale) for le, ri in zip(lefts, rights, strict=True)))

    @classmethod
    def encode(cls, source: Source, options: LoRAOptions) -> LoRA:
        m, n = source.shape
        rank = options.rank
        if rank is None:
            if not isinstance(source.delta, LowRank):
                raise AdapterError("the delta is no product of factors; say of which rank it should become: rank=N")
            rank = min(source.delta.rank, m, n)
        best = truncate(source.delta, min(rank, source.rank), seed=source.seed).operator
        shape, transposed = source.layout.shape or (m, n), source.layout.transposed
        kernel = () if transposed else shape[2:]
        down = torch.empty(1, n // math.prod(kernel), *kernel, dtype=source.stored)
        up = torch.empty(m, 1, *(1 for _ in kernel), dtype=source.stored)
        return cls(down, up, 1.0, source.layout).fit(best, scale=1.0)

    @classmethod
    def within(cls, source: Source, nbytes: int) -> LoRAOptions | None:
        rank = nbytes // (sum(source.shape) * source.stored.itemsize)
        return LoRAOptions(min(rank, source.rank)) if rank else None

    @classmethod
    def size(cls, source: Source, options: LoRAOptions) -> int:
        return min(options.rank or source.rank, source.rank) * sum(source.shape) * source.stored.itemsize

    def _composed_down(self) -> Tensor:
        assert self.mid is not None
        return torch.einsum("pq...,qi->pi...", self.mid.double(), self.down.double().flatten(1))

    def low_rank_part(self, base: Tensor | None = None) -> Operator:
        return self.operator()

    def direction_operator(self) -> Operator:
        return self.operator()

    def fit(self, part: Operator, *, scale: float, base: Tensor | None = None) -> LoRA:
        down_dtype, up_dtype = self.down.dtype, self.up.dtype
        if isinstance(part, BlockDiagonal):
            lows = [_unscaled(b, scale) for b in part.blocks]
            rights = torch.stack([r for _, r in lows])
            lefts = torch.stack([le for le, _ in lows])
            if self.layout.experts > 1:
                down, up = rights.flatten(0, 1), lefts.permute(1, 2, 0).flatten(1)
            else:
                down = rights.reshape(-1, *self.down.shape[1:])
                up = lefts.reshape(self.up.shape[0], -1, *self.up.shape[2:])
        else:
            left, right = _unscaled(part, scale)
            kernel = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
            down = right.reshape(right.shape[0], self.down.shape[1], *kernel)
            up = left.reshape(*left.shape, *self.up.shape[2:])
        down, up = cast_to(down, down_dtype), cast_to(up, up_dtype)
        return replace(self, down=down, up=up, mid=None, up_bias=self._rescaled_bias(scale), scale=scale)

    def with_direction(self, part: Operator, *, scale: float) -> LoRA:
        return replace(self, down=self.down.float(), up=self.up.float()).fit(part, scale=scale)

    def minus(self, other: LoRA) -> LoRA:
        if self.layout.experts > 1 or self.groups > 1 or self.mid is not None or self.up_bias is not None:
            raise AdapterError("only plain factors can be subtracted")
        if self.scale != other.scale:
            raise AdapterError(f"scales differ: {self.scale:g} and {other.scale:g}")
        return replace(
            self,
            down=torch.cat([self.down, other.down]),
            up=torch.cat([self.up, cast_to(-other.up.double(), other.up.dtype)], dim=1),
        )

    def prefix(self, rank: int, *, delta_scale: float, scale: float) -> LoRA:
        if self.mid is not None or self.groups > 1:
            raise AdapterError("only plain factors have a prefix, not a Tucker core or a grouped convolution")
        experts = self.layout.experts
        fold = delta_scale / scale if scale else 1.0  # a scale of 0 makes zero of any factors
        if experts > 1:
            down = self.down.reshape(experts, -1, self.down.shape[1])[:, :rank].flatten(0, 1)
            up = self.up.reshape(self.up.shape[0], -1, experts)[:, :rank].flatten(1)
        else:
            down, up = self.down[:rank], self.up[:, :rank]
        if fold != 1.0:
            up = cast_to(up.double() * fold, self.up.dtype)
        return replace(self, down=down.clone(), up=up.clone(), up_bias=self._rescaled_bias(scale), scale=scale)

    def _rescaled_bias(self, scale: float) -> Tensor | None:
        """The bias that keeps scale * bias, for it is no part of the low-rank approximation."""
        if self.up_bias is None or scale in (self.scale, 0.0):
            return self.up_bias
        return cast_to(self.up_bias.double() * (self.scale / scale), self.up_bias.dtype)

    def bias_delta(self, bias: Tensor | None = None) -> Tensor | None:
        return None if self.up_bias is None else (self.up_bias.double() * self.scale).float()


def _unscaled(op: Operator, scale: float) -> tuple[Tensor, Tensor]:
    """Factors of op / scale with the quotient shared evenly, so that balanced factors stay balanced."""
    if not isinstance(op, LowRank):
        raise AdapterError("a LoRA update holds low-rank operators only")
    ratio = op.scale / scale if scale else 1.0  # an alpha of 0 makes zero of any factors
    if ratio == 1.0:
        return op.left, op.right
    root = math.sqrt(abs(ratio))
    return op.left.double() * math.copysign(root, ratio), op.right.double() * root


def cast_to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous, on the CPU, in `dtype`; AdapterError where a finite number would overflow."""
    cast = tensor.to(dtype).cpu().contiguous()
    saturates = dtype.itemsize == 1  # casts to float8 may give the largest number instead of infinity
    if (dtype == torch.float16 and bool(torch.isinf(cast).any())) or (
        saturates and bool((tensor.abs() > torch.finfo(dtype).max).any())
    ):
        raise AdapterError(f"a factor overflows {str(dtype).removeprefix('torch.')}; write with a wider dtype")
    return cast
