"""How an adapter was moved to another base, as people read it."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from loratools.reports.transfer import KitReport, TransferReport
from loratools_cli.grids import new_grid, texts
from loratools_cli.text import number, percent, shortened

_SHOWN = 3  # samples


def render_transfer(report: TransferReport) -> Iterator[RenderableType]:
    """The stages, what came of each, what the models can do, and some of the rows."""
    stages = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    stages.add_column("stage", no_wrap=True)
    for title in ("seconds", "tokens/s"):
        stages.add_column(title, justify="right", no_wrap=True)
    stages.add_column("outcome", overflow="fold")
    outcomes = _outcomes(report)
    for row in report.rows():
        rate = row["tokens_per_second"]
        cells = [f"{row['seconds']:.1f}", "-" if rate is None else f"{rate:.0f}"]
        stages.add_row(*texts(row["stage"], *cells, outcomes[row["stage"]]))
    yield stages
    if report.evaluations:
        yield Text()
        grid = new_grid("model", "exact match", "NLL", "rows")
        for name, one in report.evaluations.items():
            exact = "" if one.exact_match is None else f"{one.exact_match:.3f}"
            grid.add_row(*texts(name, exact, number(one.nll), str(one.rows)))
        yield grid
    yield Text()
    for sample in report.samples[:_SHOWN]:
        yield Text(shortened((f"{sample.prompt!r} -> {sample.answer!r}"), 78))


def render_kit(report: KitReport) -> Iterator[RenderableType]:
    """What the discriminator could tell."""
    yield Text(
        f"{report.real} real inputs, {report.made_up} made up; cross-validated loss {report.loss:.3f} nats "
        f"(a guess: 0.693)"
    )


def _outcomes(report: TransferReport) -> dict[str, str]:
    made, taught, trained = report.synthesis, report.labelling, report.distillation
    told, start = made.discriminator, report.warm_start
    if made.discriminator_loss is not None:
        told += f", loss {made.discriminator_loss:.2f} (a guess: 0.69)"
    agreed = f"step {trained.best_step} of {trained.steps}"
    if report.agreement is not None and report.agreement_before is not None:
        agreed += f"; agrees {percent(report.agreement_before)} -> {percent(report.agreement)} %"
    sifted = {
        "twice": made.duplicate + made.similar,
        "improbable": made.improbable,
        "empty": made.empty,
        "unfinished": made.unfinished,
    }
    return {
        "prepare": f"discriminator: {told}",
        "generate": f"{made.generated} inputs, {made.inputs}",
        "filter": ", ".join([f"{made.kept} kept", *(f"{n} {why}" for why, n in sifted.items() if n)]),
        "label": f"{taught.used} answers, confidence {taught.confidence:.2f}",
        "start": "" if start is None else f"{start.targets} targets by {start.align}, {start.dropped} dropped",
        "train": agreed,
        "evaluate": "" if report.squeezed is None else f"squeezed: error {percent(report.squeezed)} %",
    }
