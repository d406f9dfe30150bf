"""TeRA: a Tucker tensor with a random core and random factors, of which a target has the scales alone."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.errors import AdapterError, UsageError
from loratools.families.base import NO_SETTINGS, Layout, Settings
from loratools.families.fitting import Fittable, Guarantee, Source
from loratools.families.lora import cast_to
from loratools.families.stated import LONGEST, seed_of, sides_of
from loratools.families.tera_fit import along_modes, fitted_scales
from loratools.operators import Dense, LowRank, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from torch import Tensor

    from loratools.storage.base import TensorSpec

_MOST = 2**24  # entries of a core that a budget asks for


@dataclass(frozen=True)
class TeRAOptions:
    """`rank`: of every mode, at most its size; `modes`: into how many either side of the matrix is split."""

    rank: int = 8
    modes: int = 2


@final
@dataclass(frozen=True, eq=False)
class TeRA(Fittable):
    """tera_d (sum of ranks,): the scales of all modes, one after another; delta = G x_1 A_1 D_1 ... x_N A_N D_N.

    The settings name the sizes of the modes, those of `outputs` before those of `inputs`, entries in the order of the
    matrix's own rows and columns, their `ranks`, and the `seed` of the core G and then of the factors A_1, A_2, ...
    `checksum` is of the numbers that were drawn, so that another generator is noticed.
    """

    family: ClassVar[str] = "tera"
    required: ClassVar[frozenset[str]] = frozenset({"tera_d"})
    Options: ClassVar[type[TeRAOptions]] = TeRAOptions
    guarantee: ClassVar[Guarantee] = "local"
    formula: ClassVar[str] = "G x_1 A_1 D_1 ... x_N A_N D_N, with G and all A_n drawn from a seed, as a matrix"
    count: ClassVar[str] = "the sum of the N ranks, for a matrix whose rank is up to the product of half of them"
    paper: ClassVar[str] = "TeRA, ACL 2026, arXiv 2509.03234"
    reconstruction: ClassVar[str] = (
        "the paper's abstract tells the structure; how the sides are split, the ranks, the numbers drawn (uniform, of "
        "variance 1, factors divided by the root of their rank) and the scale are this project's choice"
    )

    d: Tensor
    seed: int
    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    ranks: tuple[int, ...]
    checksum: str
    scale: float = 1.0
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> TeRA:
        d = parameters["tera_d"]
        outputs, inputs, ranks = (sides_of(settings, name) for name in ("outputs", "inputs", "ranks"))
        if len(ranks) != len(outputs) + len(inputs) or sum(ranks) != len(d) or math.prod(ranks) > LONGEST:
            raise AdapterError(f"{len(d)} scales are not those of modes {outputs} x {inputs} with ranks {ranks}")
        if layout.shape is not None and layout.sides != (math.prod(outputs), math.prod(inputs)):
            raise AdapterError(f"modes {outputs} x {inputs} do not make a weight of {layout.sides}")
        return cls(d, seed_of(settings), outputs, inputs, ranks, str(settings.get("checksum")), scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        spec = specs["tera_d"]
        return None if len(spec.shape) == 1 and spec.numel else f"tera_d {spec.shape} is no vector"

    def parameters(self) -> dict[str, Tensor]:
        return {"tera_d": self.d}

    def stated_settings(self) -> dict[str, Any]:
        modes = {"outputs": list(self.outputs), "inputs": list(self.inputs), "ranks": list(self.ranks)}
        return {"seed": self.seed, **modes, "checksum": self.checksum}

    def operator(self, base: Tensor | None = None) -> Operator:
        """Low rank where the ranks make it so, else dense."""
        core, factors, checksum = drawn((*self.outputs, *self.inputs), self.ranks, self.seed)
        if checksum != self.checksum:
            raise AdapterError(
                "its random numbers are not drawn here as they were where it was made; decode it with that torch, for "
                "example by loratools reparameterize --to lora"
            )
        pieces = self.d.double().split(list(self.ranks))
        scaled = [a * d for a, d in zip(factors, pieces, strict=True)]
        cut = len(self.outputs)
        wide = core.reshape(math.prod(self.ranks[:cut]), -1)
        (m, n), (rows, columns) = (math.prod(self.outputs), math.prod(self.inputs)), wide.shape
        if rows <= columns:
            left, right = _kron(scaled[:cut]), along_modes(wide, scaled[cut:], self.ranks[cut:])
        else:
            left, right = along_modes(wide.T, scaled[:cut], self.ranks[:cut]).T, _kron(scaled[cut:]).T
        low = LowRank(left, right, self.scale)
        return low if min(rows, columns) * (m + n) < m * n else Dense(low.dense())

    @classmethod
    def encode(cls, source: Source, options: TeRAOptions) -> TeRA:
        """The scales of one mode after another, each by least squares, from four starts.

        Nothing as large as the matrix is formed for a delta of factors: a sweep costs the entries of the core times the
        sum of its ranks, for each mode.
        """
        if options.rank < 1 or options.modes < 1:
            raise UsageError(f"tera: rank {options.rank} and modes {options.modes} have to be 1 or more")
        outputs, inputs = (_split(side, options.modes) for side in source.shape)
        ranks = tuple(min(options.rank, size) for size in outputs + inputs)
        core, factors, checksum = drawn(outputs + inputs, ranks, source.seed)
        d = cast_to(fitted_scales(source.delta, core, factors, len(outputs), source.seed), source.stored)
        return cls(d, source.seed, outputs, inputs, ranks, checksum, 1.0, source.layout)

    @classmethod
    def within(cls, source: Source, nbytes: int) -> TeRAOptions | None:
        sizes = [size for side in source.shape for size in _split(side, TeRAOptions.modes)]
        best = None
        for rank in range(1, max(sizes) + 1):
            ranks = [min(rank, size) for size in sizes]
            if sum(ranks) * source.stored.itemsize > nbytes or math.prod(ranks) > _MOST:
                break
            best = TeRAOptions(rank)
        return best

    @classmethod
    def size(cls, source: Source, options: TeRAOptions) -> int:
        sizes = [size for side in source.shape for size in _split(side, options.modes)]
        return sum(min(options.rank, size) for size in sizes) * source.stored.itemsize

    @classmethod
    def expected_energy(cls, source: Source, options: TeRAOptions) -> float:
        m, n = source.shape
        ranks = [min(options.rank, size) for side in (m, n) for size in _split(side, options.modes)]
        return min(1.0, (sum(ranks) - len(ranks) + 1) / (m * n))


def _split(side: int, modes: int) -> tuple[int, ...]:
    """Factors of a side, as equal as its divisors allow, the smaller first."""
    if modes == 1:
        return (side,)
    root = round(side ** (1 / modes))
    first = next(size for size in range(max(root, 1), 0, -1) if side % size == 0)
    return (first, *_split(side // first, modes - 1))


def _kron(matrices: Sequence[Tensor]) -> Tensor:
    whole = matrices[0]
    for matrix in matrices[1:]:
        whole = torch.kron(whole, matrix.contiguous())
    return whole


@lru_cache(maxsize=4)  # targets of one shape share them
def drawn(sizes: tuple[int, ...], ranks: tuple[int, ...], seed: int) -> tuple[Tensor, tuple[Tensor, ...], str]:
    """(core (ranks), factors (size, rank), checksum), float64.

    Uniform numbers, for they come out alike on every processor, which normal ones do not.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = [ranks, *zip(sizes, ranks, strict=True)]
    uniform = [torch.rand(shape, generator=generator) for shape in shapes]
    digest = hashlib.sha256(b"".join(u.numpy().tobytes() for u in uniform)).hexdigest()[:16]
    core, *factors = ((2 * u.double() - 1) * math.sqrt(3) for u in uniform)
    return core, tuple(a / math.sqrt(a.shape[1]) for a in factors), digest
