"""One adapter at several ranks: cut by the best approximation, or by keeping the first components as trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loratools.errors import UsageError
from loratools.ops.squeeze import Squeeze, squeeze
from loratools.ops.truncate import Nested, truncate
from loratools.training.task import Candidate

if TYPE_CHECKING:
    from loratools.adapter import Adapter
    from loratools.base_weights import BaseWeights
    from loratools.formats import NestedScaling


def at_ranks(
    adapter: Adapter,
    ranks: Sequence[int],
    *,
    name: str,
    nested: Nested | None = None,
    scaling: NestedScaling | None = None,
    base: BaseWeights | None = None,
) -> tuple[list[Candidate], list[str]]:
    """The adapter at each of `ranks`, by SVD, or with `nested` by slices of that scale; and what a user should know.

    Each is made when it is run. A rank that no target exceeds gives the adapter as it is. UsageError for ranks below 1
    or given twice, for an adapter without ranks, and for a slice that cannot be made of it.
    """
    if not ranks or min(ranks) < 1 or len(set(ranks)) < len(ranks):
        raise UsageError(f"ranks {','.join(map(str, ranks))}: give different ranks of at least 1, such as 1,2,4,8")
    of_targets = [entry.rank for entry in adapter.entries.values() if entry.is_factored]
    if not of_targets:
        raise UsageError(f"{name}: no target has a rank that could be lowered; leave --ranks out")
    top = max(of_targets)
    warnings = [f"rank {rank} is the adapter as it is: no target has more than {top}" for rank in ranks if rank >= top]
    if len(of_targets) < len(adapter.entries):
        warnings.append(f"{len(adapter.entries) - len(of_targets)} targets have no ranks and stay whole at every rank")

    def cut(rank: int) -> Adapter:
        if rank >= top:
            return adapter
        if nested is not None:
            return truncate(adapter, rank, nested=nested, scaling=scaling)[0]
        return squeeze(adapter, rank, options=Squeeze(base=base))[0]

    if nested is not None:
        cut(min(ranks))  # what a slice lacks, such as a scaling, is said before any model runs
    return [Candidate(name, lambda rank=rank: cut(rank), rank) for rank in ranks], warnings  # type: ignore[misc]
