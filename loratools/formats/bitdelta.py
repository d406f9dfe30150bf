"""BitDelta: `<module>.mask` and `<module>.coeff`, or `.A` and `.B`, in a pickle beside parameters that are kept whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, final

from loratools.formats.base import Header, Hints
from loratools.formats.modules import Placement, lone
from loratools.formats.read_only import ReadOnly

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Self

_SIGNS = ("mask", "coeff")
_FACTORS = {"A": "down", "B": "up"}  # (n, r) and (r, m): the change of the weight is (A B)^T


@final
@dataclass(frozen=True)
class BitDeltaFile(ReadOnly):
    """No scale; what is not packed replaces a parameter of the model, its bias or embedding for one.

    Of a module that has signs the authors' loader takes nothing else, and so does this one.
    """

    name: ClassVar[str] = "bitdelta"

    whole: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def recognises(cls, header: Header) -> bool:
        return any(_is_signs(header, key.removesuffix(".mask")) for key in header.specs if key.endswith(".mask"))

    @classmethod
    def bind(cls, header: Header, hints: Hints = Hints()) -> Self:
        keys: dict[str, dict[str, str]] = {}
        extras = []
        for key in header.specs:
            target, _, part = key.rpartition(".")
            if part in _SIGNS and _is_signs(header, target):
                keys.setdefault(target, {})[part] = key
            elif part in _FACTORS and _is_low_rank(header, target):
                keys.setdefault(target, {})[_FACTORS[part]] = key
            else:
                extras.append(key)
        whole = {key: key for key in extras if key.rpartition(".")[0] not in keys and "." in key}
        unused = len(extras) - len(whole)
        warnings = [f"{unused} tensors of modules that have signs or factors are not used"] if unused else []
        return cls(None, 1.0, keys, {}, tuple(extras), {}, tuple(warnings), whole)

    def place(self, target: str) -> Placement | None:
        return lone("BitDelta names", "", target)

    def scale(self, target: str, rank: int, stored_alpha: float | None) -> float:
        return 1.0

    def is_stored_transposed(self, target: str) -> bool:
        return "down" in self.keys[target]

    def replacements(self) -> Mapping[str, str]:
        return self.whole


def _is_signs(header: Header, target: str) -> bool:
    mask = header.specs.get(f"{target}.mask")
    return mask is not None and mask.dtype == "I32" and f"{target}.coeff" in header.specs


def _is_low_rank(header: Header, target: str) -> bool:
    parts = {part for part in ("mask", "weight", "A", "B") if f"{target}.{part}" in header.specs}
    return parts == {"A", "B"}
