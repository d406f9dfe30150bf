"""What people read of a comparison of fine-tunes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from loratools.reports.compare import CompareReport, FineTune, PairNumbers, UpdateNumbers
from loratools_cli.text import number, plain, shortened, span

_LISTED = 4  # module types and layers, of those that change most
_NAME = 18  # characters of a name in a table of several
_SHORT = 14  # and in the widest


def render_compare(report: CompareReport, *, everything: bool) -> Iterator[RenderableType]:
    """Fine-tunes, what they miss, pairs, where they lie; every target, too, where `everything` is asked for."""
    yield _summary(report.fine_tunes)
    yield Text(
        f"energy: share of the first {report.top_k} singular directions of the base; intruders: of as many after "
        f"tuning, those with no cosine of {report.epsilon:g} with any of the base; each left|right; the rest, and what "
        "follows, is defined in docs/guide.md",
        style="dim",
    )
    if any(f.missed is not None for f in report.fine_tunes.values()):
        yield Text()
        yield _missed(report.fine_tunes)
        yield Text("norms of what is missed, of that of the full change: 1 is as far off as the base is", style="dim")
    if report.pairs:
        yield Text()
        yield _pairs(report.pairs)
        yield Text("distance: norm of the difference, of that of the first of the two", style="dim")
    yield Text()
    yield _where(report.fine_tunes)
    if everything:
        yield from _targets(report)


def _summary(fine_tunes: Mapping[str, FineTune]) -> Table:
    grid = _grid("fine-tune", "kind", "rank", "rel. norm", "eff. rank", "stable", "energy %", "intruders")
    for name, f in fine_tunes.items():
        kind = "full" if f.kind == "full" else ",".join(f.families)
        grid.add_row(
            Text(plain(name)),
            Text(plain(kind)),
            span((f.rank_min, f.rank_max)) if f.rank_max else "-",
            number(f.relative_norm),
            number(f.mean_effective_rank),
            number(f.mean_stable_rank),
            _sides(f.mean_energy_left, f.mean_energy_right),
            f"{f.left_intruders}|{f.right_intruders}",
        )
    return grid


def _missed(fine_tunes: Mapping[str, FineTune]) -> Table:
    of = next(f.missed.of for f in fine_tunes.values() if f.missed is not None)
    grid = _grid(f"missed of {shortened(of, _NAME)}", "error", "best of rank", "best in its spaces", "untouched %")
    for name, f in fine_tunes.items():
        if f.missed is not None:
            m = f.missed
            cells = [number(m.error), number(m.best_error), number(m.space_error), _share(f.untouched or 0.0)]
            grid.add_row(Text(shortened(name, 2 * _NAME)), *cells)
    return grid


def _pairs(pairs: Sequence[PairNumbers]) -> Table:
    grid = _grid("pair", "cosine", "distance", "overlap out", "in")
    for p in pairs:
        cells = [number(p.cosine), number(p.relative_distance), number(p.output_overlap), number(p.input_overlap)]
        grid.add_row(Text(f"{shortened(p.a, _NAME)} | {shortened(p.b, _NAME)}"), *cells)
    return grid


def _where(fine_tunes: Mapping[str, FineTune]) -> Table:
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("where it changes most", "modules %", "layers %"):
        grid.add_column(title, overflow="fold")
    for name, f in fine_tunes.items():
        grid.add_row(Text(shortened(name, _NAME)), Text(_most(f.modules)), Text(_most(f.layers)))
    return grid


def _most(shares: Mapping[str, float]) -> str:
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    more = ", ..." if len(ordered) > _LISTED else ""
    return ", ".join(f"{plain(name)}: {_share(share)}" for name, share in ordered[:_LISTED]) + more


def _targets(report: CompareReport) -> Iterator[RenderableType]:
    """Each matrix: its updates, then its pairs."""
    for parameter, target in report.targets.items():
        yield Text()
        m, n = target.shape
        yield Text(f"{plain(parameter)}, {m} x {n}", style="bold")
        grid = _grid("fine-tune", "rank", "rel. norm", "eff. rank", "stable", "energy %", "intruders", "growth")
        for name, u in target.updates.items():
            grid.add_row(Text(shortened(name, _SHORT)), *_update(u))
        yield grid
        for name, u in target.updates.items():
            yield from _remarks(name, u)
        if target.pairs:
            yield _pairs(target.pairs)


def _update(u: UpdateNumbers) -> list[str]:
    return [
        str(u.rank) if u.rank else "-",
        number(u.relative_norm),
        number(u.effective_rank),
        number(u.stable_rank),
        _sides(u.energy_left, u.energy_right),
        f"{u.left_intruders}|{u.right_intruders}",
        number(u.logit_growth),
    ]


def _remarks(name: str, u: UpdateNumbers) -> Iterator[RenderableType]:
    if u.gain is not None:
        least, mean, most = map(number, u.gain)
        yield Text(f"{plain(name)}: gains {least} to {most}, mean {mean}")
    if u.missed is not None:
        m = u.missed
        best = f"the best of rank {m.rank} {number(m.best_error)}, in its own spaces {number(m.space_error)}"
        yield Text(f"{plain(name)}: misses {number(m.error)} of {plain(m.of)}; {best}")


def _grid(first: str, *others: str) -> Table:
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    grid.add_column(first, overflow="fold")
    for title in others:
        grid.add_column(title, justify="right", no_wrap=title != "kind", overflow="fold")
    return grid


def _sides(left: float, right: float) -> str:
    return f"{_share(left)}|{_share(right)}"


def _share(share: float) -> str:
    """A percentage in two digits."""
    return f"{100 * share:.0f}" if share >= 0.0995 or share == 0.0 else f"{100 * share:.2g}"
