"""The parameterisations that loratools understands; the set of slots of a target picks one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools.errors import AdapterError, UsageError
from loratools.families.adalora import AdaLoRA
from loratools.families.base import Layout, Update
from loratools.families.bitdelta import BitDelta
from loratools.families.block_sparse import BlockSparse
from loratools.families.blocklora import BlockLoRA
from loratools.families.boft import BOFT
from loratools.families.c3a import C3A
from loratools.families.delora import DeLoRA
from loratools.families.doha import DoHa
from loratools.families.dokr import DoKr
from loratools.families.dora import DoRA
from loratools.families.fitting import Fittable
from loratools.families.fourierft import FourierFT
from loratools.families.full import Full
from loratools.families.glora import GLoRA
from loratools.families.gralora import GraLoRA
from loratools.families.hira import HiRA
from loratools.families.hra import HRA
from loratools.families.hydra import Hydra
from loratools.families.ia3 import IA3
from loratools.families.latent_lora import LatentLoRA
from loratools.families.ldu import LDU
from loratools.families.loha import LoHa
from loratools.families.lokr import LoKr
from loratools.families.loldu import LoLDU
from loratools.families.lora import LoRA
from loratools.families.lora_xs import LoRAXS
from loratools.families.lycoris_boft import LycorisBOFT
from loratools.families.lycoris_ia3 import LycorisIA3
from loratools.families.lycoris_oft import LycorisOFT
from loratools.families.merged import MergedLoRA
from loratools.families.miss import MiSS
from loratools.families.nm import NM
from loratools.families.oft import OFT
from loratools.families.paca import PaCA
from loratools.families.pvera import PVeRA
from loratools.families.qhft import QHFT
from loratools.families.qwha import QWHA
from loratools.families.randlora import RandLoRA
from loratools.families.road import RoAd
from loratools.families.s2ft import S2FT
from loratools.families.s2lora import S2LoRA
from loratools.families.salt import SALT
from loratools.families.shira import SHiRA
from loratools.families.snell import SNELL
from loratools.families.sparse import SparseEntries
from loratools.families.tera import TeRA
from loratools.families.tinylora import TinyLoRA
from loratools.families.trainable_tokens import TrainableTokens
from loratools.families.unilora import UniLoRA
from loratools.families.vblora import VBLoRA
from loratools.families.vera import VeRA
from loratools.families.wara import WaRA
from loratools.families.waveft import WaveFT
from loratools.families.wavelet import WaveletBands
from loratools.families.wavelet_sparse import WaveletSparse

if TYPE_CHECKING:
    from collections.abc import Collection

FAMILIES: tuple[type[Update], ...] = (
    LoRA,
    DoRA,
    LoHa,
    LoKr,
    AdaLoRA,
    BOFT,
    C3A,
    DeLoRA,
    FourierFT,
    GraLoRA,
    HiRA,
    HRA,
    IA3,
    MiSS,
    OFT,
    PVeRA,
    RandLoRA,
    RoAd,
    SHiRA,
    TinyLoRA,
    TrainableTokens,
    UniLoRA,
    VBLoRA,
    VeRA,
    WaveFT,
    BitDelta,
    BlockLoRA,
    DoHa,
    DoKr,
    Full,
    GLoRA,
    Hydra,
    LDU,
    LoLDU,
    LatentLoRA,
    LoRAXS,
    LycorisBOFT,
    LycorisIA3,
    LycorisOFT,
    MergedLoRA,
    QHFT,
    QWHA,
    SparseEntries,
    WaRA,
    WaveletBands,
    WaveletSparse,
    SALT,
    SNELL,
    S2LoRA,
    TeRA,
    NM,
    BlockSparse,
    PaCA,
    S2FT,
)

FITTABLE: dict[str, type[Fittable]] = {f.family: f for f in FAMILIES if issubclass(f, Fittable)}

__all__ = [
    "BOFT",
    "C3A",
    "FAMILIES",
    "FITTABLE",
    "HRA",
    "IA3",
    "LDU",
    "NM",
    "OFT",
    "QHFT",
    "QWHA",
    "S2FT",
    "SALT",
    "SNELL",
    "AdaLoRA",
    "BitDelta",
    "BlockLoRA",
    "BlockSparse",
    "DeLoRA",
    "DoHa",
    "DoKr",
    "DoRA",
    "Fittable",
    "FourierFT",
    "Full",
    "GLoRA",
    "GraLoRA",
    "HiRA",
    "Hydra",
    "LatentLoRA",
    "Layout",
    "LoHa",
    "LoKr",
    "LoLDU",
    "LoRA",
    "LoRAXS",
    "LycorisBOFT",
    "LycorisIA3",
    "LycorisOFT",
    "MergedLoRA",
    "MiSS",
    "PVeRA",
    "PaCA",
    "RandLoRA",
    "RoAd",
    "S2LoRA",
    "SHiRA",
    "SparseEntries",
    "TeRA",
    "TinyLoRA",
    "TrainableTokens",
    "UniLoRA",
    "Update",
    "VBLoRA",
    "VeRA",
    "WaRA",
    "WaveFT",
    "WaveletBands",
    "WaveletSparse",
    "family_of",
    "fittable",
]


def family_of(slots: Collection[str]) -> type[Update]:
    """The one family with these slots; AdapterError says what is missing, or what no family has."""
    found = set(slots)
    fits = [f for f in FAMILIES if found and f.required <= found <= f.required | f.optional]
    if len(fits) == 1:
        return fits[0]
    wanted = {f: f.required or f.optional for f in FAMILIES}  # some family has two sets of slots, and none in both
    closest = min(FAMILIES, key=lambda f: (-len(found & (f.required | f.optional)), len(found ^ wanted[f])))
    missing, extra = sorted(closest.required - found), sorted(found - closest.required - closest.optional)
    problem = f"{', '.join(missing)} missing" if missing else f"unexpected {', '.join(extra)}"
    raise AdapterError(f"not a complete {closest.family} update: {problem} (it has {', '.join(sorted(found))})")


def fittable(name: str) -> type[Fittable]:
    """The family with an encoder that has this name; UsageError lists those there are."""
    if name not in FITTABLE:
        known = ", ".join(FITTABLE)
        why = "is not one that a delta can be written in" if name in {f.family for f in FAMILIES} else "is not known"
        raise UsageError(f"the family {name!r} {why}; there are: {known}")
    return FITTABLE[name]
