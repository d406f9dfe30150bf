"""LoLDU (`minloldu`): `<module>.parametrizations.weight.0.vector_z`, in a pickle of one vector for each module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools.formats.base import Header, Hints
from loratools.formats.modules import Placement, lone
from loratools.formats.read_only import ReadOnly

if TYPE_CHECKING:
    from typing_extensions import Self

_MIDDLE = ".parametrizations.weight.0."
_VECTOR = f"{_MIDDLE}vector_z"
_SCALE = f"{_MIDDLE}scaling_factor"


@final
@dataclass(frozen=True)
class LoLDUFile(ReadOnly):
    """The scale is alpha / rank, which the file does not state unless it kept `scaling_factor`: give --alpha.

    Without one alpha is 1, the default of the authors' `from_linear`. All else in the file, the residual weight and the
    frozen factors of a whole state dict, is carried along and not used. The base weight is needed for any delta.
    """

    name: ClassVar[str] = "loldu"

    scales: frozenset[str] = frozenset()

    @classmethod
    def recognises(cls, header: Header) -> bool:
        return any(key.endswith(_VECTOR) for key in header.specs)

    @classmethod
    def bind(cls, header: Header, hints: Hints = Hints()) -> Self:
        keys = {
            key.removesuffix(_VECTOR): {"loldu_z": key}
            for key in header.specs
            if key.endswith(_VECTOR) and key != _VECTOR
        }
        scales = {f"{target}{_SCALE}" for target in keys} & set(header.specs)
        read = {key for slots in keys.values() for key in slots.values()} | scales
        warnings = []
        if hints.alpha is None and len(scales) < len(keys):
            warnings.append("alpha is unknown and taken as 1, the authors' default; state it with --alpha")
        extras = tuple(key for key in header.specs if key not in read)
        return cls(None, hints.alpha, keys, {}, extras, {}, tuple(warnings), frozenset(scales))

    def place(self, target: str) -> Placement | None:
        return lone("LoLDU names", "", target)

    def scale_key(self, target: str) -> str | None:
        key = f"{target}{_SCALE}"
        return key if key in self.scales else None

    def scale(self, target: str, rank: int, stored_alpha: float | None) -> float:
        if stored_alpha is not None:
            return stored_alpha
        return (1.0 if self.alpha is None else self.alpha) / rank if rank else 1.0
