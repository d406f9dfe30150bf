"""LoRAM: a pruned transformers Llama with its adapter against the full one with the expanded adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import loratools

HEADS, PAIRS, WIDTH, HIDDEN, NEURONS = 6, 3, 4, 24, 20
GONE_PAIRS, GONE_NEURONS = [1], [0, 7, 19]


def llama(pairs: int, neurons: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=HIDDEN, intermediate_size=neurons, num_hidden_layers=2, head_dim=WIDTH,
        num_attention_heads=pairs * (HEADS // PAIRS), num_key_value_heads=pairs, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def stay(size: int, gone: list[int], each: int = 1) -> list[int]:
    return [i for i in range(size * each) if i // each not in gone]


@pytest.fixture
def models() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """A pruned model, and the full one in which what was pruned reaches nothing, so that both compute the same."""
    full = llama(PAIRS, NEURONS)
    pruned = llama(PAIRS - len(GONE_PAIRS), NEURONS - len(GONE_NEURONS))
    group = HEADS // PAIRS * WIDTH
    rows = {
        "q_proj": stay(PAIRS, GONE_PAIRS, group),
        "k_proj": stay(PAIRS, GONE_PAIRS, WIDTH),
        "v_proj": stay(PAIRS, GONE_PAIRS, WIDTH),
        "gate_proj": stay(NEURONS, GONE_NEURONS),
        "up_proj": stay(NEURONS, GONE_NEURONS),
    }
    columns = {"o_proj": rows["q_proj"], "down_proj": rows["gate_proj"]}
    state = {}
    for name, weight in full.state_dict().items():
        module = name.split(".")[-2]
        if module in columns:
            gone = [i for i in range(weight.shape[1]) if i not in columns[module]]
            weight[:, gone] = 0.0
            state[name] = weight[:, columns[module]]
        else:
            state[name] = weight[rows[module]] if module in rows else weight
    pruned.load_state_dict(state)
    return pruned, full


def test_the_full_model_computes_what_the_pruned_one_does(
    models: tuple[LlamaForCausalLM, LlamaForCausalLM], tmp_path: Path
) -> None:
    pruned, full = models
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(pruned(tokens).logits, full(tokens).logits, rtol=1e-5, atol=1e-6)
    trained = get_peft_model(
        pruned, LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
    )
    assert isinstance(trained, PeftModel)
    trained.eval()
    trained.save_pretrained(str(tmp_path / "pruned"))
    layer = {"neurons": {"removed": GONE_NEURONS}, "kv_heads": {"removed": GONE_PAIRS}}
    plan = {"version": 1, "layers": {f"model.layers.{i}": layer for i in range(2)}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    heads = loratools.Heads.from_config(full.config.to_dict())
    made, report = loratools.expand(
        loratools.load(tmp_path / "pruned"), loratools.read_plan(tmp_path / "plan.json", heads)
    )
    assert len(report.targets) == 14
    loratools.save(made, tmp_path / "full")
    served = PeftModel.from_pretrained(full, str(tmp_path / "full")).eval()
    with torch.no_grad():
        wanted = trained(tokens).logits
        torch.testing.assert_close(served(tokens).logits, wanted, rtol=1e-5, atol=1e-6)
        with trained.disable_adapter():
            assert float((trained(tokens).logits - wanted).abs().max()) > 0.1  # the adapter does something
