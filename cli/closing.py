"""The last line of what a command prints: what was written, if anything was."""

from __future__ import annotations

from functools import singledispatch
from pathlib import Path

from loratools.reports.calibrate import CalibrateReport
from loratools.reports.check import CheckReport
from loratools.reports.convert import ConvertReport
from loratools.reports.delta import DeltaReport
from loratools.reports.extract import ExtractReport
from loratools.reports.fuse import FuseReport
from loratools.reports.hub import CatalogReport
from loratools.reports.intruders import IntrudersReport
from loratools.reports.merge import MergeReport
from loratools.reports.mixture import MixtureReport
from loratools.reports.pack import PackAddReport, PackReport, UnpackReport
from loratools.reports.prune_neurons import PruneNeuronsReport
from loratools.reports.quantize import QuantizeReport
from loratools.reports.recover import RecoverReport
from loratools.reports.reparameterize import ReparameterizeReport
from loratools.reports.resize import ResizeReport
from loratools.reports.route import RouteFitReport, RouteReport
from loratools.reports.squeeze import SqueezeReport
from loratools.reports.transfer import KitReport, TransferReport
from loratools.reports.weight_transfer import WeightTransferReport
from loratools.sizes import format_size
from loratools_cli.text import percent, plain, sizes


@singledispatch
def closing(report: object, planned: Path | None = None) -> str:
    """The last line: what was written, if anything was."""
    return ""


@closing.register(SqueezeReport)
@closing.register(QuantizeReport)
@closing.register(ReparameterizeReport)
def _(report: SqueezeReport | QuantizeReport | ReparameterizeReport, planned: Path | None = None) -> str:
    before, after = int(report.total["bytes_before"] or 0), int(report.total["bytes_after"] or 0)
    share = f", {percent(after / before)} % of it" if before else ""
    if planned is not None:
        return f"dry run, {plain(planned)} was not written: {sizes(before, after)} of tensors{share}\n"
    return f"wrote {plain(report.output)}: {sizes(before, after)}{share}\n"


@closing.register
def _(report: PruneNeuronsReport, planned: Path | None = None) -> str:
    size = sizes(report.total["bytes_before"], report.total["bytes_after"])
    if planned is not None:
        return f"dry run, {plain(planned)} was not written: {size} of tensors\n"
    return f"wrote {plain(report.output)}: {size} of tensors\n"


@closing.register
def _(report: RecoverReport, planned: Path | None = None) -> str:
    return f"wrote {plain(report.output)}: {sizes(report.bytes_before, report.bytes_after)}\n"


@closing.register
def _(report: CalibrateReport, planned: Path | None = None) -> str:
    seen = f"from {report.tokens} tokens of {report.texts} texts" if report.tokens else "from the base's norms alone"
    seen += ", the adapter not applied" if report.bare else ""
    return f"wrote {plain(report.output)}: {len(report.targets)} targets, {format_size(report.bytes)}, {seen}\n"


@closing.register
def _(report: TransferReport, planned: Path | None = None) -> str:
    what = f"{report.method} of rank {report.rank}, {format_size(report.bytes)}"
    return f"wrote {plain(report.output)}: {what}; stages in {plain(report.work)}\n"


@closing.register
def _(report: WeightTransferReport, planned: Path | None = None) -> str:
    return f"wrote {plain(report.output)}: {len(report.targets)} targets, {format_size(report.bytes)}\n"


@closing.register
def _(report: KitReport, planned: Path | None = None) -> str:
    return f"wrote {plain(report.output)}: a discriminator and {report.seeds} seeds\n"


@closing.register
def _(report: DeltaReport, planned: Path | None = None) -> str:
    return f"wrote {plain(report.output)}: {len(report.parameters)} tensors, {format_size(report.bytes)}\n"


@closing.register
def _(report: ExtractReport, planned: Path | None = None) -> str:
    size = format_size(int(report.total["bytes"]))
    if planned is not None:
        return f"dry run, {plain(planned)} was not written: {size} of tensors\n"
    return f"wrote {plain(report.output)}: {size} of tensors\n"


@closing.register
def _(report: FuseReport, planned: Path | None = None) -> str:
    return f"wrote {plain(report.output)}: {len(report.files)} files, {format_size(report.bytes)} of weights\n"


@closing.register
def _(report: MergeReport, planned: Path | None = None) -> str:
    size = format_size(int(report.total["bytes"]))
    if planned is not None:
        return f"dry run, {plain(planned)} was not written: {size} of tensors\n"
    return f"wrote {plain(report.output)}: {size} of tensors\n"


@closing.register
def _(report: ConvertReport, planned: Path | None = None) -> str:
    size = sizes(report.bytes_before, report.bytes_after)
    if planned is not None:
        return f"dry run, {plain(planned)} was not written: {len(report.targets)} targets, {size} of tensors\n"
    return f"wrote {plain(report.output)}: {len(report.targets)} targets, {size}\n"


@closing.register
def _(report: ResizeReport, planned: Path | None = None) -> str:
    size = sizes(report.bytes_before, report.bytes_after)
    if planned is not None:
        return f"dry run, {plain(planned)} was not written: {size} of tensors\n"
    return f"wrote {plain(report.output)}: {len(report.targets)} targets resized, {size}\n"


@closing.register
def _(report: CheckReport, planned: Path | None = None) -> str:
    if planned is not None:
        return f"dry run, {plain(planned)} was not written\n"
    return f"wrote {plain(report.output)}\n" if report.output else ""


@closing.register
def _(report: IntrudersReport, planned: Path | None = None) -> str:
    if planned is not None:
        return f"dry run, {plain(planned)} was not written\n"
    return f"wrote {plain(report.output)}\n" if report.output else ""


@closing.register
def _(report: MixtureReport, planned: Path | None = None) -> str:
    if report.output is None or report.merged_error is None:
        return ""
    return f"wrote {plain(report.output)}: relative error {report.merged_error:.3g}\n"


@closing.register(RouteReport)
@closing.register(RouteFitReport)
def _(report: RouteReport | RouteFitReport, planned: Path | None = None) -> str:
    return f"wrote {plain(report.output)}\n" if report.output else ""


@closing.register
def _(report: CatalogReport, planned: Path | None = None) -> str:
    return f"wrote {plain(report.output)}: {sum(report.counts.values())} rows\n"


@closing.register
def _(report: PackReport, planned: Path | None = None) -> str:
    share = percent(report.bytes_after / report.bytes_before) if report.bytes_before else "0"
    return f"wrote {plain(report.output)}: {sizes(report.bytes_before, report.bytes_after)}, {share} % of it\n"


@closing.register
def _(report: PackAddReport, planned: Path | None = None) -> str:
    name, size = plain(report.adapter.name), sizes(report.bytes_before, report.bytes_after)
    return f"added {name} to {plain(report.output)}: {size}\n"


@closing.register
def _(report: UnpackReport, planned: Path | None = None) -> str:
    return f"wrote {plain(report.output)}: {format_size(report.bytes)}\n"
