"""Hydra: `hydra_{mlp,proj}_{par,seq}` in ViT, `ad_lin.adapter_{par,seq}` in CLIP, `hydra_{par,seq}` in BERT."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from loratools.formats.base import Header, Hints
from loratools.formats.modules import Placement, lone
from loratools.formats.read_only import ReadOnly

if TYPE_CHECKING:
    from typing_extensions import Self

_PART = r"(?P<branch>par|seq)\.(?:(?P<side>down_proj|up_proj|hydra_A|hydra_B)\.(?P<leaf>weight|bias)|(?P<scale>scale))$"
# What stands in for the module that the branches are beside and behind: its name.
_PLACES = (
    (re.compile(rf"^(?P<head>(?:.+\.)?mlp)\.hydra_mlp_{_PART}"), "fc2"),
    (re.compile(rf"^(?P<head>(?:.+\.)?attn)\.hydra_proj_{_PART}"), "proj"),
    (re.compile(rf"^(?P<head>(?:.+\.)?mlp)\.ad_lin\.adapter_{_PART}"), "c_proj"),
    (re.compile(rf"^(?P<head>(?:.+\.)?output)\.hydra_{_PART}"), "dense"),
)
_SIDES = {"down_proj": "down", "hydra_A": "down", "up_proj": "up", "hydra_B": "up"}


@final
@dataclass(frozen=True)
class HydraFile(ReadOnly):
    """A target is the module whose output the branches are added to: `mlp.fc2` and `attn.proj` of a ViT, `mlp.c_proj`
    of CLIP, `output.dense` of BERT. The scale is that of the YAML, which the file lacks unless it was learnt: --alpha
    states it, as it is. Other tensors, such as the head, are carried along.
    """

    name: ClassVar[str] = "hydra"

    @classmethod
    def recognises(cls, header: Header) -> bool:
        return any(_parsed(key) is not None for key in header.specs)

    @classmethod
    def bind(cls, header: Header, hints: Hints = Hints()) -> Self:
        keys: dict[str, dict[str, str]] = {}
        extras = []
        for key in header.specs:
            found = _parsed(key)
            if found is None:
                extras.append(key)
            else:
                keys.setdefault(found[0], {})[found[1]] = key
        learnt = all(_is_learnt(slots, branch) for slots in keys.values() for branch in "ps")
        warnings = (
            []
            if learnt or hints.alpha is not None
            else ["no scale is stated, so norms are for scale 1; its YAML has it: state it with --alpha, as it is"]
        )
        scale = 1.0 if hints.alpha is None else hints.alpha
        return cls(None, scale, keys, {}, tuple(extras), {}, tuple(warnings))

    def place(self, target: str) -> Placement | None:
        return lone("Hydra names", "", target)

    def scale(self, target: str, rank: int, stored_alpha: float | None) -> float:
        return 1.0 if self.alpha is None else self.alpha


def _parsed(key: str) -> tuple[str, str] | None:
    """(target, slot) of a key of a branch."""
    for pattern, module in _PLACES:
        if (match := pattern.match(key)) is None:
            continue
        branch = f"hydra_{match['branch'][0]}_"
        part = "scale" if match["scale"] else _SIDES[match["side"]] + ("_bias" if match["leaf"] == "bias" else "")
        return f"{match['head']}.{module}", branch + part
    return None


def _is_learnt(slots: dict[str, str], branch: str) -> bool:
    return f"hydra_{branch}_scale" in slots or f"hydra_{branch}_up" not in slots
