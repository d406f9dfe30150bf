"""BitDelta: the sign of every entry of a fine-tune, and one scale to a matrix (Liu et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.families.base import NO_SETTINGS, Layout, Settings, Update
from loratools.operators import MAX_DENSE_ELEMENTS, Dense, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec

WORD = 32  # signs in an int32, the first one in the lowest bit


@final
@dataclass(frozen=True, eq=False)
class BitDelta(Update):
    """coeff times signs: `mask` (n / 32, m) holds those of the transposed delta, 32 inputs to an int32, 1 for plus."""

    family: ClassVar[str] = "bitdelta"
    required: ClassVar[frozenset[str]] = frozenset({"mask", "coeff"})
    scaled: ClassVar[tuple[str, ...]] = ("coeff",)

    mask: Tensor
    coeff: Tensor
    scale: float = 1.0
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> BitDelta:
        return cls(parameters["mask"], parameters["coeff"], scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        mask, coeff = specs["mask"], specs["coeff"]
        if mask.dtype != "I32" or len(mask.shape) != 2 or 0 in mask.shape:
            return f"a mask of {mask.dtype} {mask.shape} is no matrix of signs, 32 to an int32"
        if coeff.numel != 1 or not coeff.dtype.startswith(("F", "BF")):
            return f"a coeff of {coeff.dtype} {coeff.shape} is not one real number"
        return None

    @classmethod
    def base_shape(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> tuple[int, ...]:
        words, rows = specs["mask"].shape
        return (words * WORD, rows) if layout.transposed else (rows, words * WORD)

    def parameters(self) -> dict[str, Tensor]:
        return {"mask": self.mask, "coeff": self.coeff}

    def operator(self, base: Tensor | None = None) -> Operator:
        if (count := self.mask.numel() * WORD) > MAX_DENSE_ELEMENTS:
            raise AdapterError(f"a dense matrix would hold {count:,} numbers; the limit is {MAX_DENSE_ELEMENTS:,}")
        return Dense(signs_of(self.mask).double() * (float(self.coeff) * self.scale))


def signs_of(mask: Tensor) -> Tensor:
    """The (m, n) matrix of -1 and 1, int8, in the (n / 32, m) words of a mask."""
    shifts = torch.arange(WORD, dtype=torch.int32)[:, None]  # (32, 1)
    bits = (mask.to(torch.int32)[:, None, :] >> shifts) & 1  # (n / 32, 32, m); the sign bit is shifted in, then cut off
    return (2 * bits.flatten(0, 1) - 1).to(torch.int8).T.contiguous()


def encode_bitdelta(delta: Tensor) -> tuple[Tensor, Tensor]:
    """(mask, coeff) of an (m, n) delta: its signs, plus for zero, and the float32 mean of its magnitudes.

    The mean is the best scale for signs. AdapterError for what is no matrix of finite numbers with n a multiple of 32.
    """
    if delta.ndim != 2 or not delta.numel() or delta.shape[1] % WORD:
        raise AdapterError(
            f"a delta of shape {tuple(delta.shape)} has no signs that fill words of {WORD} inputs; keep it whole"
        )
    if not bool(torch.isfinite(delta).all()):
        raise AdapterError("holds NaN or infinity, which have no sign to keep")
    bits = (delta >= 0).T.reshape(-1, WORD, delta.shape[0]).to(torch.int64)  # (n / 32, 32, m)
    words = (bits << torch.arange(WORD)[:, None]).sum(1)
    return words.to(torch.int32), delta.abs().double().mean().float()
