"""Files of the real libraries: what loratools decodes is what the library computed, and what it cannot, it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loratools.adapter import Adapter
from loratools.base_weights import BaseWeights, load_base
from loratools.errors import LoratoolsError
from loratools.files import load
from loratools.formats.peft import PREFIX

Samples = Callable[[str], Path]

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "samples"

# Relative error of the delta, for float16 files too, whose products are exact in float64. The references are float32,
# and those of LyCORIS differences of float32 forward passes.
BOUND = 1e-5

# Loaded, with no reference to compare with; checked by their own tests below.
WITHOUT_REFERENCE = {
    "peft/alora": "an activated LoRA cannot be merged, so the library made no reference",
    "peft/lora_conv_grouped": "the library refuses to merge a grouped convolution",
    "peft/two_adapters_subfolder": "two adapters of one model: the library's merge would mix them",
}
# What is not an update of a weight: `info` names it, and no target comes of it.
NOT_WEIGHTS = {
    "peft/prompt_tuning": "PROMPT_TUNING is a prompt",
    "lycoris/tlora": "T-LoRA: its delta is relative to initial factors",
    "others/adapters_pfeiffer": "a bottleneck adapter, which is not an update of a weight",
    "others/adapters_prefix": "a prefix tuning: trained keys and values, which is not an update of a weight",
}
# What the user must say of files that do not state it.
HINTS: dict[str, dict[str, Any]] = {"others/loralib_linear": {"alpha": 6, "enable_lora": (True, False, True)}}
# Those files in which a library writes other names, or another orientation, than its weights have.
OWN_NAMES = {"others/litgpt_mha": (".linear.weight", ".weight")}
TRANSPOSED = {"others/loralib_linear": {"fc_t.weight", "qkv_t.weight"}}  # fan_in_fan_out, which only a base can tell
# Files with two ranks, and one alpha for each: with the other's alpha, these are off by the quotient.
RESCALED = {"others/loralib_linear": {"qkv_t.weight": 4 / 6}}
REFUSED = {"peft/unilora": "its indices were not saved, .* set save_indices"}
# Compared in tests/formats/test_gguf.py, which puts rows in the order of transformers and bounds packed blocks.
ELSEWHERE = ("gguf",)


def found() -> list[str]:
    if not FOLDER.is_dir():
        return []
    dialects = [p for p in sorted(FOLDER.iterdir()) if p.name not in ELSEWHERE and not p.name.startswith("_")]
    return [f"{d.name}/{p.name}" for d in dialects if d.is_dir() for p in sorted(d.iterdir()) if p.is_dir()]


DECODED = [name for name in found() if name not in {*WITHOUT_REFERENCE, *NOT_WEIGHTS, *REFUSED}]


def test_the_lists_name_samples(shared: Path) -> None:
    assert {*WITHOUT_REFERENCE, *NOT_WEIGHTS, *REFUSED} <= set(found())
    assert len(DECODED) > 30


def open_sample(folder: Path) -> Adapter:
    if (folder / "adapter_model.pt").exists():
        return load(folder / "adapter_model.pt")
    if (folder / "adapter_config.json").exists() or (folder / "lit_model.pth.lora").exists():
        return load(folder)
    (weights,) = (p for p in folder.iterdir() if p.stem in ("lora", "adapter") or p.stem.startswith("pytorch_lora"))
    return load(weights, **HINTS.get(f"{folder.parent.name}/{folder.name}", {}))


def decoded(folder: Path, adapter: Adapter, base: BaseWeights | None, reference: Collection[str]) -> dict[str, Tensor]:
    """Every change of a base parameter that the file states, by parameter name."""
    names = json.loads((folder / "sample.json").read_text()).get("module_map", {})
    deltas: dict[str, Tensor] = {}
    for target, update in adapter.items():
        flat = adapter.format.parameter(target)
        module, _, leaf = flat.rpartition(".")
        parameter = f"{names[module]}.{leaf}" if module in names else flat
        if parameter not in reference and (placement := adapter.format.place(target)) is not None:
            (piece,) = placement.pieces
            parameter = f"{piece.module}.weight".replace(".text_model.", ".")  # as transformers 5 names them
        weight = None
        if update.needs_base:
            assert base is not None
            weight = base.find(flat, adapter.entries[target].base_shape)
        delta = update.delta(weight)
        shape = base.source.specs[parameter].shape if base is not None and parameter in base.source.specs else None
        deltas[parameter] = delta if shape is None else delta.reshape(shape)
        name_of_bias = parameter.removesuffix("weight") + "bias"
        has_bias = base is not None and name_of_bias in base.source.specs
        bias = update.bias_delta(base.source.read(name_of_bias) if base is not None and has_bias else None)
        if bias is not None:
            deltas[name_of_bias] = bias
    for key, parameter in adapter.format.replacements().items():
        assert base is not None
        before = base.find(parameter, adapter.extras[key].spec.shape)
        change = adapter.extras[key].read() - before
        deltas[parameter] = deltas[parameter] + change if parameter in deltas else change
    return deltas


def errors(name: str, folder: Path) -> dict[str, float]:
    """The relative error of every parameter's delta, which must be there and have its shape."""
    reference = load_file(folder / "reference_dW.safetensors")
    base = load_base(folder / "base.safetensors") if (folder / "base.safetensors").exists() else None
    adapter = open_sample(folder)
    if name in OWN_NAMES:
        reference = {key.replace(*OWN_NAMES[name]): tensor for key, tensor in reference.items()}
    for parameter in TRANSPOSED.get(name, ()):
        reference[parameter] = reference[parameter].T
    found = decoded(folder, adapter, base, reference)
    for parameter, factor in RESCALED.get(name, {}).items():
        found[parameter] = found[parameter] * factor
    assert set(found) == set(reference)
    off = {}
    for parameter, delta in found.items():
        truth = reference[parameter].double()
        assert delta.dtype == torch.float32
        assert delta.shape == truth.shape, parameter
        off[parameter] = float((delta.double() - truth).norm() / truth.norm())
    return off


@pytest.mark.parametrize("name", DECODED)
def test_deltas_are_those_of_the_library(samples: Samples, name: str) -> None:
    found = errors(name, samples(name))
    assert {parameter: error for parameter, error in found.items() if not error < BOUND} == {}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_the_others_are_refused(samples: Samples, name: str) -> None:
    with pytest.raises(LoratoolsError, match=REFUSED[name]) as caught:
        open_sample(samples(name))
    assert str(samples(name)) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(NOT_WEIGHTS))
def test_what_is_no_weight_update_is_named(samples: Samples, name: str) -> None:
    adapter = open_sample(samples(name))
    assert len(adapter) == 0
    assert adapter.unsupported
    assert all(reason.startswith(NOT_WEIGHTS[name]) for reason in adapter.unsupported.values())


class TestWithoutReference:
    def test_activated_lora_warns(self, samples: Samples) -> None:
        adapter = load(samples("peft/alora"))
        assert any("must not be merged" in warning for warning in adapter.warnings)
        stored = load_file(samples("peft/alora") / "adapter_model.safetensors")
        assert len(adapter) * 2 == len(stored) == 8
        for target, update in adapter.items():
            a, b = (stored[f"{PREFIX}{target}.lora_{side}.weight"].double() for side in "AB")
            torch.testing.assert_close(update.delta().double(), 8 / 4 * b @ a, rtol=1e-6, atol=1e-7)

    def test_grouped_convolution(self, samples: Samples) -> None:
        """Two convolutions after each other: the second one's groups make the delta block diagonal over groups."""
        adapter = load(samples("peft/lora_conv_grouped"))
        stored = load_file(samples("peft/lora_conv_grouped") / "adapter_model.safetensors")
        a, b = stored[f"{PREFIX}gconv.lora_A.weight"].double(), stored[f"{PREFIX}gconv.lora_B.weight"].double()
        groups = a.shape[0] // b.shape[1]
        assert groups == 2
        x = torch.randn(1, groups * a.shape[1], 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        hidden = torch.nn.functional.conv2d(x, a, groups=groups)  # PEFT's lora_A keeps the base's groups
        wanted = 8 / 4 * torch.nn.functional.conv2d(hidden, b, groups=groups)
        found = torch.nn.functional.conv2d(x, adapter["gconv"].delta().double(), groups=groups)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)

    def test_two_adapters(self, samples: Samples) -> None:
        outer, inner = (
            load(samples("peft/two_adapters_subfolder")),
            load(samples("peft/two_adapters_subfolder") / "other"),
        )
        assert {t.rpartition(".")[2] for t in outer} == {"q_proj", "v_proj"}
        assert {t.rpartition(".")[2] for t in inner} == {"o_proj"}
        assert {e.rank for e in inner.entries.values()} == {2}


def test_unsupported_modules_are_reported_and_carried(samples: Samples) -> None:
    adapter = open_sample(samples("lycoris/tlora"))
    assert set(adapter.unsupported) == {"lycoris_lin0", "lycoris_blk_fc_out"}
    assert {k.partition(".")[0] for k in adapter.extras} == set(adapter.unsupported)
    assert sum(k.endswith(".alpha") for k in adapter.extras) == 2
    assert not adapter.warnings


def test_norms_and_biases_are_targets_of_their_own(samples: Samples) -> None:
    adapter = open_sample(samples("lycoris/locon_norm"))
    changed = {t for t, e in adapter.entries.items() if e.family.family == "full"}
    assert changed == {"lycoris_norm", "lycoris_norm.bias", "lycoris_gn", "lycoris_gn.bias"}
    assert adapter.format.parameter("lycoris_gn") == "lycoris_gn.weight"
    assert adapter.format.parameter("lycoris_gn.bias") == "lycoris_gn.bias"
    assert not adapter.extras


def test_dora_without_its_base_says_so(samples: Samples) -> None:
    adapter = load(samples("peft/dora"))
    for update in adapter.values():
        with pytest.raises(LoratoolsError, match="depends on the base weight"):
            update.delta()
