"""Files of the real libraries: what loratools decodes is what the library computed, and what it cannot, it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loratools.adapter import Adapter
from loratools.base_weights import BaseWeights, load_base
from loratools.errors import AdapterError, InputError, LoratoolsError
from loratools.files import load
from loratools.formats.peft import PREFIX

Samples = Callable[[str], Path]

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "samples"

# Relative error of the delta, for float16 files too, whose products are exact in float64. The references are float32,
# and those of LyCORIS differences of float32 forward passes.
BOUND = 1e-5

PEFT_DECODED = {
    "adapter_name_infix", "bias_lora_only", "dora", "exclude_modules", "layers_pattern", "lora_all_linear",
    "lora_bias_true", "lora_conv2d", "lora_embedding", "lora_embedding_saved", "lora_f16", "lora_plain",
    "modules_to_save", "moe_target_parameters", "old_bin", "rank_alpha_pattern", "rslora",
}  # fmt: skip
PEFT_REFUSED = {
    "adalora", "c3a", "fourierft", "gralora", "ia3", "ln_tuning", "loha", "loha_conv", "lokr", "lokr_big_r",
    "lokr_conv_effective", "miss", "oft", "oft_cayley_neumann", "prompt_tuning", "pvera", "randlora", "road", "shira",
    "tinylora", "trainable_tokens", "unilora", "unilora_indices", "vblora", "vera",
}  # fmt: skip
# Loaded, with no reference to compare with; checked by their own tests below.
PEFT_WITHOUT_REFERENCE = {
    "alora": "an activated LoRA cannot be merged, so the library made no reference",
    "lora_conv_grouped": "the library refuses to merge a grouped convolution",
    "two_adapters_subfolder": "two adapters of one model: the library's merge would mix them",
}
KOHYA_DECODED = {"flux_bfl", "sd15_linear_only", "sd15_pt_pickle", "sd15_unet_te"}
LYCORIS_DECODED = {"locon", "locon_dora", "locon_f16", "locon_norm", "locon_scalar", "locon_tucker"}
LYCORIS_REFUSED = {
    "boft", "full", "glora", "loha", "loha_dora", "lokr", "lokr_decompose_both", "lokr_dora", "lokr_full_matrix",
    "lokr_scaled", "lokr_tucker", "oft", "oft_constraint", "tlora",
}  # fmt: skip

DECODED = [
    *(f"peft/{name}" for name in sorted(PEFT_DECODED)),
    *(f"kohya/{name}" for name in sorted(KOHYA_DECODED)),
    *(f"lycoris/{name}" for name in sorted(LYCORIS_DECODED)),
]
# Norm layers are stored as plain differences, which are carried along and reported, not decoded.
NOT_DECODED = {
    "lycoris/locon_norm": {"norm.weight", "norm.bias", "gn.weight", "gn.bias"},
}


def found_in(dialect: str) -> list[str]:
    folder = FOLDER / dialect
    return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []


@pytest.mark.parametrize(
    ("dialect", "groups"),
    [
        ("peft", (PEFT_DECODED, PEFT_REFUSED, set(PEFT_WITHOUT_REFERENCE))),
        ("kohya", (KOHYA_DECODED,)),
        ("lycoris", (LYCORIS_DECODED, LYCORIS_REFUSED)),
    ],
)
def test_every_folder_is_accounted_for_once(shared: Path, dialect: str, groups: tuple[set[str], ...]) -> None:
    listed = sorted(name for group in groups for name in group)
    assert found_in(dialect) == listed


def open_sample(folder: Path) -> Adapter:
    if (folder / "adapter_config.json").exists():
        return load(folder)
    (weights,) = (p for p in folder.iterdir() if p.stem in ("lora", "adapter"))
    return load(weights)


def decoded(folder: Path, adapter: Adapter, base: BaseWeights | None) -> dict[str, Tensor]:
    """Every change of a base parameter that the file states, by parameter name."""
    names = json.loads((folder / "sample.json").read_text()).get("module_map", {})
    deltas: dict[str, Tensor] = {}
    for target, update in adapter.items():
        flat = adapter.format.parameter(target)
        parameter = f"{names[target]}.weight" if target in names else flat
        weight = None
        if update.needs_base:
            assert base is not None
            weight = base.find(flat, adapter.entries[target].base_shape)
        deltas[parameter] = update.delta(weight)
        bias = update.bias_delta()
        if bias is not None:
            deltas[parameter.removesuffix("weight") + "bias"] = bias
    for key, parameter in adapter.format.replacements().items():
        assert base is not None
        before = base.find(parameter, adapter.extras[key].spec.shape)
        change = adapter.extras[key].read() - before
        deltas[parameter] = deltas[parameter] + change if parameter in deltas else change
    return deltas


@pytest.mark.parametrize("name", DECODED)
def test_deltas_are_those_of_the_library(samples: Samples, name: str) -> None:
    folder = samples(name)
    reference = load_file(folder / "reference_dW.safetensors")
    base = load_base(folder / "base.safetensors") if (folder / "base.safetensors").exists() else None
    adapter = open_sample(folder)
    found = decoded(folder, adapter, base)
    assert set(found) == set(reference) - NOT_DECODED.get(name, set())
    for parameter, delta in found.items():
        truth = reference[parameter].double()
        assert delta.dtype == torch.float32
        assert delta.shape == truth.shape, parameter
        error = float((delta.double() - truth).norm() / truth.norm())
        assert error < BOUND, f"{parameter}: {error:.2e}"


@pytest.mark.parametrize("name", sorted(PEFT_REFUSED))
def test_other_peft_types_are_refused_by_name(samples: Samples, name: str) -> None:
    folder = samples(f"peft/{name}")
    kind = json.loads((folder / "adapter_config.json").read_text())["peft_type"]
    with pytest.raises(AdapterError, match=rf"PEFT type '{kind}' is not supported; LORA is") as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(LYCORIS_REFUSED))
def test_other_lycoris_types_are_refused(samples: Samples, name: str) -> None:
    with pytest.raises(InputError, match=r"no known adapter dialect.*its keys begin with lycoris_blk_fc_out"):
        load(samples(f"lycoris/{name}") / "adapter.safetensors")


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
    adapter = open_sample(samples("lycoris/locon_norm"))
    assert set(adapter.unsupported) == {"lycoris_norm", "lycoris_gn"}
    assert {k.partition(".")[0] for k in adapter.extras} == {"lycoris_norm", "lycoris_gn"}


def test_dora_without_its_base_says_so(samples: Samples) -> None:
    adapter = load(samples("peft/dora"))
    for update in adapter.values():
        with pytest.raises(LoratoolsError, match="depends on the base weight"):
            update.delta()
