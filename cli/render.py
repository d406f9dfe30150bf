"""Reports as people read them, in 80 columns; every name in them is made harmless first."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import singledispatch
from typing import TextIO

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from loratools.reports.bakeoff import BakeoffReport
from loratools.reports.cache import CacheReport
from loratools.reports.calibrate import CalibrateReport
from loratools.reports.check import CheckReport
from loratools.reports.compare import CompareReport
from loratools.reports.convert import ConvertReport
from loratools.reports.delta import DeltaReport
from loratools.reports.diff import DiffReport
from loratools.reports.evaluate import EvalReport
from loratools.reports.extract import ExtractReport
from loratools.reports.fuse import FuseReport
from loratools.reports.hub import CatalogReport, HubListReport, HubRunReport
from loratools.reports.hub_plan import HubPlanReport
from loratools.reports.hub_similar import HubSimilarReport
from loratools.reports.info import InfoReport
from loratools.reports.inspect import InspectReport
from loratools.reports.intruders import IntrudersReport
from loratools.reports.merge import MergeReport
from loratools.reports.mixture import MixtureReport
from loratools.reports.neurons import NeuronsReport
from loratools.reports.pack import PackAddReport, PackReport, UnpackReport
from loratools.reports.pareto import ParetoReport
from loratools.reports.prune_neurons import PruneNeuronsReport
from loratools.reports.quantize import QuantizeReport
from loratools.reports.recover import RecoverReport
from loratools.reports.reparameterize import ReparameterizeReport
from loratools.reports.resize import ResizeReport
from loratools.reports.route import RouteFitReport, RouteReport
from loratools.reports.squeeze import SqueezeReport
from loratools.reports.tables import FamiliesReport, FormatsReport
from loratools.reports.transfer import KitReport, TransferReport
from loratools.reports.weight_transfer import WeightTransferReport
from loratools.sizes import format_size
from loratools_cli.grids import by_module, new_grid, reasons, some, texts
from loratools_cli.render_calibrate import render_calibrate
from loratools_cli.render_compare import render_compare
from loratools_cli.render_eval import render_eval
from loratools_cli.render_families import render_bakeoff, render_families, render_reparameterize
from loratools_cli.render_hub import render_catalog, render_hub_list, render_hub_run
from loratools_cli.render_hub_plan import render_hub_plan
from loratools_cli.render_hub_similar import render_hub_similar
from loratools_cli.render_inspect import render_inspect
from loratools_cli.render_intruders import render_intruders
from loratools_cli.render_mixture import render_mixture
from loratools_cli.render_neurons import bottlenecks_line, render_neurons, render_prune_neurons
from loratools_cli.render_pack import render_pack, render_pack_add, render_unpack
from loratools_cli.render_quantize import render_pareto, render_quantize
from loratools_cli.render_recover import render_recover
from loratools_cli.render_resize import render_resize
from loratools_cli.render_route import render_route, render_route_fit
from loratools_cli.render_squeeze import render_squeeze
from loratools_cli.render_transfer import render_kit, render_transfer
from loratools_cli.render_weight_transfer import render_weight_transfer
from loratools_cli.text import counted, number, percent, plain, shortened, span

_GROUP_ABOVE = 24  # targets
_WORST = 10  # differing targets
_WIDTH = 80
_VALUE = 160  # characters of a value in a summary


class _Page(io.StringIO):
    """Collects a page in the encoding of the stream that it is for."""

    def __init__(self, encoding: str) -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding


def table(report: object, stream: TextIO, *, everything: bool = False) -> str:
    """The text of a report: coloured on a terminal only, and not where NO_COLOR is set."""
    terminal = stream.isatty()
    colour = terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    page = _Page(stream.encoding or "utf-8")
    console = Console(
        file=page,
        width=shutil.get_terminal_size((_WIDTH, 24)).columns if terminal else _WIDTH,
        force_terminal=colour,
        color_system="standard" if colour else None,
        markup=False,
        highlight=False,
        emoji=False,
    )
    for block in blocks(report, everything):
        console.print(block, soft_wrap=bool(getattr(block, "no_wrap", False)))  # commands stay on one line
    return "".join(f"{line.rstrip()}\n" for line in page.getvalue().splitlines())


@singledispatch
def blocks(report: object, everything: bool) -> Iterator[RenderableType]:
    """What to print for a report, from top to bottom."""
    raise TypeError(f"no view of {type(report).__name__}")


@blocks.register
def _(report: InspectReport, everything: bool) -> Iterator[RenderableType]:
    yield render_inspect(replace(report, warnings=()), 2 * _WIDTH, every=everything)


@blocks.register
def _(report: IntrudersReport, everything: bool) -> Iterator[RenderableType]:
    yield from render_intruders(report, everything=everything)


@blocks.register
def _(report: CompareReport, everything: bool) -> Iterator[RenderableType]:
    yield from render_compare(report, everything=everything)
    yield from reasons("skipped", report.skipped, everything)


@blocks.register
def _(report: MixtureReport, everything: bool) -> Iterator[RenderableType]:
    yield from render_mixture(report, everything=everything)


@blocks.register
def _(report: RouteReport, everything: bool) -> Iterator[RenderableType]:
    yield from render_route(report, everything=everything)


@blocks.register
def _(report: RouteFitReport, everything: bool) -> Iterator[RenderableType]:
    yield from render_route_fit(report)


@blocks.register
def _(report: NeuronsReport, everything: bool) -> Iterator[RenderableType]:
    yield from render_neurons(report, everything=everything)


@blocks.register
def _(report: PruneNeuronsReport, everything: bool) -> Iterator[RenderableType]:
    yield from render_prune_neurons(report, everything=everything)


@blocks.register
def _(report: RecoverReport, everything: bool) -> Iterator[RenderableType]:
    yield from render_recover(report)


@blocks.register
def _(report: CalibrateReport, everything: bool) -> Iterator[RenderableType]:
    yield from render_calibrate(report, everything=everything or len(report.targets) <= _GROUP_ABOVE)


@blocks.register
def _(report: TransferReport, everything: bool) -> Iterator[RenderableType]:
    yield from render_transfer(report)


@blocks.register
def _(report: WeightTransferReport, everything: bool) -> Iterator[RenderableType]:
    yield from render_weight_transfer(report, everything=everything)


@blocks.register
def _(report: KitReport, everything: bool) -> Iterator[RenderableType]:
    yield from render_kit(report)


@blocks.register
def _(report: SqueezeReport, everything: bool) -> Iterator[RenderableType]:
    yield from render_squeeze(report, everything=everything or len(report.targets) <= _GROUP_ABOVE)
    yield from reasons("unchanged", report.unchanged, everything)


@blocks.register
def _(report: QuantizeReport, everything: bool) -> Iterator[RenderableType]:
    yield from render_quantize(report, everything=everything or len(report.targets) <= _GROUP_ABOVE)
    yield from reasons("unchanged", report.unchanged, everything)


@blocks.register
def _(report: ResizeReport, everything: bool) -> Iterator[RenderableType]:
    yield from render_resize(report, everything=everything or len(report.targets) <= _GROUP_ABOVE)


@blocks.register
def _(report: ParetoReport, everything: bool) -> Iterator[RenderableType]:
    yield from render_pareto(report, everything=everything)


@blocks.register
def _(report: EvalReport, everything: bool) -> Iterator[RenderableType]:
    yield from render_eval(report, everything=everything)


@blocks.register
def _(report: MergeReport, everything: bool) -> Iterator[RenderableType]:
    rows = report.targets
    conflicts = any(row.sign_conflicts is not None for row in rows.values())
    shown_rows = new_grid("target", "ranks", "rel. error", "cosines", *(["conflicts %"] if conflicts else []))
    groups = {target: [row] for target, row in rows.items()}
    if not everything and len(rows) > _GROUP_ABOVE:
        groups = {f"{m} x{len(members)}": members for m, members in by_module(rows).items()}
    for name, members in groups.items():
        ranks = " + ".join(some(row.ranks_in[i] for row in members) for i in range(len(report.weights)))
        cells = [
            f"{ranks} -> {span(row.rank_out for row in members)}",
            span((row.relative_error for row in members), number),
            " | ".join(some((row.cosines[i] for row in members), "{:.2f}".format) for i in range(len(report.weights))),
        ]
        if conflicts:
            cells.append(span((row.sign_conflicts or 0.0 for row in members), percent))
        shown_rows.add_row(*texts(name, *cells))
    total = ["", number(report.total["relative_error"]), "", *([""] if conflicts else [])]
    shown_rows.add_row(*texts(f"all {len(rows)}", *total, style="bold"))
    yield shown_rows
    missing = {t: f"only in adapter {', '.join(map(str, holders))}" for t, holders in report.partial.items()}
    yield from reasons("not in all adapters", missing, everything)
    yield from reasons("left out, no update", dict.fromkeys(report.dropped_extras, ""), everything)


@blocks.register
def _(report: InfoReport, everything: bool) -> Iterator[RenderableType]:
    few = 100_000 if everything else 8
    shown_rows = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    shown_rows.add_column(no_wrap=True)
    shown_rows.add_column(overflow="fold")
    rows = {
        "file": report.path,
        "format": f"{report.format} in {report.container}",
        "base model": report.base_model,
        "family": counted(report.families, few),
        "targets": f"{report.targets}: {counted(report.modules, few)}" if report.targets else "none",
        "rank": counted(report.ranks, few),
        "scale": counted(report.scales, few),
        "dtype": counted(report.dtypes, few),
        "codes": counted(report.codings, few),
        "bottlenecks": bottlenecks_line(report.bottlenecks),
        "size": f"{format_size(report.bytes)}, {report.parameters:,} parameters",
        "extras": counted({f"{k} ({format_size(n)})": 1 for k, n in report.extras.items()}, few).replace(" x1", ""),
        "made by": _made_by(report.record),
    }
    for name, value in rows.items():
        if value:
            shown_rows.add_row(Text(name, style="bold"), Text(plain(value)))
    for title, entries in (("config", report.config), ("metadata", report.metadata)):
        for name, value in _first(_pairs(title, entries, everything), everything):
            shown_rows.add_row(Text(name, style="bold"), Text(value))
    yield shown_rows
    yield from reasons("carried along, not supported", report.unsupported, everything)


@blocks.register
def _(report: DiffReport, everything: bool) -> Iterator[RenderableType]:
    worst = sorted(report.targets.items(), key=lambda item: -(_infinite(item[1].relative_error)))
    shown = worst if everything else worst[:_WORST]
    shown_rows = new_grid("target", "rank", "rel. error", "cosine", "overlap out", "in")
    for target, row in shown:
        numbers = (row.relative_error, row.cosine, row.output_overlap, row.input_overlap)
        shown_rows.add_row(*texts(target, f"{row.rank_a} | {row.rank_b}", *map(number, numbers)))
    if shown:
        total = number(report.total["relative_error"])
        shown_rows.add_row(*texts(f"all {len(worst)}", "", total, "", "", "", style="bold"))
        yield shown_rows
    if hidden := len(worst) - len(shown):
        yield Text(f"the {len(shown)} that differ most; {hidden} more with --all")
    for title, names in (("only in the first", report.only_in_a), ("only in the second", report.only_in_b)):
        yield from reasons(title, dict.fromkeys(names, ""), everything)
    yield from reasons("other tensors", report.extras, everything)
    verdict = "the same" if report.same else "different"
    yield Text(f"{verdict}, at a tolerance of {report.tolerance:g}", style="bold green" if report.same else "bold red")


@blocks.register
def _(report: DeltaReport, everything: bool) -> Iterator[RenderableType]:
    if everything:
        shown_rows = new_grid("parameter", "shape")
        for name, shape in report.parameters.items():
            shown_rows.add_row(*texts(name, " x ".join(map(str, shape))))
        yield shown_rows
    yield from reasons("left out", report.skipped, everything)


@blocks.register
def _(report: ExtractReport, everything: bool) -> Iterator[RenderableType]:
    if everything:
        shown_rows = new_grid("target", "rank", "change %", "error %", "rounding %")
        for name, t in report.targets.items():
            shares = (percent(t.relative_change), percent(t.relative_error), percent(t.noise))
            shown_rows.add_row(*texts(name, str(t.rank), *shares))
        yield shown_rows
    total = report.total
    form = f"rank up to {total['rank_out']}" if total["rank_out"] else "one bit to a number"
    yield Text(
        f"{len(report.targets)} matrices, {form}, relative error "
        f"{number(total['relative_error'])}; {report.unchanged} parameters unchanged"
    )
    left = {name: f"changed by {percent(share)} %, and no LoRA holds it" for name, share in report.left_out.items()}
    yield from reasons("left out", left, everything)


@blocks.register
def _(report: FuseReport, everything: bool) -> Iterator[RenderableType]:
    if everything:
        shown_rows = new_grid("parameter", "from", "change %", "lost to rounding %")
        for name, p in report.parameters.items():
            shown_rows.add_row(*texts(name, ", ".join(p.sources), percent(p.relative_change), percent(p.lost)))
        yield shown_rows
    total = report.total
    yield Text(
        f"{len(report.parameters)} parameters changed by {percent(total['relative_change'])} %, of which rounding took "
        f"{percent(total['lost'])} %"
    )
    yield from reasons("left out", report.skipped, everything)


@blocks.register
def _(report: ConvertReport, everything: bool) -> Iterator[RenderableType]:
    model = f" ({report.model})" if report.model else ""
    yield Text(f"{report.source_format} -> {report.format}{model}", style="bold")
    if everything:
        shown_rows = new_grid("target", "from", "rule", "family", "rank")
        for name, t in report.targets.items():
            shown_rows.add_row(*texts(name, ", ".join(t.sources), t.rule, t.family, str(t.rank)))
        yield shown_rows
    rules = Counter(t.rule for t in report.targets.values())
    yield Text(f"names: {counted(rules, 4)}")
    keys = report.keys
    yield Text(
        f"keys: {keys['updates']} of updates, {keys['scales']} scales, {keys['carried']} carried over, "
        f"{keys['dropped']} dropped"
    )
    actions = [(name, t, action) for name, t in report.targets.items() for action in t.actions]
    if everything:
        for name, t, action in actions:
            error = "" if t.relative_error is None else f", relative error {number(t.relative_error)}"
            yield _indented(f"{name}: {action}{error}")
    else:
        for kind, count in Counter(_kind_of_action(action) for _, _, action in actions).items():
            yield Text(f"rewritten: {kind}, {count} targets")
    errors = [t.relative_error for t in report.targets.values() if t.relative_error is not None]
    if errors:
        yield Text(f"relative error: {span(errors, number)} for {len(errors)} approximated targets")
    yield from reasons("dropped", report.dropped, everything)


def _kind_of_action(action: str) -> str:
    """What was done, without the name of what it was done to."""
    return "rows of a fused projection" if action.startswith("rows of ") else action


def _indented(text: str) -> RenderableType:
    return Padding(Text(text), (0, 0, 0, 2))


@blocks.register
def _(report: CheckReport, everything: bool) -> Iterator[RenderableType]:
    for finding in report.findings:
        kind = {"refused": "refused", "wrong": "computed wrongly", "old": "a problem in old versions"}[finding.severity]
        more = f" and {finding.count - len(finding.where)} more" if finding.count > len(finding.where) else ""
        yield Text.assemble((finding.requirement, "bold"), f": {kind}: {finding.reason}")
        yield _indented(f"here: {', '.join(map(plain, finding.where))}{more}")
        yield _indented(f"fix: {finding.fix}")
        if everything:
            yield _indented(f"source: {finding.source}")
    if everything and report.met:
        yield Text(f"met: {', '.join(report.met)}")
    if report.setting and report.loads:
        yield Text(f"start the server with {report.setting}")
    verdict = f"loads in {report.title}" if report.loads else f"does not work in {report.title}"
    yield Text(verdict, style="bold green" if report.loads else "bold red")


@blocks.register
def _(report: FormatsReport, everything: bool) -> Iterator[RenderableType]:
    for name, dialect in report.formats.items():
        how = f"read; written with {', '.join(dialect.writes)}" if dialect.writes else "read"
        yield Text.assemble((name, "bold"), f": {how}")
        yield Text(f"  {dialect.summary}")


@blocks.register
def _(report: FamiliesReport, everything: bool) -> Iterator[RenderableType]:
    yield from render_families(report)


@blocks.register
def _(report: BakeoffReport, everything: bool) -> Iterator[RenderableType]:
    yield from render_bakeoff(report, everything=everything)


@blocks.register
def _(report: ReparameterizeReport, everything: bool) -> Iterator[RenderableType]:
    yield from render_reparameterize(report, everything=everything)


@blocks.register
def _(report: HubListReport, everything: bool) -> Iterator[RenderableType]:
    yield from render_hub_list(report, everything=everything)


@blocks.register
def _(report: HubRunReport, everything: bool) -> Iterator[RenderableType]:
    yield from render_hub_run(report, everything=everything)


@blocks.register
def _(report: HubSimilarReport, everything: bool) -> Iterator[RenderableType]:
    yield from render_hub_similar(report, everything=everything)


@blocks.register
def _(report: HubPlanReport, everything: bool) -> Iterator[RenderableType]:
    yield from render_hub_plan(report)


@blocks.register
def _(report: CatalogReport, everything: bool) -> Iterator[RenderableType]:
    yield from render_catalog(report, everything=everything)


@blocks.register
def _(report: PackReport, everything: bool) -> Iterator[RenderableType]:
    yield from render_pack(report, everything=everything)


@blocks.register
def _(report: PackAddReport, everything: bool) -> Iterator[RenderableType]:
    yield from render_pack_add(report)


@blocks.register
def _(report: UnpackReport, everything: bool) -> Iterator[RenderableType]:
    yield from render_unpack(report)


@blocks.register
def _(report: CacheReport, everything: bool) -> Iterator[RenderableType]:
    shown = report.entries if everything else report.entries[:_WORST]
    if shown:
        shown_rows = new_grid("weight", "size")
        for entry in shown:
            shown_rows.add_row(*texts(entry.name, format_size(entry.bytes)))
        yield shown_rows
    if more := len(report.entries) - len(shown):
        yield Text(f"... and {more} more; see --all")
    freed = "" if report.freed is None else f", {format_size(report.freed)} freed"
    yield Text(f"{plain(report.folder)}: {len(report.entries)} weights, {format_size(report.bytes)}{freed}")


def _pairs(title: str, entries: Mapping[str, object], everything: bool) -> Iterator[tuple[str, str]]:
    for name, value in entries.items():
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        spelt = f"{plain(name)} = {plain(text)}"
        yield title, spelt if everything else shortened(spelt, _VALUE)


def _first(pairs: Iterator[tuple[str, str]], everything: bool, limit: int = 16) -> Iterator[tuple[str, str]]:
    last = ""
    for i, (title, text) in enumerate(pairs):
        if i == limit and not everything:
            yield "", "... more with --all"
            return
        yield "" if title == last else title, text
        last = title


def _made_by(record: Mapping[str, object] | None) -> str:
    if record is None:
        return ""
    arguments = record.get("arguments")
    spelt = ", ".join(f"{k} {v}" for k, v in arguments.items()) if isinstance(arguments, dict) else ""
    return f"loratools {record.get('version', '')} {record.get('verb', '')}: {spelt}"


def _infinite(error: float | None) -> float:
    return float("inf") if error is None else error
