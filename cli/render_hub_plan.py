"""What people read of a serving plan."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from loratools.reports.hub_plan import HubPlanReport
from loratools.sizes import format_size
from loratools_cli.grids import new_grid, texts
from loratools_cli.text import number, percent, plain, shortened

_REASON = 160


def render_hub_plan(report: HubPlanReport) -> Iterator[RenderableType]:
    """Who fits the server, the buckets, who stays, how policies do, and what to do."""
    yield Text(_who(report), style="bold")
    for unfit in report.unfit:
        more = ", ..." if unfit.count > len(unfit.examples) else ""
        names = ", ".join(shortened(name, 40) for name in unfit.examples)
        yield Padding(Text(f"{unfit.count} not: {shortened(unfit.reason, _REASON)} ({names}{more})"), (0, 0, 0, 2))
    yield Text(_memory(report))
    yield Text(f"popularity {plain(report.popularity)}{_strangers(report)}")
    yield Text("")
    yield _buckets(report)
    yield Text(_waste(report))
    yield Text("")
    yield _policies(report)
    yield Text(_resident(report))
    if report.top:
        yield Text("")
        yield _top(report)
    yield Text("")
    for setting in report.settings:
        yield Text.assemble((f"start {report.title} with ", "bold"), plain(setting))
    if report.commands:
        yield Text("run", style="bold")
    for command in report.commands:  # never wrapped: a shell would take the rest for a command of its own
        yield Text(plain(command), no_wrap=True)


def _who(report: HubPlanReport) -> str:
    base = f", base {plain(report.base_model)}" if report.base_model else ""
    mended = f", {report.mended} of them after a conversion" if report.mended else ""
    return f"{report.title}: {report.fit} of {report.adapters} adapters can be served{base}{mended}"


def _memory(report: HubPlanReport) -> str:
    facts, size = report.facts, format_size(report.memory)
    each = f"{format_size(facts['bytes_per_rank'])} for each rank of an adapter"
    if report.server == "vllm":
        return f"{size} of slots for {facts['targets']} modules: {each}"
    cells = report.capacity + report.reserve_tokens
    reserved = f", {report.reserve_tokens} of them for the cache" if report.reserve_tokens else ""
    shape = f"{facts['layers']} layers of {facts['hidden']}"
    return f"{size}: {cells} cells of {format_size(report.unit_bytes)} ({shape}){reserved}; {each}"


def _strangers(report: HubPlanReport) -> str:
    parts = []
    if report.elsewhere:
        parts.append(f"{percent(report.elsewhere)} % for adapters that are not served")
    if report.unknown:
        names = ", ".join(shortened(name, 30) for name in report.unknown_names)
        parts.append(f"{percent(report.unknown)} % for unknown names ({names})")
    return f"; {', '.join(parts)}" if parts else ""


def _buckets(report: HubPlanReport) -> RenderableType:
    squeezing = report.largest_error is not None
    shown = new_grid("rank", "adapters", "padded", "waste %", "size", "asked %", "held",
                     *(["squeezed", "error"] if squeezing else []))  # fmt: skip
    for bucket in report.buckets:
        cells = [str(bucket.adapters), str(bucket.padded), percent(bucket.waste), format_size(bucket.bytes)]
        cells += [percent(bucket.requests), str(bucket.resident)]
        cells += [str(bucket.squeezed), number(bucket.largest_error)] if squeezing else []
        shown.add_row(*texts(str(bucket.rank), *cells))
    return shown


def _waste(report: HubPlanReport) -> str:
    what = "of the slots" if report.server == "vllm" else "of the work of full batches, not of memory,"
    saved = sum(bucket.saved_bytes for bucket in report.buckets)
    squeezed = f"; squeezing saves {format_size(saved)}" if saved else ""
    one = f"{percent(report.one_bucket_waste)} % at one rank"
    return f"padding is {percent(report.waste)} % {what} and would be {one}{squeezed}"


def _policies(report: HubPlanReport) -> RenderableType:
    shown = new_grid("policy", "expected hits %", "of the trace %", "loads", "loaded", "evictions")
    for policy in report.policies:
        cells = [percent(policy.expected), percent(policy.hit_rate), str(policy.loads)]
        shown.add_row(*texts(policy.name, *cells, format_size(policy.loaded_bytes), str(policy.evictions)))
    return shown


def _resident(report: HubPlanReport) -> str:
    taken = format_size(report.used * report.unit_bytes)
    tokens = f", which displaces {report.displaced_tokens} tokens of cache" if report.server == "slora" else ""
    return (
        f"static keeps {report.resident} adapters in {taken}{tokens}; no choice hits more than "
        f"{percent(report.bound)} %; trace: {report.requests} requests, {report.trace}"
        + ("" if report.trace.startswith("as") else f" (seed {report.seed})")
        + f"; all that fit the server take {format_size(report.host_bytes)} of host memory"
    )


def _top(report: HubPlanReport) -> RenderableType:
    shown = new_grid("most asked for", "requests %", "rank", "", "size", "")
    for row in report.top:
        action = f"{row.action} {row.bucket}" if row.action != "keep" else "keep"
        stays = "resident" if row.resident else "on demand"
        cells = [percent(row.popularity), str(row.rank), action, format_size(row.bytes), stays]
        shown.add_row(*texts(shortened(row.name, 30), *cells))
    return shown
