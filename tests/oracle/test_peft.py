"""PEFT itself loads what a squeeze wrote, and merges exactly the delta that loratools says is in it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

if not os.environ.get("CI"):  # where it must be installed, its absence is an error
    pytest.importorskip("peft", reason="compares with PEFT: pip install 'loratools[oracle]'")
    pytest.importorskip("transformers", reason="compares with PEFT: pip install 'loratools[oracle]'")

import peft
import transformers

from loratools.adapter import Adapter
from loratools.base_weights import load_base
from loratools.files import load, save
from loratools.ops.squeeze import Squeeze, squeeze_file
from loratools.ranks import Energy, Policy

SIZES = {"vocab_size": 40, "max_position_embeddings": 16}


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **SIZES
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=24, n_layer=2, n_head=2, **SIZES))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, (3, 1))
        self.second = nn.Conv2d(12, 10, 1)
        self.line = nn.Conv1d(10, 14, 3)
        self.volume = nn.Conv3d(4, 9, (1, 2, 3))
        self.head = nn.Linear(14, 11)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 16, 24))
        self.down_proj = nn.Parameter(torch.randn(3, 24, 16))


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(24, 10)
        self.layers = nn.ModuleList(nn.ModuleDict({"experts": Experts()}) for _ in range(2))


@dataclass(frozen=True)
class Case:
    model: Callable[[], nn.Module]
    policy: int | Policy
    config: dict[str, Any] = field(default_factory=dict)
    mode: str = "fold"


ALL = {"target_modules": "all-linear"}
FUSED = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
TABLE = {"target_modules": ["embed_tokens", "q_proj"]}
PATTERNS = {"rank_pattern": {"q_proj": 4, r"layers\.1\.mlp\.up_proj": 6}, "alpha_pattern": {"v_proj": 5, "q_proj": 3}}
CONVS = {"target_modules": ["first", "second", "line", "volume", "head"]}
PARAMETERS = {
    "target_modules": ["router"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}
CASES = {
    "llama": Case(llama, 3, ALL),
    "llama, scale kept": Case(llama, 3, ALL, "keep"),
    "llama, uneven ranks": Case(llama, Energy(0.6), ALL),
    "llama, uneven ranks, scale kept": Case(llama, Energy(0.6), ALL, "keep"),
    "llama, patterns": Case(llama, 3, ALL | PATTERNS),
    "llama, patterns, rsLoRA, scale kept": Case(llama, 5, ALL | PATTERNS | {"use_rslora": True}, "keep"),
    "llama, rsLoRA": Case(llama, 3, ALL | {"use_rslora": True}),
    "llama, rsLoRA, uneven ranks, scale kept": Case(llama, Energy(0.6), ALL | {"use_rslora": True}, "keep"),
    "llama, DoRA": Case(llama, 3, ALL | {"use_dora": True}),
    "llama, DoRA, uneven ranks, scale kept": Case(llama, Energy(0.6), ALL | {"use_dora": True}, "keep"),
    "embedding": Case(llama, Energy(0.6), TABLE),
    "embedding, DoRA": Case(llama, 3, TABLE | {"use_dora": True}),
    "gpt2": Case(gpt2, Energy(0.6), FUSED),
    "gpt2, DoRA": Case(gpt2, 3, FUSED | {"use_dora": True}),
    "convolutions": Case(ConvNet, 3, CONVS),
    "convolutions, uneven ranks": Case(ConvNet, Energy(0.6), CONVS, "keep"),
    "convolutions, DoRA": Case(ConvNet, 3, CONVS | {"use_dora": True}),
    "bias": Case(ConvNet, 3, {"target_modules": ["head"], "lora_bias": True}, "keep"),
    "bias, scale folded": Case(ConvNet, 3, {"target_modules": ["head"], "lora_bias": True}),
    "experts": Case(Mixture, 2, PARAMETERS),
    "experts, uneven ranks, scale kept": Case(Mixture, Energy(0.5), PARAMETERS, "keep"),
}
each = pytest.mark.parametrize("name", CASES)


def fresh(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.model()


def trained(case: Case, folder: Path) -> Path:
    """An adapter as PEFT saves it, with random factors whose spectra fall at different speeds."""
    model = peft.get_peft_model(fresh(case), peft.LoraConfig(r=8, lora_alpha=12, **case.config))
    generator = torch.Generator().manual_seed(1)
    for i, (key, parameter) in enumerate(model.named_parameters()):
        if "lora_" in key:
            noise = torch.randn(parameter.shape, generator=generator)
            if "lora_B" in key or "lora_embedding_B" in key:
                fall = torch.arange(1, noise.shape[-1] + 1) ** -(0.3 * (i % 4))
                noise = 0.3 * noise * (fall if noise.ndim == 2 else 1)
            elif "magnitude" in key:
                noise = parameter.detach() * (1 + 0.1 * noise)
            parameter.data = noise
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def merged(case: Case, folder: Path) -> dict[str, Tensor]:
    """What PEFT adds to each parameter of the base, in float64."""
    base = {key: t.double() for key, t in fresh(case).state_dict().items()}
    model = peft.PeftModel.from_pretrained(fresh(case), folder).double()
    state = model.merge_and_unload(safe_merge=True).state_dict()
    assert state.keys() == base.keys()
    changes = {key: state[key] - base[key] for key in base}
    return {key: change for key, change in changes.items() if change.any()}


def ours(adapter: Adapter, case: Case) -> dict[str, Tensor]:
    base, deltas = fresh(case).state_dict(), {}
    for target, update in adapter.items():
        parameter = adapter.format.parameter(target)
        deltas[parameter] = update.delta(base[parameter] if update.needs_base else None)
        bias = update.bias_delta()
        if bias is not None:
            deltas[parameter.removesuffix("weight") + "bias"] = bias
    return deltas


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, delta in wanted.items():
        assert found[key].shape == delta.shape
        assert float((found[key] - delta).norm()) <= 1e-6 * float(delta.norm()), key


@dataclass(frozen=True)
class Squeezed:
    case: Case
    before: Path
    after: Path


@pytest.fixture(scope="module")
def squeezed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Squeezed]:
    done: dict[str, Squeezed] = {}

    def make(name: str) -> Squeezed:
        if name not in done:
            case, folder = CASES[name], tmp_path_factory.mktemp("peft")
            state = {key: t.clone() for key, t in fresh(case).state_dict().items()}
            save_file(state, folder / "model.safetensors")
            source = trained(case, folder / "before")
            base = load_base(folder / "model.safetensors")
            options = Squeeze(base=base, scale=case.mode)  # type: ignore[arg-type]
            saved, report = squeeze_file(load(source), folder / "after", case.policy, options=options)
            assert report.targets
            done[name] = Squeezed(case, source, saved.path)
        return done[name]

    return make


@each
def test_peft_merges_what_we_decode(squeezed: Callable[[str], Squeezed], name: str) -> None:
    s = squeezed(name)
    assert_equal(ours(load(s.before), s.case), merged(s.case, s.before))
    assert_equal(ours(load(s.after), s.case), merged(s.case, s.after))


@each
def test_peft_sees_the_ranks_and_scales(squeezed: Callable[[str], Squeezed], name: str) -> None:
    s = squeezed(name)
    adapter = load(s.after)
    model = peft.PeftModel.from_pretrained(fresh(s.case), s.after)
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    seen = sorted((m.r["default"], round(float(m.scaling["default"]), 6)) for m in layers)
    assert seen == sorted((e.rank, round(e.scale, 6)) for e in adapter.entries.values())
    before = load(s.before)
    if s.case.mode == "fold":
        changed = [t for t in adapter if adapter.entries[t].rank < before.entries[t].rank]
        assert changed
        assert all(adapter.entries[t].scale == pytest.approx(1.0) for t in changed)
    else:
        assert all(e.scale == pytest.approx(before.entries[t].scale, rel=1e-9) for t, e in adapter.entries.items())
    if isinstance(s.case.policy, Energy):
        assert len({e.rank for e in adapter.entries.values()}) > 1, "the case is meant to have uneven ranks"


@each
def test_get_delta_weight(squeezed: Callable[[str], Squeezed], name: str) -> None:
    """PEFT's own decoder of one layer, which knows nothing of DoRA's magnitude."""
    s = squeezed(name)
    adapter = load(s.after)
    model = peft.PeftModel.from_pretrained(fresh(s.case), s.after)
    names = {id(module): key.removeprefix("base_model.model.") for key, module in model.named_modules()}
    found = {}
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            path = names[id(module)]
            leaf = getattr(module, "parameter_name", None)  # of an expert stack, whose wrappers nest
            target = path if leaf is None else f"{path.replace('.base_layer', '')}.{leaf}"
            found[target] = module.get_delta_weight("default")
    directions = {t: u.direction.delta() if u.needs_base else u.delta() for t, u in adapter.items()}  # type: ignore[attr-defined]
    assert_equal(found, directions)


def test_the_config_is_as_it_was_but_for_ranks_and_alphas(squeezed: Callable[[str], Squeezed]) -> None:
    s = squeezed("llama, patterns, rsLoRA, scale kept")
    before, after = (json.loads((f / "adapter_config.json").read_text()) for f in (s.before, s.after))
    ranks = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
    assert {k: v for k, v in after.items() if k not in ranks} == {k: v for k, v in before.items() if k not in ranks}


def test_a_pickle_comes_back_as_what_peft_loads(tmp_path: Path) -> None:
    case = CASES["llama"]
    source = trained(case, tmp_path / "in")
    weights = source / "adapter_model.safetensors"
    torch.save(load_file(weights), source / "adapter_model.bin")
    weights.unlink()
    saved = save(load(source), tmp_path / "out")
    assert saved.weights.name == "adapter_model.safetensors"
    assert_equal(merged(case, saved.path), merged(case, source))
