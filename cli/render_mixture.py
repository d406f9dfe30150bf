"""What people read of a mixture of adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.text import Text

from loratools.reports.mixture import MixtureReport, MixtureTarget, RouterReport
from loratools_cli.grids import by_module, new_grid, some, texts
from loratools_cli.text import number, percent, span

_GROUP_ABOVE = 24  # targets
_LAYERS = 40
_PAIRS = 6  # experts, up to which a table of pairs fits


def render_mixture(report: MixtureReport, *, everything: bool) -> Iterator[RenderableType]:
    """The experts, what pairs of them share, the targets and the router."""
    for i, name in enumerate(report.experts, 1):
        yield Text.assemble((f"{i} ", "bold"), *texts(name))
    yield Text("")
    yield from _pairs(report)
    yield from _targets(report, everything=everything)
    if report.router is not None:
        yield Text("")
        yield from _router(report.router, everything=everything)


def _pairs(report: MixtureReport) -> Iterator[RenderableType]:
    if not 2 < len(report.experts) <= _PAIRS:
        return
    shown = new_grid("shared directions", *(str(i) for i in range(1, len(report.experts) + 1)))
    for i, row in enumerate(report.overlaps, 1):
        shown.add_row(*texts(str(i), *(number(value) for value in row)))
    yield shown
    yield Text("")


def _targets(report: MixtureReport, *, everything: bool) -> Iterator[RenderableType]:
    routed = [] if report.router is None else ["equal vs routed"]
    weighted = [] if report.total["weighted_change"] is None else ["weighted"]
    shown = new_grid("target", "rank", "effective", "redundant %", "shared", *routed, *weighted)
    rows = report.targets

    def cells(members: Sequence[MixtureTarget]) -> list[str]:
        found = [span(row.rank for row in members)]
        found.append(span((row.effective_rank for row in members), number))
        found.append(span((row.redundancy for row in members), percent))
        found.append(some((row.overlap for row in members), number))
        found += [some((row.change for row in members), number)] if routed else []
        return found + ([some((row.weighted_change for row in members), number)] if weighted else [])

    if everything or len(rows) <= _GROUP_ABOVE:
        for target, row in rows.items():
            shown.add_row(*texts(target, *cells([row])))
    else:
        for module, members in by_module(rows).items():
            shown.add_row(*texts(f"{module} x{len(members)}", *cells(members)))
    shown.add_row(*texts(f"all {len(rows)}", *cells(list(rows.values())), style="bold"))
    yield shown


def _router(router: RouterReport, *, everything: bool) -> Iterator[RenderableType]:
    shown = new_grid("layer", "effective experts", "of the mean", "top experts", "coverage %")
    rows = list(enumerate(router.layers))
    for i, row in rows if everything else rows[:_LAYERS]:
        chosen = ",".join(map(str, row.chosen)) if len(row.chosen) <= _PAIRS else f"{len(row.chosen)} of them"
        cells = [number(row.ess) + ("!" if row.is_collapsed else ""), number(row.ess_of_mean), chosen]
        shown.add_row(*texts(str(i), *cells, percent(row.coverage)))
    yield shown
    if len(rows) > _LAYERS and not everything:
        yield Text(f"... and {len(rows) - _LAYERS} more; see --all")
    means = f"router: {number(router.ess)} of {router.experts} experts in use at once, "
    yield Text(f"{means}{percent(router.coverage)} % of the mass covered, samples: {router.samples}", style="bold")
