"""Adapters on a task: measures with intervals, at the ranks they can be cut to, and against each other."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from loratools.bootstrap import Sampled, bootstrap
from loratools.calibration import (
    Binned,
    binned,
    log_probabilities,
    measures_of_choices,
    measures_of_confidence,
    nll,
    scaled,
    top_label,
)
from loratools.errors import UsageError
from loratools.ops.aurac import aurac
from loratools.reports.evaluate import Aurac, Bin, Estimate, EvalReport, EvalRun, FittedTemperature
from loratools.storage.atomic import printable
from loratools.training.choices import (
    ChoiceRow,
    Normalise,
    choice_scores,
    n_choice_batches,
    read_choices,
    shared_classes,
)
from loratools.training.cost import Cost, Machine, if_known, n_tokens, n_weights
from loratools.training.evaluate import (
    FORM,
    Evaluate,
    Row,
    Step,
    answer_losses,
    evaluating,
    n_steps,
    read_rows,
    replies,
)
from loratools.training.lines import read_json, read_lines

if TYPE_CHECKING:
    from loratools.adapter import Adapter

Metric = Literal["exact", "nll", "choice"]
Fit = Literal["crossfit", "split", "none"]

_FEW = 30  # rows, below which intervals say little
_SHARES = ("accuracy", "exact_match")  # given in % where ranks are averaged over


@dataclass(frozen=True)
class Measuring:
    """What is measured beside the score itself, and how often rows are drawn for the intervals.

    `bins` and `min_count` are of calibration errors; `threshold` is TACE's. `temperature`: how one is fitted and
    judged, for choices; `folds` of a crossfit.
    """

    calibration: bool = False
    bins: int = 15
    min_count: int = 1
    threshold: float = 0.01
    temperature: Fit = "crossfit"
    folds: int = 5
    normalise: Normalise = "none"
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("bins", 1), ("min_count", 1), ("folds", 2), ("resamples", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not 0 < self.threshold < 1:
            raise UsageError(f"threshold must lie between 0 and 1, not {self.threshold:g}")


@dataclass(frozen=True)
class Task:
    """Rows, and what is asked of a model about them: `answers` for exact and nll, `choices` for choice."""

    metric: Metric
    answers: Sequence[Row] = ()
    choices: Sequence[ChoiceRow] = ()

    @property
    def n_rows(self) -> int:
        """How many rows there are."""
        return len(self.answers) + len(self.choices)

    def check(self, measuring: Measuring) -> None:
        """UsageError for what cannot be measured of these rows."""
        if self.metric == "nll" and measuring.calibration:
            raise UsageError(
                "the likelihood of given answers has no right and wrong; --calibration needs exact or choice"
            )

    def n_batches(self, tokenizer: Any, options: Evaluate) -> int:
        """How often one run calls its step."""
        if self.choices:
            return n_choice_batches(self.choices, options)
        return n_steps(tokenizer, self.answers, self.fitting(options))

    @if_known
    def cost(self, base: str | os.PathLike[str], runs: int, options: Evaluate) -> Cost:
        """What so many runs with that base will take; None where it is not here."""
        weights, machine = n_weights(base), Machine(options.device)
        read = sum(n_tokens(row.prompt, row.answer) for row in self.answers)
        read += sum(n_tokens(row.prompt, choice) for row in self.choices for choice in row.choices)
        said = sum(n_tokens(row.answer) for row in self.answers) if self.fitting(options).match else 0.0
        seconds = machine.reading(weights, read) + machine.saying(weights, said, options.batch)
        tokens = options.batch * read / max(self.n_rows, 1)
        return Cost(machine.memory(weights, weights, round(tokens)), runs * seconds)

    def fitting(self, options: Evaluate) -> Evaluate:
        """The options with answers of the model's own where they are asked for, and only there."""
        return replace(options, match=self.metric == "exact")


@dataclass(frozen=True)
class Candidate:
    """A model to be run: the base with what `make` gives, or alone where that is None."""

    name: str
    make: Callable[[], Adapter | None]
    rank: int | None = None


def read_task(path: str | os.PathLike[str], metric: Metric | None = None, limit: int | None = None) -> Task:
    """The first `limit` rows of a file; without a metric it is choice where the first row has choices, else exact.

    InputError names lines that do not fit.
    """
    if metric is None and Path(path).is_fifo():
        raise UsageError(f"{printable(Path(path))}: a pipe is read once; say what its rows are for with --metric")
    if metric is None:
        first = read_lines(path, 1, lambda line, where: read_json(line, where, FORM), what="rows", form=FORM)
        metric = "choice" if isinstance(first[0], Mapping) and "choices" in first[0] else "exact"
    if metric == "choice":
        return Task(metric, choices=read_choices(path, limit))
    rows = read_rows(path, limit)
    return Task("exact" if metric == "exact" and any(row.prompt for row in rows) else "nll", answers=rows)


def run_task(
    model: Any,
    tokenizer: Any,
    task: Task,
    candidates: Iterable[Candidate],
    *,
    options: Evaluate = Evaluate(),
    measuring: Measuring = Measuring(),
    step: Step | None = None,
) -> EvalReport:
    """Run `model` with each candidate in turn on the rows of `task`; differences are to the first of them.

    Deterministic. `step` is called after each batch, with its tokens. AURAC is there where candidates state ranks.
    Raises AdapterError where an adapter does not fit the model.
    """
    task.check(measuring)
    options = task.fitting(options)
    warnings: list[str] = []
    if task.n_rows < _FEW:
        warnings.append(f"{task.n_rows} rows are few: the intervals are rough")
    if task.choices and measuring.calibration and shared_classes(task.choices) is None:
        warnings.append(
            "rows have choices of their own: classwise_ece and ace_class, which are of classes, are left out"
        )
    runs: list[EvalRun] = []
    sampled: list[_Sampled] = []
    tokens = 0
    for candidate in candidates:
        with evaluating(model, candidate.make()):
            found = _scored(model, tokenizer, task, options, measuring, step)
        tokens = found.n_tokens
        drawn = found.sampled(measuring)
        runs.append(_run(candidate, drawn, sampled[0] if sampled else None))
        sampled.append(drawn)
    if not runs:
        raise UsageError("there is nothing to evaluate; name an adapter, or none for the base alone")
    if any(run.temperature is not None and run.temperature.at_limit for run in runs):
        warnings.append(
            "a temperature lies at the end of its range: the rows it was fitted on are all right, or right by chance"
        )
    ranked = [(run.rank, drawn) for run, drawn in zip(runs, sampled, strict=True) if run.rank is not None]
    return EvalReport(
        task.metric,
        task.n_rows,
        tokens,
        tuple(runs),
        measuring.resamples,
        measuring.seed,
        options.device,
        str(next(model.parameters()).dtype).removeprefix("torch."),
        normalise=measuring.normalise if task.choices else None,
        aurac=_aurac(ranked) if ranked else None,
        warnings=tuple(warnings),
    )


@dataclass(frozen=True, eq=False)
class _Sampled:
    """The measures of one run on every draw."""

    measures: Mapping[str, Sampled]
    bins: Binned | None = None
    scaled: Mapping[str, Sampled] = field(default_factory=dict)
    temperature: FittedTemperature | None = None


@dataclass(frozen=True, eq=False)
class _Answers:
    """Of each row the loss of its answer; where the model was asked, whether it answers that, and how sure it was."""

    nll: NDArray[np.float64]
    tokens: NDArray[np.int64]
    asked: NDArray[np.bool_]
    exact: NDArray[np.float64]
    confidence: NDArray[np.float64]

    @property
    def n_tokens(self) -> int:
        return int(self.tokens.sum())

    def sampled(self, how: Measuring) -> _Sampled:
        def measure(rows: NDArray[np.int64]) -> dict[str, float]:
            asked = rows[self.asked[rows]]
            found = {}
            with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
                if self.asked.any():
                    found["exact_match"] = float(self.exact[asked].sum() / np.float64(len(asked)))
                found["nll"] = float(self.nll[rows].sum() / np.float64(self.tokens[rows].sum()))
                found["perplexity"] = float(np.exp(found["nll"]))
                if how.calibration:
                    several = measures_of_confidence(
                        self.confidence[asked], self.exact[asked], bins=how.bins, min_count=how.min_count
                    )
                    found |= several
            return found

        drawn = bootstrap(measure, len(self.nll), resamples=how.resamples, seed=how.seed)
        bins = binned(self.confidence[self.asked], self.exact[self.asked], how.bins) if how.calibration else None
        return _Sampled(drawn, bins)


@dataclass(frozen=True, eq=False)
class _Choices:
    """Scores of the choices of each row, and which is right."""

    scores: NDArray[np.float64]
    labels: NDArray[np.int64]
    n_tokens: int
    same_classes: bool

    def sampled(self, how: Measuring) -> _Sampled:
        log_p = log_probabilities(self.scores)
        drawn = self._drawn(log_p, self.labels, how)
        if not how.calibration:
            return _Sampled(drawn)
        bins = binned(*top_label(np.exp(log_p), self.labels), how.bins)
        if how.temperature == "none":
            return _Sampled(drawn, bins)
        folds = how.folds if how.temperature == "crossfit" else 1
        fitted = scaled(self.scores, self.labels, folds=folds, seed=how.seed)
        found = FittedTemperature(
            how.temperature,
            tuple(t.value for t in fitted.temperatures),
            len(fitted.rows),
            any(t.at_limit for t in fitted.temperatures),
        )
        return _Sampled(drawn, bins, self._drawn(fitted.log_p, self.labels[fitted.rows], how), found)

    def _drawn(self, log_p: NDArray[np.float64], labels: NDArray[np.int64], how: Measuring) -> dict[str, Sampled]:
        right = (log_p.argmax(axis=1) == labels).astype(np.float64)

        def measure(rows: NDArray[np.int64]) -> dict[str, float]:
            found = {"accuracy": float(right[rows].mean()), "nll": nll(log_p[rows], labels[rows])}
            if how.calibration:
                found |= measures_of_choices(
                    log_p[rows],
                    labels[rows],
                    bins=how.bins,
                    min_count=how.min_count,
                    threshold=how.threshold,
                    same_classes=self.same_classes,
                )
            return found

        return bootstrap(measure, len(labels), resamples=how.resamples, seed=how.seed)


def _scored(
    model: Any, tokenizer: Any, task: Task, options: Evaluate, how: Measuring, step: Step | None
) -> _Answers | _Choices:
    if task.choices:
        scores, tokens = choice_scores(
            model, tokenizer, task.choices, options=options, normalise=how.normalise, step=step
        )
        labels = np.array([row.answer for row in task.choices])
        return _Choices(scores, labels, tokens, shared_classes(task.choices) is not None)
    rows = task.answers
    losses = answer_losses(model, tokenizer, rows, options=options, step=step)
    if not any(loss.tokens for loss in losses):
        raise UsageError("the answers have no token that could be foretold; give prompts, or longer answers")
    said = replies(model, tokenizer, rows, options=options, step=step) if options.match else [None] * len(rows)
    return _Answers(
        np.array([loss.nll for loss in losses]),
        np.array([loss.tokens for loss in losses]),
        np.array([reply is not None for reply in said]),
        np.array([reply is not None and reply.exact for reply in said], dtype=np.float64),
        np.array([math.nan if reply is None else reply.confidence for reply in said]),
    )


def _run(candidate: Candidate, drawn: _Sampled, first: _Sampled | None) -> EvalRun:
    return EvalRun(
        candidate.name,
        candidate.rank,
        {name: _estimate(s) for name, s in drawn.measures.items()},
        {} if first is None else {name: _estimate(s - first.measures[name]) for name, s in drawn.measures.items()},
        {name: _estimate(s) for name, s in drawn.scaled.items()},
        {} if first is None else {name: _estimate(s - first.scaled[name]) for name, s in drawn.scaled.items()},
        drawn.temperature,
        () if drawn.bins is None else _bins(drawn.bins),
    )


def _estimate(sampled: Sampled) -> Estimate:
    return Estimate(sampled.value, *sampled.interval)


def _bins(found: Binned) -> tuple[Bin, ...]:
    n = len(found.counts)
    return tuple(
        Bin(
            i / n,
            (i + 1) / n,
            int(count),
            float(found.confidence[i]) if count else None,
            float(found.accuracy[i]) if count else None,
        )
        for i, count in enumerate(found.counts)
    )


def _aurac(ranked: Sequence[tuple[int, _Sampled]]) -> Aurac:
    """Over the ranks, of the share of right answers where there is one, else of the NLL."""
    measure = next((name for name in _SHARES if name in ranked[0][1].measures), "nll")
    unit = 100.0 if measure in _SHARES else 1.0
    ranks = [rank for rank, _ in ranked]
    curves = [drawn.measures[measure] for _, drawn in ranked]

    def area(axis: Literal["linear", "log2"]) -> Estimate:
        whole = aurac(ranks, [unit * curve.value for curve in curves], axis)
        draws = np.stack([curve.draws for curve in curves], axis=1)
        # a draw may hold no row with a prompt, and then has no score
        each = [aurac(ranks, unit * d, axis) if np.isfinite(d).all() else math.nan for d in draws]
        return _estimate(Sampled(whole, np.array(each)))

    return Aurac(measure, area("linear"), area("log2"))
