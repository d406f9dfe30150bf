"""Plain LoRA from an adapter whose initial factors were taken out of the base weight (PiSSA and its kin)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from loratools.adapter import Adapter
from loratools.errors import AdapterError, MutatedBaseError
from loratools.families.base import LowRankUpdate

if TYPE_CHECKING:
    from loratools.families.base import Update


ON_THE_BASE = "its sum with the original base means nothing"
AT_OTHER_RANKS = "at another rank, a loader would take other factors out of the base weight"


def refuse_mutated(adapter: Adapter, why: str) -> None:
    """MutatedBaseError, giving `why`, for factors that are relative to a base which their initialisation changed."""
    if (init := adapter.format.mutated_init) is not None:
        again = " (a PiSSA by full SVD needs none: convert --base with --initial-from-base)" if init == "pissa" else ""
        raise MutatedBaseError(
            f"trained with init_lora_weights={init!r}: {why}; pass --initial-adapter with the saved initial factors"
            f"{again}, or, if your base model is the changed one, set init_lora_weights to true in adapter_config.json"
        )


def subtract_initial(adapter: Adapter, initial: Adapter) -> Adapter:
    """The update relative to the original base: scale * (up down - up0 down0), exactly, at twice the rank.

    `initial` is the adapter saved before training. The scale is unchanged, so alpha doubles, or grows by sqrt 2 under
    rsLoRA (arXiv 2404.02948). Raises AdapterError where the two do not have the same targets, ranks and shapes.
    """
    if missing := sorted(set(adapter.entries) ^ set(initial.entries)):
        raise AdapterError(
            f"{missing[0]}: in one of adapter and initial adapter only; were both saved by one training run?"
        )
    updates = {}
    for target, entry in adapter.entries.items():
        other = initial.entries[target]
        if entry.specs != other.specs or entry.scale != other.scale or entry.layout != other.layout:
            raise AdapterError(f"{target}: rank, shape or scale differ between adapter and initial adapter")
        updates[target] = _difference(target, entry.read(), other.read())
    warnings = tuple(w for w in adapter.warnings if "--initial-adapter" not in w)
    return replace(adapter.with_updates(updates), format=adapter.format.without_mutation(), warnings=warnings)


def _difference(target: str, after: Update, before: Update) -> Update:
    if not isinstance(after, LowRankUpdate) or type(before) is not type(after):
        raise AdapterError(f"{target}: {after.family} has no factors to subtract")
    try:
        return after.minus(before)
    except AdapterError as error:
        raise type(error)(f"{target}: {error}") from error
