"""Texts to adapters, with features of our own, against naive numpy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from loratools.errors import AdapterError, InputError, OutputError, UsageError
from loratools.hub.adapter_set import AdapterSet, Scenario, load_adapter_set, require_in_hub
from loratools.hub.route import choose
from loratools.hub.route_fit import Fit, fit, fit_measured, held_out
from loratools.hub.route_quality import expected_calibration_error, quality, read_losses

Array = NDArray[np.float64]


def blobs(per: int = 20, size: int = 6, spread: float = 0.3) -> tuple[list[str], Array]:
    """Examples of three adapters, each around an axis."""
    rng = np.random.default_rng(0)
    labels, rows = [], []
    for i, name in enumerate(("a", "b", "c")):
        for _ in range(per):
            labels.append(name)
            rows.append(5 * np.eye(size)[i] + spread * 5 * rng.normal(size=size))
    return labels, np.array(rows)


def unit(x: Array) -> Array:
    return np.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True))


def test_centroids_thresholds_and_choices_by_their_definitions() -> None:
    labels, rows = blobs()
    found = fit(labels, torch.from_numpy(rows))
    units = unit(rows)
    centroids = {}
    for scenario in found.scenarios:
        own = units[[label == scenario.name for label in labels]]
        centroids[scenario.name] = unit(own.sum(axis=0))
        assert np.allclose(scenario.centroids[0].numpy(), centroids[scenario.name])
        left_out = [own[i] @ unit(np.delete(own, i, axis=0).sum(axis=0)) for i in range(len(own))]
        assert scenario.threshold == pytest.approx(np.quantile(left_out, 0.05))
        assert scenario.examples == 20
    queries = unit(np.random.default_rng(1).normal(size=(200, 6)))
    seen = set()
    for query, choice in zip(queries, choose(found, torch.from_numpy(3 * queries)), strict=True):
        cosines = {name: float(query @ c) for name, c in centroids.items()}
        order = sorted(cosines, key=lambda name: -cosines[name])
        total = sum(math.exp(value / 0.1) for value in cosines.values())
        assert [c.adapter for c in choice.candidates] == order
        assert [c.cosine for c in choice.candidates] == pytest.approx([cosines[name] for name in order])
        assert choice.candidates[0].confidence == pytest.approx(math.exp(cosines[order[0]] / 0.1) / total)
        threshold = next(s.threshold for s in found.scenarios if s.name == order[0])
        reason = "threshold" if cosines[order[0]] < threshold else ""
        if not reason and cosines[order[0]] - cosines[order[1]] < 0.02:
            reason = "margin"
        assert (choice.adapter, choice.reason) == ("base" if reason else order[0], reason)
        seen.add(reason)
    assert {"", "threshold"} <= seen


def test_two_that_are_as_near_go_to_the_base() -> None:
    made = AdapterSet(tuple(Scenario(n, torch.eye(3)[[i]].double(), 0.1, 5) for i, n in enumerate("ab")))
    near, clear = choose(made, torch.tensor([[1.0, 0.99, 0.0], [1.0, 0.5, 0.0]]))
    assert (near.adapter, near.reason) == ("base", "margin")
    assert (clear.adapter, clear.reason) == ("a", "")


def test_several_centroids_for_an_adapter_of_several_kinds() -> None:
    rng = np.random.default_rng(0)
    kinds = np.repeat(np.eye(6)[[0, 1, 2]], 10, axis=0) + 0.05 * rng.normal(size=(30, 6))
    labels = ["a"] * 20 + ["b"] * 10
    one, two = (fit(labels, torch.from_numpy(kinds), options=Fit(centroids=k)) for k in (1, 2))
    cosines = unit(kinds[:20]) @ two.scenarios[0].centroids.numpy().T
    assert cosines.max(axis=1).min() > 0.97  # each of its kinds has a centroid
    assert len(set(cosines.argmax(axis=1)[:10])) == len(set(cosines.argmax(axis=1)[10:])) == 1
    assert two.scenarios[0].threshold > one.scenarios[0].threshold + 0.1
    again = fit(labels, torch.from_numpy(kinds), options=Fit(centroids=2))
    assert torch.equal(again.scenarios[0].centroids, two.scenarios[0].centroids)
    # A centroid for each example: what is left out then has only the others.
    alone = fit(["a"] * 3, torch.eye(3) + 0.1, options=Fit(centroids=3, quantile=0.0))
    assert alone.scenarios[0].threshold == pytest.approx(float(unit(np.eye(3) + 0.1)[0] @ unit(np.eye(3) + 0.1)[1]))


def test_what_is_held_out_is_not_fitted() -> None:
    labels, rows = blobs()
    labels, rows = [*labels, *["base"] * 4], np.vstack([rows, -np.abs(rows[:4])])
    away = held_out(labels)
    assert [sum(a for a, label in zip(away, labels, strict=True) if label == n) for n in ("a", "b", "base")] == [
        4,
        4,
        4,
    ]
    found, told, measured = fit_measured(labels, torch.from_numpy(rows))
    kept = [i for i, out in enumerate(away) if not out]
    trial = fit([labels[i] for i in kept], torch.from_numpy(rows[kept]))
    rest = [i for i, out in enumerate(away) if out]
    choices = choose(trial, torch.from_numpy(rows[rest]))
    own = [(c, labels[i]) for c, i in zip(choices, rest, strict=True) if labels[i] != "base"]
    assert measured.texts == 12
    assert measured.accuracy == sum(c.adapter == label for c, label in own) / 12
    assert measured.nearest == sum(c.candidates[0].adapter == label for c, label in own) / 12
    assert measured.base_rejected == 1.0
    assert sum(sum(row.values()) for row in measured.confusion.values()) == 16
    assert found.names == tuple(told) == ("a", "b", "c")
    # Features that say nothing must not look good: the labels are shuffled among them.
    noise = np.random.default_rng(2).normal(size=rows.shape)
    assert (fit_measured(labels, torch.from_numpy(noise))[2].nearest or 0) < 0.8


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_examples(count: int) -> None:
    with pytest.raises(InputError, match="at least three"):
        held_out(["a"] * 5 + ["b"] * count)
    if count == 1:
        with pytest.raises(InputError, match="at least two"):
            fit(["a", "a", "b"], torch.eye(3))
    with pytest.raises(InputError, match="name no adapter"):
        fit(["base"] * 3, torch.eye(3))


def test_features_that_are_no_directions() -> None:
    labels, rows = blobs()
    found = fit(labels, torch.from_numpy(rows))
    bad = torch.from_numpy(rows).clone()
    bad[7, 2] = float("nan")
    with pytest.raises(AdapterError, match="row 8 of the features holds NaN"):
        fit(labels, bad)
    with pytest.raises(AdapterError, match="row 2 of the features is zero"):
        choose(found, torch.tensor([[1.0] * 6, [0.0] * 6]))
    with pytest.raises(AdapterError, match="features of 5 numbers, and the scenarios have 6"):
        choose(found, torch.ones(1, 5))
    with pytest.raises(AdapterError, match="one row for each of 60"):
        fit(labels, torch.from_numpy(rows[1:]))


def test_the_manifest_comes_back(tmp_path: Path) -> None:
    labels, rows = blobs()
    found = fit(labels, torch.from_numpy(rows), encoder="some encoder", options=Fit(2, temperature=0.2, margin=0.01))
    place = found.save(tmp_path / "route.json")
    again = load_adapter_set(place)
    assert (again.names, again.encoder, again.temperature, again.margin) == (("a", "b", "c"), "some encoder", 0.2, 0.01)
    ours, theirs = choose(found, torch.from_numpy(rows)), choose(again, torch.from_numpy(rows))
    assert [c.adapter for c in ours] == [c.adapter for c in theirs]
    before = place.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        found.save(place)
    fit(labels, torch.from_numpy(rows), encoder="some encoder", options=Fit(2, temperature=0.2, margin=0.01)).save(
        place, force=True
    )
    assert place.read_bytes() == before
    again.require_encoder("some encoder")
    for other in (None, "another"):
        with pytest.raises(UsageError, match="were fitted with some encoder"):
            again.require_encoder(other)


def _edit(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(fields: dict[str, Any]) -> None:
        inside = fields
        for key in path[:-1]:
            inside = inside[key]
        inside[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        _edit("kind", value="else"),
        _edit("version", value=2),
        _edit("adapters", value={}),
        _edit("adapters", value=[1]),
        _edit("temperature", value=0),
        _edit("margin", value=float("nan")),
        _edit("adapters", "a", "centroids", value=[]),
        _edit("adapters", "a", "centroids", value=[[1.0, "x"]]),
        _edit("adapters", "a", "centroids", value=[[1.0, 1.0, 1.0, 0, 0, 0]]),
        _edit("adapters", "a", "centroids", value=[[1.0, 0.0]]),
        _edit("adapters", "a", "centroids", value=[[float("nan")] * 6]),
        _edit("adapters", "a", "threshold", value=None),
        _edit("adapters", "a", "threshold", value=float("inf")),
        _edit("adapters", "a", value=3),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    labels, rows = blobs(5)
    place = fit(labels, torch.from_numpy(rows)).save(tmp_path / "route.json")
    fields = json.loads(place.read_text())
    edit(fields)
    place.write_text(json.dumps(fields))
    with pytest.raises(InputError, match="route-fit") as caught:
        load_adapter_set(place)
    assert "\n" not in str(caught.value)


def test_no_manifest_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_adapter_set(tmp_path / "route.json")
    (tmp_path / "route.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        load_adapter_set(tmp_path / "route.json")


def test_adapters_must_be_in_the_hub() -> None:
    there = {"a": Path("a"), "b": Path("b")}
    require_in_hub(["a", "b"], there, where="x")
    with pytest.raises(InputError, match=r"no adapter 'c\\x1b' nor 1 others; it has 'a', 'b'"):
        require_in_hub(["d", "c\x1b"], there, where="x")


def test_the_calibration_error_by_its_definition() -> None:
    rng = np.random.default_rng(3)
    confidences = rng.random(300)
    hits = rng.random(300) < confidences**2
    want = 0.0
    for b in range(10):
        inside = (confidences > b / 10) & (confidences <= (b + 1) / 10)
        if inside.any():
            want += inside.mean() * abs(hits[inside].mean() - confidences[inside].mean())
    assert expected_calibration_error(confidences.tolist(), hits.tolist()) == pytest.approx(want)
    assert expected_calibration_error([0.0, 1.0], [False, True]) == 0.0


def test_regret_by_its_definition(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("scenario,a,b,base\na,1.0,3.0,2.5\nb,4.0,0.5,2.0\n")
    losses = read_losses(tmp_path / "l.csv")
    made = AdapterSet(tuple(Scenario(n, torch.eye(3)[[i]].double(), 0.5, 5) for i, n in enumerate("ab")))
    # a right, a to b, a to the base, b right
    choices = choose(made, torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [0, 1.0, 0]]))
    found = quality(choices, ["a", "a", "a", "b"], losses)
    assert found.confusion == {"a": {"a": 1, "b": 1, "base": 1}, "b": {"b": 1}}
    assert (found.accuracy, found.rejected, found.base_rejected) == (0.5, 0.25, None)
    assert found.regret is not None
    assert found.regret.mean == pytest.approx((0 + 2.0 + 1.5 + 0) / 4)
    assert found.regret.matrix == {"a": (0.0, 2.0, 1.5), "b": (3.5, 0.0, 1.5)}
    assert (found.regret.single_adapter, found.regret.single) == ("a", pytest.approx(3.5 / 4))
    assert found.regret.of_base == pytest.approx(1.5)
    # A text for no adapter counts only where its losses are known.
    both = quality(choices, ["a", "a", "base", "b"], losses)
    assert (both.regret and both.regret.texts, both.base_rejected) == (3, 1.0)
    with pytest.raises(InputError, match="no row for the scenario 'c'"):
        quality(choices, ["a", "a", "c", "b"], losses)
    (tmp_path / "n.csv").write_text("scenario,a,b\na,1,3\nb,4,0\n")
    with pytest.raises(InputError, match="no column for 'base'"):
        quality(choices, ["a", "a", "a", "b"], read_losses(tmp_path / "n.csv"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "needs a line of names"),
        ("scenario,a\n", "needs a line of names"),
        ("scenario,a\na,x\n", "row 2: holds a loss that is no number"),
        ("scenario,a\na,nan\n", "row 2: needs 1 finite"),
        ("scenario,a\na,1,2\n", "row 2: needs 1 finite"),
        ("scenario,a\na,1\na,2\n", "row 3: names the scenario 'a' again"),
        ("scenario,a,a\na,1,2\n", "an adapter twice"),
    ],
)
def test_what_is_no_table_of_losses(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "l.csv").write_text(text)
    with pytest.raises(InputError, match=says):
        read_losses(tmp_path / "l.csv")


@pytest.mark.parametrize("wrong", [{"centroids": 0}, {"quantile": 1.0}])
def test_wrong_fits(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Fit(**wrong)
    labels, rows = blobs(5)
    with pytest.raises(UsageError, match="temperature"):
        fit(labels, torch.from_numpy(rows), options=Fit(temperature=0.0))
