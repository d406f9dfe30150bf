"""The figure of a comparison: written, deterministic, and drawable whatever the names are."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from compare_reports import CALM, HOSTILE, compare_report, gaps

from loratools.errors import AdapterError, MissingExtraError, OutputError, UsageError
from loratools.reports.plot_compare import plot_compare


def words(path: Path) -> str:
    """What an SVG says: matplotlib leaves each text as a comment beside its outlines."""
    return path.read_text(encoding="utf-8")


def test_png_and_svg(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = compare_report(layers=4)
    assert plot_compare(report, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    svg = plot_compare(report, tmp_path / "a.svg")
    assert ET.fromstring(svg.read_text()).tag.endswith("svg")
    assert all(f"<!-- {name}: relative norm by layer and module -->" in words(svg) for name in CALM)
    assert "<!-- Overlap, q_proj, output side -->" in words(svg)
    file = plot_compare(replace(report, base="models/llama/model.safetensors"), tmp_path / "b.svg")
    assert "<!-- 3 fine-tunes of llama -->" in words(file)


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_same_report_gives_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    report = compare_report(HOSTILE, layers=2)
    first, second = (plot_compare(report, tmp_path / f"{i}.{suffix}").read_bytes() for i in range(2))
    assert first == second


def test_gaps_one_layer_and_more_fine_tunes_than_maps(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bare = plot_compare(gaps(compare_report(layers=2)), tmp_path / "gaps.svg")  # no map is left to draw
    assert "Overlap" not in words(bare)
    assert "relative norm by" not in words(bare)
    plot_compare(compare_report(["one"], layers=1, modules=("a",), rank=1), tmp_path / "one.svg")
    many = plot_compare(compare_report([f"t{i}" for i in range(8)], layers=1, modules=("a",)), tmp_path / "many.svg")
    assert "maps of the first 6" in words(many)
    assert words(many).count("relative norm by layer") == 6


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    report = compare_report(layers=1)
    with pytest.raises(UsageError, match=r"\.png or \.svg"):
        plot_compare(report, tmp_path / "a.pdf")
    (tmp_path / "a.png").write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists already"):
        plot_compare(report, tmp_path / "a.png")
    with pytest.raises(AdapterError, match="nothing to plot"):
        plot_compare(replace(report, fine_tunes={}), tmp_path / "b.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'loratools\[plot\]'"):
        plot_compare(report, tmp_path / "b.png")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
