"""Files of nonlinear bottlenecks, as AdapterTune, AdaptFormer and MoSA save them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools.errors import AdapterError, naming
from loratools.formats.base import Header, Hints
from loratools.formats.bottlenecks import LAYOUTS, is_bottleneck
from loratools.formats.read_only import ReadOnly

if TYPE_CHECKING:
    from typing_extensions import Self

BOTTLENECK = "a bottleneck adapter, which is not an update of a weight"


@final
@dataclass(frozen=True)
class Bottlenecks(ReadOnly):
    """Bottlenecks are no updates of weights: they are described, pruned and carried along.

    What else the file holds, such as the weights of the model and its head, is carried along too.
    """

    name: ClassVar[str] = "bottleneck"

    @classmethod
    def recognises(cls, header: Header) -> bool:
        return any(is_bottleneck(key) for key in header.specs)

    @classmethod
    def bind(cls, header: Header, hints: Hints = Hints()) -> Self:
        with naming(str(header.path)):
            found = [places for find in LAYOUTS if (places := find(header.specs))]
        if len(found) > 1:
            kinds = ", ".join(next(iter(places.values())).kind for places in found)
            raise AdapterError(f"{header.path}: bottlenecks of more than one kind ({kinds}); split the file")
        why = {key: BOTTLENECK for place in found[0].values() for key in place.keys if key in header.specs}
        return cls(None, None, {}, {}, tuple(header.specs), why, (), bottlenecks=found[0])
