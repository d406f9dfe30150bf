"""Prompts and answers as the token ids that a model is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loratools._lazy import torch
from loratools.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

Encoded = tuple[list[int], int]  # all ids, and how many of them are the prompt's


def encoded(tokenizer: Any, prompt: str, answer: str, *, chat: bool = False) -> Encoded:
    """Prompt, answer and an end token, where the tokenizer has one; without a prompt, the answer as a text alone."""
    if not prompt:
        return list(tokenizer(answer).input_ids), 1
    asked = prompt_ids(tokenizer, prompt, chat=chat)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return asked + list(tokenizer(answer, add_special_tokens=False).input_ids) + end, len(asked)


def prompt_ids(tokenizer: Any, prompt: str, *, chat: bool = False) -> list[int]:
    """The ids of a prompt, with what the tokenizer puts before every text, and no end token behind it.

    `chat` puts it into the tokenizer's chat template; UsageError where there is none.
    """
    if not chat:
        ids = list(tokenizer(prompt).input_ids)
        return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
    require_chat(tokenizer)
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def require_chat(tokenizer: Any) -> None:
    """UsageError for a tokenizer without a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError("the tokenizer has no chat template; leave chat out, and prompts are taken as they are")


def pad_id(tokenizer: Any) -> int:
    """A token to fill rows with, which no model looks at."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def collated(items: Sequence[Encoded], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, the mask of what is no padding, and that of what is to be foretold; (rows, tokens), padded on the right."""
    most = max(len(ids) for ids, _ in items)
    ids = torch.zeros(len(items), most, dtype=torch.long)
    mask, wanted = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for i, (row, start) in enumerate(items):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
        wanted[i, max(start, 1) : len(row)] = True
    return ids.to(device), mask.to(device), wanted.to(device)
