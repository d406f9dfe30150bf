"""What several updates did to one base model, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import pandas as pd

    from loratools.reports.frames import Kind

MAX_VALUES = 256  # of a spectrum in a report; numbers that summarise one are of all its values


@dataclass(frozen=True)
class Missed:
    """What one update misses of the full fine-tune `of` the same base.

    `error` is ||full - update|| / ||full||; `best_error` that of the nearest matrix of the update's rank (Eckart and
    Young); `space_error` that of the nearest one in the update's own row and column spaces: what better
    coefficients could have reached. The rank and spaces of a DoRA are those of its direction's rank, with the leading
    singular vectors of its delta; its own error may then lie below the best.
    """

    of: str
    rank: int
    error: float
    best_error: float
    space_error: float


@dataclass(frozen=True)
class UpdateNumbers:
    """One update of one matrix.

    `rank` is the stored one, 0 for a family without. `relative_norm` is ||delta|| / ||W0||, null for a W0 of zeros.
    `spectrum` holds the leading singular values. `energy_left` and `energy_right` are shares of ||delta||^2 in the
    spaces of the first top_k left and right singular vectors of W0. `share` is that of the squared norm of the whole
    fine-tune. `gain` is the least, mean and greatest factor that DoRA's magnitudes put on the outputs (or on the
    inputs, where they run along those). `logit_growth` is the factor by which the data-free bound on the outputs of a
    query, key or value projection grows: a heuristic.
    """

    family: str
    rank: int
    norm: float
    relative_norm: float | None
    spectrum: tuple[float, ...]
    effective_rank: float
    stable_rank: float
    energy_left: float
    energy_right: float
    share: float
    left_intruders: int
    right_intruders: int
    gain: tuple[float, float, float] | None = None
    logit_growth: float | None = None
    missed: Missed | None = None


@dataclass(frozen=True)
class PairNumbers:
    """Two updates of one matrix. Overlaps are mean squared cosines of the principal angles between output and input
    spaces, of equal dimension `overlap_rank`: the rank of the lower-ranked update, at most the report's
    `max_overlap_rank`, in leading singular vectors. Over all matrices it is the largest, and overlaps are means."""

    a: str
    b: str
    cosine: float | None
    relative_distance: float | None  # ||a - b|| / ||a||
    output_overlap: float | None
    input_overlap: float | None
    overlap_rank: int | None = None


@dataclass(frozen=True)
class ComparedTarget:
    """One matrix of the base: `base_values` are its first top_k singular values, and the next one."""

    layer: str
    module: str
    shape: tuple[int, int]
    base_norm: float
    base_values: tuple[float, ...]
    updates: Mapping[str, UpdateNumbers]  # by the name of the fine-tune
    pairs: tuple[PairNumbers, ...]


@dataclass(frozen=True)
class OverlapMap:
    """Mean squared cosines between the spaces of `a` in one layer (row) and of `b` in another (column), up to rank 16.

    `side` is "output" or "input"; null where a layer has no such matrix, or one of another width.
    """

    a: str
    b: str
    module: str
    side: str
    layers: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class FineTune:
    """One of the things compared: an adapter, or a model that was tuned whole (`kind` "adapter" or "full").

    Means are over the matrices that it changes. `missed` sums up `Missed` over all of them: the norms of what is missed
    relative to the norm of the full fine-tune there. `untouched` is the share of the full fine-tune's squared norm in
    the matrices that it leaves alone.
    """

    path: str
    kind: str
    families: tuple[str, ...]
    targets: int
    rank_min: int
    rank_max: int
    norm: float
    relative_norm: float | None
    mean_effective_rank: float
    mean_stable_rank: float
    mean_energy_left: float
    mean_energy_right: float
    left_intruders: int
    right_intruders: int
    spectrum: tuple[float, ...]  # root mean square over the matrices, value by value
    layers: Mapping[str, float]  # share of the squared norm
    modules: Mapping[str, float]
    missed: Missed | None = None
    untouched: float | None = None


@dataclass(frozen=True)
class CompareReport:
    """`fine_tunes` by the names they go under, in the order given."""

    # Of rows(), in this order.
    columns: ClassVar[Mapping[str, Kind]] = {
        "target": "text",
        "fine_tune": "text",
        "layer": "text",
        "module": "text",
        "outputs": "integer",
        "inputs": "integer",
        "base_norm": "number",
        "family": "text",
        "rank": "integer",
        "norm": "number",
        "relative_norm": "number",
        "effective_rank": "number",
        "stable_rank": "number",
        "energy_left": "number",
        "energy_right": "number",
        "share": "number",
        "left_intruders": "integer",
        "right_intruders": "integer",
        "gain_least": "number",
        "gain_mean": "number",
        "gain_greatest": "number",
        "logit_growth": "number",
        "missed_of": "text",
        "missed_rank": "integer",
        "missed_error": "number",
        "missed_best_error": "number",
        "missed_space_error": "number",
        "spectrum": "numbers",
    }

    base: str
    top_k: int
    epsilon: float
    max_overlap_rank: int
    fine_tunes: Mapping[str, FineTune]
    targets: Mapping[str, ComparedTarget]
    pairs: tuple[PairNumbers, ...]  # over all matrices that both change
    overlap_maps: tuple[OverlapMap, ...]
    skipped: Mapping[str, str]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each update of each target, keyed as `columns`; None where there is no such number."""
        for name, target in self.targets.items():
            for fine_tune, update in target.updates.items():
                gain, missed = update.gain or (None, None, None), update.missed
                yield {
                    "target": name,
                    "fine_tune": fine_tune,
                    "layer": target.layer,
                    "module": target.module,
                    "outputs": target.shape[0],
                    "inputs": target.shape[1],
                    "base_norm": target.base_norm,
                    "family": update.family,
                    "rank": update.rank,
                    "norm": update.norm,
                    "relative_norm": update.relative_norm,
                    "effective_rank": update.effective_rank,
                    "stable_rank": update.stable_rank,
                    "energy_left": update.energy_left,
                    "energy_right": update.energy_right,
                    "share": update.share,
                    "left_intruders": update.left_intruders,
                    "right_intruders": update.right_intruders,
                    "gain_least": gain[0],
                    "gain_mean": gain[1],
                    "gain_greatest": gain[2],
                    "logit_growth": update.logit_growth,
                    "missed_of": missed.of if missed else None,
                    "missed_rank": missed.rank if missed else None,
                    "missed_error": missed.error if missed else None,
                    "missed_best_error": missed.best_error if missed else None,
                    "missed_space_error": missed.space_error if missed else None,
                    "spectrum": update.spectrum,
                }

    def to_frame(self) -> pd.DataFrame:
        """`rows` as a pandas frame; MissingExtraError without pandas."""
        from loratools.reports.frames import to_frame

        return to_frame(self)
