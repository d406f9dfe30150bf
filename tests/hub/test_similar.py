"""A hub with planted relatives, found by their files alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hub.conftest import write_kohya
from hub.planted import Factors, cosine_of, dense, draw, gauged, product, summed, write

import loratools
from loratools.errors import AdapterError, InputError, UsageError
from loratools.hub import similar as module
from loratools.hub.catalog import CatalogRow, write_catalog
from loratools.hub.cataloguing import Catalog, catalog
from loratools.hub.similar import Groups, Similar, similar
from loratools.hub.sketches import SEED
from loratools.reports.hub_similar import HubSimilarReport


def here() -> Executor:
    """Workers of this process, which need no start."""
    return ThreadPoolExecutor(2)


def found_in(hub: Path, threshold: float = 0.95, **how: object) -> HubSimilarReport:
    return similar(hub, Similar(threshold, executor=here, **how))  # type: ignore[arg-type]


def rounded(factors: Factors, dtype: torch.dtype) -> Factors:
    return {t: (d.to(dtype), u.to(dtype)) for t, (d, u) in factors.items()}


PARTS = {name: draw(i) for i, name in enumerate(["a", "b", "c", "d", "e", "f", "g", "h"])}
KIN = {  # the relative's name begins with that of what it was made of
    "a gauge": ("copy", 1.0),
    "a kohya.safetensors": ("copy", 1.0),
    "a same": ("copy", 1.0),
    "b bf16": ("copy", 1.0),
    "c half": ("scaled copy", 0.5),
    "c minus": ("scaled copy", -1.0),
    "d near": ("derivative", None),
    "d packed.safetensors": ("derivative", None),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    hub = tmp_path_factory.mktemp("hub")
    for name, factors in PARTS.items():
        write(hub / name, factors)
    write(hub / "a gauge", gauged(PARTS["a"], 1))
    shutil.copytree(hub / "a", hub / "a same")
    write(hub / "b bf16", rounded(PARTS["b"], torch.bfloat16))
    write(hub / "c half", gauged(PARTS["c"], 2), alpha=0.5)
    write(hub / "c minus", PARTS["c"], alpha=-1.0)
    write(hub / "d near", summed({1.0: PARTS["d"], 0.2: draw(50)}))
    with loratools.load(hub / "a") as adapter:
        loratools.convert_file(adapter, hub / "a kohya.safetensors", "kohya")
    with loratools.load(hub / "d") as adapter:
        loratools.quantize_file(adapter, hub / "d packed.safetensors", loratools.Quantize(bits=4))
    write(hub / "merge of two", rounded(summed({0.7: PARTS["e"], 0.3: PARTS["f"]}), torch.bfloat16))
    write(hub / "merge of three", gauged(summed({0.5: PARTS["e"], 0.4: PARTS["g"], 0.6: PARTS["h"]}), 3))
    write_kohya(hub / "elsewhere.safetensors", 90)
    (hub / "broken.safetensors").write_bytes(b"x" * 100)
    nan = draw(60)
    next(iter(nan.values()))[0][0, 0] = torch.nan
    write(hub / "nan", nan)
    write(hub / "zero", {t: (d, torch.zeros_like(u)) for t, (d, u) in draw(61).items()})
    for name in ("dora", "dora same"):
        path = write(hub / name, draw(62), magnitude=True)
        config = json.loads((path / "adapter_config.json").read_text()) | {"use_dora": True}
        (path / "adapter_config.json").write_text(json.dumps(config))
    return hub


def deltas(hub: Path, name: str) -> dict[str, torch.Tensor]:
    """Dense, in float64, by the name with underscores for dots."""
    with loratools.load(hub / name) as adapter:
        return {t.removeprefix("lycoris_").replace(".", "_"): u.delta().double() for t, u in adapter.items()}


@pytest.fixture(scope="module")
def report(hub: Path) -> HubSimilarReport:
    return found_in(hub)


def test_the_pairs_are_those_of_brute_force(hub: Path, report: HubSimilarReport) -> None:
    names = sorted({p.name for p in hub.iterdir()} - {row.name for row in report.left_out})
    assert report.adapters == len(names) == 18 + 1
    held = {name: deltas(hub, name) for name in names}
    truth = {
        (x, y): cosine_of(held[x], held[y])
        for i, x in enumerate(names)
        for y in names[i + 1 :]
        if abs(cosine_of(held[x], held[y])) >= 0.95
    }
    told = {(p.adapter, p.other): p for p in report.pairs if p.relation != "same bytes"}
    assert set(told) == set(truth)
    for (x, y), pair in told.items():
        assert pair.cosine == pytest.approx(truth[x, y], rel=1e-6)
        assert pair.scale == pytest.approx(product(held[x], held[y]) / product(held[x], held[x]), rel=1e-6)
        assert pair.least_cosine == pytest.approx(
            min(cosine_of({t: held[x][t]}, {t: held[y][t]}) for t in held[x]), rel=1e-6
        )


@pytest.mark.parametrize("name", KIN)
def test_each_relative_is_called_what_it_is(report: HubSimilarReport, name: str) -> None:
    (pair,) = (p for p in report.pairs if (p.adapter, p.other) == (name[0], name))
    relation, scale = KIN[name]
    assert pair.relation == relation
    assert scale is None or pair.scale == pytest.approx(scale, rel=2e-3)
    assert pair.same_bytes == (name in ("a same", "c minus"))  # the config alone says that it is negated


def test_merges_are_told_with_their_weights(report: HubSimilarReport) -> None:
    found = {m.adapter: m for m in report.merges}
    assert set(found) == {"merge of two", "merge of three"}
    for name, weights in {
        "merge of two": {"e": 0.7, "f": 0.3},
        "merge of three": {"e": 0.5, "g": 0.4, "h": 0.6},
    }.items():
        assert {t.name: t.weight for t in found[name].terms} == pytest.approx(weights, rel=5e-3)
        assert found[name].relative_error < 5e-3


def test_clusters_and_what_is_left_out(report: HubSimilarReport) -> None:
    members = {frozenset(c.members): c.representative for c in report.clusters}
    assert frozenset({"a", "a gauge", "a kohya.safetensors", "a same"}) in members
    assert frozenset({"dora", "dora same"}) in members
    assert members[frozenset({"c", "c half", "c minus"})] == "c"
    assert len(members) == 5
    reasons = {row.name: row.reason for row in report.left_out}
    assert set(reasons) == {"broken.safetensors", "nan", "zero", "dora", "dora same"}
    assert "NaN" in reasons["nan"]
    assert "zero" in reasons["zero"]
    assert "base weight" in reasons["dora"]
    (same,) = (p for p in report.pairs if p.relation == "same bytes")
    assert (same.adapter, same.other, same.cosine) == ("dora", "dora same", None)


def test_the_same_again_and_in_processes(hub: Path, report: HubSimilarReport) -> None:
    assert found_in(hub) == report
    assert similar(hub, Similar(workers=2)) == report


def test_a_hub_is_ranked_by_its_likeness_to_an_adapter(hub: Path, tmp_path: Path) -> None:
    outside = write(tmp_path / "mine", gauged(summed({1.0: PARTS["a"], 0.5: PARTS["b"]}), 4))
    report = found_in(hub, to=outside, nearest=7)
    assert len(report.pairs) == 7
    assert {p.other for p in report.pairs[:4]} == {"a", "a gauge", "a kohya.safetensors", "a same"}
    mine = dense(summed({1.0: PARTS["a"], 0.5: PARTS["b"]}))
    assert report.pairs[0].cosine == pytest.approx(cosine_of(mine, dense(PARTS["a"])), rel=1e-5)
    assert report.pairs[0].relation == "other"
    (merge,) = report.merges
    assert sorted(t.weight for t in merge.terms) == pytest.approx([0.5, 1.0], rel=5e-3)
    inside = found_in(hub, to=hub / "a", nearest=3)
    assert {p.other for p in inside.pairs} == {"a gauge", "a kohya.safetensors", "a same"}
    with pytest.raises(AdapterError, match="base weight"):
        found_in(hub, to=hub / "dora")
    with pytest.raises(InputError):
        found_in(hub, to=hub / "nowhere")


def test_a_catalog_stands_in_for_reading_the_hub(hub: Path, report: HubSimilarReport, tmp_path: Path) -> None:
    place = tmp_path / "catalog.parquet"
    catalog(hub, place, Catalog(workers=2))
    found = found_in(hub, catalog=place)
    assert (found.pairs, found.merges, found.clusters) == (report.pairs, report.merges, report.clusters)
    assert {row.name for row in found.left_out} == {row.name for row in report.left_out}


def test_rows_of_a_catalog_that_tell_nothing_or_too_much(hub: Path, tmp_path: Path) -> None:
    import numpy as np

    place = tmp_path / "catalog.parquet"
    good = np.ones(1024, np.float32)
    rows = [
        CatalogRow("away", "found", path="away.safetensors", sketch=good, sketch_seed=SEED),
        CatalogRow("away too", "found", path="away2.safetensors", sketch=good, sketch_seed=SEED),
        CatalogRow("failed", "failed", "it was bad"),
        CatalogRow("nan", "found", path="x", sketch=good * np.nan, sketch_seed=SEED),
        CatalogRow("none", "found", path="x"),
        CatalogRow("other version", "found", path="a", sketch=good[:7], sketch_seed=99),
        CatalogRow("outside", "found", path="../../a", sketch=good, sketch_seed=SEED),
    ]
    write_catalog(rows, place)
    report = found_in(hub, catalog=place)
    reasons = {row.name: row.reason for row in report.left_out}
    assert set(reasons) == {"away and away too", "failed", "nan", "none", "outside"}
    assert reasons["failed"] == "it was bad"
    assert "away.safetensors" in reasons["away and away too"]
    assert report.adapters == 3
    with pytest.raises(InputError):
        found_in(hub, catalog=tmp_path / "nowhere.parquet")


def test_of_very_many_pairs_enough_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(12):
        write(tmp_path / f"m{i:02}", rounded(summed({1.0: draw(0), 0.1: draw(70 + i)}), torch.float32))
    every = found_in(tmp_path)
    assert len(every.pairs) == 66
    monkeypatch.setattr(module, "_ALL_PAIRS", 10)
    monkeypatch.setattr(module, "_NEAREST", 1)
    few = found_in(tmp_path)
    assert len(few.pairs) < 30
    assert set(few.pairs) <= set(every.pairs)
    assert [c.members for c in few.clusters] == [c.members for c in every.clusters]
    assert "were not compared" in few.warnings[0]


@pytest.mark.parametrize("wrong", [{"threshold": 0.0}, {"threshold": 1.5}, {"workers": 0}, {"nearest": 0}])
def test_wrong_numbers_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Similar(**wrong)  # type: ignore[arg-type]


def test_an_empty_hub(tmp_path: Path) -> None:
    report = found_in(tmp_path)
    assert (report.adapters, report.pairs, report.merges, report.clusters) == (0, (), (), ())


def test_groups() -> None:
    groups = Groups(5)
    assert groups.join(3, 1)
    assert groups.join(4, 3)
    assert not groups.join(1, 4)
    assert [groups.root(i) for i in range(5)] == [0, 1, 2, 1, 1]


def test_make_is_called_for_every_stage(hub: Path) -> None:
    made: list[Executor] = []

    def make() -> Executor:
        made.append(ThreadPoolExecutor(1))
        return made[-1]

    chosen: Callable[[], Executor] = make
    similar(hub, Similar(executor=chosen))
    assert len(made) == 3
