"""The page of a transfer by weights alone: what arrived of each target."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from loratools.reports.blocks import Block, Card, Cell, Section, block_page, facts, paragraph, table
from loratools.reports.pages import check_place
from loratools.reports.weight_transfer import WeightTransferReport
from loratools.sizes import format_size
from loratools.storage.atomic import write_whole


def write_page(report: WeightTransferReport, path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write a transfer by weights as one page; the same report gives the same bytes.

    Raises UsageError for a suffix other than .html, and OutputError where the file exists and `force` is not given, or
    cannot be written.
    """
    return write_whole(check_place(path, force=force), _page(report).encode("utf-8"))


def _page(report: WeightTransferReport) -> str:
    places = (report.adapter, report.source, report.destination)
    adapter, source, destination = ("–" if place is None else place for place in places)
    kept = [row.kept for row in report.targets.values()]
    cards = (
        Card("Targets carried over", f"{len(kept):,}", f"{len(report.dropped):,} left out"),
        Card("Kept of the squared norm", f"{100 * sum(kept) / len(kept):.3g} %", "mean over the targets"),
        Card("New adapter", format_size(report.bytes), f"aligned by: {report.align}"),
    )
    return block_page(
        "transfer",
        f"{Path(adapter).name or adapter}, carried to {Path(destination).name or destination}",
        f"From {source} to {destination} by the weights of both alone: nothing was trained, and no input was made up.",
        (
            Section("targets", "Targets", tuple(_targets(report))),
            Section("moved", "What was moved", (facts(_moved(report, adapter, source, destination)),)),
        ),
        cards=cards,
        tags=("weights only",),
        notes=report.warnings,
    )


def _targets(report: WeightTransferReport) -> Iterator[Block]:
    yield paragraph(
        "Kept is the share of the squared norm of the delta that arrived. Agreement is that of the leading singular "
        "spaces of the two weights, or of mapped and real activations; 0 is chance. Neither says how well the task is "
        "done: see loratools eval."
    )
    columns: list[tuple[str, Cell]] = [
        ("Target", "text"),
        ("Made of", "text"),
        ("By", "text"),
        ("Rank", "number"),
        ("Kept", "share"),
        ("Agreement", "number"),
        ("‖Δ‖ / ‖W‖ before", "share"),
        ("after", "share"),
    ]
    yield table(
        columns,
        [
            (row["target"], row["origins"], row["method"], row["rank"], row["kept"], row["agreement"],
             row["relative_before"], row["relative_after"])
            for row in report.rows()
        ],
        tall=True,
    )  # fmt: skip
    if report.dropped:
        yield table([("Left out", "text"), ("Why", "prose")], report.dropped.items(), title="Left out")


def _moved(report: WeightTransferReport, adapter: str, source: str, destination: str) -> dict[str, str]:
    return {
        "adapter": adapter,
        "from": source,
        "to": destination,
        "output": report.output or "–",
        "aligned by": report.align,
    }
