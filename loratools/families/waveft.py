"""WaveFT: a few coefficients of the delta's wavelet transform (Bilican et al. 2025, arXiv 2505.12532; PEFT)."""

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
class WaveFT(Update):
    """waveft_spectrum (count,): the delta is the middle of one inverse wavelet transform, its four bands side by side.

    Settings: `seed`, which says where the coefficients lie, by torch's generator of random numbers; `wavelet`, by the
    name that PyWavelets gives it, or None where the coefficients are entries of the delta themselves.
    """

    family: ClassVar[str] = "waveft"
    required: ClassVar[frozenset[str]] = frozenset({"waveft_spectrum"})
    needs_base: ClassVar[bool] = True
    needs_shape_alone: ClassVar[bool] = True

    spectrum: Tensor
    seed: int
    wavelet: str | None
    scale: float
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> WaveFT:
        return cls(parameters["waveft_spectrum"], settings["seed"], settings["wavelet"], scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        return check_spectrum("waveft_spectrum", specs["waveft_spectrum"].shape)

    def parameters(self) -> dict[str, Tensor]:
        return {"waveft_spectrum": self.spectrum}

    def operator(self, base: Tensor | None = None) -> Operator:
        m, n = base_size("WaveFT", base, self.layout)
        if self.wavelet is None:
            return Dense(scattered(self.spectrum, self.seed, (m, n), (m, n)) * self.scale)
        import pywt  # takes a tenth of a second

        lost = pywt.Wavelet(self.wavelet).rec_len - 2  # rows and columns that the inverse transform cuts off
        rows, columns = (size + lost + (size + lost) % 2 for size in (m, n))
        bands = scattered(self.spectrum, self.seed, (m, n), (rows, columns)).numpy()
        top, bottom = bands[: rows // 2], bands[rows // 2 :]
        (near, across), (along, fine) = ((band[:, : columns // 2], band[:, columns // 2 :]) for band in (top, bottom))
        dense = torch.from_numpy(pywt.idwt2((near, (across, along, fine)), self.wavelet, mode="zero"))
        return Dense(dense[:m, :n] * self.scale)
