"""A tiny random Llama, a tokenizer of bytes, and a PEFT LoRA of it with factors that do something."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def tiny_llama(seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.1)
    return model


def byte_tokenizer(text: str) -> Any:
    return SimpleNamespace(input_ids=list(text.encode()))


def save_tiny_lora(folder: Path, *, rank: int = 4, modules: tuple[str, ...] = ATTENTION + MLP, **config: Any) -> Path:
    """A saved PEFT adapter whose second factor is not zero."""
    import peft

    torch.manual_seed(1)
    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(modules), **config)
    model = peft.get_peft_model(tiny_llama(), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


def save_tiny_model(folder: Path) -> Path:
    """The model in Hugging Face's layout, with a tokenizer of single characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tiny_llama().save_pretrained(folder)
    vocabulary = {"?": 0} | {chr(code): code for code in range(32, 127) if chr(code) != "?"}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="?").save_pretrained(folder)
    return folder


def load_tiny_model(folder: Path) -> tuple[Any, Any]:
    """What `save_tiny_model` saved, with an end token and a head that tells words apart."""
    from loratools.training.models import load_model

    model, tokenizer = load_model(folder)
    tokenizer.eos_token = "~"
    with torch.no_grad():
        model.lm_head.weight.mul_(40)  # as it is made it says hardly anything
    return model, tokenizer
