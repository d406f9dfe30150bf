"""LoRA-XS and LoRA-SB: a PEFT folder of LoRA with a matrix between the factors, which PEFT would pass over."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, final

from loratools.families.base import Layout
from loratools.formats.base import Header, Hints
from loratools.formats.lora_config import LATENT, has_latent_mapping, stated_scale
from loratools.formats.peft import PREFIX, component_of, path_of, placed, whole_parameter
from loratools.formats.read_only import UNKNOWN_ALPHA, ReadOnly

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Self

    from loratools.formats.modules import Placement

_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<part>[AB])(\.(?!weight$)[^.]+)?\.weight$")


@final
@dataclass(frozen=True)
class LoraXs(ReadOnly):
    """`<module>.lora_A.weight`, `.lora_B.weight` and the latent mapping: `<module>.default_lora_latent_mapping.weight`,
    or `<module>_lora_latent_mapping.weight` as older PEFT saved it. The config is that of a plain LoRA."""

    name: ClassVar[str] = "lora-xs"

    @classmethod
    def recognises(cls, header: Header) -> bool:
        kind = None if header.config is None else header.config.get("peft_type", "LORA")
        return kind in (None, "LORA") and has_latent_mapping(header.specs)

    @classmethod
    def bind(cls, header: Header, hints: Hints = Hints()) -> Self:
        factors = {key: match for key in header.specs if (match := _FACTOR.match(path_of(key)))}
        modules = {match["module"] for match in factors.values()}
        keys: dict[str, dict[str, str]] = {}
        extras = []
        for key in header.specs:
            if (match := factors.get(key)) is not None:
                keys.setdefault(match["module"], {})[f"latent_{match['part']}"] = key
            elif key.endswith(LATENT):
                stem = path_of(key).removesuffix(LATENT)  # ends in an adapter's name after a dot, or in "_" alone
                module = stem if stem in modules else stem.rpartition(".")[0]
                keys.setdefault(module, {})["latent_R"] = key
            else:
                extras.append(key)
        transposed = bool(header.config and header.config.get("fan_in_fan_out"))
        layouts = {module: Layout(transposed=transposed) for module in keys}
        warnings = [UNKNOWN_ALPHA] if header.config is None and hints.alpha is None else []
        if header.config is not None and hints.alpha is not None:
            warnings.append("the alpha given is ignored: this dialect keeps it in its config")
        alpha = hints.alpha if header.config is None else None
        return cls(header.config, alpha, keys, layouts, tuple(extras), {}, tuple(warnings))

    def scale(self, target: str, rank: int, stored_alpha: float | None) -> float:
        if self.config is None:
            return (1.0 if self.alpha is None else self.alpha) / rank
        return stated_scale(self.config, target, rank)

    def place(self, target: str) -> Placement | None:
        return placed(target, self._component)

    @cached_property
    def _component(self) -> str:
        return component_of(self.keys)

    def replacements(self) -> Mapping[str, str]:
        """Modules saved whole."""
        return {
            key: whole_parameter(key)
            for key in self.extras
            if key.startswith(PREFIX) and key.endswith((".weight", ".bias"))
        }
