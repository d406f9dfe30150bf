"""What is done to every adapter of a hub: verbs of this project, one after the other."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.errors import InputError, UsageError
from loratools.hub.recipe_checks import check_step
from loratools.storage.atomic import printable

if TYPE_CHECKING:
    from loratools.adapter import Adapter
    from loratools.ops.quantize import Quantize
    from loratools.reports.squeeze import SqueezeReport

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Worked:
    """An adapter after a step: how it is to be packed at the end, what was lost so far, and what was said.

    `whole` is the relative error of all deltas against the source, where it is known without comparing the files: one
    step lost something, and told of every target. `rounded`: a step has other numbers stored than it was given.
    """

    adapter: Adapter
    packing: Quantize | None = None
    errors: tuple[tuple[str, float], ...] = ()  # verb, relative error against what it was given
    warnings: tuple[str, ...] = ()
    whole: float | None = None
    rounded: bool = False


@dataclass(frozen=True)
class Step:
    """One verb with its options."""

    verb: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.verb not in VERBS:
            raise UsageError(f"a step {self.verb!r} is not known; there are {', '.join(VERBS)}")
        known = inspect.signature(VERBS[self.verb]).parameters
        for name, value in self.options.items():
            if name not in known or name == "worked":
                there = ", ".join(n for n in known if n != "worked")
                raise UsageError(f"{self.verb} has no option {name!r} in a recipe; there are {there}")
            if isinstance(value, dict | list) or value is None:
                raise UsageError(f"{self.verb}: {name} is {value!r}; give a number, a word or a flag")
        check_step(self.verb, VERBS[self.verb], self.options)


@dataclass(frozen=True)
class Recipe:
    """The steps; UsageError for none. `quantize` goes last, for it says how the file is written."""

    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        if not self.steps:
            raise UsageError("the recipe has no steps; give --step, or a file with [[step]] tables")
        if sum(step.verb == "quantize" for step in self.steps) > 1:
            raise UsageError("the recipe quantises twice; once is enough")

    @property
    def digest(self) -> str:
        """The SHA-256 of the steps: results of equal recipes are equal."""
        steps = [[step.verb, dict(step.options)] for step in self.steps]
        return hashlib.sha256(json.dumps(steps, sort_keys=True).encode()).hexdigest()

    def spelt(self) -> list[str]:
        """Every step as `--step` takes it."""
        return [" ".join([s.verb, *(f"{k}={_text(v)}" for k, v in s.options.items())]) for s in self.steps]

    def run(self, adapter: Adapter) -> Worked:
        """The adapter after all steps, in memory."""
        worked = Worked(adapter)
        for step in self.steps:
            worked = VERBS[step.verb](worked, **step.options)
        return worked


def parse_steps(texts: Sequence[str]) -> Recipe:
    """From texts such as `squeeze rank=8`; UsageError for what is no verb with NAME=VALUE pairs."""
    steps = []
    for text in texts:
        verb, *pairs = text.split() or [""]
        options = {}
        for pair in pairs:
            name, equals, value = pair.partition("=")
            if not equals:
                raise UsageError(f"--step {text!r}: write options as NAME=VALUE, such as rank=8")
            options[name.replace("-", "_")] = _value(value)
        steps.append(Step(verb, options))
    return Recipe(tuple(steps))


def read_recipe(path: Path) -> Recipe:
    """From a TOML file with a table [[step]] for each step: `verb`, and its options. InputError for anything else."""
    try:
        whole = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{printable(path)}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{printable(path)}: is no TOML: {error}") from error
    steps = whole.get("step")
    if set(whole) - {"step"} or not isinstance(steps, list) or not all(isinstance(s, dict) for s in steps):
        raise InputError(f"{printable(path)}: holds something else than [[step]] tables")
    made = []
    for table in steps:
        options = {name.replace("-", "_"): value for name, value in table.items() if name != "verb"}
        try:
            made.append(Step(str(table.get("verb", "")), options))
        except UsageError as error:
            raise InputError(f"{printable(path)}: {error}") from error
    return Recipe(tuple(made))


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _squeeze(
    worked: Worked,
    rank: int | None = None,
    energy: float | None = None,
    budget: str | None = None,
    ratio: float | None = None,
    threshold: float | None = None,
    elbow: bool = False,
    max_rank: int | None = None,
    min_rank: int = 1,
    multiple_of: int = 1,
    uniform: bool = False,
    allow_nonfinite: bool = False,
) -> Worked:
    from loratools.ops.squeeze import Squeeze, squeeze
    from loratools.rank_choice import RankChoice
    from loratools.ranks import Limits

    size = None if budget is None else str(budget)
    choice = RankChoice(rank, energy, size, ratio, threshold, elbow)
    policy = choice.policy(worked.adapter.file_nbytes)
    limits = Limits(min_rank, max_rank, multiple_of, uniform)
    how = Squeeze(allow_unchanged=True, allow_nonfinite=allow_nonfinite)
    made, report = squeeze(worked.adapter, policy, limits=limits, options=how)
    return _lowered(worked, made, "squeeze", report)


def _truncate(worked: Worked, rank: int, nested: str = "keep", scaling: str | None = None) -> Worked:
    from loratools.ops.truncate import truncate

    made, report = truncate(worked.adapter, rank, nested=nested, scaling=scaling, allow_unchanged=True)  # type: ignore[arg-type]
    return _lowered(worked, made, "truncate", report)


def _convert(
    worked: Worked,
    to: str,
    exact: bool = False,
    rank: int | None = None,
    energy: float | None = None,
    portable: bool = False,
    fold_alpha: bool = False,
    dtype: str | None = None,
    drop: str = "",
) -> Worked:
    from loratools.ops.convert import Convert, convert
    from loratools.ops.lowering import Lowering

    kinds = frozenset(kind for kind in drop.split(",") if kind)
    how = Convert(Lowering(exact, rank, energy), portable, fold_alpha, drop=kinds, dtype=dtype)  # type: ignore[arg-type]
    made, report = convert(worked.adapter, to, how)
    error = max((t.relative_error for t in report.targets.values() if t.relative_error is not None), default=None)
    after = _after(worked, made, "convert", error, report.warnings)
    return after if dtype is None else replace(after, rounded=True)


def _reparameterize(
    worked: Worked,
    to: str,
    budget: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
    accept_loss: bool = False,
    options: str = "",
) -> Worked:
    from loratools.ops.reparameterize import Reparameterize, reparameterize
    from loratools.sizes import parse_size

    chosen = dict(pair.split(":", 1) for pair in options.split(",") if ":" in pair)
    size = None if budget is None else parse_size(str(budget))
    how = Reparameterize(chosen, size, None, dtype, seed, accept_loss)
    made, report = reparameterize(worked.adapter, to, how)
    return _after(worked, made, "reparameterize", report.total["relative_error"], report.warnings)


def _quantize(
    worked: Worked,
    bits: float | None = None,
    budget: str | None = None,
    ratio: float | None = None,
    method: str = "grid",
    group: int = 64,
    rounds: int = 1,
) -> Worked:
    from loratools.ops.quantize import Quantize
    from loratools.rank_choice import RankChoice

    size = None
    if bits is None:
        choice = RankChoice(budget=None if budget is None else str(budget), ratio=ratio)
        size = choice.bytes(worked.adapter.file_nbytes)
    return replace(
        worked,
        packing=Quantize(method, 4 if bits is None else bits, size, group, rounds=rounds),  # type: ignore[arg-type]
    )


def _lowered(worked: Worked, made: Adapter, verb: str, report: SqueezeReport) -> Worked:
    whole = not report.unchanged and not any(entry.needs_base for entry in made.entries.values())
    return _after(worked, made, verb, report.total["relative_error"], report.warnings, whole=whole)


def _after(
    worked: Worked, made: Adapter, verb: str, error: Any, warnings: Sequence[str], *, whole: bool = False
) -> Worked:
    new = tuple(text for text in warnings if text not in worked.warnings)
    after = replace(worked, adapter=made, warnings=(*worked.warnings, *new))
    if error is None:
        return after
    first = whole and not worked.errors
    return replace(after, errors=(*worked.errors, (verb, float(error))), whole=float(error) if first else None)


VERBS: Mapping[str, Callable[..., Worked]] = {
    "squeeze": _squeeze,
    "truncate": _truncate,
    "convert": _convert,
    "reparameterize": _reparameterize,
    "quantize": _quantize,
}
