"""Transfers that train from what the weights of both bases made of the adapter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training.test_transfer import HOW, KilledError, killing, moved, result
from training.tiny import ATTENTION, save_tiny_lora
from training.tiny_task import Places

from loratools.errors import AdapterError
from loratools.files import load
from loratools.ops.weight_space import Align
from loratools.training.anneal import lora_layers
from loratools.training.new_adapter import NewAdapter
from loratools.training.training_run import TrainingRun
from loratools.training.transfer import fit, run, warm_start
from loratools.training.transfer.stage_files import StageFiles


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORATOOLS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(("align", "method"), [("bases", "lora"), ("activations", "lora"), ("activations", "dora")])
def test_training_begins_with_the_squeezed_adapter(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, align: Align, method: Any
) -> None:
    begun: dict[str, torch.Tensor] = {}
    whole = fit.train_rows

    def watched(model: Any, *arguments: Any, **keywords: Any) -> Any:
        for target, layer in lora_layers(model.get_base_model()):
            x = torch.eye(layer.in_features)
            begun[target] = (layer(x) - layer.get_base_layer()(x)).T.detach().double()
        return whole(model, *arguments, **keywords)

    monkeypatch.setattr(fit, "train_rows", watched)
    how = replace(HOW, warm_start=align, adapter=NewAdapter(method, rank=4))
    report = moved(places, tmp_path / "moved", how)
    rows = [json.loads(line) for line in (tmp_path / "moved.transfer" / "labelled.jsonl").read_text().splitlines()]
    carried, told = _weights_only(places, align, [row["prompt"] + row["answer"] for row in rows])
    assert begun.keys() == carried.keys()
    lost = whole_norm = 0.0
    for target, found in begun.items():
        dense = carried[target].operator().dense().double()
        u, s, vt = torch.linalg.svd(dense, full_matrices=False)
        assert torch.allclose(found, u[:, :4] * s[:4] @ vt[:4], atol=1e-4 * float(s[0]) + 1e-5), target
        assert float(s[0]) > 1e-3
        lost, whole_norm = lost + float(s[4:].square().sum()), whole_norm + float(s.square().sum())
    assert report.warm_start is not None
    assert (report.warm_start.align, report.warm_start.targets) == (align, len(carried))
    assert report.warm_start.squeezed == pytest.approx((lost / whole_norm) ** 0.5, rel=1e-3)
    assert {f"warm start: {warning}" for warning in told.warnings} <= set(report.warnings)
    names = [stage.stage for stage in report.stages]
    assert names == ["prepare", "generate", "filter", "label", "start", "train", "evaluate"]


def _weights_only(places: Places, align: Align, texts: list[str]) -> Any:
    """What --weights-only makes, by another path: from the models' weights and the texts."""
    from loratools.ops.weight_space import module_pairs, transfer_weights
    from loratools.training.applied import base_of
    from loratools.training.models import load_model
    from loratools.training.paired_activations import PairedActivations, Side, paired_texts

    one, other = (Side(*load_model(place), place.name) for place in (places.first, places.second))
    bases = base_of(one.model), base_of(other.model)
    adapter = load(places.adapter)
    maps: Any = "bases"
    if align == "activations":
        maps = PairedActivations(one, other, paired_texts(one, other, texts), module_pairs(adapter, *bases))
    return transfer_weights(adapter, *bases, maps=maps)


WARM = replace(HOW, warm_start="activations")


def everything(out: Path) -> dict[str, list[str]]:
    start = out.with_name(f"{out.name}.transfer") / "start" / "adapter_model.safetensors"
    return {**result(out), "start": [start.read_bytes().hex()]}


@pytest.fixture(scope="module")
def expected(places: Places, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    out = tmp_path_factory.mktemp("expected") / "moved"
    moved(places, out, WARM)
    return everything(out)


def test_the_same_seed_gives_the_same(places: Places, tmp_path: Path, expected: dict[str, list[str]]) -> None:
    moved(places, tmp_path / "again", WARM)
    assert everything(tmp_path / "again") == expected
    moved(places, tmp_path / "cold")
    cold = result(tmp_path / "cold")
    assert cold["labelled"] == expected["labelled"]
    assert cold["weights"] != expected["weights"]


@pytest.mark.parametrize(
    ("where", "name", "after", "before"),
    [
        (warm_start, "save", 1, False),  # the carried adapter is there, the record does not say so
        (StageFiles, "note", 10, True),
        (TrainingRun, "save", 1, False),
        (run, "save", 1, False),
    ],
)
def test_a_killed_one_goes_on_to_the_same_result(
    places: Places,
    tmp_path: Path,
    expected: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    where: Any,
    name: str,
    after: int,
    before: bool,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(where, name, killing(getattr(where, name), after, before_the_work=before))
        with pytest.raises(KilledError):
            moved(places, tmp_path / "moved", WARM)
    moved(places, tmp_path / "moved", WARM, resume=True)
    assert everything(tmp_path / "moved") == expected


def test_a_cold_run_that_was_killed_does_not_warm_up_halfway(
    places: Places, tmp_path: Path, expected: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of training from a fresh start is none of training from another."""
    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "save", killing(TrainingRun.save, 2, before_the_work=False))
        with pytest.raises(KilledError):
            moved(places, tmp_path / "moved")
    moved(places, tmp_path / "moved", WARM, resume=True)
    assert everything(tmp_path / "moved") == expected


def test_bases_come_first_and_another_alignment_is_another_stage(places: Places, tmp_path: Path) -> None:
    out = tmp_path / "moved"
    first = moved(places, out, replace(HOW, warm_start="bases"))
    record = list(json.loads((tmp_path / "moved.transfer" / "stages.json").read_text()))
    assert record[0] == "start"
    before = everything(out)["start"]
    again = moved(places, out, WARM, resume=True)
    assert everything(out)["start"] != before
    assert again.labelling == first.labelling
    assert again.stages[1] == first.stages[1]  # not generated once more


@pytest.mark.parametrize("align", ["bases", "activations"])
def test_nothing_to_carry_is_an_error(places: Places, tmp_path: Path, align: Align) -> None:
    dora = save_tiny_lora(tmp_path / "dora", use_dora=True, modules=ATTENTION)
    odd = replace(places, adapter=dora)
    with pytest.raises(AdapterError, match=r"no warm start: nothing can be carried over.*convert it to LoRA first"):
        moved(odd, tmp_path / "moved", replace(HOW, warm_start=align))
    generated = tmp_path / "moved.transfer" / "generated.jsonl"
    assert generated.exists() == (align == "activations")
    assert not (tmp_path / "moved").exists()
