"""Wavelets: low rank in every sub-band of the delta's wavelet transform, singular values pooled over all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

from loratools._lazy import torch
from loratools.errors import AdapterError, UsageError
from loratools.families.base import NO_SETTINGS, Layout, Settings, base_size
from loratools.families.fitting import Fittable, Guarantee, Source
from loratools.families.lora import cast_to
from loratools.linalg.svd import truncate
from loratools.linalg.wavelets import bands_of, coefficients, filters, spread
from loratools.operators import LowRank, Operator

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.storage.base import TensorSpec


@dataclass(frozen=True)
class WaveletOptions:
    """`rank`: singular values that are kept, of all bands together; None for all, where the delta is a product of
    factors. `wavelet`: an orthogonal one of PyWavelets, `levels`: how often the approximation is taken apart.
    """

    rank: int | None = None
    wavelet: str = "db1"
    levels: int = 1

    def __post_init__(self) -> None:
        filters(self.wavelet)
        for name, value in (("rank", self.rank), ("levels", self.levels)):
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be 1 or more")


@final
@dataclass(frozen=True, eq=False)
class WaveletBands(Fittable):
    """wavelet_left, wavelet_right: of each band its (m_b, k_b) and (n_b, k_b) factors, row by row, one band after the
    other; wavelet_ranks (bands,): the k_b, the coarsest band first.

    The setting `wavelet` names the filters, as PyWavelets does; 3 L + 1 bands make L levels. The transform is
    periodised, and orthogonal at any size. How large the weight is the shape states.
    """

    family: ClassVar[str] = "wavelet"
    required: ClassVar[frozenset[str]] = frozenset({"wavelet_left", "wavelet_right", "wavelet_ranks"})
    needs_base: ClassVar[bool] = True
    needs_shape_alone: ClassVar[bool] = True
    Options: ClassVar[type[WaveletOptions]] = WaveletOptions
    guarantee: ClassVar[Guarantee] = "optimal"
    formula: ClassVar[str] = "inverse wavelet transform of bands U_b V_b"
    count: ClassVar[str] = "sum over bands of k_b (m_b + n_b), and the k_b"
    paper: ClassVar[str] = (
        "wavelets of Mallat 1989; bands of low rank as the abstract of WaRA, arXiv 2506.24092, has it"
    )
    reconstruction: ClassVar[str] = (
        "that the bands are those of the delta itself, and that their singular values are pooled, is this project's "
        "reading of an abstract"
    )

    tensors: Mapping[str, Tensor]
    wavelet: str
    scale: float = 1.0
    layout: Layout = Layout()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Tensor], *, scale: float, layout: Layout, settings: Settings = NO_SETTINGS
    ) -> WaveletBands:
        return cls(dict(parameters), wavelet_of(settings), scale, layout)

    @classmethod
    def check(cls, specs: Mapping[str, TensorSpec], layout: Layout) -> str | None:
        if any(len(spec.shape) != 1 or not spec.numel for spec in specs.values()):
            return "its factors or their ranks are no vectors"
        if specs["wavelet_ranks"].dtype.startswith(("F", "BF")):
            return f"wavelet_ranks of {specs['wavelet_ranks'].dtype} are no whole numbers"
        bands = specs["wavelet_ranks"].shape[0]
        return None if bands >= 4 and bands % 3 == 1 else f"{bands} bands are not those of any number of levels"

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.tensors)

    def stated_settings(self) -> dict[str, Any]:
        return {"wavelet": self.wavelet}

    def operator(self, base: Tensor | None = None) -> Operator:
        """Of low rank again: the factors are transformed back, each from its own band."""
        sides = base_size("a wavelet update", base, self.layout)
        ranks = self.tensors["wavelet_ranks"].tolist()
        bands = bands_of(sides, (len(ranks) - 1) // 3)
        factors = []
        for axis, slot in enumerate(("wavelet_left", "wavelet_right")):
            stored, parts, start = self.tensors[slot].double(), [], 0
            if min(ranks) < 0 or sum(k * b.shape[axis] for k, b in zip(ranks, bands, strict=True)) != len(stored):
                raise AdapterError(f"{slot} holds {len(stored)} numbers, not those of its ranks in a {sides} matrix")
            for rank, band in zip(ranks, bands, strict=True):
                size = band.shape[axis]
                part = stored[start : start + rank * size].reshape(size, rank)
                parts.append(spread(part, sides[axis], self.wavelet, band.level, details=band.details[axis]))
                start += rank * size
            factors.append(torch.cat(parts, dim=1))
        return LowRank(factors[0], factors[1].T, self.scale)

    @classmethod
    def encode(cls, source: Source, options: WaveletOptions) -> WaveletBands:
        """In O((m + n) r^2) from factors, which are transformed in place of the delta."""
        delta, wanted = source.delta, options.rank
        if wanted is None and not isinstance(delta, LowRank):
            raise AdapterError("the delta is no product of factors; say how many singular values to keep: rank=N")
        found = []
        for band, op in coefficients(delta, options.wavelet, options.levels):
            most = min(*band.shape, op.rank if isinstance(op, LowRank) else max(band.shape))
            found.append(truncate(op, most if wanted is None else min(wanted, most), seed=source.seed))
        values = torch.cat([t.spectra[0] for t in found])
        if wanted is None:
            rounding = torch.finfo(torch.float64).eps * max(delta.shape) * float(values.max())
            wanted = int((values > rounding).sum())
        kept = values.sort(descending=True, stable=True).indices[: max(1, wanted)]
        ranks = torch.bincount(_owners([len(t.spectra[0]) for t in found])[kept], minlength=len(found))
        lefts, rights = [], []
        for rank, truncated in zip(ranks.tolist(), found, strict=True):
            best = truncated.operator
            assert isinstance(best, LowRank)
            lefts.append((best.left[:, :rank] * best.scale).reshape(-1))
            rights.append(best.right[:rank].T.reshape(-1))
        return cls(
            {
                "wavelet_left": cast_to(torch.cat(lefts), source.stored),
                "wavelet_right": cast_to(torch.cat(rights), source.stored),
                "wavelet_ranks": ranks.to(torch.int32),
            },
            options.wavelet,
            1.0,
            source.layout,
        )

    @classmethod
    def within(cls, source: Source, nbytes: int) -> WaveletOptions | None:
        if min(source.shape) < 2:
            return None
        bands = bands_of(source.shape, 1)
        each = max(sum(band.shape) for band in bands) * source.stored.itemsize
        rank = (nbytes - len(bands) * torch.int32.itemsize) // each
        most = sum(min(band.shape) for band in bands)
        return WaveletOptions(min(rank, most)) if rank > 0 else None

    @classmethod
    def size(cls, source: Source, options: WaveletOptions) -> int:
        """Of the longest bands, where these are not alike: the delta decides which of them have how many."""
        bands = bands_of(source.shape, options.levels)
        left, numbers = options.rank or len(bands) * source.rank, 0
        for band in sorted(bands, key=lambda band: -sum(band.shape)):
            rank = min(left, source.rank, *band.shape)
            left, numbers = left - rank, numbers + rank * sum(band.shape)
        return numbers * source.stored.itemsize + len(bands) * torch.int32.itemsize


def _owners(sizes: list[int]) -> Tensor:
    """Which of the lists, one after the other, each place belongs to."""
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


def wavelet_of(settings: Settings) -> str:
    """The name of the wavelet; AdapterError where none is stated, or one that is not orthogonal."""
    name = settings.get("wavelet")
    if not isinstance(name, str):
        raise AdapterError("its settings name no wavelet")
    try:
        filters(name)
    except UsageError as error:  # as an option it would be
        raise AdapterError(str(error)) from None
    return name
