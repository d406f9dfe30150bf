"""Figures: what is written where, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from loratools.base_weights import load_base
from loratools.errors import AdapterError, MissingExtraError, OutputError, UsageError
from loratools.files import load
from loratools.ops.inspect import inspect
from loratools.reports.inspect import InspectReport
from loratools.reports.plot_inspect import plot_spectra


@pytest.fixture(scope="module")
def report(samples: Callable[[str], Path]) -> InspectReport:
    path = samples("peft/lora_all_linear")
    return inspect(load(path), base=load_base(path / "base.safetensors"))


def test_png_and_svg(report: InspectReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    png = plot_spectra(report, tmp_path / "a.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert ET.fromstring(plot_spectra(report, tmp_path / "A.SVG").read_text()).tag.endswith("svg")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["A.SVG", "a.png"]


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_same_report_gives_the_same_bytes(report: InspectReport, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    first, second = (plot_spectra(report, tmp_path / f"{i}.{suffix}").read_bytes() for i in range(2))
    assert first == second


def test_many_modules_experts_and_strange_names(samples: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_spectra(inspect(load(samples("kohya/sd15_unet_te") / "lora.safetensors")), tmp_path / "unet.svg")
    report = inspect(load(samples("peft/moe_target_parameters")))
    targets = {name: replace(t, module="$x_{\x1b[31m") for name, t in report.targets.items()}
    plot_spectra(replace(report, targets=targets, path="/a/$^$/adapter_model.safetensors"), tmp_path / "odd.svg")
    plot_spectra(inspect(load(samples("peft/lora_conv2d")), target="lin0"), tmp_path / "one.svg")


def test_refusals(report: InspectReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(UsageError, match=r"\.png or \.svg"):
        plot_spectra(report, tmp_path / "a.pdf")
    taken = tmp_path / "a.png"
    taken.write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists already"):
        plot_spectra(report, taken)
    assert taken.read_bytes() == b"mine"
    plot_spectra(report, taken, force=True)
    assert taken.read_bytes() != b"mine"
    with pytest.raises(AdapterError, match="nothing to plot"):
        plot_spectra(replace(report, targets={}), tmp_path / "b.png")


def test_a_missing_matplotlib_names_the_install_line(
    report: InspectReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'loratools\[plot\]'"):
        plot_spectra(report, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
