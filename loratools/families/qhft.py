"""QWHA as its authors store it, under the name QHFT: two integers to a coefficient (arXiv 2509.17428)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.families.base import NO_SETTINGS, Layout, Settings, Update, base_size
from loratools.linalg.hadamard import Hadamard
from loratools.operators import Operator, Sparse, Transformed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec


@final
@dataclass(frozen=True, eq=False)
class QHFT(Update):
    """qhft_spectrum (k,) at qhft_indices (2, k), outputs over places in the transform: delta = qhft_scaling F H_n / n /
    sqrt(m).

    Of a place that is named twice the last value counts. The delta is relative to the quantised base that it was
    trained on.
    """

    family: ClassVar[str] = "qhft"
    required: ClassVar[frozenset[str]] = frozenset({"qhft_spectrum", "qhft_indices", "qhft_scaling"})
    optional: ClassVar[frozenset[str]] = frozenset({"qhft_n_frequency", "qhft_random_loc_seed"})
    needs_base: ClassVar[bool] = True
    needs_shape_alone: ClassVar[bool] = True

    tensors: Mapping[str, Tensor]
    scale: float
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> QHFT:
        return cls(dict(parameters), scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        values, indices = specs["qhft_spectrum"].shape, specs["qhft_indices"].shape
        if len(values) != 1 or not values[0] or indices != (2, values[0]):
            return f"qhft_spectrum {values} and qhft_indices {indices} do not fit together"
        for slot in ("qhft_scaling", "qhft_n_frequency", "qhft_random_loc_seed"):
            if slot in specs and specs[slot].numel != 1:
                return f"{slot} {specs[slot].shape} is not one number"
        return None

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.tensors)

    def operator(self, base: Tensor | None = None) -> Operator:
        m, n = base_size("QWHA", base, self.layout)
        rows, columns = self.tensors["qhft_indices"].long()
        if bool(((rows < 0) | (rows >= m) | (columns < 0) | (columns >= n)).any()):
            raise AdapterError(f"qhft_indices holds places outside the base weight of {(m, n)}; is it the right base?")
        places, at = _last_of_each(rows * n + columns)
        factor = self.scale * float(self.tensors["qhft_scaling"]) / math.sqrt(m * n)
        values = self.tensors["qhft_spectrum"].double()[at] * factor
        return Transformed(Sparse(places, values, (m, n)), None, Hadamard(n))


def _last_of_each(places: Tensor) -> tuple[Tensor, Tensor]:
    """Different places, ascending, and where each of them comes last."""
    order = places.argsort(stable=True)
    ordered = places[order]
    is_last = torch.ones(len(places), dtype=torch.bool)
    is_last[:-1] = ordered[1:] != ordered[:-1]
    return ordered[is_last], order[is_last]
