"""SNELL and SNELLA: `additional_<module>.learnable.{In_Qs,Out_Qs,shared_coeff_fc}` in the `.pth` of a whole model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, final

from loratools.errors import InputError
from loratools.formats.base import Header, Hints
from loratools.formats.modules import Placement, lone
from loratools.formats.read_only import ReadOnly

if TYPE_CHECKING:
    from typing_extensions import Self

BESIDE = "thresholds.json"
_KEY = re.compile(
    r"^(?P<head>(?:.+\.)?)additional_(?P<module>\w+)\.learnable\."
    r"(?P<part>(?:In|Out)_Qs(?P<kernel>_1)?|shared_coeff_fc|alpha|gamma|beta)$"
)
_SLOTS = {"In_Qs": "snell_in", "Out_Qs": "snell_out", "shared_coeff_fc": "snell_coefficients"}
_SLOTS |= {f"{part}_1": _SLOTS[part] for part in ("In_Qs", "Out_Qs")}


@final
@dataclass(frozen=True)
class SnellFile(ReadOnly):
    """A target is the module that `additional_<module>` stands beside: `attn.q`, not a part of a fused qkv.

    `In_Qs_1` is KLoRA's, which drops nothing. Of the others the file lacks how many entries are dropped, `init_thres`:
    one share for a whole SNELL, which its training script states, and one for each module of a SNELLA, in its log.
    `--snell-threshold` states it, or `thresholds.json` beside the file: a share under each target, or under `*`. The
    rest of the model is carried along.
    """

    name: ClassVar[str] = "snell"

    kernels: frozenset[str] = frozenset()
    thresholds: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def recognises(cls, header: Header) -> bool:
        return any((match := _KEY.match(key)) and match["part"].startswith("In_Qs") for key in header.specs)

    @classmethod
    def bind(cls, header: Header, hints: Hints = Hints()) -> Self:
        keys: dict[str, dict[str, str]] = {}
        extras, kernels = [], set()
        for key in header.specs:
            if (match := _KEY.match(key)) is None:
                extras.append(key)
                continue
            target = f"{match['head']}{match['module']}"
            keys.setdefault(target, {})[_SLOTS.get(match["part"], f"snell_{match['part']}")] = key
            if match["kernel"]:
                kernels.add(target)
        given = hints.thresholds
        if given is None and (beside := header.beside(BESIDE)) is not None:
            given = shares(beside, BESIDE)
        found = {"*": given} if isinstance(given, float | int) else dict(given or {})
        lacking = [t for t in keys if t not in kernels and t not in found and "*" not in found]
        warnings = []
        if lacking:
            warnings.append(
                f"{len(lacking)} targets do not say which share of their entries they drop, and so have no delta; "
                f"state it with --snell-threshold or {BESIDE}; the first is {lacking[0]}"
            )
        return cls(None, 1.0, keys, {}, tuple(extras), {}, tuple(warnings), frozenset(kernels), found)

    def place(self, target: str) -> Placement | None:
        return lone("SNELL names", "", target)

    def settings(self, target: str) -> Mapping[str, Any]:
        if target in self.kernels:
            return {"is_kernel": True}
        share = self.thresholds.get(target, self.thresholds.get("*"))
        return {} if share is None else {"threshold": share}

    def scale(self, target: str, rank: int, stored_alpha: float | None) -> float:
        return 1.0


def shares(given: Mapping[str, Any], where: str) -> dict[str, float]:
    """Target -> share, from the fields of a JSON file; InputError for what is no share."""
    for name, share in given.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise InputError(f"{where}: {name} is {share!r}, not a share between 0 and 1")
    return {name: float(share) for name, share in given.items()}
