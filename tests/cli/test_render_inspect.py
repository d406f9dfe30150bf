"""The terminal view: it fits, it degrades, and names cannot harm the terminal."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from loratools.base_weights import load_base
from loratools.files import load
from loratools.ops.inspect import inspect
from loratools.reports.inspect import InspectReport
from loratools_cli.render_inspect import render_inspect, sparkline

Samples = Callable[[str], Path]


def shown(
    report: InspectReport, *, width: int = 80, every: bool = False, encoding: str = "utf-8", color: bool = False
) -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)  # strict: what cannot be encoded raises
    console = Console(
        file=stream, width=width, force_terminal=color, legacy_windows=False, no_color=not color, _environ={}
    )
    console.print(render_inspect(report, width, every=every))
    stream.flush()
    return raw.getvalue().decode(encoding)


@pytest.fixture(scope="module")
def unet(samples: Samples) -> InspectReport:
    return inspect(load(samples("kohya/sd15_unet_te") / "lora.safetensors"), nested=True)


@pytest.fixture(scope="module")
def small(samples: Samples) -> InspectReport:
    return inspect(load(samples("peft/lora_plain")))


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_line_is_wider_than_asked(unet: InspectReport, small: InspectReport, width: int, every: bool) -> None:
    for report in (unet, small):
        text = shown(report, width=width, every=every)
        assert max(cell_len(line) for line in text.splitlines()) <= width
        assert "\x1b" not in text


def test_every_target_has_a_row_when_few_or_asked_for(unet: InspectReport, small: InspectReport) -> None:
    assert "Module types" not in shown(small)
    assert "layers.0.self_attn.q_proj" in shown(small, width=200).replace("0.self_attn", "layers.0.self_attn")
    grouped, full = shown(unet), shown(unet, every=True)
    for heading in ("Module types", "Layers", "Effective rank by depth", "Most compressible", "Least compressible"):
        assert heading in grouped
        assert heading not in full
    assert len(full.splitlines()) >= len(unet.targets)
    assert "Footprint" in full
    assert "MiB" in full


def test_numbers_are_those_of_the_report(small: InspectReport) -> None:
    row = next(line for line in shown(small, width=120).splitlines() if "0.self_attn.q_proj" in line)
    numbers = small.targets["model.layers.0.self_attn.q_proj"]
    assert f"{numbers.effective_rank:.1f}" in row
    assert f"{int(numbers.energy[1] * 100)}" in row.split()


def test_relative_norms_and_the_base(samples: Samples) -> None:
    path = samples("peft/lora_plain")
    report = inspect(load(path), base=load_base(path / "base.safetensors"))
    text = shown(report)
    numbers = report.targets["model.layers.0.self_attn.q_proj"]
    assert f"{numbers.relative_norm:.2%}" in text
    assert "adapter + base" in text


def test_ascii_alone(unet: InspectReport) -> None:
    for every in (False, True):
        assert shown(unet, encoding="ascii", every=every).isascii()


def test_names_cannot_reach_the_terminal(small: InspectReport) -> None:
    evil = "[red]\x1b]0;owned\x07\n\u202e\r[/red]a"
    target = next(iter(small.targets.values()))
    targets = {f"{evil}{i}": replace(target, layer=f"{i}{evil}", module=evil) for i in range(30)}
    modules, layers = {evil: small.total}, {f"{i}{evil}": small.total for i in range(30)}
    listed = tuple(targets)[:3]
    report = replace(
        small,
        path=f"/tmp/{evil}.safetensors",
        format=evil,
        targets=targets,
        modules=modules,
        layers=layers,
        most_compressible=listed,
        least_compressible=listed,
        warnings=(evil,),
    )
    for every in (False, True):
        for encoding in ("utf-8", "ascii"):
            text = shown(report, every=every, encoding=encoding, width=160)
            assert not set(text) & {"\x1b", "\x07", "\u202e", "\r"}
            assert "[red]" in text  # as text, not as markup


def test_colour_is_the_consoles_choice(small: InspectReport) -> None:
    assert "\x1b[" in shown(small, color=True)
    assert "\x1b[" not in shown(small)


def test_sparkline_is_logarithmic() -> None:
    assert sparkline([1.0, 0.1, 0.01, 0.001]) == "█▆▃▁"
    assert sparkline([5.0, 5.0]) == "██"
    assert sparkline([1.0, 0.0]) == "█▁"
    assert sparkline([0.0]) == sparkline([]) == ""
    assert len(sparkline([2.0**-i for i in range(64)])) == 8
