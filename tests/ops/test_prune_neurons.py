"""Pruning of hidden units: exact ones on any input, fitted ones against numpy's least squares."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import bottleneck_files as files
import numpy as np
import pytest
import torch
from bottleneck_files import ACTS, LAYOUTS, SIZE, WIDTH, Layout, rand
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import loratools
from loratools import Activations, PruneNeurons, load_activations
from loratools.errors import AdapterError, InputError, UnchangedError, UsageError
from loratools.files import load
from loratools.ops.bottleneck import ACTIVATIONS, read_bottleneck

each = pytest.mark.parametrize("name", LAYOUTS)
ROWS = 300


def redundant(layout: Layout, tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """With a pair of equal units, a constant one and one that nothing listens to: 3 of 6 go."""
    keys = layout.keys(name)
    down, up = tensors[keys["down.weight"]].clone(), tensors[keys["up.weight"]].clone()
    down[1, 0] = 0.0
    down[4] = down[1]
    down[4, 0] = -0.0
    down[2] = 0.0
    up[:, 0] = 0.0
    changed = {keys["down.weight"]: down, keys["up.weight"]: up}
    if "down.bias" in keys:
        bias = tensors[keys["down.bias"]].clone()
        bias[4] = bias[1]
        changed[keys["down.bias"]] = bias
    return tensors | changed


def all_redundant(layout: Layout) -> dict[str, Tensor]:
    tensors = files.made(layout)
    for name in layout.names:
        tensors = redundant(layout, tensors, name)
    return tensors


def inputs(layout: Layout, rows: int = ROWS) -> dict[str, Tensor]:
    return {name: rand(100 + i, rows, SIZE) for i, name in enumerate(layout.names)}


@each
def test_exact_pruning_keeps_the_function(tmp_path: Path, name: str) -> None:
    """On inputs small and large, and the rest of the file is as it was."""
    layout = LAYOUTS[name]
    tensors = all_redundant(layout)
    source = files.write(tmp_path / "in", layout, tensors)
    saved, report = loratools.prune_neurons_file(
        load(source), tmp_path / "out.safetensors" if source.is_file() else tmp_path / "out"
    )
    found = files.read(saved.path)
    assert set(found) == set(tensors)
    assert torch.equal(found["head.weight"], tensors["head.weight"])
    for each_name in layout.names:
        keys = layout.keys(each_name)
        assert found[keys["down.weight"]].shape == (WIDTH - 3, SIZE)
        assert found[keys["up.weight"]].shape == (SIZE, WIDTH - 3)
        for size in (1e-3, 1.0, 100.0):
            h = rand(7, 50, SIZE) * size
            truth = files.added(layout, each_name, tensors, h)
            assert files.distance(files.added(layout, each_name, found, h), truth) < 1e-6
        row = report.targets[each_name]
        assert (row.width_before, row.width_after) == (WIDTH, WIDTH - 3)
        assert (row.duplicates, row.constant, row.zero) == (1, 1, 1)
        assert row.error is None
        assert row.held_out_error is None


@pytest.mark.parametrize("act", ACTS)
def test_each_activation_is_what_it_is_called(tmp_path: Path, act: str) -> None:
    layout = Layout(("blocks.0.adapter",), LAYOUTS["adaptertune"].keys, act)
    tensors = files.made(layout)
    tensors["blocks.0.adapter.down.bias"] *= 6  # where a ReLU6 saturates
    b = read_bottleneck(load(files.write(tmp_path, layout, tensors)), "blocks.0.adapter", activation=act)
    h = rand(3, 40, SIZE)
    truth = files.added(layout, "blocks.0.adapter", tensors, h)
    assert files.distance(b.outputs(h).numpy(), truth) < 1e-12


def test_every_activation_is_tested() -> None:
    aliases = {"swish": "silu", "gelu_pytorch_tanh": "gelu_new"}
    assert {aliases.get(name, name) for name in ACTIVATIONS} == set(ACTS)


def lstsq(hidden: np.ndarray, kept: list[int], wanted: np.ndarray, ridge: float, bias: bool) -> tuple[Any, Any]:
    """Ridge regression of `wanted` on the kept columns by augmented rows; the bias is free."""
    a = hidden[:, kept]
    mean = a.mean(0) if bias else np.zeros(len(kept))
    target = wanted.mean(0) if bias else np.zeros(wanted.shape[1])
    centred = a - mean
    penalty = ridge * (centred**2).sum(0).mean()
    rows = np.vstack([centred, np.sqrt(penalty) * np.eye(len(kept))])
    sides = np.vstack([wanted - target, np.zeros((len(kept), wanted.shape[1]))])
    up = np.linalg.lstsq(rows, sides, rcond=None)[0].T
    return up, target - up @ mean


@each
@pytest.mark.parametrize("ridge", [1e-6, 0.1])
def test_the_fit_is_that_of_least_squares(tmp_path: Path, name: str, ridge: float) -> None:
    layout = LAYOUTS[name]
    tensors = files.made(layout)
    seen = inputs(layout)
    adapter = load(files.write(tmp_path, layout, tensors))
    made, report = loratools.prune_neurons(
        adapter, PruneNeurons(width=3, ridge=ridge), activations=Activations.of(seen)
    )
    found = {key: extra.read() for key, extra in made.extras.items()}
    fit = ROWS - ROWS // 5
    for each_name in layout.names:
        keys, rows = layout.keys(each_name), seen[each_name]
        one = Layout(layout.names, layout.keys, layout.activation, layout.eps, 1.0)
        up = tensors[keys["up.weight"]].double().numpy()
        # What each hidden unit is, by asking for the unit vectors of `up`, with neither bias nor scale.
        shown = tensors | {keys["up.weight"]: torch.eye(WIDTH)}
        shown = {k: t for k, t in shown.items() if k not in (keys.get("up.bias"), keys.get("scale"))}
        hidden = files.added(one, each_name, shown, rows[:fit])
        bias = "up.bias" in keys
        spread = hidden.std(0) if bias else np.sqrt((hidden**2).mean(0))
        kept = sorted(np.argsort(-np.linalg.norm(up, axis=0) * spread, kind="stable")[:3].tolist())
        wanted = hidden @ up.T + (tensors[keys["up.bias"]].double().numpy() if bias else 0.0)
        truth, offset = lstsq(hidden, kept, wanted, ridge, bias)
        assert torch.equal(found[keys["down.weight"]], tensors[keys["down.weight"]][kept])
        assert files.distance(found[keys["up.weight"]].numpy(), truth) < 2e-6
        if bias:
            assert files.distance(found[keys["up.bias"]].numpy(), offset) < 2e-6
        row = report.targets[each_name]
        for error, part in ((row.error, rows[:fit]), (row.held_out_error, rows[fit:])):
            before, after = (files.added(layout, each_name, t, part) for t in (tensors, found))
            assert error == pytest.approx(files.distance(after, before), rel=1e-6)
    assert (report.tokens, report.held_out_tokens) == (fit, ROWS - fit)


def test_the_fit_beats_leaving_units_out(tmp_path: Path) -> None:
    """Inputs in a plane: what the units that go would have done can be made up for."""
    layout = LAYOUTS["adaptertune"]
    tensors = files.made(layout)
    plane = rand(5, ROWS, 2) @ rand(6, 2, SIZE) / 10
    adapter = load(files.write(tmp_path, layout, tensors))
    seen = Activations.of(dict.fromkeys(layout.names, plane))
    _, report = loratools.prune_neurons(adapter, PruneNeurons(width=3), activations=seen)
    for name, row in report.targets.items():
        keys = layout.keys(name)
        up = tensors[keys["up.weight"]].clone()
        kept = load_widest(tensors, layout, name, plane)
        up[:, [j for j in range(WIDTH) if j not in kept]] = 0.0
        left = files.added(layout, name, tensors | {keys["up.weight"]: up}, plane)
        bare = files.distance(left, files.added(layout, name, tensors, plane))
        assert row.held_out_error is not None
        assert row.held_out_error < bare / 3


def load_widest(tensors: dict[str, Tensor], layout: Layout, name: str, rows: Tensor) -> set[int]:
    """The best three units to leave alone, by trying all."""
    import itertools

    keys = layout.keys(name)
    truth = files.added(layout, name, tensors, rows)

    def error(kept: tuple[int, ...]) -> float:
        up = tensors[keys["up.weight"]].clone()
        up[:, [j for j in range(WIDTH) if j not in kept]] = 0.0
        return files.distance(files.added(layout, name, tensors | {keys["up.weight"]: up}, rows), truth)

    return set(min(itertools.combinations(range(WIDTH), 3), key=error))


def test_exact_units_go_before_any_is_fitted_away(tmp_path: Path) -> None:
    """Three of six are enough, so a width of three costs nothing."""
    layout = LAYOUTS["mosa"]
    adapter = load(files.write(tmp_path, layout, all_redundant(layout)))
    _, report = loratools.prune_neurons(adapter, PruneNeurons(ratio=2.0), activations=Activations.of(inputs(layout)))
    for row in report.targets.values():
        assert row.width_after == 3
        assert row.error is not None
        assert row.error < 1e-6


def test_bottlenecks_that_share_a_width_get_the_largest_needed(tmp_path: Path) -> None:
    """AdapterTune is built with one rank; units that are not needed fill up, with columns of zeros."""
    layout = LAYOUTS["adaptertune"]
    first, second = layout.names
    tensors = redundant(layout, files.made(layout), first)
    keys = layout.keys(second)
    tensors[keys["up.weight"]][:, 5] = 0.0
    made, report = loratools.prune_neurons(load(files.write(tmp_path, layout, tensors)))
    assert [row.width_after for row in report.targets.values()] == [5, 5]
    found = {key: extra.read() for key, extra in made.extras.items()}
    for name in layout.names:
        truth = files.added(layout, name, tensors, rand(9, 20, SIZE))
        assert files.distance(files.added(layout, name, found, rand(9, 20, SIZE)), truth) < 1e-6


def test_units_that_fill_up_do_nothing(tmp_path: Path) -> None:
    """Those that went are put back where another bottleneck needs the whole width, a duplicate's share not twice."""
    layout = LAYOUTS["adaptertune"]
    tensors = redundant(layout, files.made(layout), layout.names[0])
    adapter = load(files.write(tmp_path, layout, tensors))
    with pytest.raises(UnchangedError):
        loratools.prune_neurons(adapter)
    made, _ = loratools.prune_neurons(adapter, allow_unchanged=True)
    found = {key: extra.read() for key, extra in made.extras.items()}
    for name in layout.names:
        truth = files.added(layout, name, tensors, rand(9, 20, SIZE))
        assert files.distance(files.added(layout, name, found, rand(9, 20, SIZE)), truth) < 1e-6


def test_channels_count_by_their_scale(tmp_path: Path) -> None:
    """A unit that writes into a channel of scale 0 alone is the first to go, however large its column."""
    name = "encoder.layer.0.output.adapters.t"
    layout = Layout((name,), LAYOUTS["pfeiffer"].keys, "relu", file="a.safetensors")
    tensors = files.made(layout)
    keys = layout.keys(name)
    scaling = torch.ones(SIZE)
    scaling[0] = 0.0
    tensors[keys["up.weight"]][:, 3] = 0.0
    tensors[keys["up.weight"]][0, 3] = 100.0
    adapter = load(files.write(tmp_path, layout, tensors | {f"{name}.scaling": scaling}))
    how = PruneNeurons(WIDTH - 1, activation="relu")
    made, report = loratools.prune_neurons(adapter, how, activations=Activations.of({name: rand(0, ROWS, SIZE)}))
    kept = tensors[keys["down.weight"]][[0, 1, 2, 4, 5]]
    assert torch.equal(made.extras[keys["down.weight"]].read(), kept)
    error = report.targets[name].error
    assert error is not None
    assert error < 1e-5


def test_the_config_says_how_wide_each_layer_is(tmp_path: Path) -> None:
    """By layers in AdapterHub, both of Houlsby's bottlenecks alike."""
    layout = LAYOUTS["houlsby"]
    tensors = redundant(layout, files.made(layout), layout.names[0])  # layer 0, after the MLP
    tensors = redundant(layout, tensors, layout.names[2])  # layer 0, after attention
    tensors = redundant(layout, tensors, layout.names[1])  # layer 1, after the MLP alone
    source = files.write(tmp_path / "in", layout, tensors)
    with pytest.raises(UnchangedError, match="no hidden unit can go"):
        loratools.prune_neurons(load(files.write(tmp_path / "full", layout, files.made(layout))))
    loratools.prune_neurons_file(load(source), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    stated = config["config"].pop("reduction_factor")
    before = dict(layout.config or {})
    assert config == before | {"config": {k: v for k, v in before["config"].items() if k != "reduction_factor"}}
    found = files.read(tmp_path / "out")
    for name in layout.names:
        layer = name.split(".")[2]
        width = int(SIZE // stated.get(layer, stated["default"]))
        assert width == {"0": 3, "1": 6}[layer]
        assert len(found[layout.keys(name)["down.weight"]]) == width


def test_at_least_one_unit_stays(tmp_path: Path) -> None:
    layout = LAYOUTS["adaptertune"]
    tensors = {k: torch.zeros_like(t) if ".up.weight" in k else t for k, t in files.made(layout).items()}
    _, report = loratools.prune_neurons(load(files.write(tmp_path, layout, tensors)))
    assert {row.width_after for row in report.targets.values()} == {1}


def test_a_constant_stays_where_no_bias_can_hold_it(tmp_path: Path) -> None:
    """MoSA may be saved without the bias of `up`; a GELU of a bias is not zero."""
    layout = LAYOUTS["adaptertune"]
    name = layout.names[0]
    tensors = redundant(layout, {k: t for k, t in files.made(layout).items() if k.startswith(name)}, name)
    del tensors[f"{name}.up.bias"]
    made, report = loratools.prune_neurons(load(files.write(tmp_path, layout, tensors)))
    assert (report.targets[name].constant, report.targets[name].width_after) == (0, 4)
    found = {key: extra.read() for key, extra in made.extras.items()}
    truth = files.added(layout, name, tensors, rand(9, 20, SIZE))
    assert files.distance(files.added(layout, name, found, rand(9, 20, SIZE)), truth) < 1e-6


def test_half_precision_is_kept_and_its_rounding_told(tmp_path: Path) -> None:
    layout = LAYOUTS["pfeiffer"]
    tensors = {key: t.bfloat16() for key, t in all_redundant(layout).items()}
    seen = Activations.of({name: rows.half() for name, rows in inputs(layout).items()})
    made, report = loratools.prune_neurons(load(files.write(tmp_path, layout, tensors)), activations=seen)
    assert {extra.spec.dtype for extra in made.extras.values()} == {"BF16"}
    for row in report.targets.values():
        assert row.error is not None
        assert 1e-5 < row.error < 2**-7


def mosa_experts(count: int, *, stored: str | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file of experts that each changed their own part of the start, and what it merges to."""
    layout = LAYOUTS["mosa"]
    start, moved = files.made(layout, 1), files.made(layout, 50)
    tensors = {key: t for key, t in start.items() if "_merge" not in key}
    whole = dict(tensors)
    for key in (key for key in start if "_merge" in key):
        owner = torch.randint(count + 1, start[key].shape, generator=torch.Generator().manual_seed(3))
        experts = [torch.where(owner == k, moved[key], start[key]) for k in range(count)]
        whole[key] = torch.where(owner < count, moved[key], start[key])
        for k, expert in enumerate(experts):
            tensors[key.replace("_merge", f".{k}")] = expert
        if stored is not None:
            mean = torch.stack(experts).mean(0)
            tensors[key] = {"mean": mean, "start": start[key], "whole": whole[key]}[stored]
    return tensors, whole


@pytest.mark.parametrize("stored", [None, "start", "whole"])
@pytest.mark.parametrize("count", [3, 4, 5])
def test_experts_add_up(tmp_path: Path, count: int, stored: str | None) -> None:
    """W0 and the changes of each, to the bit; a merged tensor that is still the start says nothing."""
    layout = LAYOUTS["mosa"]
    tensors, whole = mosa_experts(count, stored=stored)
    adapter = load(files.write(tmp_path, layout, tensors))
    for name in layout.names:
        b = read_bottleneck(adapter, name)
        keys = layout.keys(name)
        for part, tensor in (("down.weight", b.down), ("up.weight", b.up), ("up.bias", b.up_bias)):
            assert tensor is not None
            assert torch.equal(tensor, whole[keys[part]])


def test_what_is_merged_in_the_file_goes_first(tmp_path: Path) -> None:
    """MoSA's own merge is the mean, which is what its model runs with."""
    layout = LAYOUTS["mosa"]
    tensors, whole = mosa_experts(4, stored="mean")
    adapter = load(files.write(tmp_path, layout, tensors))
    key = layout.keys(layout.names[0])["down.weight"]
    assert torch.equal(read_bottleneck(adapter, layout.names[0]).down, tensors[key])
    assert torch.equal(read_bottleneck(adapter, layout.names[0], experts="assembled").down, whole[key])
    torch.testing.assert_close(read_bottleneck(adapter, layout.names[0], experts="mean").down, tensors[key])


def test_experts_are_written_merged(tmp_path: Path) -> None:
    layout = LAYOUTS["mosa"]
    tensors, whole = mosa_experts(3, stored=None)
    source = files.write(tmp_path / "in", layout, tensors)
    how = PruneNeurons(width=4)
    seen = Activations.of(inputs(layout))
    _, report = loratools.prune_neurons_file(load(source), tmp_path / "out.safetensors", how, activations=seen)
    found = files.read(tmp_path / "out.safetensors")
    assert set(found) == set(whole)
    assert "the experts are left out: what they merge to is written instead" in report.warnings
    for name in layout.names:
        rows = inputs(layout)[name]
        error = files.distance(files.added(layout, name, found, rows), files.added(layout, name, whole, rows))
        row = report.targets[name]
        assert row.error is not None
        assert row.held_out_error is not None
        assert min(row.error, row.held_out_error) < error < max(row.error, row.held_out_error)


def test_two_experts_or_overlapping_ones_do_not_add_up(tmp_path: Path) -> None:
    layout = LAYOUTS["mosa"]
    tensors, _ = mosa_experts(2, stored=None)
    name = layout.names[0]
    adapter = load(files.write(tmp_path / "two", layout, tensors))
    with pytest.raises(AdapterError, match="two experts do not tell what they started from"):
        read_bottleneck(adapter, name)
    with pytest.raises(AdapterError, match="is not in the file, only its experts"):
        read_bottleneck(adapter, name, experts="stored")
    tensors, _ = mosa_experts(3, stored=None)
    tensors["encoder.layer.0.adapter_down.1.weight"] += 1
    tensors["encoder.layer.0.adapter_down.2.weight"] += 2
    adapter = load(files.write(tmp_path / "three", layout, tensors))
    with pytest.raises(AdapterError, match="several experts changed one number"):
        read_bottleneck(adapter, name)


def test_a_record_says_what_was_done(tmp_path: Path) -> None:
    layout = LAYOUTS["adaptertune"]
    loratools.prune_neurons_file(
        load(files.write(tmp_path / "in", layout, all_redundant(layout))), tmp_path / "o.safetensors"
    )
    record = loratools.info(load(tmp_path / "o.safetensors")).record
    assert record is not None
    assert record["verb"] == "prune-neurons"
    with safe_open(tmp_path / "o.safetensors", "pt") as opened:
        assert "loratools" in opened.metadata()


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("down.weight", torch.full((WIDTH, SIZE), torch.nan), r"down.weight: holds NaN or infinity"),
        ("up.bias", torch.full((SIZE,), torch.inf), r"up.bias: holds NaN or infinity"),
        ("up.weight", torch.zeros(SIZE, WIDTH + 1), r"down \(6, 12\) and up \(12, 7\) are no pair"),
        ("down.bias", torch.zeros(WIDTH - 1), r"bias of down has the shape \(5,\), not \(6,\)"),
        ("up.bias", torch.zeros(1, SIZE), r"bias of up has the shape \(1, 12\)"),
        ("down.weight", torch.zeros(WIDTH, SIZE, dtype=torch.int32), r"is I32, not a floating-point tensor"),
    ],
)
def test_what_is_broken_is_named(tmp_path: Path, part: str, value: Tensor, message: str) -> None:
    layout = LAYOUTS["adaptertune"]
    tensors = files.made(layout) | {layout.keys(layout.names[1])[part]: value}
    adapter = load(files.write(tmp_path, layout, tensors))
    with pytest.raises(AdapterError, match=message) as caught:
        loratools.prune_neurons(adapter)
    assert str(caught.value).startswith(layout.names[1])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(20, SIZE - 1), r"has the shape \(20, 11\) in torch.float32, not \(tokens, 12\)"),
        (torch.full((20, SIZE), torch.nan), r"holds NaN or infinity"),
        (torch.zeros(1, SIZE), r"has 1 tokens, too few"),
        (torch.zeros(20, SIZE, dtype=torch.int64), r"not \(tokens, 12\)"),
        (None, r"has no tensor blocks.1.adapter, of the shape \(tokens, 12\)"),
    ],
)
def test_activations_that_do_not_fit_are_named(tmp_path: Path, rows: Tensor | None, message: str) -> None:
    layout = LAYOUTS["adaptertune"]
    adapter = load(files.write(tmp_path, layout, files.made(layout)))
    first, second = layout.names
    tensors = {first: rand(0, 20, SIZE)} | ({} if rows is None else {second: rows})
    save_file(tensors, tmp_path / "acts.safetensors")
    with pytest.raises(AdapterError, match=message) as caught:
        loratools.prune_neurons(adapter, PruneNeurons(3), activations=load_activations(tmp_path / "acts.safetensors"))
    assert "acts.safetensors" in str(caught.value)


def test_more_axes_of_activations_are_tokens_too(tmp_path: Path) -> None:
    layout = LAYOUTS["adaptertune"]
    adapter = load(files.write(tmp_path, layout, files.made(layout)))
    flat = inputs(layout)
    batched = {name: rows.reshape(10, -1, SIZE) for name, rows in flat.items()}
    found = [
        loratools.prune_neurons(adapter, PruneNeurons(3), activations=Activations.of(a))[1] for a in (flat, batched)
    ]
    assert found[0] == found[1]


def test_what_does_not_go_together_is_refused(tmp_path: Path, samples: Any) -> None:
    for fields in ({"width": 0}, {"ratio": 1.0}, {"width": 2, "ratio": 2.0}, {"ridge": 0.0}, {"held_out": 1.0}):
        with pytest.raises(UsageError):
            PruneNeurons(**fields)
    layout = LAYOUTS["adaptertune"]
    adapter = load(files.write(tmp_path, layout, files.made(layout)))
    with pytest.raises(UsageError, match="pass activations"):
        loratools.prune_neurons(adapter, PruneNeurons(3))
    with pytest.raises(UsageError, match="activation 'sine' is not known"):
        loratools.prune_neurons(adapter, PruneNeurons(activation="sine"))
    with pytest.raises(UnchangedError, match="choose a smaller width"):
        loratools.prune_neurons(adapter, PruneNeurons(WIDTH), activations=Activations.of(inputs(layout)))
    with pytest.raises(AdapterError, match="holds updates of weights, no nonlinear bottlenecks"):
        loratools.prune_neurons(load(samples("peft/lora_plain")))
    with pytest.raises(InputError):
        load_activations(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(("scaling", "found"), [("learned", None), (float("nan"), "its scale is not finite")])
def test_a_scale_that_is_not_there(tmp_path: Path, scaling: Any, found: str | None) -> None:
    """A learned one that was left out is taken for 1, which is said; one that is no number is refused."""
    layout = replace(LAYOUTS["pfeiffer"], config=files.hub_config("relu", scaling=scaling))
    adapter = load(files.write(tmp_path, layout, files.made(layout)))
    if found is None:
        assert any("the scale is not in the file" in text for text in loratools.neurons(adapter).warnings)
        return
    with pytest.raises(AdapterError, match=found):
        loratools.neurons(adapter)


def test_a_file_of_the_library(samples: Any, tmp_path: Path) -> None:
    """AdapterHub's own file, by the formula of its Adapter.forward."""
    source = samples("others/adapters_pfeiffer")
    before = torch.load(source / "pytorch_adapter.bin", weights_only=True)
    names = tuple(f"encoder.layer.{i}.output.adapters.task" for i in range(2))
    layout = Layout(names, LAYOUTS["pfeiffer"].keys, "relu")
    seen = {name: rand(i, 400, 16) for i, name in enumerate(names)}
    how = PruneNeurons(width=3, held_out=0.0)
    report = loratools.prune_neurons_file(load(source), tmp_path / "out", how, activations=Activations.of(seen))[1]
    after = files.read(tmp_path / "out")
    for name in names:
        error = files.distance(*(files.added(layout, name, t, seen[name]) for t in (after, before)))
        assert report.targets[name].error == pytest.approx(error, rel=1e-6)
        assert report.targets[name].held_out_error is None
    stated = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert int(16 // stated["config"]["reduction_factor"]) == 3
