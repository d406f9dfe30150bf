"""How a model is let go on with a text: by what is asked of it alone, whatever its own files say of sampling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loratools.errors import UsageError
from loratools.training.models import library, room
from loratools.training.prompts import pad_id


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and what the model's makers add, such as the end of a turn."""
    stated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = stated if isinstance(stated, list) else [stated]
    return list(dict.fromkeys(one for one in (tokenizer.eos_token_id, *several) if one is not None))


@contextmanager
def generating(
    model: Any, tokenizer: Any, *, asked: int, max_tokens: int, temperature: float = 0.0, top_p: float = 1.0
) -> Iterator[Any]:
    """The settings to generate with, greedy at a temperature of 0, behind prompts of at most `asked` tokens.

    Within the block they are the model's own too, which would fill what is not stated: penalties for repetition, say.
    Answers end where the model has no more room; UsageError where prompts leave none.
    """
    left = room(model) - asked
    if left < 1:
        raise UsageError(
            f"a prompt of {asked} tokens leaves no room for an answer: the model has {room(model)} in all; shorten it"
        )
    how = library("transformers").GenerationConfig(
        max_new_tokens=min(max_tokens, left),
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_p=top_p if temperature else 1.0,
        top_k=0 if temperature else 50,
        num_beams=1,
        eos_token_id=end_ids(model, tokenizer) or None,
        pad_token_id=pad_id(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
    )
    before = model.generation_config
    model.generation_config = how
    try:
        yield how
    finally:
        model.generation_config = before
