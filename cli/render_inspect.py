"""The terminal view of an inspection: what an adapter changes, at a glance."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.console import Group as RenderGroup
from rich.constrain import Constrain
from rich.table import Table
from rich.text import Text

from loratools.reports.inspect import Group, TargetNumbers, group

if TYPE_CHECKING:
    from loratools.reports.inspect import Bytes, InspectReport, Nested

GROUP_ABOVE = 24  # targets
_DECADES = 3  # that the sparkline of a spectrum spans below the largest value
_SPARK = 8  # columns
_RANGES = 8  # rows of layer ranges
_LISTED = 3
_MIN_NAME = 18  # columns, before energies are left out to make room


@dataclass(frozen=True)
class _Signs:
    blocks: str
    blank: str  # no value
    ellipsis: str
    dot: str
    times: str
    dash: str
    unprintable: str
    delta: str
    relative: str


_UNICODE = _Signs("▁▂▃▄▅▆▇█", "·", "…", " · ", "×", "–", "\N{REPLACEMENT CHARACTER}", "‖Δ‖", "‖Δ‖/‖W‖")
_ASCII = _Signs("_.-=+*#@", " ", "~", " | ", "x", "-", "?", "norm", "norm/W")


@dataclass(frozen=True)
class _Row:
    name: str
    count: str
    numbers: Group


def render_inspect(report: InspectReport, width: int, *, every: bool = False) -> RenderableType:
    """The view, `width` columns wide; many targets are grouped unless `every` asks for one row each.

    Falls back to ASCII where the console's encoding has no blocks; colour is left to the console.
    """
    return _View(report, width, every)


@dataclass(frozen=True)
class _View:
    report: InspectReport
    width: int
    every: bool

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        width = min(self.width, options.max_width)
        signs = _ASCII if options.ascii_only else _UNICODE
        yield Constrain(RenderGroup(*_blocks(self.report, width, self.every, signs)), width)


def _blocks(report: InspectReport, width: int, every: bool, signs: _Signs) -> Iterator[RenderableType]:
    yield from _header(report, width, signs)
    if report.targets and (every or len(report.targets) <= GROUP_ABOVE):
        yield from _targets("Targets", list(report.targets), report, width, signs)
    elif report.targets:
        modules = [_Row(name, f"{signs.times}{g.targets}", g) for name, g in report.modules.items()]
        yield from _section("Module types", _table(modules, "", width, signs))
        yield from _section("Layers", _table(_layer_ranges(report, signs), "", width, signs))
        yield from _depth(report, width, signs)
        yield from _targets("Most compressible", report.most_compressible[:_LISTED], report, width, signs)
        yield from _targets("Least compressible", report.least_compressible[:_LISTED], report, width, signs)
    if report.targets:
        yield Text()
        yield Text(_legend(report, signs), style="dim")
    if report.nested:
        yield from _section("Order of the components", *_nested(report.nested, signs))
    yield from _section("Footprint", _footprint(report, signs))
    yield from _notes(report, signs)


def _section(title: str, *blocks: RenderableType) -> Iterator[RenderableType]:
    yield Text()
    yield Text(title, style="bold")
    yield from blocks


def _header(report: InspectReport, width: int, signs: _Signs) -> Iterator[RenderableType]:
    path = Path(report.path) if report.path else None
    name = "adapter" if path is None else path.parent.name if path.stem == "adapter_model" else path.name
    yield Text(_fit(name, width - 1, signs), style="bold cyan")
    total = report.total
    scales = [t.scale for t in report.targets.values()]
    mixed = len(report.families) > 1
    facts = [
        report.format + (f" in {report.container}" if report.container else ""),
        ", ".join(f"{family} {signs.times}{n}" if mixed else family for family, n in report.families.items()),
        f"{total.targets} target{'s' * (total.targets != 1)}",
        f"rank {_span(total.rank_min, total.rank_max, signs)}",
    ]
    if scales:
        facts.append(f"scale {_span(min(scales), max(scales), signs)}")
        facts.append(f"{signs.delta}={total.norm:.4g}")
    yield Text(_clean(signs.dot.join(fact for fact in facts if fact), signs))


def _span(low: float, high: float, signs: _Signs) -> str:
    return f"{low:.4g}" if low == high else f"{low:.4g}{signs.dash}{high:.4g}"


def _targets(
    title: str, names: Sequence[str], report: InspectReport, width: int, signs: _Signs
) -> Iterator[RenderableType]:
    if not names:
        return
    common = _common_path(list(report.targets))
    rows = [_Row(name[len(common) :], str(report.targets[name].rank), group([report.targets[name]])) for name in names]
    told = common.rstrip("._")
    where = "" if told in ("", "lora", "lycoris") else _fit(f" in {told}", max(8, width - len(title)), signs)
    yield Text()
    yield Text.assemble((title, "bold"), (where, "dim"))
    yield _table(rows, "rank", width, signs)


def _common_path(names: Sequence[str]) -> str:
    """What all names begin with, up to a dot, or to an underscore in flattened names."""
    first, last = min(names), max(names)
    equal = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
    shared = first[:equal]
    return shared[: shared.rfind("." if "." in first else "_") + 1]


def _table(rows: Sequence[_Row], count: str, width: int, signs: _Signs) -> Table:
    has_base = any(row.numbers.mean_relative_norm is not None for row in rows)
    norm = signs.relative if has_base else signs.delta
    counts = max(len(count), *(len(row.count) for row in rows))
    fixed = counts + _SPARK + 5 + 5 + 4 + max(7, len(norm)) + 6
    longest = max(cell_len(_clean(row.name, signs)) for row in rows)
    ranks = sorted({k for row in rows for k in row.numbers.energy if k < row.numbers.rank_max and k & (k - 1) == 0})
    while ranks and fixed + sum(len(str(k)) + 2 for k in ranks) + min(longest, _MIN_NAME) > width:
        ranks.pop()
    room = max(6, width - fixed - sum(max(3, len(str(k)) + 1) + 1 for k in ranks))
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim", show_edge=False)
    table.add_column("", no_wrap=True, width=min(longest, room))
    table.add_column(count, no_wrap=True, justify="right", width=counts, style="dim")
    table.add_column("spectrum", no_wrap=True, width=_SPARK, style="cyan")
    for k in ranks:
        table.add_column(f"@{k}", no_wrap=True, justify="right", width=max(3, len(str(k)) + 1))
    for title, columns in (("r95", 4), ("erank", 5), ("srank", 5), (norm, max(7, len(norm)))):
        table.add_column(title, no_wrap=True, justify="right", width=columns)
    for row in rows:
        g = row.numbers
        ranked = (g.mean_compressible_rank_95, g.mean_effective_rank, g.mean_stable_rank)
        moving = g.zero < g.targets
        table.add_row(
            Text(_fit(row.name, min(longest, room), signs)),
            row.count,
            sparkline(g.spectrum, signs.blocks) if moving else "zero",
            *(_share(g, k) if moving else "" for k in ranks),
            *((_number(v) if moving else "") for v in ranked),
            _norm(g, has_base),
        )
    return table


def _share(numbers: Group, rank: int) -> Text:
    """Per cent of the energy at a rank, rounded down so that 100 means all of it."""
    share = max((e for k, e in numbers.energy.items() if k <= rank), default=0.0)
    style = "bold green" if share >= 0.95 else "green" if share >= 0.8 else "yellow" if share >= 0.5 else "dim"
    return Text(str(math.floor(share * 100 + 1e-9)), style=style)


def _norm(numbers: Group, has_base: bool) -> str:
    if not has_base:
        return f"{numbers.mean_norm:#.3g}".rstrip(".")
    return "" if numbers.mean_relative_norm is None else f"{numbers.mean_relative_norm:.2%}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 or value == round(value) else f"{value:.1f}"


def sparkline(spectrum: Sequence[float], blocks: str = _UNICODE.blocks) -> str:
    """Singular values relative to the largest, on a log scale; a long spectrum is sampled evenly."""
    top = max(spectrum, default=0.0)
    count = min(len(spectrum), _SPARK)
    if top == 0.0:
        return ""
    sampled = [spectrum[round(i * (len(spectrum) - 1) / max(1, count - 1))] for i in range(count)]
    levels = [1 + math.log10(s / top) / _DECADES if s > 0 else 0.0 for s in sampled]
    return "".join(_block(level, blocks) for level in levels)


def _block(level: float, blocks: str) -> str:
    """The block for a height in [0, 1]."""
    return blocks[max(0, min(len(blocks) - 1, math.floor(level * len(blocks))))]


def _layer_ranges(report: InspectReport, signs: _Signs) -> list[_Row]:
    """Neighbouring layers of one stage put together, so that few rows remain."""
    size = max(1, -(-len(report.layers) // _RANGES))
    ranges: list[list[str]] = []
    for layer in report.layers:
        stage = layer.rpartition(".")[0]
        fits = ranges and len(ranges[-1]) < size and ranges[-1][0].rpartition(".")[0] == stage
        if fits and "other" not in (layer, ranges[-1][0]):
            ranges[-1].append(layer)
        else:
            ranges.append([layer])
    members: dict[str, list[TargetNumbers]] = {}
    for target in report.targets.values():
        members.setdefault(target.layer, []).append(target)
    rows = []
    for layers in ranges:
        name = layers[0] if len(layers) == 1 else f"{layers[0]}{signs.dash}{layers[-1].rpartition('.')[2]}"
        numbers = group(target for layer in layers for target in members[layer])
        rows.append(_Row(name, f"{signs.times}{numbers.targets}", numbers))
    return rows


def _depth(report: InspectReport, width: int, signs: _Signs) -> Iterator[RenderableType]:
    """Effective rank by module type, one block for each layer (or for a few neighbours)."""
    layers = [layer for layer in report.layers if layer != "other"]
    if len(layers) < 3:
        return
    names = max(cell_len(_clean(module, signs)) for module in report.modules)
    names = min(names, 20)
    columns = max(1, min(len(layers), width - names - 16))
    place = {layer: i * columns // len(layers) for i, layer in enumerate(layers)}
    cells: dict[str, dict[int, list[float]]] = {module: {} for module in report.modules}
    for t in report.targets.values():
        if t.layer in place and t.spectral_norm > 0:
            cells[t.module].setdefault(place[t.layer], []).append(t.effective_rank)
    means = {module: {x: sum(v) / len(v) for x, v in row.items()} for module, row in cells.items() if row}
    if not means:
        return
    low, high = (pick(v for row in means.values() for v in row.values()) for pick in (min, max))
    span = high - low or 1.0
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_header=False)
    table.add_column(no_wrap=True, width=names)
    table.add_column(no_wrap=True, width=columns)
    table.add_column(no_wrap=True, style="dim")
    for module, row in means.items():
        strip = Text()
        for x in range(columns):
            level = (row[x] - low) / span if x in row else None
            strip.append(signs.blank if level is None else _block(level, signs.blocks), _shade(level))
        ends = f"{_number(min(row.values()))}{signs.dash}{_number(max(row.values()))}"
        table.add_row(Text(_fit(module, names, signs)), strip, ends)
    first, last = (_clean(layers[i], signs) for i in (0, -1))
    yield Text()
    where = _fit(f"  layer {first} to {last}", max(8, width - 24), signs)
    yield Text.assemble(("Effective rank by depth", "bold"), (where, "dim"))
    yield table


def _shade(level: float | None) -> str:
    if level is None:
        return "dim"
    return ("blue", "cyan", "green", "yellow", "bright_yellow")[max(0, min(4, math.floor(level * 5)))]


def _legend(report: InspectReport, signs: _Signs) -> str:
    parts = [
        f"spectrum: singular values, log scale, {_DECADES} decades",
        "@k: % of energy in rank k",
        "r95: rank for 95 %",
        "erank, srank: effective, stable rank",
    ]
    return signs.dot.join(parts + ["groups: means"] * (len(report.targets) > GROUP_ABOVE))


def _nested(nested: Nested, signs: _Signs) -> Iterator[RenderableType]:
    style = "green" if nested.verdict.startswith("nested") else "yellow"
    line = Text.assemble((nested.verdict, style))
    if nested.ratio is not None:
        line.append(f": the first k components err {nested.ratio:.3g} {signs.times} as much as the best rank k")
        if nested.verdict == "undecided":
            line.append(", but so do any others")
    yield line
    if nested.total:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for title in ("rank", "first k", "best (SVD)", "ratio", "random k", "rescaled", "multiplier"):
            table.add_column(title, justify="right", no_wrap=True)
        for rank, e in nested.total.items():
            values = (e.prefix, e.best, e.ratio, e.random, e.rescaled, e.multiplier)
            table.add_row(str(rank), *("" if v is None else f"{v:.3f}" for v in values))
        yield table
    yield Text(f"relative errors; {nested.criterion}", style="dim")
    if nested.skipped:
        target, reason = next(iter(nested.skipped.items()))
        told = f"{len(nested.skipped)} targets have no prefix; first: {target}: {reason}"
        yield Text(_clean(told, signs), style="dim")


def _footprint(report: InspectReport, signs: _Signs) -> Table:
    f = report.footprint
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in ("", "parameters", "MiB", "MB"):
        table.add_column(title, no_wrap=bool(title), justify="right" if title else "left")
    rows: list[tuple[str, int | None, Bytes | None]] = [
        ("adapter", f.trainable_parameters, f.adapter),
        ("adapter file", None, f.file),
        ("base", f.base_parameters, f.base),
        ("adapter + base", None, f.adapter_and_base),
        ("to train: gradients", None, f.gradients),
        (f"to train: Adam, 2 {signs.times} float32", None, f.adam_state),
    ]
    for name, parameters, size in rows:
        if size is not None:
            count = "" if parameters is None else f"{parameters:,}"
            table.add_row(name, count, _size(size.mib), _size(size.mb))
    return table


def _size(value: float) -> str:
    return f"{value:,.2f}" if value >= 1 else f"{value:.3g}"


def _notes(report: InspectReport, signs: _Signs) -> Iterator[RenderableType]:
    notes = list(report.warnings)
    if extras := report.keys.get("extras"):
        notes.append(f"{extras} tensors belong to no target and are carried along")
    if notes:
        yield Text()
    for note in notes:
        yield Text.assemble(("! ", "bold yellow"), _clean(note, signs))


def _clean(text: str, signs: _Signs) -> str:
    """Without control characters and, on a console that has ASCII alone, without anything else."""
    ascii_only = signs is _ASCII
    return "".join(c if c.isprintable() and (c.isascii() or not ascii_only) else signs.unprintable for c in text)


def _fit(text: str, width: int, signs: _Signs) -> str:
    """At most `width` columns, shortened in the middle."""
    text = _clean(text, signs)
    if cell_len(text) <= width:
        return text
    head, tail = "", ""
    for i in range(len(text)):  # from both ends by turns, the end first: it says what the module is
        if cell_len(tail) <= cell_len(head):
            longer = (head, text[len(text) - len(tail) - 1] + tail)
        else:
            longer = (head + text[len(head)], tail)
        if cell_len(longer[0]) + cell_len(longer[1]) + 1 > width:
            break
        head, tail = longer
    return head + signs.ellipsis + tail
