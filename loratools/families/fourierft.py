"""FourierFT: a few coefficients of the delta's Fourier transform (Gao et al. 2024, arXiv 2405.03003; PEFT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools._lazy import torch
from loratools.families.base import NO_SETTINGS, Layout, Settings, Update, base_size
from loratools.families.random_places import check_spectrum, scattered
from loratools.operators import Dense, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec


@final
@dataclass(frozen=True, eq=False)
class FourierFT(Update):
    """fourierft_spectrum (count,): delta = real part of the inverse transform of a matrix that is zero elsewhere.

    The setting `seed` says where the coefficients lie, by torch's generator of random numbers.
    """

    family: ClassVar[str] = "fourierft"
    required: ClassVar[frozenset[str]] = frozenset({"fourierft_spectrum"})
    needs_base: ClassVar[bool] = True
    needs_shape_alone: ClassVar[bool] = True

    spectrum: Tensor
    seed: int
    scale: float
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> FourierFT:
        return cls(parameters["fourierft_spectrum"], settings["seed"], scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        return check_spectrum("fourierft_spectrum", specs["fourierft_spectrum"].shape)

    def parameters(self) -> dict[str, Tensor]:
        return {"fourierft_spectrum": self.spectrum}

    def operator(self, base: Tensor | None = None) -> Operator:
        m, n = base_size("FourierFT", base, self.layout)
        dense = torch.fft.ifft2(scattered(self.spectrum, self.seed, (m, n), (m, n))).real
        return Dense(dense * self.scale)
