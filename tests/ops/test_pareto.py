"""Rate-distortion curves: sizes and errors against files that the named commands write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ops.test_quantize import deltas, peft, relative, seen_by_inputs

import loratools
from loratools.adapter import Adapter
from loratools.errors import UsageError
from loratools.ops.measuring import marked, relative_error
from loratools.ops.pareto import pareto
from loratools.ops.quantize import Quantize, quantize
from loratools.ops.statistics import Statistics, fingerprint
from loratools.reports.pareto import ParetoReport, Point
from loratools_cli.app import main


def stats_of(adapter: Adapter) -> tuple[Statistics, dict[str, torch.Tensor]]:
    """Statistics of an adapter, and the (tokens, n) inputs of each target that they are of."""
    moments, means, inputs = {}, {}, {}
    for i, (target, update) in enumerate(adapter.items()):
        down = update.parameters()["down"].double()
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(300, down.shape[1], generator=generator, dtype=torch.float64)
        x = x * torch.logspace(0.7, -0.7, down.shape[1], dtype=torch.float64)
        inputs[target] = x
        moments[target], means[target] = (x @ down.T).T @ (x @ down.T) / len(x), x.square().mean(0)
    return Statistics(moments, means, 300, {t: fingerprint(u) for t, u in adapter.items()}), inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return peft(tmp_path_factory.mktemp("curves") / "in", rank=8, size=4)


@pytest.fixture(scope="module")
def report(folder: Path) -> ParetoReport:
    return pareto(loratools.load(folder), ("grid", "svd", "rtn", "delta-come"), ratios=(4, 8))


def test_a_point_is_what_its_command_writes(report: ParetoReport, folder: Path, tmp_path: Path) -> None:
    truth = deltas(loratools.load(folder))
    for i, point in enumerate(p for p in report.points if p.method in ("grid", "rtn")):
        place, less = tmp_path / f"{i}.safetensors", tmp_path / f"less{i}"
        for command in point.command.split(" && "):
            words = command.removeprefix("loratools ").replace("IN", str(folder)).replace("LESS", str(less)).split()
            assert main([*words, *([] if "-o" in words else ["-o", str(place)]), "--quiet"]) == 0
        assert place.stat().st_size == pytest.approx(point.bytes, abs=96), point  # two verbs leave a longer record
        assert relative(truth, deltas(loratools.load(place))) == pytest.approx(point.relative_error, rel=1e-3), point


def test_every_method_is_there_and_the_best_are_marked(report: ParetoReport) -> None:
    assert {p.method for p in report.points} == {"grid", "svd", "rtn", "delta-come"}
    assert [p.bytes for p in report.points] == sorted((p.bytes for p in report.points), reverse=True)
    for p in report.points:
        beaten = any(q.bytes <= p.bytes and q.relative_error < p.relative_error for q in report.points)
        assert p.best != beaten


def test_marking_by_hand() -> None:
    points = [
        Point("a", "", size, error, None, False, "") for size, error in ((10, 0.5), (20, 0.6), (30, 0.1), (30, 0.2))
    ]
    assert [(p.bytes, p.relative_error, p.best) for p in marked(points)] == [
        (30, 0.2, False),
        (30, 0.1, True),
        (20, 0.6, False),
        (10, 0.5, True),
    ]


def test_an_adapter_errs_nothing_against_itself(folder: Path) -> None:
    adapter = loratools.load(folder)
    assert relative_error(adapter, adapter) < 1e-7


def test_a_figure_and_a_table(report: ParetoReport, tmp_path: Path) -> None:
    from loratools.reports.frames import write_table
    from loratools.reports.plot_pareto import plot_pareto

    assert plot_pareto(report, tmp_path / "a.svg").read_bytes().startswith(b"<?xml")
    assert len(write_table(report, tmp_path / "a.csv").read_text().splitlines()) == len(report.points) + 1
    assert list(report.to_frame().columns) == list(report.columns)


def test_an_unknown_method_is_named(folder: Path) -> None:
    with pytest.raises(UsageError, match="no method 'zip'; there are grid, svd"):
        pareto(loratools.load(folder), ("zip",))


def test_statistics_weigh_every_point_and_add_some(folder: Path) -> None:
    adapter = loratools.load(folder)
    stats, inputs = stats_of(adapter)
    report = pareto(adapter, ("grid", "svd", "rtn"), ratios=(2, 4), weights=stats)
    assert {p.method for p in report.points} == {"grid", "grid, weighted", "svd", "svd, weighted", "rtn"}
    assert all(p.weighted_error is not None for p in report.points)
    one = next(p for p in report.points if p.method == "grid, weighted" and p.setting == "1/4")
    assert one.command == "loratools quantize IN --ratio 4 --weights stats.safetensors"
    made, told = quantize(adapter, Quantize(budget=int(report.bytes / 4), weights=stats))
    assert told.total["bytes_after"] == one.bytes
    assert one.weighted_error == pytest.approx(seen_by_inputs(adapter, made, inputs), rel=1e-6)
    best = {(p.method, p.setting): p.weighted_error or 0.0 for p in report.points}
    assert best["svd, weighted", "1/2"] < best["svd", "1/2"]
