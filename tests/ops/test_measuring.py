"""The engine under the curves: what is measured against whole matrices, what recipes make, and what is left out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import pytest
import torch
from ops.test_pareto import stats_of
from ops.test_quantize import deltas, peft, relative, seen_by_inputs
from safetensors.torch import save_file

import loratools
from loratools.adapter import Adapter
from loratools.errors import AdapterError, UnchangedError
from loratools.families.bitdelta import encode_bitdelta
from loratools.ops.measuring import Made, Recipe, Setting, Source, errors, in_memory, marked, measure, measure_all
from loratools.ops.pareto import Codes, Lowered, pareto
from loratools.ops.quantize import Quantize
from loratools.reports.evaluate import Evaluation
from loratools.reports.pareto import Point


@final
@dataclass(frozen=True)
class Halved(Recipe):
    """Half of every `up`, in no bytes: another family's recipe would look like this."""

    def make(self, source: Source) -> Made:
        updates = {t: u.with_tensors({"up": u.parameters()["up"] / 2}) for t, u in source.adapter.items()}
        return Made(source.adapter.with_updates(updates), 7)


@final
@dataclass(frozen=True)
class Refusing(Recipe):
    error: type[AdapterError]

    def make(self, source: Source) -> Made:
        raise self.error("not with this one")


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    return loratools.load(peft(tmp_path / "in", rank=4, size=2))


def test_any_recipe_is_measured_by_the_same_lines(adapter: Adapter) -> None:
    source = Source.held(adapter, stats_of(adapter)[0])
    point = measure(source, Setting("half", "all", "nothing", Halved()))
    assert (point.method, point.setting, point.bytes, point.command) == ("half", "all", 7, "nothing")
    assert point.relative_error == pytest.approx(0.5)
    assert point.weighted_error == pytest.approx(0.5)


def test_errors_are_those_of_whole_matrices(adapter: Adapter) -> None:
    stats, inputs = stats_of(adapter)
    for options in (Quantize("rtn", 4), Quantize("sign", 1), Quantize("rtn", 8)):
        made = Codes(options).make(Source(adapter)).adapter
        plain, weighted = errors(Source(adapter, stats), made)
        assert plain == pytest.approx(relative(deltas(adapter), deltas(made)), rel=1e-5)
        assert weighted == pytest.approx(seen_by_inputs(adapter, made, inputs), rel=1e-5)
        assert errors(Source(adapter), made)[1] is None


def test_what_fails_is_said_and_what_changes_nothing_is_no_point(adapter: Adapter) -> None:
    steps: list[int] = []
    recipes = {"a": Refusing(AdapterError), "b": Refusing(UnchangedError), "c": Halved()}
    settings = [Setting(name, "", name, recipe) for name, recipe in recipes.items()]
    done = measure_all(Source.held(adapter), settings, step=lambda: steps.append(1))
    assert done.failed == {"a": "not with this one"}
    assert [setting.method for setting, _ in done.found] == ["c"]
    assert len(steps) == 3


def test_updates_are_read_once(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []

    def counted(target: str, read: object) -> object:
        def once() -> object:
            reads.append(target)
            return read()  # type: ignore[operator]

        return once

    entries = {t: replace(e, read=counted(t, e.read)) for t, e in adapter.entries.items()}  # type: ignore[arg-type]
    counting = replace(adapter, entries=entries)
    held = in_memory(counting)
    for _ in range(3):
        deltas(held)
    assert sorted(reads) == sorted(adapter.entries)
    monkeypatch.setattr("loratools.ops.measuring.HELD_BYTES", 0)
    again = in_memory(counting)
    deltas(again)
    deltas(again)
    assert len(reads) == 3 * len(adapter)


def test_the_best_are_chosen_by_what_inputs_see_where_all_points_know_it() -> None:
    points = [
        Point("a", "", size, plain, weighted, False, "")
        for size, plain, weighted in ((10, 0.5, 0.2), (20, 0.4, 0.3), (30, 0.3, 0.1))
    ]
    assert [p.best for p in marked(points)] == [True, False, True]
    assert [p.best for p in marked([replace(points[0], weighted_error=None), *points[1:]])] == [True, True, True]


def lycoris(path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Full deltas in a file of LyCORIS."""
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for i in range(2):
        low = torch.randn(96, 3, generator=generator) @ torch.randn(3, 128, generator=generator)
        tensors[f"lycoris_layers_{i}_up_proj.diff"] = low + 0.3 * torch.randn(96, 128, generator=generator)
    save_file(tensors, path)
    return path, tensors


def test_full_deltas_of_a_file(tmp_path: Path) -> None:
    path, tensors = lycoris(tmp_path / "full.safetensors")
    adapter = loratools.load(path)
    report = pareto(adapter, ("grid", "svd", "rtn", "bitdelta", "loraquant"), ratios=(4, 8))
    assert report.bytes == path.stat().st_size
    assert {p.method for p in report.points} == {"grid", "svd", "rtn", "bitdelta"}
    assert any(w.startswith("loraquant was left out: there are no factors") for w in report.warnings)
    norm = sum(float(d.double().square().sum()) for d in tensors.values())
    for point in (p for p in report.points if p.method == "svd"):
        rank = int(point.command.split()[-1])
        lost = sum(float(torch.linalg.svdvals(d.double())[rank:].square().sum()) for d in tensors.values())
        assert point.relative_error == pytest.approx((lost / norm) ** 0.5, rel=0.02)
        assert point.bytes <= 1.1 * report.bytes / int(point.setting.removeprefix("1/"))
    signs = next(p for p in report.points if p.method == "bitdelta")
    left = 0.0
    for delta in tensors.values():
        _, scale = encode_bitdelta(delta.double())
        signed = torch.where(delta >= 0, 1.0, -1.0).double() * float(scale)
        left += float((delta.double() - signed).square().sum())
    assert signs.relative_error == pytest.approx((left / norm) ** 0.5, rel=1e-3)


def test_targets_of_another_dialect_are_matched_by_their_modules(tmp_path: Path) -> None:
    adapter = loratools.load(lycoris(tmp_path / "full.safetensors")[0])
    made = Lowered(96).make(Source(adapter)).adapter
    assert set(made.entries).isdisjoint(adapter.entries)
    assert errors(Source(adapter), made)[0] < 1e-5
    fewer = replace(made, entries=dict(list(made.entries.items())[:1]))
    with pytest.raises(AdapterError, match=r"^lycoris_layers_1_up_proj: is not among the 1 targets"):
        errors(Source(adapter), fewer)


def test_a_task_is_asked_of_the_best_alone_and_of_what_they_are_decoded_to(adapter: Adapter) -> None:
    asked: list[Adapter | None] = []
    counts: list[tuple[int, str]] = []

    def task(made: Adapter | None) -> Evaluation:
        asked.append(made)
        return Evaluation(float(len(asked)), None, 1, 1)

    def steps(total: int, what: str) -> object:
        counts.append((total, what))
        return lambda: None

    report = pareto(adapter, ("rtn", "sign"), evaluate=task, steps=steps)  # type: ignore[arg-type]
    best = [p for p in report.points if p.best]
    assert counts == [(len(report.points), "points"), (2 + len(best), "evaluations")]
    assert asked[0] is None
    assert [p.nll for p in best] == [float(i) for i in range(3, 3 + len(best))]
    assert all(p.nll is None for p in report.points if not p.best)
    for point, made in zip(best, asked[2:], strict=True):
        assert made is not None
        assert relative(deltas(adapter), deltas(made)) == pytest.approx(point.relative_error, rel=1e-4)
