"""Nonlinear bottlenecks: every layout is named for what it is, and refused where a weight is asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bottleneck_files as files
import pytest
import torch
from bottleneck_files import LAYOUTS, SIZE, WIDTH

import loratools
from loratools.adapter import Adapter
from loratools.errors import AdapterError, InputError, NotAWeightDeltaError
from loratools.files import load
from loratools.formats.bottlenecks import adapterhub, reduction_factor, with_reduction
from loratools.storage import TensorSpec

each = pytest.mark.parametrize("name", LAYOUTS)
KINDS = {
    "adaptertune": "AdapterTune", "adaptformer": "AdaptFormer", "mosa": "MoSA", "mosa houlsby": "MoSA",
    "pfeiffer": "Pfeiffer", "houlsby": "Houlsby", "parallel": "AdapterHub, parallel",
    "norm in sequence": "Pfeiffer", "petl": "PETL-ViT AdaptFormer",
}  # fmt: skip


@each
def test_info_names_them(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    adapter = load(files.write(tmp_path, layout, files.made(layout)))
    found = loratools.info(adapter)
    assert not found.targets
    assert list(found.bottlenecks) == sorted(layout.names, key=list(found.bottlenecks).index)
    assert set(found.bottlenecks) == set(layout.names)
    for row in found.bottlenecks.values():
        assert row.kind == KINDS[name]
        assert (row.width, row.inputs) == (WIDTH, SIZE)
        assert row.activation in (layout.activation, "swish")
    parts = [p for p in layout.keys(layout.names[0]) if p != "scale"]
    sizes = {"down.weight": WIDTH * SIZE, "up.weight": WIDTH * SIZE, "down.bias": WIDTH}
    assert row.parameters == sum(sizes.get(p, SIZE) for p in parts)
    assert set(found.unsupported) <= set(adapter.extras)
    assert all("which is not an update of a weight" in why for why in found.unsupported.values())


REFUSING: dict[str, Callable[[Adapter, Path], object]] = {
    "inspect": lambda a, _: loratools.inspect(a),
    "squeeze": lambda a, _: loratools.squeeze(a, 2),
    "squeeze_file": lambda a, out: loratools.squeeze_file(a, out, 2),
    "truncate": lambda a, _: loratools.truncate(a, 2),
    "quantize": lambda a, _: loratools.quantize(a),
    "convert": lambda a, _: loratools.convert(a, "peft"),
    "delta": lambda a, _: list(loratools.delta(a)),
    "delta_file": loratools.delta_file,
    "diff": lambda a, _: loratools.diff(a, a),
    "merge": lambda a, _: loratools.merge([(a, 1.0), (a, 1.0)]),
    "check": lambda a, _: loratools.check(a, "vllm"),
    "pareto": lambda a, _: loratools.pareto(a),
}


@pytest.mark.parametrize("verb", REFUSING)
@pytest.mark.parametrize("name", ["adaptertune", "pfeiffer", "petl"])
def test_no_verb_takes_them_for_weights(tmp_path: Path, name: str, verb: str) -> None:
    layout = LAYOUTS[name]
    adapter = load(files.write(tmp_path / "in", layout, files.made(layout)))
    with pytest.raises(NotAWeightDeltaError, match=r"no update of a weight equals; use loratools neurons") as caught:
        REFUSING[verb](adapter, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "in") in str(caught.value)
    assert not (tmp_path / "out").exists()


@each
@pytest.mark.parametrize("role", ["down.weight", "up.weight"])
def test_a_missing_half_is_named(tmp_path: Path, name: str, role: str) -> None:
    layout = LAYOUTS[name]
    tensors = files.made(layout)
    del tensors[layout.keys(layout.names[1])[role]]
    path = files.write(tmp_path, layout, tensors)
    with pytest.raises(AdapterError, match=rf"{layout.names[1]}: has no .*{role[:2]}.*weight") as caught:
        load(path)
    assert str(tmp_path) in str(caught.value)


def test_a_head_alone_is_still_nothing(tmp_path: Path) -> None:
    path = files.write(tmp_path, LAYOUTS["adaptertune"], {"head.weight": torch.zeros(3, 4)})
    with pytest.raises(InputError, match="no known adapter dialect"):
        load(path)


def test_two_kinds_in_one_file(tmp_path: Path) -> None:
    tensors = files.made(LAYOUTS["adaptertune"]) | files.made(LAYOUTS["adaptformer"])
    path = files.write(tmp_path, LAYOUTS["adaptertune"], tensors)
    with pytest.raises(AdapterError, match=r"more than one kind \(AdapterTune, AdaptFormer\)"):
        load(path)


def test_a_config_without_bottlenecks_leaves_the_activation_open(tmp_path: Path) -> None:
    """A file of AdapterHub alone is known by its keys."""
    layout = LAYOUTS["pfeiffer"]
    files.write(tmp_path, layout, files.made(layout))
    (tmp_path / "adapter_config.json").unlink()
    rows = loratools.info(load(tmp_path)).bottlenecks
    assert {(row.kind, row.activation) for row in rows.values()} == {("Pfeiffer", None)}


def test_a_union_keeps_its_bottlenecks_in_one_of_its_configs() -> None:
    inner = files.hub_config("relu")["config"]
    config = {"config": {"architecture": "union", "configs": [{"flat": False}, inner]}, "hidden_size": SIZE}
    layout = LAYOUTS["pfeiffer"]
    specs = {key: TensorSpec("F32", tuple(t.shape)) for key, t in files.made(layout).items()}
    places = adapterhub(specs, config)
    assert {place.activation for place in places.values()} == {"relu"}
    changed = with_reduction(config, places, dict.fromkeys(places, 4))
    assert changed["config"]["configs"] == [{"flat": False}, inner | {"reduction_factor": 3}]


def test_reduction_factors_give_back_every_width() -> None:
    """As the library computes it: int(hidden_size // reduction_factor)."""
    for size in (8, 12, 100, 312, 768, 1000):
        for width in range(1, size + 1):
            assert int(size // reduction_factor(size, width)) == width


def test_a_reduction_factor_for_each_layer() -> None:
    layout = LAYOUTS["houlsby"]
    specs = {key: TensorSpec("F32", tuple(t.shape)) for key, t in files.made(layout).items()}
    places = adapterhub(specs, layout.config)
    widths = {name: 4 if ".0." in name else 3 for name in places}
    stated = with_reduction(layout.config or {}, places, widths)["config"]["reduction_factor"]
    assert stated == {"0": 3, "1": 4, "default": 3}
    with pytest.raises(AdapterError, match="its width differs from that of others in its layer"):
        with_reduction(layout.config or {}, places, {name: i + 1 for i, name in enumerate(places)})


def test_layers_of_two_stacks_have_one_width() -> None:
    """Configs count the layers of an encoder and a decoder on; which number is whose no key says."""
    names = [f"{stack}.layers.{i}.adapters.t" for stack in ("encoder", "decoder") for i in range(2)]
    specs = {key: TensorSpec("F32", (2, 2)) for n in names for key in LAYOUTS["pfeiffer"].keys(n).values()}
    places = adapterhub(specs, LAYOUTS["pfeiffer"].config)
    assert {place.group for place in places.values()} == {""}
