"""How small an adapter can be made at which loss, by every method: rate-distortion curves of one adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

from loratools.adapter import Adapter
from loratools.errors import AdapterError, UsageError
from loratools.ops.convert import Convert, convert
from loratools.ops.extract import Differences, extract
from loratools.ops.lowering import Lowering
from loratools.ops.measuring import Made, Recipe, Setting, Source, marked, measure_all
from loratools.ops.quantize import Quantize, quantize
from loratools.ops.squeeze import Squeeze, squeeze
from loratools.ops.whole import whole
from loratools.ranks import Budget
from loratools.reports.pareto import ParetoReport, Point

if TYPE_CHECKING:
    from loratools.ops.statistics import Statistics
    from loratools.reports.evaluate import Evaluation

METHODS = ("grid", "svd", "balanced", "rtn", "lloyd", "nf", "petl", "sign", "bitdelta", "loraquant", "delta-come")
RATIOS = (2, 4, 8, 16, 32, 64)
STATISTICS = "stats.safetensors"  # as commands name them
_RANKS = (1, 2, 4, 8)  # by which the rank is divided before numbers are rounded
_BITS: dict[str, tuple[float, ...]] = {
    "balanced": (1, 2, 3, 4, 8),
    "rtn": (2, 3, 4, 8),
    "lloyd": (1, 2, 3, 4),
    "nf": (3, 4),
    "petl": (1, 2, 3, 4),
    "sign": (1,),
    "bitdelta": (1,),
    "loraquant": (2, 3),
    "delta-come": (0.5, 1, 1.5, 2),
}
_FACTORS_ONLY = ("balanced", "loraquant", "delta-come")  # of dense deltas they would be plain rounding
_DENSE_ONLY = ("bitdelta",)

Evaluate = Callable[[Adapter | None], "Evaluation"]


@final
@dataclass(frozen=True)
class Codes(Recipe):
    """Codes of the adapter, or of what the best squeeze to `rank` makes of it."""

    options: Quantize
    rank: int | None = None

    def make(self, source: Source) -> Made:
        made, report = quantize(source.at_rank(self.rank), self.options)
        return Made(made, int(report.total["bytes_after"] or 0))


@final
@dataclass(frozen=True)
class Squeezed(Recipe):
    """The best lower ranks in so many bytes."""

    budget: int
    weights: Statistics | None = None

    def make(self, source: Source) -> Made:
        made, _ = squeeze(source.adapter, Budget(self.budget), options=Squeeze(weights=self.weights))
        return Made.ordinary(made)


@final
@dataclass(frozen=True)
class Extracted(Recipe):
    """The best low-rank approximation of what tuning changed, its tensors in so many bytes."""

    budget: int

    def make(self, source: Source) -> Made:
        assert source.differences is not None  # such settings are made for those alone
        return Made.ordinary(extract(source.differences, Budget(self.budget))[0])


@final
@dataclass(frozen=True)
class Lowered(Recipe):
    """The best approximation of every target at one rank, whatever its family, as a LoRA in PEFT's dialect."""

    rank: int

    def make(self, source: Source) -> Made:
        return Made.ordinary(convert(source.adapter, "peft", Convert(lowering=Lowering(rank=self.rank)))[0])


def pareto(
    adapter: Adapter | Differences,
    methods: Sequence[str] = METHODS,
    *,
    ratios: Sequence[float] = RATIOS,
    weights: Statistics | None = None,
    evaluate: Evaluate | None = None,
    steps: Callable[[int, str], Callable[[], None]] | None = None,
) -> ParetoReport:
    """Every method at every setting: bytes of the file that it would write, and the error of the whole delta.

    `grid` and `svd` (the squeeze) are asked for the adapter's size divided by each of `ratios`; the others round at
    their widths, after squeezes to the rank and to a half, a quarter and an eighth of it. `Differences` of a model that
    was tuned whole are measured as `whole` holds them. What cannot be done with this adapter is left out, with a
    warning. With `weights`, grid and squeeze are there once more by what they know, all points have the error that
    inputs see (linalg/input_norm.py), and that is the error by which the best are chosen. `evaluate` is called for the
    base alone (None), the adapter, and the best points, which are made again for it. `steps(total, what)` may count.
    Raises UsageError for an unknown method, AdapterError where nothing can be measured.
    """
    if unknown := [m for m in methods if m not in METHODS]:
        raise UsageError(f"no method {unknown[0]!r}; there are {', '.join(METHODS)}")
    if isinstance(adapter, Differences):
        source = Source.held(whole(adapter), weights, adapter)
    else:
        adapter.require_weights()
        source = Source.held(adapter, weights)
    settings = list(_settings(source, methods, ratios))
    step = steps(len(settings), "points") if steps else lambda: None
    measured = measure_all(source, settings, step=step)
    failed = measured.failed | {m: reason for m in methods if (reason := _inapplicable(source, m))}
    if not measured.found:
        raise AdapterError(f"nothing could be measured: {next(iter(failed.values()), 'no setting applies')}")
    points = marked([point for _, point in measured.found])
    evaluated: dict[str, Evaluation] = {}
    if evaluate is not None:
        recipes = {setting.command: setting.recipe for setting, _ in measured.found}
        points, evaluated = _evaluated(source, points, recipes, evaluate, steps)
    there = {setting.method for setting, _ in measured.found}
    warnings = tuple(
        f"{method} was left out{' at some settings' if method in there else ''}: {reason}"
        for method, reason in failed.items()
    )
    if isinstance(adapter, Differences) and adapter.left_out:
        count, first = len(adapter.left_out), next(iter(adapter.left_out))
        warnings += (f"{count} changed parameters are no matrices and in none of the files; first: {first}",)
    return ParetoReport(source.bytes, points, (*source.adapter.warnings, *warnings), evaluated)


def _evaluated(
    source: Source,
    points: Sequence[Point],
    recipes: Mapping[str, Recipe],
    evaluate: Evaluate,
    steps: Callable[[int, str], Callable[[], None]] | None,
) -> tuple[tuple[Point, ...], dict[str, Evaluation]]:
    """The points, the best of them with what the task says of them, and the same of the base and of the adapter."""
    step = steps(2 + sum(p.best for p in points), "evaluations") if steps else lambda: None

    def of(adapter: Adapter | None) -> Evaluation:
        found = evaluate(adapter)
        step()
        return found

    evaluated = {"base": of(None), "adapter": of(source.adapter)}
    out = []
    for point in points:
        if point.best:
            found = of(recipes[point.command].make(source).adapter)
            point = replace(point, nll=found.nll, exact_match=found.exact_match)
        out.append(point)
    return tuple(out), evaluated


def _settings(source: Source, methods: Sequence[str], ratios: Sequence[float]) -> Iterator[Setting]:
    for method in methods:
        if _inapplicable(source, method):
            continue
        if method in ("grid", "svd"):
            for ratio in ratios:
                yield _sized(source, method, ratio, None)
            for ratio in ratios if source.weights is not None and source.top else ():
                yield _sized(source, method, ratio, source.weights)
        else:
            yield from _rounded(source, method)


def _inapplicable(source: Source, method: str) -> str | None:
    """Why a method has nothing to do with such an adapter."""
    dense = any(entry.family.family == "full" for entry in source.adapter.entries.values())
    if method in _FACTORS_ONLY and not source.top:
        return "there are no factors, and it would be plain rounding"
    return "it is for full deltas, and there are none" if method in _DENSE_ONLY and not dense else None


def _sized(source: Source, method: str, ratio: float, weights: Statistics | None) -> Setting:
    """Grid or SVD at the adapter's size divided by `ratio`."""
    size = int(source.bytes / ratio)
    name, option = (method, "") if weights is None else (f"{method}, weighted", f" --weights {STATISTICS}")
    label = f"1/{ratio:g}"
    if method == "grid":
        command = f"{_begun(source)}loratools quantize {_input(source)} --ratio {ratio:g}{option}"
        return Setting(name, label, command, Codes(Quantize(budget=size, weights=weights)))
    if source.differences is not None:
        tensors = int(source.differences.adapter.nbytes / ratio)
        return Setting(name, label, f"loratools extract BASE TUNED --ratio {ratio:g} -o OUT", Extracted(tensors))
    if source.top:
        return Setting(name, label, f"loratools squeeze IN --ratio {ratio:g}{option}", Squeezed(size, weights))
    rank = _rank_within(source.adapter, size)
    return Setting(name, label, f"loratools convert IN --to peft --rank {rank}", Lowered(rank))


def _rank_within(adapter: Adapter, size: int) -> int:
    """The rank at which factors of all targets take at most `size` bytes; at least 1."""
    per_rank = 0.0
    for entry in adapter.entries.values():
        if entry.base_shape is not None and len(entry.base_shape) > 1:
            rows, columns = entry.base_shape[0], math.prod(entry.base_shape[1:])
            per_rank += (rows + columns) * entry.nbytes / (rows * columns)
    return max(1, int(size / per_rank)) if per_rank else 1


def _rounded(source: Source, method: str) -> Iterator[Setting]:
    """Codes at every width, after squeezes to several ranks where there are ranks."""
    top = source.top
    whole_rank = method in ("delta-come", "bitdelta")  # the one chooses its ranks, the other has none
    lower = [max(1, top // by) for by in _RANKS if by > 1] if top and not whole_rank else []
    for rank in (None, *dict.fromkeys(r for r in lower if r < top)):
        for bits in _BITS[method]:
            command = f"loratools quantize {_input(source)} --method {method} --bits {bits:g}"
            options = Quantize(method, bits)  # type: ignore[arg-type]
            if method == "bitdelta":
                command = f"loratools quantize {_input(source)} --method sign --bits 1 --scales tensor"
                options = Quantize("sign", 1, scales="tensor")
            label, recipe = f"{bits:g} bits", Codes(options, rank)
            if rank is not None:
                command = f"loratools squeeze IN --rank {rank} -o LESS && {command.replace('IN', 'LESS')}"
                label = f"rank {rank}, {label}"
            yield Setting(method, label, f"{_begun(source)}{command}", recipe)


def _begun(source: Source) -> str:
    """What makes a file of the changes of a model that was tuned whole, which the other commands then read."""
    return "" if source.differences is None else "loratools extract BASE TUNED --to lycoris -o WHOLE.safetensors && "


def _input(source: Source) -> str:
    return "IN" if source.differences is None else "WHOLE.safetensors"
