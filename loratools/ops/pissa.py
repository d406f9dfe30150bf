"""PiSSA without its saved initial factors: which state a file is in, and what makes a plain LoRA of it (2404.02948).

A file is in one of three states. *Declared*: its config says `pissa`, and its factors are relative to a base that PEFT
changes on loading. *Residual*: the config says nothing, on purpose, for the factors go with a published base that has
the principal part taken out; on the original base that part would be added twice. *Plain*: the difference to the
original base, at twice the rank, as PEFT and `subtract_initial` write it; it is a LoRA like any other.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from loratools._lazy import torch
from loratools.errors import AdapterError, MutatedBaseError, naming
from loratools.families.base import base_matrix
from loratools.families.lora import LoRA
from loratools.linalg.inner import frobenius
from loratools.linalg.svd import truncate
from loratools.operators import Dense, LowRank, sum_of
from loratools.ops.initial import subtract_initial

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from loratools.adapter import Adapter, Entry
    from loratools.base_weights import BaseWeights
    from loratools.operators import Operator

State = Literal["declared", "residual", "plain"]
FULL = "pissa"  # the initialisation that a full SVD computes again, up to signs that its product does not see
_GAP = 1e-4  # relative, of the singular values at which the principal part ends
_NOISE = 0.05  # of the norm of the principal part: what rounding leaves between a base and its residual
_LIKE = 0.5  # of the factors' norm: what training changes of a principal part


def pissa_state(adapter: Adapter, base: BaseWeights | None = None) -> State:
    """Which of the three states the file is in, by its config and names and, with the original `base`, by numbers.

    Factors that hold the principal part of the base are what the base itself does to the same inputs.
    """
    init = adapter.format.mutated_init
    if init is not None and init.lower().startswith(FULL):
        return "declared"
    named = str((adapter.config or {}).get("base_model_name_or_path") or "")
    folder = "" if adapter.origin is None else adapter.origin.path.parent.name
    if FULL in Path(named).name.lower() or folder == "pissa_init":
        return "residual"
    if base is None:
        return "plain"
    found = []
    for target, entry in adapter.entries.items():
        if entry.family is LoRA and entry.layout.experts == 1 and not entry.layout.embedding:
            weight = base_matrix("PiSSA", base.find(adapter.format.parameter(target), entry.base_shape), entry.layout)
            found.append(holds_principal_part(entry.read().operator(), weight, entry.rank))
    return "residual" if found and 2 * sum(found) > len(found) else "plain"


def holds_principal_part(delta: Operator, weight: Tensor, rank: int) -> bool:
    """Whether `delta`, of this rank, is the part of `weight` (m, n) with the same rows, rather than a change of it."""
    probe = torch.randn(delta.shape[0], rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    delta, weight = delta.to(torch.float64), weight.double()
    rows = torch.linalg.qr(delta.rmatmat(probe))[0]  # (n, rank)
    norm = frobenius(delta)
    return norm > 0 and float((delta.matmat(rows) - weight @ rows).norm()) < _LIKE * norm


def subtract_principal(adapter: Adapter, base: BaseWeights) -> Adapter:
    """The update relative to the original `base`, whose principal part is computed again: for `pissa` by a full SVD.

    In float32, as PEFT computes it, so that the delta is right to rounding of the base: signs fall out of the product.
    Raises MutatedBaseError for `pissa_niter_N`, whose random numbers nobody saved, and for other initialisations; and
    AdapterError where the singular values do not tell where the principal part ends.
    """
    init = adapter.format.mutated_init
    if init is None:
        raise MutatedBaseError(
            "the config states no PiSSA, so that nothing tells whether these factors go with a changed base; set "
            "init_lora_weights to 'pissa' in adapter_config.json if they do"
        )
    if init.lower() != FULL:
        why = "came of random numbers that nobody saved" if init.lower().startswith(FULL) else "is no SVD of the base"
        raise MutatedBaseError(
            f"trained with init_lora_weights={init!r}, which {why}: pass --initial-adapter with the saved initial "
            "factors, or --residual-base with the changed base model"
        )
    return _less_initial(adapter, lambda target, entry: _principal(_weight(adapter, target, entry, base), entry))


def subtract_residual(adapter: Adapter, residual: BaseWeights, base: BaseWeights) -> Adapter:
    """The update relative to the original `base`, from the changed one that the adapter was trained on.

    What was taken out is the best matrix of the adapter's rank in their difference, for any initialisation. Raises
    AdapterError where more than rounding is left of it.
    """

    def initial(target: str, entry: Entry) -> LowRank:
        gone = _weight(adapter, target, entry, base) - _weight(adapter, target, entry, residual)
        norm = float(gone.norm())
        if not norm:
            raise AdapterError("the residual base is no other than the original one")
        found = truncate(Dense(gone), entry.rank).operator
        assert isinstance(found, LowRank)
        left = frobenius(sum_of([Dense(gone), -found]))
        if left > _NOISE * norm:
            raise AdapterError(
                f"the two base weights differ by more than rank {entry.rank}: {100 * left / norm:.0f} % of their "
                "difference is left; is the one the other's residual?"
            )
        return found

    return _less_initial(adapter, initial)


def _less_initial(adapter: Adapter, initial: Callable[[str, Entry], LowRank]) -> Adapter:
    """The adapter in float32, less the factors that it began with."""
    trained, began = {}, {}
    for target, entry in adapter.entries.items():
        update = entry.read()
        with naming(target):
            if (
                not isinstance(update, LoRA)
                or update.mid is not None
                or update.down.ndim != 2
                or entry.layout.experts > 1
            ):
                raise AdapterError("PiSSA knows linear modules alone")
            wide = replace(update, down=update.down.float(), up=update.up.float())
            trained[target] = wide
            began[target] = wide.fit(initial(target, entry), scale=wide.scale)
    return subtract_initial(adapter.with_updates(trained), adapter.with_updates(began))


def _principal(weight: Tensor, entry: Entry) -> LowRank:
    u, s, vt = torch.linalg.svd(weight.float(), full_matrices=False)
    rank = entry.rank
    if rank < len(s) and float(s[rank - 1] - s[rank]) <= _GAP * float(s[rank - 1]):
        raise AdapterError(
            f"singular values {rank} and {rank + 1} of the base are equal, so that its principal part of rank {rank} "
            "is not one matrix; pass --initial-adapter"
        )
    return LowRank(u[:, :rank].double() * s[:rank].double(), vt[:rank].double())


def _weight(adapter: Adapter, target: str, entry: Entry, base: BaseWeights) -> Tensor:
    return base_matrix("PiSSA", base.find(adapter.format.parameter(target), entry.base_shape), entry.layout)
