"""The components of an adapter's targets, kept between passes over it while they fit in memory."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, final

from loratools.errors import naming
from loratools.families.base import LowRankUpdate
from loratools.operators import LowRank
from loratools.ops.gridding import Components, components_of, finest_step, weighted_components_of
from loratools.ops.spectra import is_finite_update
from loratools.ops.steps import Spread
from loratools.pipeline import ordered_map, worker_count

if TYPE_CHECKING:
    from loratools.adapter import Adapter
    from loratools.families.base import Update
    from loratools.ops.statistics import Statistics

MEMORY = 1 << 30  # bytes that are kept; what is beyond is decomposed anew in every pass


@final
class ComponentStore:
    """Components in single precision, divided by the scale with which each target is written.

    Numbers are the same whether they were kept or not.
    """

    def __init__(self, adapter: Adapter, weights: Statistics | None, *, limit: int = MEMORY) -> None:
        self._adapter, self._weights, self._left = adapter, weights, limit
        self._kept: dict[str, Components] = {}
        self._lock = threading.Lock()

    def scale(self, target: str, update: LowRankUpdate) -> float:
        """The scale with which `target` is written."""
        rank = self._adapter.entries[target].rank
        return self._adapter.format.writable_scale(target, rank, update.scale, "fold")

    def of(self, target: str, update: LowRankUpdate, part: LowRank) -> Components:
        """The components of `part`, the direction of `update`."""
        if target in self._kept:
            return self._kept[target]
        wide = LowRank(part.left.double(), part.right.double(), part.scale)
        if self._weights is None:
            found = components_of(wide)
        else:
            moment = self._weights.moment_of(target, update)
            found = weighted_components_of(wide, moment, self._weights.channels(target))
        found = found.single(self.scale(target, update))
        with self._lock:
            if found.nbytes <= self._left and target not in self._kept:
                self._kept[target] = found
                self._left -= found.nbytes
        return found

    def spreads(self) -> Iterator[Spread]:
        """How the numbers of all finite deltas spread that go on the grid, in the order of the targets."""
        for found in ordered_map(self._spreads_of, self._adapter.entries, workers=worker_count("cpu")):
            yield from found

    def _spreads_of(self, target: str) -> list[Spread]:
        update = self._adapter[target]
        if not is_finite_update(update):
            return []
        if update.family == "full":
            diff = update.parameters()["diff"].double()
            if not diff.numel():
                return []
            return [Spread(diff.numel(), float(diff.square().mean().sqrt()), finest_step(float(diff.abs().max())))]
        part = grid_part(self._adapter, target, update)
        if part is None:
            return []
        assert isinstance(update, LowRankUpdate)  # it has a part
        with naming(target):
            c = self.of(target, update, part)
            by = abs(self.scale(target, update)) or 1.0
        return [
            Spread(side, by * norm / math.sqrt(side), by * finest_step(c.largest))
            for side, norms in ((c.x.shape[0], c.x.double().norm(dim=0)), (c.y.shape[1], c.y.double().norm(dim=1)))
            for norm in norms.tolist()
        ]


def grid_part(adapter: Adapter, target: str, update: Update) -> LowRank | None:
    """The product of two factors of an update that can be written in another pair; None where there is none."""
    if not isinstance(update, LowRankUpdate) or adapter.format.packing(target, "down") == "stacked":
        return None
    part = update.direction_operator()
    return part if isinstance(part, LowRank) else None
