"""How well models do a task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import pandas as pd

    from loratools.reports.frames import Kind


@dataclass(frozen=True)
class Evaluation:
    """Of rows of prompts and answers.

    `nll`: the mean negative log-likelihood, in nats, of a token of an answer, the end token behind it included;
    `exact_match`: the share of the prompts to which the greedy answer is the row's, None where no row has a prompt.
    """

    nll: float
    exact_match: float | None
    rows: int
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Estimate:
    """A value, and the middle 95 % of what it is on rows drawn again with replacement."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Bin:
    """Predictions of a confidence above `low`, up to `high`: how many, how sure, and the share that was right.

    The last two are None where there are none.
    """

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class FittedTemperature:
    """Temperatures of least NLL, each fitted on other rows than the `rows` it was judged on.

    `how`: "crossfit", each part of the rows at the temperature of all others, or "split", a half at that of the other.
    `at_limit`: whether one lies at the end of the range that was searched, 0.01 to 100.
    """

    how: str
    values: tuple[float, ...]
    rows: int
    at_limit: bool


@dataclass(frozen=True)
class EvalRun:
    """One model: the base with an adapter, or alone (`name` "none"); `rank`: that to which the adapter was cut.

    `measures` are of all rows, `scaled` of the rows that `temperature` was judged on, at it. `differences` and
    `scaled_differences` are to the first run, on the same draws of the rows. `bins` are those of the ECE.
    """

    name: str
    rank: int | None
    measures: Mapping[str, Estimate]
    differences: Mapping[str, Estimate] = field(default_factory=dict)
    scaled: Mapping[str, Estimate] = field(default_factory=dict)
    scaled_differences: Mapping[str, Estimate] = field(default_factory=dict)
    temperature: FittedTemperature | None = None
    bins: tuple[Bin, ...] = ()


@dataclass(frozen=True)
class Aurac:
    """The area under the curve of `measure`, in % where it is a share: v1 over the rank, v2 over its log2."""

    measure: str
    v1: Estimate
    v2: Estimate


@dataclass(frozen=True)
class EvalReport:
    """How each run did with the same rows.

    `metric` is exact, nll or choice; `tokens` are those of the answers or choices; `cut`, where an adapter was cut to
    ranks, is "svd" or how a slice was scaled. `normalise`: what the log-likelihood of a choice was divided by.
    """

    columns: ClassVar[Mapping[str, Kind]] = {
        "run": "text",
        "rank": "integer",
        "measure": "text",
        "scaled": "flag",
        "value": "number",
        "low": "number",
        "high": "number",
        "difference": "number",
        "difference_low": "number",
        "difference_high": "number",
    }

    metric: str
    rows_read: int
    tokens: int
    runs: tuple[EvalRun, ...]
    resamples: int
    seed: int
    device: str
    dtype: str
    normalise: str | None = None
    cut: str | None = None
    aurac: Aurac | None = None
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each measure of each run, with the keys of `columns`."""
        for run in self.runs:
            for scaled, found, differences in (
                (False, run.measures, run.differences),
                (True, run.scaled, run.scaled_differences),
            ):
                for name, estimate in found.items():
                    other = differences.get(name)
                    yield {
                        "run": run.name,
                        "rank": run.rank,
                        "measure": name,
                        "scaled": scaled,
                        **asdict(estimate),
                        "difference": None if other is None else other.value,
                        "difference_low": None if other is None else other.low,
                        "difference_high": None if other is None else other.high,
                    }

    def to_frame(self) -> pd.DataFrame:
        """`rows` as a pandas frame; MissingExtraError without pandas."""
        from loratools.reports.frames import to_frame

        return to_frame(self)
