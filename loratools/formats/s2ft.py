"""S2FT's training state: `<module>.s2`, the trained rows or columns, without their places."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools.formats.base import Header, Hints
from loratools.formats.read_only import ReadOnly

if TYPE_CHECKING:
    from typing_extensions import Self

_SLOT = ".s2"
_REASON = (
    "trained rows or columns, whose places S2FT does not store; take them from the model that it saves: loratools "
    "extract --base, or differences and reparameterize"
)


@final
@dataclass(frozen=True)
class S2FTState(ReadOnly):
    """Nothing of it can be placed in a weight: start and end, and the order of heads and channels, are not in the file.

    The model that S2FT saves has them fused, in another order; `loratools extract` puts that back.
    """

    name: ClassVar[str] = "s2ft"

    @classmethod
    def recognises(cls, header: Header) -> bool:
        return any(key.endswith(_SLOT) for key in header.specs)

    @classmethod
    def bind(cls, header: Header, hints: Hints = Hints()) -> Self:
        trained = dict.fromkeys((key for key in header.specs if key.endswith(_SLOT)), _REASON)
        return cls(None, None, {}, {}, tuple(header.specs), trained, ())
