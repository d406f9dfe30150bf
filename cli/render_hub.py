"""What people read of a hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.text import Text

from loratools.reports.hub import CatalogReport, HubListReport, HubRunReport, Row
from loratools.sizes import format_size
from loratools_cli.grids import new_grid, texts
from loratools_cli.text import counted_things, number, plain, shortened, sizes

_SHOWN = 40  # rows, unless all are asked for
_REASON = 120


def render_hub_list(report: HubListReport, *, everything: bool) -> Iterator[RenderableType]:
    """A row for each adapter, then what cannot be read."""
    good = [a for a in report.adapters if not a.reason]
    shown = new_grid("adapter", "dialect", "families", "targets", "rank", "size")
    for adapter in good if everything else good[:_SHOWN]:
        cells = [adapter.dialect, adapter.families, str(adapter.targets), str(adapter.rank), format_size(adapter.bytes)]
        shown.add_row(*texts(adapter.name, *cells))
    if good:
        yield shown
    if len(good) > _SHOWN and not everything:
        yield Text(f"... and {len(good) - _SHOWN} more; see --all")
    bad = [(a.name, a.reason) for a in report.adapters if a.reason]
    yield from failures(bad, everything=everything)
    total = format_size(sum(a.bytes for a in good))
    unread = f"; {counted_things(len(bad), 'place')} cannot be read" if bad else ""
    yield Text(f"{counted_things(len(good), 'adapter')}, {total}{unread}", style="bold")


def render_hub_run(report: HubRunReport, *, everything: bool) -> Iterator[RenderableType]:
    """What failed, a row for each adapter with --all, and the sums."""
    done = [row for row in report.adapters if row.status in ("done", "kept")]
    shown = new_grid("adapter", "", "size", "rel. error", "seconds")
    for row in done if everything else done[:_SHOWN]:
        error = "-" if row.relative_error is None else number(row.relative_error)
        cells = [row.status, sizes(row.bytes_before, row.bytes_after), error, f"{row.seconds:.2f}"]
        shown.add_row(*texts(row.name, *cells))
    if done:
        yield shown
    if len(done) > _SHOWN and not everything:
        yield Text(f"... and {len(done) - _SHOWN} more; see --all")
    told = ("failed", "stale") if everything else ("failed",)
    yield from failures(
        [(row.name, row.reason) for row in report.adapters if row.status in told], everything=everything
    )
    yield Text(_sum(report, done), style="bold")


def render_catalog(report: CatalogReport, *, everything: bool) -> Iterator[RenderableType]:
    """What failed, and the sums."""
    yield from failures(report.failures, everything=everything)
    counts = [f"{count} {status}" for status, count in sorted(report.counts.items())]
    counts += [f"{report.missing} without a receipt yet"] if report.missing else []
    size = sizes(report.bytes_before, report.bytes) if report.bytes_before else format_size(report.bytes)
    yield Text(f"{', '.join(counts) or 'no adapters'}: {size} in {plain(report.hub)}", style="bold")


def _sum(report: HubRunReport, done: Sequence[Row]) -> str:
    counts = [f"{count} {status}" for status, count in sorted(report.counts.items())]
    counts += [f"{len(report.missing)} still to do"] if report.missing else []
    before, after = sum(r.bytes_before for r in done), sum(r.bytes_after for r in done)
    return f"{', '.join(counts) or 'nothing to do'}: {sizes(before, after)} in {plain(report.output)}"


def failures(rows: Sequence[tuple[str, str]], *, everything: bool) -> Iterator[RenderableType]:
    """Names and reasons of what could not be done."""
    for name, reason in rows if everything else rows[:_SHOWN]:
        text = plain(reason) if everything else shortened(reason, _REASON)
        yield Text.assemble((plain(name), "bold red"), f": {text}")
    if len(rows) > _SHOWN and not everything:
        yield Text(f"... and {len(rows) - _SHOWN} more; see --all")
