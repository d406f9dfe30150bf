"""Two tiny bases with different tokenizers that know what a list of numbers looks like, and an adapter of the first."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from training.tiny import tiny_llama

from loratools.training.distil import Train, TrainRow, train_rows
from loratools.training.models import load_model
from loratools.training.new_adapter import NewAdapter, new_adapter

SEEDS = ("12", "345", "7", "908", "22")


@dataclass(frozen=True)
class Places:
    """`chatty` is as `first`, with a chat template."""

    first: Path
    second: Path
    chatty: Path
    adapter: Path
    seeds: Path


def answer(number: str) -> str:
    """The task: a word for the first digit."""
    return " low" if number[0] < "5" else " high"


def prompt(number: str) -> str:
    return f"No: {number}\nW:"


def save_places(folder: Path) -> Places:
    first = save_tiny_base(folder / "first", seed=0)
    second = save_tiny_base(folder / "second", seed=3, pieces=("low", "hi", "gh", "10", "99"))
    chatty = save_tiny_base(folder / "chatty", seed=0, chat=True)
    model, tokenizer = load_model(first)
    adapted = new_adapter(model, NewAdapter(rank=8))
    rows = [TrainRow(prompt(str(n)), answer(str(n))) for n in range(3, 900, 7)]
    train_rows(adapted, tokenizer, rows, Train(steps=160, learning_rate=2e-2, batch=16))
    adapted.save_pretrained(folder / "adapter")
    seeds = folder / "seeds.jsonl"
    seeds.write_text("".join(json.dumps({"prompt": prompt(n)}) + "\n" for n in SEEDS))
    return Places(first, second, chatty, folder / "adapter", seeds)


def save_tiny_base(folder: Path, *, seed: int, pieces: tuple[str, ...] = (), chat: bool = False) -> Path:
    """A base that has seen lists of numbers; its tokenizer knows single characters and `pieces` of several."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["?", "<end>", "<begin>", "\n", *(chr(c) for c in range(32, 127) if chr(c) != "?"), *pieces]
    known = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    whole = "|".join([*(re.escape(piece) for piece in sorted(pieces, key=len, reverse=True)), "(?:.|\n)"])
    known.pre_tokenizer = pre_tokenizers.Split(Regex(whole), "isolated")
    known.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=known,
        unk_token="?",
        eos_token="<end>",
        bos_token="<begin>",
        clean_up_tokenization_spaces=False,
    )
    if chat:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}"
            "{% if add_generation_prompt %}a:{% endif %}"
        )
    model = tiny_llama(seed)
    model.resize_token_embeddings(len(words), mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)  # as it is made it says hardly anything
    _see_lists(model, tokenizer, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _see_lists(model: Any, tokenizer: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        numbers = torch.randint(1, 1000, (16, 8), generator=generator).tolist()
        texts = ["".join(f"No: {n}\n" for n in some) for some in numbers]
        ids = torch.tensor([tokenizer(text).input_ids[:48] for text in texts])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
