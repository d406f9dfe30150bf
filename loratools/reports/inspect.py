"""What an adapter changes, how strongly, and in how many directions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any, Literal

Part = Literal["delta", "direction", "low-rank part"]
Verdict = Literal["nested", "nested up to scale", "not nested", "undecided"]


@dataclass(frozen=True)
class TargetNumbers:
    """One target. Ranks are as the dialect counts them: per expert, and over all groups of a grouped convolution.

    `of` says what was measured: the delta; the direction that a magnitude rescales, where that takes a base and none
    was given; or the low-rank part of such a delta, whose `norm` is then nonetheless that of the whole delta. `blocks`
    are experts or groups: `spectrum` holds the singular values of all of them, while effective and stable rank are
    means over them, counted as the rank is.
    """

    family: str
    of: Part
    layer: str  # "other" where the name holds no layer number
    module: str  # last component of the name, such as q_proj
    shape: tuple[int, ...]  # of the base parameter
    rank: int
    scale: float
    blocks: int
    parameters: int
    bytes: int
    dtypes: Mapping[str, str]  # slot -> safetensors name
    norm: float  # Frobenius
    relative_norm: float | None  # norm / Frobenius norm of the base parameter
    spectral_norm: float
    nuclear_norm: float
    effective_rank: float  # exp of the entropy of s / sum s
    stable_rank: float  # sum s^2 / max s^2
    energy: Mapping[int, float]  # rank -> share of sum s^2 that the best approximation of that rank keeps
    compressible_rank_95: int  # least rank that keeps 95 % of the energy; 0 for a zero update
    spectrum: tuple[float, ...]  # descending

    @property
    def squared_spectrum(self) -> float:
        """sum s^2."""
        return math.fsum(s * s for s in self.spectrum)


@dataclass(frozen=True)
class Group:
    """Sums and means over some targets; means leave out zero updates."""

    targets: int
    zero: int  # targets whose update is zero
    parameters: int
    bytes: int
    rank_min: int
    rank_max: int
    norm: float  # root of the sum of squared norms
    mean_norm: float
    mean_relative_norm: float | None
    mean_effective_rank: float
    mean_stable_rank: float
    mean_compressible_rank_95: float
    energy: Mapping[int, float]  # rank -> share of the energy of all targets together, each cut to that rank
    spectrum: tuple[float, ...]  # root mean square of the i-th singular values


@dataclass(frozen=True)
class Bytes:
    """An amount of memory or storage."""

    bytes: int

    @property
    def mib(self) -> float:
        """In units of 2^20 bytes."""
        return self.bytes / 2**20

    @property
    def mb(self) -> float:
        """In units of 10^6 bytes."""
        return self.bytes / 10**6

    def to_dict(self) -> dict[str, float]:
        return {"bytes": self.bytes, "mib": self.mib, "mb": self.mb}


@dataclass(frozen=True)
class Footprint:
    """Sizes of the whole adapter, whichever targets were selected; the accounting of One-for-All (arXiv 2603.29756).

    Training memory is derived, not measured: a gradient in the stored dtype and two float32 Adam moments for each
    trainable parameter; activations and copies of the weights are left out.
    """

    trainable_parameters: int  # of the updates and of the parameters that extras replace
    other_parameters: int  # of all other extras
    adapter: Bytes  # of all tensors
    file: Bytes | None
    gradients: Bytes
    adam_state: Bytes
    base_parameters: int | None
    base: Bytes | None
    adapter_and_base: Bytes | None

    def to_dict(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value.to_dict() if isinstance(value, Bytes) else value for name, value in fields.items()}


@dataclass(frozen=True)
class PrefixErrors:
    """Relative errors of approximations of one rank; `ratio` is prefix / best, None where the best is exact.

    `random` is the root mean square error over all choices of that many components. `rescaled` is the error of the
    prefix times `multiplier`, the number that suits it best; `random_rescaled` is to it what `random` is to `prefix`.
    """

    prefix: float
    best: float
    ratio: float | None
    random: float
    rescaled: float
    random_rescaled: float
    multiplier: float | None


@dataclass(frozen=True)
class Nested:
    """Whether the first components, as trained, are the best ones: what truncation loses against squeezing.

    `ratio` and `order` are the geometric means over the ranks of prefix / best and prefix / random in total, and
    likewise for the rescaled errors; None where no rank can tell. "undecided" also stands for a flat spectrum, in
    which any components serve.
    """

    verdict: Verdict
    criterion: str
    ratio: float | None
    order: float | None
    rescaled_ratio: float | None
    rescaled_order: float | None
    total: Mapping[int, PrefixErrors]  # by rank
    targets: Mapping[str, Mapping[int, PrefixErrors]]
    skipped: Mapping[str, str]  # target -> why it has no prefix

    def to_dict(self) -> dict[str, Any]:
        return dict(_plain(asdict(self)))


@dataclass(frozen=True)
class InspectReport:
    """Every selected target is in `targets` or, with the reason, in `unmeasured`.

    `keys` counts the tensors of the input by what they are. `layers` and `modules` group the targets. Most and least
    compressible are by the share of their rank that keeps 95 % of the energy, zero updates left out.
    """

    path: str | None
    container: str | None
    format: str
    families: Mapping[str, int]
    keys: Mapping[str, int]
    targets: Mapping[str, TargetNumbers]
    unmeasured: Mapping[str, str]
    total: Group
    layers: Mapping[str, Group]
    modules: Mapping[str, Group]
    most_compressible: tuple[str, ...]
    least_compressible: tuple[str, ...]
    footprint: Footprint
    nested: Nested | None
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        groups = {name: {k: asdict(g) for k, g in getattr(self, name).items()} for name in ("layers", "modules")}
        return {
            "path": self.path,
            "container": self.container,
            "format": self.format,
            "families": dict(self.families),
            "keys": dict(self.keys),
            "total": _plain(asdict(self.total)),
            "layers": _plain(groups["layers"]),
            "modules": _plain(groups["modules"]),
            "targets": {target: _plain(asdict(numbers)) for target, numbers in self.targets.items()},
            "unmeasured": dict(self.unmeasured),
            "most_compressible": list(self.most_compressible),
            "least_compressible": list(self.least_compressible),
            "footprint": self.footprint.to_dict(),
            "nested": self.nested.to_dict() if self.nested else None,
            "warnings": list(self.warnings),
        }


def _plain(value: Any) -> Any:
    """With text for keys and lists for tuples, as JSON has them."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def doubling(rank: int, step: int = 1) -> tuple[int, ...]:
    """step, 2 step, 4 step, ... and `rank` itself."""
    powers = [step << i for i in range(max(1, rank // step).bit_length()) if step << i < rank]
    return (*powers, rank)


def group(targets: Iterable[TargetNumbers]) -> Group:
    """The sums and means of some targets."""
    members = list(targets)
    moving = [t for t in members if t.spectral_norm > 0]
    energies = [t.squared_spectrum for t in moving]
    whole = math.fsum(energies)
    ranks = doubling(max((t.rank for t in members), default=1))
    relative = [t.relative_norm for t in moving if t.relative_norm is not None]
    rows = zip_longest(*(t.spectrum for t in moving), fillvalue=0.0)
    return Group(
        targets=len(members),
        zero=len(members) - len(moving),
        parameters=sum(t.parameters for t in members),
        bytes=sum(t.bytes for t in members),
        rank_min=min((t.rank for t in members), default=0),
        rank_max=max((t.rank for t in members), default=0),
        norm=math.hypot(*(t.norm for t in members)),
        mean_norm=_mean(t.norm for t in moving),
        mean_relative_norm=_mean(relative) if relative else None,
        mean_effective_rank=_mean(t.effective_rank for t in moving),
        mean_stable_rank=_mean(t.stable_rank for t in moving),
        mean_compressible_rank_95=_mean(t.compressible_rank_95 for t in moving),
        energy={
            k: math.fsum(e * _energy_at(t, k) for t, e in zip(moving, energies, strict=True)) / whole if whole else 1.0
            for k in ranks
        },
        spectrum=tuple(math.hypot(*row) / math.sqrt(len(moving)) for row in rows),
    )


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers) if numbers else 0.0


def _energy_at(target: TargetNumbers, rank: int) -> float:
    """The energy kept at `rank`: of the largest rank known below it, where a target has steps of its own."""
    return max((share for k, share in target.energy.items() if k <= rank), default=0.0)
