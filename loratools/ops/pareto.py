"""How small an adapter can be made at which loss, by every method: rate-distortion curves of one adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from loratools.errors import AdapterError, LoratoolsError, UnchangedError, UsageError
from loratools.files import header_room
from loratools.linalg.inner import frobenius
from loratools.operators import sum_of
from loratools.ops.quantize import Quantize, quantize
from loratools.ops.spectra import known_delta
from loratools.ops.squeeze import Squeeze, squeeze
from loratools.pipeline import ordered_map, worker_count
from loratools.ranks import Budget
from loratools.reports.pareto import ParetoReport, Point

if TYPE_CHECKING:
    from loratools.adapter import Adapter

METHODS = ("grid", "svd", "balanced", "rtn", "lloyd", "nf", "petl", "sign", "loraquant", "delta-come")
RATIOS = (2, 4, 8, 16, 32, 64)
_RANKS = (1, 2, 4, 8)  # by which the rank is divided before numbers are rounded
_BITS = {
    "balanced": (1, 2, 3, 4, 8),
    "rtn": (2, 3, 4, 8),
    "lloyd": (1, 2, 3, 4),
    "nf": (3, 4),
    "petl": (1, 2, 3, 4),
    "sign": (1,),
    "loraquant": (2, 3),
}


@dataclass(frozen=True)
class _Setting:
    """One point to be measured: what makes the adapter and its size in bytes."""

    method: str
    label: str
    command: str
    make: Callable[[], tuple[Adapter, int]]


def pareto(
    adapter: Adapter,
    methods: Sequence[str] = METHODS,
    *,
    ratios: Sequence[float] = RATIOS,
    steps: Callable[[int, str], Callable[[], None]] | None = None,
) -> ParetoReport:
    """Every method at every setting: bytes of the file that it would write, and the error of the whole delta.

    `grid` and `svd` (the squeeze) are asked for the adapter's size divided by each of `ratios`; the others round at
    their widths, after squeezes to the rank and to a half, a quarter and an eighth of it. What cannot be done with this
    adapter is left out, with a warning. `steps(total, what)` may count the points. Raises UsageError for an unknown
    method, AdapterError where nothing can be measured.
    """
    if unknown := [m for m in methods if m not in METHODS]:
        raise UsageError(f"no method {unknown[0]!r}; there are {', '.join(METHODS)}")
    adapter.require_weights()
    settings = list(_settings(adapter, methods, ratios))
    step = steps(len(settings), "points") if steps else lambda: None
    found: list[Point] = []
    failed: dict[str, str] = {}
    for setting in settings:
        try:
            made, size = setting.make()
            error = relative_error(adapter, made)
        except UnchangedError:
            continue
        except LoratoolsError as problem:
            failed.setdefault(setting.method, str(problem))
            continue
        finally:
            step()
        found.append(Point(setting.method, setting.label, size, error, None, False, setting.command))
    if not found:
        raise AdapterError(f"nothing could be measured: {next(iter(failed.values()), 'no setting applies')}")
    warnings = tuple(f"{method} was left out: {reason}" for method, reason in failed.items())
    return ParetoReport(_size(adapter), marked(found), (*adapter.warnings, *warnings))


def marked(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points by size, largest first, with those that no other beats in both bytes and error marked as best."""
    ordered = sorted(points, key=lambda p: (p.bytes, p.relative_error))
    least = math.inf
    out = []
    for point in ordered:
        best = point.relative_error < least
        least = min(least, point.relative_error)
        out.append(replace(point, best=best))
    return tuple(reversed(out))


def relative_error(before: Adapter, after: Adapter) -> float:
    """||delta - delta'|| / ||delta|| of all targets together; of directions, where a delta needs the base."""

    def work(target: str) -> tuple[float, float]:
        one, other = (known_delta(a[target]) for a in (before, after))
        return frobenius(sum_of([one, -other])) ** 2, frobenius(one) ** 2

    pairs = list(ordered_map(work, before.entries, workers=worker_count("cpu")))
    distance, norm = (math.fsum(column) for column in zip(*pairs, strict=True)) if pairs else (0.0, 0.0)
    return math.sqrt(distance / norm) if norm else 0.0


def _size(adapter: Adapter) -> int:
    return adapter.origin.nbytes if adapter.origin else adapter.nbytes + header_room(adapter)


def _settings(adapter: Adapter, methods: Sequence[str], ratios: Sequence[float]) -> Iterator[_Setting]:
    size, top = _size(adapter), max((e.rank for e in adapter.entries.values()), default=0)
    ranks = list(dict.fromkeys(max(1, top // by) for by in _RANKS)) if top else [0]
    lower: dict[int, Adapter] = {}

    def at_rank(rank: int) -> Adapter:
        if rank not in lower:
            lower[rank] = adapter if rank == top else squeeze(adapter, rank, options=Squeeze(allow_unchanged=True))[0]
        return lower[rank]

    for method in methods:
        if method in ("grid", "svd"):
            verb = "quantize" if method == "grid" else "squeeze"
            for ratio in ratios:
                make = partial(_gridded if method == "grid" else _squeezed, adapter, int(size / ratio))
                yield _Setting(method, f"1/{ratio:g}", f"loratools {verb} IN --ratio {ratio:g}", make)
        elif method == "delta-come":
            for bits in (0.5, 1.0, 1.5, 2.0):
                command = f"loratools quantize IN --method delta-come --bits {bits:g}"
                yield _Setting(
                    method, f"{bits:g} bits", command, partial(_coded, adapter, Quantize("delta-come", bits))
                )
        else:
            for rank in ranks:
                for bits in _BITS[method]:
                    options = Quantize(method, bits)  # type: ignore[arg-type]
                    command = f"loratools quantize IN --method {method} --bits {bits}"
                    label = f"{bits} bits"
                    if rank not in (top, 0):
                        command = f"loratools squeeze IN --rank {rank} -o LESS && {command.replace('IN', 'LESS')}"
                        label = f"rank {rank}, {label}"
                    yield _Setting(method, label, command, partial(_coded_at, at_rank, rank, options))


def _gridded(adapter: Adapter, size: int) -> tuple[Adapter, int]:
    made, report = quantize(adapter, Quantize(budget=size))
    return made, int(report.total["bytes_after"] or 0)


def _squeezed(adapter: Adapter, size: int) -> tuple[Adapter, int]:
    made, _ = squeeze(adapter, Budget(size))
    return made, made.nbytes + header_room(made)


def _coded(adapter: Adapter, options: Quantize) -> tuple[Adapter, int]:
    made, report = quantize(adapter, options)
    return made, int(report.total["bytes_after"] or 0)


def _coded_at(at_rank: Callable[[int], Adapter], rank: int, options: Quantize) -> tuple[Adapter, int]:
    return _coded(at_rank(rank), options)
