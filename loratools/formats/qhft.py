"""QWHA's fork of PEFT: peft_type QHFT, and keys in which the name of the adapter is part of the parameter's."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools.errors import InputError
from loratools.families.base import Layout
from loratools.formats.base import Header, Hints
from loratools.formats.peft import PREFIX, component_of, placed
from loratools.formats.read_only import ReadOnly

if TYPE_CHECKING:
    from typing_extensions import Self

    from loratools.formats.modules import Placement

_SLOTS = ("qhft_spectrum", "qhft_indices", "qhft_scaling", "qhft_n_frequency", "qhft_random_loc_seed")
_KEY = re.compile(rf"^(?P<module>.+)\.(?P<slot>{'|'.join(_SLOTS)})(?:[._](?P<name>[^.]+))?$")


@final
@dataclass(frozen=True)
class Qhft(ReadOnly):
    """`<module>.qhft_spectrum`, `<module>.qhft_indices_<adapter>` and `<module>.qhft_scaling_<adapter>`.

    The scaling is that of the file, not of the config. Stock PEFT loads none of these.
    """

    name: ClassVar[str] = "qhft"

    @classmethod
    def recognises(cls, header: Header) -> bool:
        return header.config is not None and str(header.config.get("peft_type", "")).upper() == "QHFT"

    @classmethod
    def bind(cls, header: Header, hints: Hints = Hints()) -> Self:
        keys: dict[str, dict[str, str]] = {}
        extras = []
        for key in header.specs:
            match = _KEY.match(key)
            if match is None:
                extras.append(key)
                continue
            slots = keys.setdefault(match["module"].removeprefix(PREFIX), {})
            if match["slot"] in slots:
                raise InputError(f"{header.path}: {match['module']} has two adapters; save them apart")
            slots[match["slot"]] = key
        transposed = bool((header.config or {}).get("fan_in_fan_out"))
        layouts = {target: Layout(transposed=transposed) for target in keys}
        warnings = ["the delta is relative to the quantised base that it was trained on, not to the original weights"]
        if hints.alpha is not None:
            warnings.append("the alpha given is ignored: this dialect states its scales")
        return cls(header.config, 1.0, keys, layouts, tuple(extras), {}, tuple(warnings))

    def place(self, target: str) -> Placement | None:
        return placed(target, component_of(self.keys))

    def scale(self, target: str, rank: int, stored_alpha: float | None) -> float:
        return 1.0
