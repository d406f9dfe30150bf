"""Trainable tokens: some rows of an embedding table, replaced outright (PEFT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.errors import AdapterError, NeedsBaseError
from loratools.families.base import NO_SETTINGS, Layout, Settings, Update
from loratools.operators import MAX_DENSE_ELEMENTS, Dense, LowRank, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec


@final
@dataclass(frozen=True, eq=False)
class TrainableTokens(Update):
    """token_rows (count, n): the new rows themselves, not their differences; the setting `tokens` says which rows."""

    family: ClassVar[str] = "trainable_tokens"
    required: ClassVar[frozenset[str]] = frozenset({"token_rows"})
    needs_base: ClassVar[bool] = True

    rows: Tensor
    tokens: tuple[int, ...]
    scale: float
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> TrainableTokens:
        rows, tokens = parameters["token_rows"], tuple(settings.get("tokens", ()))
        if len(tokens) != len(rows):
            raise AdapterError(f"{len(rows)} rows for the {len(tokens)} tokens that adapter_config.json lists")
        return cls(rows, tokens, scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        shape = specs["token_rows"].shape
        return None if len(shape) == 2 and 0 not in shape else f"token rows {shape} are no matrix"

    def parameters(self) -> dict[str, Tensor]:
        return {"token_rows": self.rows}

    def operator(self, base: Tensor | None = None) -> Operator:
        if base is None:
            raise NeedsBaseError("the delta of trainable tokens depends on the base weight")
        if base.ndim != 2 or base.shape[1] != self.rows.shape[1] or max(self.tokens) >= len(base):
            raise AdapterError(
                f"the base weight is {tuple(base.shape)} where rows up to {max(self.tokens)} of {self.rows.shape[1]} "
                "numbers are replaced; is it the right base?"
            )
        tokens = torch.tensor(self.tokens)
        rows = self.rows.double() - base[tokens].double()
        change: Operator
        if len(tokens) < min(base.shape):
            places = torch.zeros(len(base), len(tokens), dtype=torch.float64)
            places[tokens, torch.arange(len(tokens))] = 1.0
            change = LowRank(places, rows, self.scale)
        elif base.numel() <= MAX_DENSE_ELEMENTS:
            change = Dense(torch.zeros_like(base, dtype=torch.float64).index_copy_(0, tokens, rows) * self.scale)
        else:
            raise AdapterError(
                f"the change of a table of {base.numel():,} numbers is larger than {MAX_DENSE_ELEMENTS:,}"
            )
        return change.T if self.layout.transposed else change
