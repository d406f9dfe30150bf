"""SALT (`AllinonSAM`): `<module>.trainable_scale_A`, `.trainable_shift_B`, `.trainable_X` and `.trainable_Y`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools.formats.base import Header, Hints
from loratools.formats.modules import Placement, lone
from loratools.formats.read_only import ReadOnly

if TYPE_CHECKING:
    from typing_extensions import Self

_SLOTS = {
    "trainable_scale_A": "salt_scale",
    "trainable_shift_B": "salt_shift",
    "trainable_X": "salt_x",
    "trainable_Y": "salt_y",
}


@final
@dataclass(frozen=True)
class SaltFile(ReadOnly):
    """No scale; what else the checkpoint holds, the whole model or what was trained of it, is carried along.

    The singular vectors are not in the file: they are computed from the base weight, whose signs are the library's. A
    file that counts its leading values anew at each step, or keeps no block for the others, is not of this kind.
    """

    name: ClassVar[str] = "salt"

    @classmethod
    def recognises(cls, header: Header) -> bool:
        return any(key.endswith(".trainable_scale_A") for key in header.specs)

    @classmethod
    def bind(cls, header: Header, hints: Hints = Hints()) -> Self:
        keys: dict[str, dict[str, str]] = {}
        extras = []
        for key in header.specs:
            target, _, part = key.rpartition(".")
            if part in _SLOTS and target:
                keys.setdefault(target, {})[_SLOTS[part]] = key
            else:
                extras.append(key)
        warnings = []
        if any("salt_x" in slots for slots in keys.values()):
            warnings.append(
                "X and Y belong to singular vectors that the file lacks: on a machine that signs those of the base "
                "otherwise than the trainer's did, another delta comes out"
            )
        return cls(None, 1.0, keys, {}, tuple(extras), {}, tuple(warnings))

    def place(self, target: str) -> Placement | None:
        return lone("SALT names", "", target)

    def scale(self, target: str, rank: int, stored_alpha: float | None) -> float:
        return 1.0
