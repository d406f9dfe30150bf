"""What people read of families, and of deltas that were written in another one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from loratools.reports.bakeoff import BakeoffReport
from loratools.reports.reparameterize import ReparameterizeReport, TargetFitted
from loratools.reports.tables import FamiliesReport, Family
from loratools.sizes import format_size
from loratools_cli.grids import by_module, new_grid, texts
from loratools_cli.text import number, percent, sizes, span

_NEEDED = {"yes": "needs the base weight", "shape": "needs the base's shape", "fit": "needs the base to be fitted"}


def render_families(report: FamiliesReport) -> Iterator[RenderableType]:
    """What each family is, those first in which any delta can be written; all that is known of a single one."""
    if len(report.families) > 1:
        yield from _listed(report)
        return
    for name, family in report.families.items():
        facts = [
            "any delta can be written in it" if family.guarantee else "",
            "ranks can be lowered" if family.squeezable else "",
            _NEEDED.get(family.base, ""),
            f"written in {', '.join(family.written_by)}" if family.written_by else "read only",
        ]
        yield Text.assemble((name, "bold"), f": {'; '.join(f for f in facts if f)}")
        yield Text(f"  {family.summary}")
        yield from _details(family)


def _listed(report: FamiliesReport) -> Iterator[RenderableType]:
    width = max(map(len, report.families))
    kinds = {"any delta can be written in these, by loratools reparameterize --to NAME": True, "these are read": False}
    for title, fitted in kinds.items():
        yield Text(f"{title}:", style="bold")
        shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
        shown.add_column(min_width=width, no_wrap=True)
        shown.add_column(overflow="fold")
        for name, family in report.families.items():
            if bool(family.guarantee) is fitted:
                shown.add_row(*texts(name, family.summary))
        yield shown
    yield Text("loratools families NAME tells what one needs, its options, and which dialects hold it")


def _details(family: Family) -> Iterator[RenderableType]:
    facts = {
        "delta": family.formula,
        "numbers": family.count,
        "fit": family.guarantee,
        "options": ", ".join(f"{name}={value}" for name, value in family.options.items()),
        "feasible": "" if family.most_entries is None else f"up to {family.most_entries:,} entries of a matrix",
        "source": family.paper,
        "rebuilt": family.reconstruction,
        "slots": ", ".join(family.slots),
        "": family.notes.replace("\n", " "),
    }
    for name, value in facts.items():
        if value:
            yield Text(f"  {name}: {value}" if name else f"  {value}")


def render_reparameterize(report: ReparameterizeReport, *, everything: bool) -> Iterator[RenderableType]:
    """A row for each target, or for each module type, and one for all of them."""
    shown = new_grid("target", "numbers", "energy kept %", "rel. error", "size")
    groups = {t: [c] for t, c in report.targets.items()} if everything else by_module(report.targets)
    for name, members in groups.items():
        shown.add_row(*texts(name if everything else f"{name} x{len(members)}", *_cells(members)))
    members = list(report.targets.values())
    total = report.total
    shown.add_row(
        *texts(
            f"all {len(members)}",
            f"{total['numbers']:,}",
            _energy(float(total["energy_kept"] or 0.0)),
            number(total["relative_error"] or 0.0),
            sizes(int(total["bytes_before"] or 0), int(total["bytes_after"] or 0)),
            style="bold",
        )
    )
    yield shown
    chosen = ", ".join(f"{name}={value}" for name, value in report.options.items())
    how = {"exact": "exact", "optimal": "the optimum", "local": "a local optimum"}[report.guarantee]
    yield Text(f"{report.family}{f' ({chosen})' if chosen else ''}: {how} of this family")
    if report.expected_energy is not None:
        yield Text(
            f"a generic delta keeps {percent(report.expected_energy)} % of its energy in a subspace of this size"
        )


def render_bakeoff(report: BakeoffReport, *, everything: bool) -> Iterator[RenderableType]:
    """A row for each family in each budget, the nearest first; the commands of the best, or of all."""
    is_sample = len(report.targets) < report.available
    count = f"{len(report.targets)} of {report.available}" if is_sample else f"{len(report.targets)}"
    yield Text(f"{count} targets, such as {report.targets[0]}")
    shown = new_grid("within", "family", "size", "energy kept %", "rel. error", "rank", "fit")
    last = 0
    for entrant in report.entrants:
        within = "" if entrant.budget == last else format_size(entrant.budget)
        last = entrant.budget
        rank = "-" if entrant.rank is None else f"{entrant.rank:.3g}"
        cells = [entrant.family, format_size(entrant.bytes), _energy(entrant.energy_kept)]
        style = "bold" if entrant.best else ""
        shown.add_row(*texts(within, *cells, number(entrant.relative_error), rank, entrant.guarantee, style=style))
    yield shown
    if is_sample:
        yield Text(f"where IN is a file of these {len(report.targets)} targets alone:")
    for entrant in report.entrants:
        if entrant.best or everything:
            yield Text(f"  {entrant.command}")
    reasons: dict[str, list[str]] = {}
    for family, reason in report.left_out.items():
        reasons.setdefault(reason, []).append(family)
    for reason, families in reasons.items():
        yield Text(f"  without {', '.join(families)}: {reason}")


def _cells(members: Sequence[TargetFitted]) -> list[str]:
    return [
        span((m.numbers for m in members), lambda n: f"{n:,}"),
        span((m.energy_kept for m in members), _energy),
        span((m.relative_error for m in members), number),
        f"{sum(m.bytes for m in members):,} B",
    ]


def _energy(share: float) -> str:
    return percent(share if share < 1 - 1e-9 else 1.0)
