"""BitDelta: `<module>.mask` and `<module>.coeff`, or `.A` and `.B`, in a pickle with parameters kept whole."""

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
    """No scale; what is not packed replaces a parameter of the model, such as an embedding, a norm or a bias.

    Of a module that has signs the authors' loader takes no other weight, and so does this one. It passes over biases,
    which are in the files all the same.
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
        whole = {key: key for key in extras if not _is_unused(key, keys)}
        unused = len(extras) - len(whole)
        warnings = [f"{unused} weights and factors of modules that have signs are not used"] if unused else []
        return cls(None, 1.0, keys, {}, tuple(extras), {}, tuple(warnings), whole)

    def place(self, target: str) -> Placement | None:
        return lone("BitDelta names", "", target)

    def scale(self, target: str, rank: int, stored_alpha: float | None) -> float:
        return 1.0

    def is_stored_transposed(self, target: str) -> bool:
        return "down" in self.keys[target]

    def replacements(self) -> Mapping[str, str]:
        return self.whole


def _is_unused(key: str, keys: Mapping[str, Mapping[str, str]]) -> bool:
    target, _, part = key.rpartition(".")
    return part in _FACTORS or (part == "weight" and target in keys)


def _is_signs(header: Header, target: str) -> bool:
    mask = header.specs.get(f"{target}.mask")
    return mask is not None and mask.dtype == "I32" and f"{target}.coeff" in header.specs


def _is_low_rank(header: Header, target: str) -> bool:
    parts = {part for part in ("mask", "weight", "A", "B") if f"{target}.{part}" in header.specs}
    return parts == {"A", "B"}
