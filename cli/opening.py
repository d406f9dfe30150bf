"""Adapters and base models as the options name them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loratools.adapter import Adapter
    from loratools.base_weights import BaseWeights
    from loratools.formats import NestedScaling


def open_adapter(
    path: Path,
    *,
    alpha: float | None = None,
    scaling: NestedScaling | None = None,
    enable_lora: str | None = None,
    initial: Path | None = None,
    base: BaseWeights | None = None,
    petl: Path | None = None,
    weights: bool = True,
    thresholds: str | None = None,
) -> Adapter:
    """The adapter at `path`, relative to the original base where its initial factors are given.

    NotAWeightDeltaError for one that is no update of weights, unless it need not be one.
    """
    import loratools
    from loratools_cli import options

    adapter = loratools.load(
        path,
        alpha=alpha,
        scaling=scaling,
        enable_lora=options.flags(enable_lora),
        base=base,
        petl=petl,
        thresholds=options.thresholds(thresholds),
    )
    if weights:
        adapter.require_weights()
    return adapter if initial is None else loratools.subtract_initial(adapter, loratools.load(initial))


def open_base(path: Path | None) -> BaseWeights | None:
    """The base model at `path`, if one is given."""
    import loratools

    return None if path is None else loratools.load_base(path)


def relative_to_base(adapter: Adapter, base: BaseWeights | None, residual: BaseWeights | None) -> Adapter:
    """A PiSSA as a plain LoRA: by the SVD of the original base, or by the residual one where it is given."""
    import loratools
    from loratools.errors import UsageError

    if base is None:
        raise UsageError("the original base model is needed too: pass --base")
    if residual is None:
        return loratools.subtract_principal(adapter, base)
    return loratools.subtract_residual(adapter, residual, base)
