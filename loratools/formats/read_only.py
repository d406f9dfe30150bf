"""What the dialects have in common that are read and not written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from loratools.errors import InputError
from loratools.families.base import Layout
from loratools.formats.base import Declaration, Format, NestedScaling, ScaleMode, Written

if TYPE_CHECKING:
    from typing_extensions import Self

    from loratools.formats.bottlenecks import Place


@dataclass(frozen=True)
class ReadOnly(Format):
    """Sorted keys and the file's own config; `alpha` is None where nobody states it."""

    writable: ClassVar[bool] = False

    config: Mapping[str, Any] | None
    alpha: float | None
    keys: Mapping[str, Mapping[str, str]]
    layouts: Mapping[str, Layout]
    extras: tuple[str, ...]
    unsupported: Mapping[str, str]
    warnings: tuple[str, ...]
    bottlenecks: Mapping[str, Place] = field(default_factory=dict, kw_only=True)

    def spell(self, target: str, slot: str) -> str:
        return self.keys[target][slot]

    def layout(self, target: str) -> Layout:
        return self.layouts.get(target, Layout())

    def scale_key(self, target: str) -> str | None:
        return None

    def scale(self, target: str, rank: int, stored_alpha: float | None) -> float:
        return (1.0 if self.alpha is None else self.alpha) / rank if rank else 1.0

    def writable_scale(self, target: str, rank: int, scale: float, mode: ScaleMode) -> float:
        return self.scale(target, rank, None)

    def declare(self, written: Mapping[str, Written], metadata: Mapping[str, str]) -> Declaration:
        return Declaration(self.config, metadata)

    def parameter(self, target: str) -> str:
        return f"{target}.weight"

    @property
    def nested_scaling(self) -> NestedScaling | None:
        return None

    def is_stored_transposed(self, target: str) -> bool:
        return False

    def without_mutation(self) -> Self:
        return self

    def resized(self, widths: Mapping[str, int]) -> Self:
        gone = {key for place in self.bottlenecks.values() for keys in place.experts.values() for key in keys}
        merged = [key for place in self.bottlenecks.values() for key in place.experts]
        extras = tuple(dict.fromkeys(key for key in (*self.extras, *merged) if key not in gone))
        why = {key: reason for key, reason in self.unsupported.items() if key not in gone}
        why |= {key: next(iter(self.unsupported.values())) for key in merged}
        places = {name: replace(place, experts={}) for name, place in self.bottlenecks.items()}
        config = self.config_with(widths)
        return replace(self, config=config, extras=extras, unsupported=why, bottlenecks=places)

    def config_with(self, widths: Mapping[str, int]) -> Mapping[str, Any] | None:
        """The config for bottlenecks of these widths, in a dialect that states them."""
        return self.config

    def replacements(self) -> Mapping[str, str]:
        return {}


UNKNOWN_ALPHA = "alpha is unknown, so norms are for alpha 1; state it with --alpha"


def number(config: Mapping[str, Any], field: str, where: str) -> float | None:
    """A number of a config, None where it is absent; InputError where it is something else."""
    value = config.get(field)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{where}: {field} is {value!r}, not a number")
    return float(value)
