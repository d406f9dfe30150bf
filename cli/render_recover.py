"""What a short training gave back, as people read it."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from loratools.reports.recover import RecoverReport
from loratools_cli.grids import new_grid, texts
from loratools_cli.text import number, percent


def render_recover(report: RecoverReport) -> Iterator[RenderableType]:
    """The held-out rows before and after, or the losses where there are none."""
    if report.nll_before is not None and report.nll_after is not None:
        rows = new_grid("", "before", "after")
        rows.add_row(*texts("NLL of a token", number(report.nll_before), number(report.nll_after)))
        if report.answers_before is not None and report.answers_after is not None:
            shares = (f"{percent(share)} %" for share in (report.answers_before, report.answers_after))
            rows.add_row(*texts("whole answers", *shares))
        yield rows
        yield Text(
            f"{report.held_out} held-out rows; the state after step {report.best_step} of {report.steps} was kept"
        )
    else:
        yield Text(f"loss {number(report.losses[0])} -> {number(report.losses[-1])}; no rows were held out")
    rate = f", {report.tokens / report.seconds:.0f} tokens a second" if report.seconds else ""
    rounded = "on its grid" if report.rounding == "exact" else f"in the codes of {report.rounding}"
    codes = f", {rounded}" if report.rounding else ""
    yield Text(f"{report.steps} steps on {report.rows} rows{codes}: {report.seconds:.0f} s{rate}")
