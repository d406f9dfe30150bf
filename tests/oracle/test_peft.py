"""PEFT itself loads what loratools wrote, and sees the same updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import loratools

peft = pytest.importorskip("peft", reason="the real PEFT is not installed: pip install 'loratools[oracle]'")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'loratools[oracle]'"
)

HIDDEN, LAYERS = 32, 2


def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=HIDDEN, n_layer=LAYERS, n_head=4)
    return transformers.GPT2LMHeadModel(config).eval()


class ConvNet(torch.nn.Module):
    """Convolutions of every number of dimensions, and of both kernel kinds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = torch.nn.Conv1d(6, 10, 3)
        self.two = torch.nn.Conv2d(4, 12, 3)
        self.point = torch.nn.Conv2d(12, 8, 1)
        self.three = torch.nn.Conv3d(3, 6, 2)
        self.linear = torch.nn.Linear(16, 20)


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "all linear": (llama, {"target_modules": "all-linear", "r": 6, "lora_alpha": 9}),
    "rslora": (llama, {"target_modules": ["q_proj", "v_proj"], "r": 6, "lora_alpha": 5, "use_rslora": True}),
    "patterns": (
        llama,
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "r": 6,
            "lora_alpha": 7,
            "rank_pattern": {"v_proj": 4, "layers.1.self_attn.q_proj": 5},
            "alpha_pattern": {"layers.0.mlp.down_proj": 3},
        },
    ),
    "embedding": (llama, {"target_modules": ["embed_tokens", "o_proj"], "r": 6, "lora_alpha": 4}),
    "bias": (ConvNet, {"target_modules": ["linear"], "r": 6, "lora_alpha": 4, "lora_bias": True}),
    "conv1d of GPT-2": (
        gpt2,
        {"target_modules": ["c_attn", "c_proj"], "r": 6, "lora_alpha": 4, "fan_in_fan_out": True},
    ),
    "convolutions": (ConvNet, {"target_modules": ["one", "two", "point", "three", "linear"], "r": 6, "lora_alpha": 4}),
    "dora": (llama, {"target_modules": ["q_proj", "down_proj"], "r": 6, "lora_alpha": 4, "use_dora": True}),
}


def trained(make: Any, config: dict[str, Any], folder: Path) -> Path:
    """An adapter as PEFT saves it, with random values that decay along the rank."""
    model = peft.get_peft_model(make(), peft.LoraConfig(**config))
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter *= 1 + 0.2 * torch.rand(parameter.shape, generator=gen)
            elif "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=gen) * 0.3)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def merged_changes(make: Any, folder: Path) -> dict[str, torch.Tensor]:
    """What PEFT's own merge does to every parameter, computed in float64."""
    base = {name: value.double().clone() for name, value in make().state_dict().items()}
    model = peft.PeftModel.from_pretrained(make().double(), folder).double().merge_and_unload()
    return {
        name: value - base[name] for name, value in model.state_dict().items() if not torch.equal(value, base[name])
    }


@pytest.mark.parametrize("scale", ["fold", "keep"])
@pytest.mark.parametrize("case", CASES)
def test_peft_sees_the_update_that_we_report(tmp_path: Path, case: str, scale: Any) -> None:
    make, config = CASES[case]
    source = trained(make, config, tmp_path / "source")
    base_file = tmp_path / "base.safetensors"
    save_file({k: v.clone() for k, v in make().state_dict().items()}, base_file)
    base = loratools.load_base(base_file)
    options = loratools.Squeeze(scale=scale, base=base)

    ours, truth = dict(loratools.delta(loratools.load(source), base=base)), merged_changes(make, source)
    assert set(ours) == set(truth)
    for name, value in truth.items():
        assert float((ours[name] - value).norm()) <= 2e-6 * float(value.norm()), name

    squeezed = tmp_path / "squeezed"
    _, report = loratools.squeeze_file(loratools.load(source), squeezed, 3, options=options)
    ours, small = dict(loratools.delta(loratools.load(squeezed), base=base)), merged_changes(make, squeezed)
    assert set(ours) == set(small) == set(truth)
    for name, value in small.items():
        assert float((ours[name] - value).norm()) <= 2e-6 * float(value.norm()), name
    for target, change in report.targets.items():
        name = f"{target}.weight"
        error = float((small[name] - truth[name]).norm() / truth[name].norm())
        assert change.relative_error == pytest.approx(error, rel=1e-4), target
        if not config.get("use_dora"):
            matrix = truth[name].flatten(1)
            best = torch.linalg.svdvals(matrix)[change.rank_after :].norm() / matrix.norm()
            assert error == pytest.approx(float(best), rel=1e-4), target


@pytest.mark.parametrize("case", ["all linear", "rslora", "patterns", "conv1d of GPT-2"])
def test_uneven_ranks_reach_peft_through_the_patterns(tmp_path: Path, case: str) -> None:
    make, config = CASES[case]
    source = trained(make, config, tmp_path / "source")
    squeezed = tmp_path / "squeezed"
    _, report = loratools.squeeze_file(loratools.load(source), squeezed, loratools.Energy(0.8))
    ranks = {change.rank_after for change in report.targets.values()}
    assert len(ranks) > 1, "the case does not test uneven ranks"
    truth, small = merged_changes(make, source), merged_changes(make, squeezed)
    for target, change in report.targets.items():
        name = f"{target}.weight"
        error = float((small[name] - truth[name]).norm() / truth[name].norm())
        assert change.relative_error == pytest.approx(error, rel=1e-4), target


def test_peft_converts_pissa_as_we_do(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4, lora_alpha=6, init_lora_weights="pissa")
    model = peft.get_peft_model(llama(), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=gen)
    model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained(tmp_path / "trained")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    plain = loratools.subtract_initial(loratools.load(tmp_path / "trained"), loratools.load(tmp_path / "initial"))
    theirs = loratools.load(tmp_path / "converted")
    assert set(plain) == set(theirs)
    for target, update in theirs.items():
        assert torch.allclose(plain[target].delta(), update.delta(), atol=1e-6)
    assert plain.config is not None
    assert theirs.config is not None
    assert (plain.config["r"], plain.config["lora_alpha"]) == (theirs.config["r"], theirs.config["lora_alpha"])
