"""The figure of intruders: written once, the same each time, whatever the names are."""

from __future__ import annotations

from pathlib import Path

import pytest

from loratools.errors import AdapterError, OutputError, UsageError
from loratools.reports.intruders import Count, IntrudersReport, Side, TargetIntruders
from loratools.reports.plot_intruders import plot_intruders

HOSTILE = "</svg><script>alert(1)</script> $x$ \x1b[31m\n\u202e"


def report(
    modules: tuple[str, ...] = ("q_proj", HOSTILE), layers: tuple[str, ...] = ("0", "1", "10", "2")
) -> IntrudersReport:
    targets = {}
    for module in modules:
        for i, layer in enumerate(layers):
            left = Side(1, (i % 3,), (0.2, 0.9, 0.7), (0.1, 0.9, 0.7), (0.1 * i, 0.9, 0.5))
            targets[f"{layer}.{module}"] = TargetIntruders(left, left, (3.0, 2.0, 1.0), 0.3, "dense", layer, module)
    ordered = sorted(layers, key=int)
    return IntrudersReport(
        top_k=4,  # one more than a matrix has
        epsilon=0.5,
        targets=targets,
        total={"targets": len(targets), "left": len(targets), "right": len(targets), "examined": 3 * len(targets)},
        sweep={},
        by_k={},
        layers={layer: Count(len(modules), 1, 1) for layer in ordered},
        modules={module: Count(len(layers), 1, 1) for module in modules},
        skipped={},
        warnings=(),
    )


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_same_report_gives_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    one, two = (plot_intruders(report(), tmp_path / f"{name}{suffix}") for name in "ab")
    assert one.read_bytes() == two.read_bytes()
    assert len(one.read_bytes()) > 5000


def test_layers_stand_in_the_order_of_the_model(tmp_path: Path) -> None:
    shuffled = report(layers=("10", "2", "1", "0"))
    sorted_ = report(layers=("0", "1", "2", "10"))
    drawn = [plot_intruders(r, tmp_path / f"{i}.svg").read_text() for i, r in enumerate((shuffled, sorted_))]
    ticks = [[line for line in text.splitlines() if line.strip().startswith("<!-- ")] for text in drawn]
    assert ticks[0] == ticks[1]


def test_names_are_text(tmp_path: Path) -> None:
    text = plot_intruders(report(), tmp_path / "a.svg").read_text()
    assert "<script" not in text
    assert "\x1b" not in text


@pytest.mark.parametrize("count", [1, 3, 30])
def test_any_number_of_modules(tmp_path: Path, count: int) -> None:
    assert plot_intruders(report(tuple(f"m{i}" for i in range(count))), tmp_path / "a.png").is_file()


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        plot_intruders(report(), tmp_path / "a.txt")
    (tmp_path / "a.png").write_text("mine")
    with pytest.raises(OutputError):
        plot_intruders(report(), tmp_path / "a.png")
    with pytest.raises(AdapterError, match="nothing to plot"):
        plot_intruders(report(modules=()), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_text() == "mine"
