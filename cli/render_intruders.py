"""What people read of a search for intruder dimensions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from loratools.reports.intruders import IntrudersReport, TargetIntruders
from loratools_cli.text import plain


def render_intruders(report: IntrudersReport, *, everything: bool) -> Iterator[RenderableType]:
    """Counts by module type, or by target, and the thresholds where `everything` is asked for."""
    if everything:
        rows = {plain(name): [t] for name, t in report.targets.items() if t.left.count or t.right.count}
    else:
        rows = {plain(m): [t for t in report.targets.values() if t.module == m] for m in report.modules}
    if rows:
        yield _table(rows)
    total = report.total
    yield Text(
        f"{total['left']} left and {total['right']} right intruders among the first {report.top_k} singular vectors of "
        f"{total['targets']} matrices: no cosine of {report.epsilon:g} with any vector of the base",
        style="bold",
    )
    if everything or len(report.sweep) > 1:
        yield _counts("epsilon", report.sweep)
        yield _counts("first k", report.by_k)
        yield _counts("layer", {plain(name): {"left": c.left, "right": c.right} for name, c in report.layers.items()})
    if report.uniform_shrink is not None:
        yield Text(
            f"norms of the updates: {report.uniform_shrink:.4f} of before; as a control, compare with the old adapter "
            "at that scale, which changes as much without looking for intruders"
        )
    if report.skipped:
        yield Text(f"skipped: {len(report.skipped)}, such as {plain(next(iter(report.skipped)))}")


def _counts(title: str, counts: Mapping[str, Mapping[str, int]]) -> Text:
    listed = "  ".join(f"{name}: {n['left']}|{n['right']}" for name, n in counts.items())
    return Text.assemble((f"{title}  ", "dim"), listed)


def _table(rows: dict[str, list[TargetIntruders]]) -> Table:
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    grid.add_column("matrices", overflow="fold")
    for title in ("left", "right", "least cosine", "energy %"):
        grid.add_column(title, justify="right", no_wrap=True)
    for name, found in rows.items():
        least = min(min(t.left.max_cosine) for t in found)
        share = sum(t.energy_share for t in found) / len(found)
        left, right = sum(t.left.count for t in found), sum(t.right.count for t in found)
        label = f"{name} x{len(found)}" if len(found) > 1 else name
        grid.add_row(Text(label), str(left), str(right), f"{least:.2f}", f"{100 * share:.1f}")
    return grid
