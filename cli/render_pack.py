"""What people read of a pack."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from loratools.reports.pack import PackAddReport, PackReport, UnpackReport
from loratools.sizes import format_size
from loratools_cli.grids import new_grid, texts
from loratools_cli.render_hub import failures
from loratools_cli.text import counted_things, number

_SHOWN = 40  # rows, unless all are asked for


def render_pack(report: PackReport, *, everything: bool) -> Iterator[RenderableType]:
    """A row for each adapter, how targets are kept, and what cannot be packed."""
    done = [row for row in report.adapters if row.status == "done"]
    shown = new_grid("adapter", "size", "of its own", "sharing", "rel. error")
    for row in done if everything else done[:_SHOWN]:
        own = format_size(row.bytes_after)
        error = number(row.relative_error)
        shown.add_row(*texts(row.name, format_size(row.bytes_before), own, f"{row.sharing}/{row.factored}", error))
    yield shown
    if len(done) > _SHOWN and not everything:
        yield Text(f"... and {len(done) - _SHOWN} more; see --all")
    ways = new_grid("targets", "", "width", "sharing", "own components", "bases")
    for method in sorted(report.methods):
        chosen = [t for t in report.targets if t.method == method]
        widths = sorted(t.width for t in chosen)
        width = "-" if not widths[-1] else f"{widths[0]}" if widths[0] == widths[-1] else f"{widths[0]}-{widths[-1]}"
        counts = [f"{sum(getattr(t, of) for t in chosen)}" for of in ("sharing", "components")]
        ways.add_row(*texts(method, str(len(chosen)), width, *counts, format_size(sum(t.base_bytes for t in chosen))))
    yield Text("")
    yield ways
    if everything:
        yield Text("")
        yield _by_target(report)
    yield from failures([(row.name, row.reason) for row in report.failed], everything=everything)
    errors = report.errors
    yield Text(
        f"relative error: median {number(statistics.median(errors))}, largest {number(max(errors))}", style="bold"
    )


def _by_target(report: PackReport) -> RenderableType:
    shown = new_grid("target", "kept by", "width", "adapters", "sharing", "components")
    for t in report.targets:
        cells = [t.method, str(t.width or "-"), str(t.adapters), str(t.sharing), str(t.components)]
        shown.add_row(*texts(t.name, *cells))
    return shown


def render_pack_add(report: PackAddReport) -> Iterator[RenderableType]:
    """What became of it."""
    row = report.adapter
    yield Text(
        f"{row.sharing} of {row.factored} targets share bases, {counted_things(report.components, 'component')} "
        f"of its own, {row.as_they_are} stored whole; {format_size(row.bytes_after)}, "
        f"relative error {number(row.relative_error)}"
    )


def render_unpack(report: UnpackReport) -> Iterator[RenderableType]:
    """What was written."""
    yield Text(
        f"{report.targets} targets, ranks up to {report.largest_rank}, in the dialect {report.dialect}; "
        f"relative error {number(report.relative_error)}, as it was packed"
    )
