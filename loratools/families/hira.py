"""HiRA: delta = weight * (B @ A), entry by entry (Huang et al. 2025, ICLR; PEFT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools.errors import AdapterError
from loratools.families.base import NO_SETTINGS, Layout, Settings, Update, base_matrix
from loratools.operators import Dense, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec

_LAYER = frozenset({"hira_A", "hira_B"})
_TABLE = frozenset({"hira_embedding_A", "hira_embedding_B"})


@final
@dataclass(frozen=True, eq=False)
class HiRA(Update):
    """A (r, n) and B (m, r), of a convolution (r, inputs, *kernel) and (m, r, *ones).

    The delta has the rank of the weight, up to r times that: it is no low-rank matrix.
    """

    family: ClassVar[str] = "hira"
    required: ClassVar[frozenset[str]] = frozenset()
    optional: ClassVar[frozenset[str]] = _LAYER | _TABLE
    needs_base: ClassVar[bool] = True

    tensors: Mapping[str, Tensor]
    scale: float
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> HiRA:
        return cls(dict(parameters), scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        if set(specs) not in (_LAYER, _TABLE):
            return f"{', '.join(sorted(specs))} are no pair of factors"
        a, b = (specs[slot].shape for slot in sorted(specs))
        if len(a) < 2 or len(b) < 2 or 0 in a or 0 in b:
            return f"factors of shape {a} and {b} hold no rank"
        return None if a[0] == b[1] and set(b[2:]) <= {1} else f"A {a} and B {b} do not chain"

    @classmethod
    def rank_of(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> int:
        return specs[min(specs)].shape[0]

    @classmethod
    def base_shape(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> tuple[int, ...]:
        a, b = (specs[slot].shape for slot in sorted(specs))
        return (a[1], b[0]) if layout.transposed else (b[0], *a[1:])

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.tensors)

    def operator(self, base: Tensor | None = None) -> Operator:
        matrix = base_matrix("HiRA", base, self.layout)
        a, b = (self.tensors[slot].double().flatten(1) for slot in sorted(self.tensors))
        if matrix.shape != (len(b), a.shape[1]):
            raise AdapterError(
                f"the base weight is {tuple(matrix.shape)} where B @ A is {(len(b), a.shape[1])}; is it the right base?"
            )
        return Dense(matrix * (b @ a) * self.scale)
