"""LoHa and LoKr between LyCORIS and PEFT, whose alphas mean different things where both factors are whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools.adapter import Adapter
from loratools.errors import UnsupportedInTargetError
from loratools.files import load
from loratools.ops.convert import Convert, convert, convert_file
from loratools.ops.lowering import Lowering

Samples = Callable[[str], Path]
TO_PEFT = ("loha", "lokr", "lokr_full_matrix", "lokr_scaled", "lokr_tucker")
TO_KOHYA = ("loha", "loha_conv", "lokr", "lokr_conv_effective")


def written(adapter: Adapter, path: Path, to: str) -> Adapter:
    saved, _ = convert_file(adapter, path, to)
    return load(saved.path)


def assert_identical(found: Adapter, wanted: Adapter) -> None:
    assert set(found) == set(wanted)
    for target, update in wanted.items():
        again = found[target]
        assert (again.family, again.scale) == (update.family, update.scale)
        assert set(again.parameters()) == set(update.parameters())
        assert all(torch.equal(again.parameters()[slot], t) for slot, t in update.parameters().items()), target


@pytest.mark.parametrize("name", TO_PEFT)
def test_lycoris_becomes_a_method_of_peft(samples: Samples, tmp_path: Path, name: str) -> None:
    """By PEFT's formula, alpha / r in its config, the delta is that of LyCORIS's forward pass; and back to the bit."""
    reference = load_file(samples(f"lycoris/{name}") / "reference_dW.safetensors")
    before = load(samples(f"lycoris/{name}") / "adapter.safetensors")
    after = written(before, tmp_path / "there", "peft")
    config = json.loads((tmp_path / "there" / "adapter_config.json").read_text())
    assert config["peft_type"] == name[:4].upper()
    tensors = load_file(tmp_path / "there" / "adapter_model.safetensors")
    flat = {parameter.replace(".", "_"): delta for parameter, delta in reference.items()}
    for target in after:
        t = {k.split(".")[-1]: v.double().numpy() for k, v in tensors.items() if f".{target}." in k}
        scale = config["alpha_pattern"].get(target, config["alpha"]) / config["rank_pattern"].get(target, config["r"])
        truth = flat[f"{target}.weight".replace(".", "_")].double().numpy()
        if name == "loha":
            delta = scale * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
        elif "lokr_t2" in t:
            second = np.einsum("pqkl,po,qi->oikl", t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
            delta = scale * np.kron(t["lokr_w1"][..., None, None], second)
        else:
            second = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
            second = second.reshape(second.shape[0], -1)
            delta = scale * np.kron(t["lokr_w1"], second)
        assert np.linalg.norm(delta.reshape(truth.shape) - truth) <= 1e-6 * np.linalg.norm(truth), target
    assert_identical(written(after, tmp_path / "back.safetensors", "kohya"), before)


@pytest.mark.parametrize("name", TO_KOHYA)
def test_peft_comes_back_from_lycoris(samples: Samples, tmp_path: Path, name: str) -> None:
    before = load(samples(f"peft/{name}"))
    there = written(before, tmp_path / "there.safetensors", "kohya")
    back = written(there, tmp_path / "back", "peft")
    assert back.config == before.config
    assert_identical(back, before)


def test_two_whole_factors_have_no_alpha_in_lycoris(samples: Samples, tmp_path: Path) -> None:
    """PEFT multiplies them with alpha / r all the same, so that it goes into the first."""
    before = load(samples("peft/lokr_big_r"))
    reference = load_file(samples("peft/lokr_big_r") / "reference_dW.safetensors")
    _, report = convert(before, "kohya")
    assert "W_SCALE_FOLDED" in report.notices
    convert_file(before, tmp_path / "there", "kohya")
    tensors = load_file(tmp_path / "there.safetensors")
    for parameter, truth in reference.items():
        stem = f"lycoris_{parameter.removesuffix('.weight').replace('.', '_')}"
        delta = np.kron(tensors[f"{stem}.lokr_w1"].double().numpy(), tensors[f"{stem}.lokr_w2"].double().numpy())
        assert np.linalg.norm(delta - truth.double().numpy()) <= 1e-6 * float(truth.norm())


def test_what_is_allowed_decides(samples: Samples) -> None:
    """A method as it is, unless a LoRA is asked for."""
    adapter = load(samples("lycoris/lokr") / "adapter.safetensors")
    assert {t.family for t in convert(adapter, "peft")[1].targets.values()} == {"lokr"}
    lowered = convert(adapter, "peft", Convert(Lowering(rank=2)))[1]
    assert {t.family for t in lowered.targets.values()} == {"lora"}


def test_the_taps_of_a_kernel_are_no_channels(tmp_path: Path) -> None:
    """20 inputs split in 4 and 5 at the root; with nine taps they would be 180, which split in 12 and 15."""
    shapes = {"lokr_w1": (4, 4), "lokr_w2_a": (5, 2), "lokr_w2_b": (2, 5 * 9)}
    save_file({f"lycoris_conv.{s}": torch.randn(*shape) for s, shape in shapes.items()}, tmp_path / "x.safetensors")
    config = convert(load(tmp_path / "x.safetensors"), "peft")[0].config
    assert config is not None
    assert (config["decompose_factor"], config["r"], config["alpha"]) == (-1, 2, 2)


class TestRefusals:
    def test_other_sides(self, samples: Samples) -> None:
        adapter = load(samples("lycoris/oft") / "adapter.safetensors")
        with pytest.raises(UnsupportedInTargetError, match=r"OFT rotates inputs, LyCORIS's rotates outputs.*--rank N"):
            convert(adapter, "peft")
        with pytest.raises(UnsupportedInTargetError, match="OFT rotates outputs, PEFT's rotates inputs"):
            convert(load(samples("peft/oft")), "kohya")

    def test_magnitudes(self, samples: Samples) -> None:
        adapter = load(samples("lycoris/lokr_dora") / "adapter.safetensors")
        with pytest.raises(UnsupportedInTargetError, match="PEFT's LoKr has no magnitude"):
            convert(adapter, "peft")

    def test_splits_that_peft_does_not_make(self, samples: Samples) -> None:
        """LyCORIS puts the smaller divisor first, PEFT the one asked for."""
        adapter = load(samples("lycoris/lokr_decompose_both") / "adapter.safetensors")
        with pytest.raises(UnsupportedInTargetError, match="no decompose_factor of PEFT's LoKr"):
            convert(adapter, "peft")

    def test_halves_of_different_ranks(self, tmp_path: Path) -> None:
        shapes = {"hada_w1_a": (8, 2), "hada_w1_b": (2, 9), "hada_w2_a": (8, 3), "hada_w2_b": (3, 9)}
        save_file({f"lycoris_lin.{s}": torch.randn(*shape) for s, shape in shapes.items()}, tmp_path / "x.safetensors")
        with pytest.raises(UnsupportedInTargetError, match="its halves have ranks 2 and 3"):
            convert(load(tmp_path / "x.safetensors"), "peft")
