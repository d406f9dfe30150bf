"""How an adapter was moved to another base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from loratools.reports.evaluate import Evaluation

if TYPE_CHECKING:
    import pandas as pd

    from loratools.reports.frames import Kind


Five: TypeAlias = tuple[float, float, float, float, float]  # the least, the quartiles, the greatest


@dataclass(frozen=True)
class Diversity:
    """How different some inputs are, without what all have in common.

    `distinct_n` is the share of runs of n words that differ; it falls with the number of inputs, so `distinct_2_few` is
    the mean over groups of as many as there are seeds, None without seeds. `characters` and `words` are lengths.
    """

    inputs: int
    distinct_1: float | None
    distinct_2: float | None
    distinct_3: float | None
    distinct_2_few: float | None
    characters: Five
    words: Five


@dataclass(frozen=True)
class Synthesis:
    """The inputs that were made up.

    `inputs` is "few-shot" where seeds were shown, "self-prompted" where the source with its adapter was only told to
    begin. `duplicate` are equal to an earlier one, `similar` nearly so;
    `improbable` are those that the discriminator took for made up; `acceptance` is the share of all generated that were
    kept. `distinct_n` is the share of runs of n words that differ; `discrepancy` the squared maximum mean discrepancy
    of inputs and seeds. `discriminator_loss` is its cross-validated loss in nats: at log 2 = 0.69 it could not tell the
    two apart, and lets everything pass. `least`: the probability that passes, where one does. `diversity`: of "seeds",
    of all "generated" that are whole, and of those "kept".
    """

    inputs: str
    seeds: int
    generated: int
    kept: int
    empty: int
    unfinished: int
    duplicate: int
    similar: int
    improbable: int
    acceptance: float
    distinct_1: float | None
    distinct_2: float | None
    distinct_3: float | None
    discrepancy: float | None
    discriminator: str
    discriminator_loss: float | None
    least: float | None = None
    diversity: Mapping[str, Diversity] = field(default_factory=dict)


@dataclass(frozen=True)
class KitReport:
    """What --prepare-only saved: a discriminator, its cross-validated loss, and of how many inputs it was made."""

    real: int
    made_up: int
    loss: float
    seeds: int
    output: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Labelling:
    """The teacher's answers: how many were used, were empty or did not end, and how sure it was of them on average."""

    used: int
    empty: int
    unfinished: int
    confidence: float


@dataclass(frozen=True)
class Agreed:
    """A look at held-out rows, after so many steps: shares of answers and of their tokens, and the NLL of a token."""

    step: int
    answers: float
    tokens: float
    nll: float


@dataclass(frozen=True)
class Distillation:
    """The training: `losses` of every step, `looks` at the held-out rows, and the step whose state was kept."""

    rows: int
    held_out: int
    steps: int
    best_step: int
    stopped_early: bool
    tokens: int
    losses: tuple[float, ...]
    looks: tuple[Agreed, ...]


@dataclass(frozen=True)
class WarmStart:
    """What training began with: how it was aligned, its targets, those of the old adapter that it has nothing of, and
    the relative error of squeezing it to the new adapter's rank."""

    align: str
    targets: int
    dropped: int
    squeezed: float


@dataclass(frozen=True)
class StageTime:
    """What a stage took; a stage that an earlier run did keeps that run's figures."""

    stage: str
    seconds: float
    tokens: int | None


@dataclass(frozen=True)
class Sample:
    """A made-up input with its label."""

    prompt: str
    answer: str
    confidence: float | None


@dataclass(frozen=True)
class Moved:
    """What was moved: the families and ranks of the old adapter, and the kinds of model of its base and of the new one.

    A kind is None where no config states it.
    """

    families: tuple[str, ...]
    ranks: tuple[int, ...]
    source_type: str | None
    target_type: str | None


@dataclass(frozen=True)
class TransferReport:
    """The whole run.

    `agreement` and `agreement_before` are of the transferred adapter and of what training began with, the target alone
    unless there was a warm start, with the teacher, on held-out inputs; None where no rows were held out. `evaluations`
    are of the rows of --eval, by model. `squeezed` is the relative error of the deltas where they were squeezed
    afterwards.
    """

    columns: ClassVar[Mapping[str, Kind]] = {
        "stage": "text",
        "seconds": "number",
        "tokens": "integer",
        "tokens_per_second": "number",
    }

    adapter: str
    source: str
    target: str
    generator: str
    method: str
    rank: int
    synthesis: Synthesis
    labelling: Labelling
    distillation: Distillation
    agreement: float | None
    agreement_before: float | None
    evaluations: Mapping[str, Evaluation]
    squeezed: float | None
    stages: tuple[StageTime, ...]
    samples: tuple[Sample, ...]
    settings: Mapping[str, Any]
    work: str
    output: str
    bytes: int
    moved: Moved
    warnings: tuple[str, ...] = field(default=())
    warm_start: WarmStart | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each stage, with the keys of `columns`."""
        for stage in self.stages:
            rate = stage.tokens / stage.seconds if stage.tokens and stage.seconds else None
            yield {**asdict(stage), "tokens_per_second": rate}

    def to_frame(self) -> pd.DataFrame:
        """`rows` as a pandas frame; MissingExtraError without pandas."""
        from loratools.reports.frames import to_frame

        return to_frame(self)
