"""A real adapter goes into its real base, and comes out again."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from real.smollm2 import ADAPTERS, RealModel, load_real_model, missing
from safetensors.torch import load_file

import loratools
from loratools.base_weights import BaseWeights

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> RealModel:
    if reason := missing():
        pytest.skip(reason)
    return load_real_model(tmp_path_factory.mktemp("base"), n_rows=32)


@pytest.fixture(scope="module")
def fused(real: RealModel, tmp_path_factory: pytest.TempPathFactory) -> BaseWeights:
    out = tmp_path_factory.mktemp("fused") / "model"
    loratools.fuse(loratools.load(ADAPTERS / "en_lora_r8"), real.weights, out)
    return loratools.load_base(out)


def test_peft_merges_to_the_same_weights(real: RealModel, fused: BaseWeights) -> None:
    import peft

    merged = peft.PeftModel.from_pretrained(copy.deepcopy(real.model), ADAPTERS / "en_lora_r8").merge_and_unload()
    truth = dict(merged.named_parameters())
    found = load_file(fused.source.path)
    assert set(found) == set(truth)
    changed = 0
    for name, weight in found.items():
        before = real.weights.source.read(name)
        assert weight.dtype == before.dtype
        change = (truth[name].detach() - before).double()
        changed += bool(change.any())
        error = float((weight.double() - truth[name].detach().double()).norm())
        assert error <= 1e-5 * float(change.norm()) + 1e-7 * float(before.double().norm()), name
    assert changed == len(loratools.load(ADAPTERS / "en_lora_r8"))


def test_what_was_fused_is_extracted_at_its_rank(real: RealModel, fused: BaseWeights) -> None:
    adapter = loratools.load(ADAPTERS / "en_lora_r8")
    made, report = loratools.extract(loratools.differences(real.weights, fused), 8)
    assert set(made) == set(adapter)
    assert report.total["relative_error"] < 1e-3
    assert not report.left_out
    for target in list(adapter)[::30]:
        wanted = adapter[target].delta().double()
        assert (made[target].delta().double() - wanted).norm() <= 1e-3 * wanted.norm()
    assert real.nll(made) == pytest.approx(real.nll(adapter), abs=1e-3)


def test_half_the_rank_loses_what_squeezing_loses(real: RealModel, fused: BaseWeights, tmp_path: Path) -> None:
    made, _ = loratools.extract(loratools.differences(real.weights, fused), 4)
    squeezed, _ = loratools.squeeze(loratools.load(ADAPTERS / "en_lora_r8"), 4)
    again = loratools.load(loratools.save(made, tmp_path / "extracted").path)
    assert real.nll(again) == pytest.approx(real.nll(squeezed), abs=2e-3)
