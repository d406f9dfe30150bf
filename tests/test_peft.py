"""Adapters put into a model: the logits are those of PEFT's own loading."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from training.tiny import save_tiny_lora, tiny_llama

from loratools import Convert, convert_file, load, quantize_file, save, switched
from loratools.errors import AdapterError, MissingExtraError, UsageError
from loratools.ops.quantize import Quantize
from loratools.ops.reparameterize import Reparameterize, reparameterize
from loratools.peft import load_adapter

IDS = torch.tensor([[5, 17, 101, 3, 200]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def by_peft(folder: Path) -> torch.Tensor:
    import peft

    return logits(peft.PeftModel.from_pretrained(tiny_llama(), folder))


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_lora(tmp_path_factory.mktemp("lora") / "adapter")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
        {"modules": ("embed_tokens", "q_proj", "lm_head")},
    ],
    ids=["lora", "dora", "rslora", "patterns", "embedding"],
)
def test_logits_are_those_of_peft(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = save_tiny_lora(tmp_path / "adapter", **settings)
    ours = logits(load_adapter(tiny_llama(), folder))
    assert torch.equal(ours, by_peft(folder))
    assert not torch.allclose(ours, logits(tiny_llama()), atol=1e-3)


def test_a_packed_file_loads(lora: Path, tmp_path: Path) -> None:
    packed = tmp_path / "small.safetensors"
    quantize_file(load(lora), packed, Quantize(bits=8))
    found = load(packed)
    plain = tiny_llama()
    with torch.no_grad():
        for target, update in found.items():
            plain.get_parameter(f"{target}.weight").add_(update.delta())
    torch.testing.assert_close(logits(load_adapter(tiny_llama(), packed)), logits(plain), rtol=1e-4, atol=1e-4)
    assert torch.allclose(logits(plain), by_peft(lora), atol=0.5)


def test_a_kohya_file_loads(tmp_path: Path) -> None:
    """As sd-scripts writes it: flattened names, alpha as a tensor, the scale alpha / rank."""
    generator = torch.Generator().manual_seed(3)
    plain, tensors, alpha, rank = tiny_llama(), {}, 6.0, 4
    for target in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        weight = plain.get_parameter(f"{target}.weight")
        down = torch.randn(rank, weight.shape[1], generator=generator)
        up = 0.3 * torch.randn(weight.shape[0], rank, generator=generator)
        name = f"lora_te_{target.replace('.', '_')}"
        tensors |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(alpha),
        }
        with torch.no_grad():
            weight.add_(alpha / rank * up @ down)
    save_file(tensors, tmp_path / "kohya.safetensors")
    assert load(tmp_path / "kohya.safetensors").format.name == "kohya"
    found = logits(load_adapter(tiny_llama(), tmp_path / "kohya.safetensors"))
    torch.testing.assert_close(found, logits(plain), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, logits(tiny_llama()), atol=1e-2)


@pytest.mark.parametrize("dialect", ["mlx", "gguf"])
def test_other_dialects_load(lora: Path, tmp_path: Path, dialect: str) -> None:
    from loratools import load_base

    base = tmp_path / "model"
    tiny_llama().save_pretrained(base)
    place = tmp_path / ("other.gguf" if dialect == "gguf" else "other")
    saved, _ = convert_file(load(lora), place, dialect, Convert(base=load_base(base)))
    adapter = load(saved.path if dialect == "gguf" else place, base=load_base(base))
    torch.testing.assert_close(logits(load_adapter(tiny_llama(), adapter)), by_peft(lora), rtol=1e-4, atol=1e-4)


def test_only_the_named_targets_get_an_adapter(lora: Path) -> None:
    from dataclasses import replace

    adapter = load(lora)
    few = {t: e for t, e in adapter.entries.items() if t == "model.layers.1.self_attn.q_proj"}
    wrapped = load_adapter(tiny_llama(), replace(adapter, entries=few))
    names = [name for name, _ in wrapped.named_parameters() if "lora_A" in name]
    assert names == ["base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight"]


def test_a_second_adapter_joins(lora: Path, tmp_path: Path) -> None:
    other = save_tiny_lora(tmp_path / "other", rank=2, modules=("q_proj",))
    wrapped = load_adapter(load_adapter(tiny_llama(), lora), other, "other")
    assert torch.equal(logits(wrapped), by_peft(lora))
    wrapped.set_adapter("other")
    torch.testing.assert_close(logits(wrapped), by_peft(other))
    with pytest.raises(UsageError, match="already"):
        load_adapter(wrapped, other, "other")


def test_a_target_that_the_model_lacks_leaves_the_model_alone(lora: Path) -> None:
    model = tiny_llama()
    del model.model.layers[1]
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(AdapterError, match=r"^model\.layers\.1\.\S+: the model has no such module"):
        load_adapter(model, lora)
    assert [name for name, _ in model.named_modules()] == names


def test_a_family_that_peft_lacks_is_named(samples: Any) -> None:
    with pytest.raises(AdapterError, match="glora"):
        load_adapter(tiny_llama(), samples("lycoris/glora"))


def test_a_method_of_a_fork_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "paca"
    folder.mkdir()
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{stem}.paca_w": torch.ones(16, 1), f"{stem}.paca_indices": torch.tensor([3])}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "PACA", "r": 1, "paca_alpha": 1}))
    with pytest.raises(AdapterError, match="PEFT has no method PACA"):
        load_adapter(tiny_llama(), folder)


def test_a_fitted_shira_loads(lora: Path, tmp_path: Path) -> None:
    """From loratools' own file, by way of PEFT's folder: the logits are those of the model with the entries added."""
    made, _ = reparameterize(load(lora), "shira", Reparameterize({"rank": "2"}, accept_loss=True))
    found = load(save(made, tmp_path / "shira.safetensors").path)
    plain = tiny_llama()
    with switched(plain, found) as changed:
        wanted = logits(changed)
    torch.testing.assert_close(logits(load_adapter(tiny_llama(), found)), wanted)
    assert not torch.allclose(logits(plain), wanted, atol=1e-3)


def test_without_peft_the_extra_is_named(lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'loratools\[models\]'"):
        load_adapter(tiny_llama(), lora)


def test_a_saved_copy_is_the_same_adapter(lora: Path, tmp_path: Path) -> None:
    save(load(lora), tmp_path / "copy")
    assert torch.equal(logits(load_adapter(tiny_llama(), tmp_path / "copy")), by_peft(lora))
