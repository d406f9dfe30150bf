"""Pages, figures and tables of a report, beside what is printed: checked before the work, written after it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loratools_cli.output import say

if TYPE_CHECKING:
    from loratools.reports.frames import Tabular


def check_exports(
    *, page: Path | None = None, figure: Path | None = None, table: Path | None = None, force: bool = False
) -> None:
    """Refuse now what could not be written later: another suffix, an existing file, a library that is missing."""
    from loratools.reports import frames, html, plots

    for path, place_of in ((page, html.place_of), (figure, plots.place_of), (table, frames.place_of)):
        if path is not None:
            place_of(path, force=force)


def write_exports(
    report: Tabular,
    *,
    page: Path | None = None,
    figure: Path | None = None,
    table: Path | None = None,
    force: bool = False,
) -> None:
    """Write what is asked for, and say so on standard error.

    A `page` is of comparisons, a `figure` of those, of intruders and of curves.
    """
    from loratools.reports.bakeoff import BakeoffReport
    from loratools.reports.compare import CompareReport
    from loratools.reports.frames import write_table
    from loratools.reports.intruders import IntrudersReport
    from loratools.reports.pareto import ParetoReport

    if table is not None:
        write_table(report, table, force=force)
        say(f"wrote {table}")
    if figure is not None and isinstance(report, IntrudersReport):
        from loratools.reports.plot_intruders import plot_intruders

        plot_intruders(report, figure, force=force)
        say(f"wrote {figure}")
    elif figure is not None and isinstance(report, ParetoReport):
        from loratools.reports.plot_pareto import plot_pareto

        plot_pareto(report, figure, force=force)
        say(f"wrote {figure}")
    elif figure is not None and isinstance(report, BakeoffReport):
        from loratools.reports.plot_bakeoff import plot_bakeoff

        plot_bakeoff(report, figure, force=force)
        say(f"wrote {figure}")
    elif figure is not None:
        from loratools.reports.plot_compare import plot_compare

        assert isinstance(report, CompareReport)
        plot_compare(report, figure, force=force)
        say(f"wrote {figure}")
    if page is not None:
        from loratools.reports.html import write_html

        assert isinstance(report, CompareReport)
        write_html(report, page, force=force)
        say(f"wrote {page}")
