"""LitGPT: `lit_model.pth.lora` with fused qkv, its settings in hyperparameters.yaml and model_config.yaml."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, final

from loratools.errors import AdapterError
from loratools.families.base import Layout
from loratools.formats.base import Header, Hints
from loratools.formats.modules import Module, Piece, Placement, Rows, lone
from loratools.formats.read_only import UNKNOWN_ALPHA, ReadOnly, number

if TYPE_CHECKING:
    from typing_extensions import Self

_KEY = re.compile(
    r"^(?P<target>transformer\.h\.\d+\.(?:attn\.(?:qkv|attn|proj)|"
    r"mlp\.(?:experts\.\d+\.)?(?:fc|fc_1|fc_2|proj)|mlp\.gate)|lm_head)\.(?P<part>lora_A|lora_B)$"
)
_NAMES = {"attn.proj": "self_attn.o_proj", "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj"}
_NAMES |= {"mlp.proj": "mlp.down_proj", "mlp.gate": "block_sparse_moe.gate"}
_EXPERT_NAMES = {"fc_1": "w1", "fc_2": "w3", "proj": "w2"}
_LLAMA_MLPS = ("LLaMAMLP", "GemmaMLP", "LLaMAMoE")
_PARTS = ("query", "key", "value")
_REMEDY = "put model_config.yaml beside the weights"


@final
@dataclass(frozen=True)
class LitGPT(ReadOnly):
    """Scale lora_alpha / r; of the fused qkv, the rows of the queries, keys and values lie one after another."""

    name: ClassVar[str] = "litgpt"

    model: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def recognises(cls, header: Header) -> bool:
        body = [m["target"] for key in header.specs if (m := _KEY.match(key))]
        return any(target != "lm_head" for target in body)

    @classmethod
    def bind(cls, header: Header, hints: Hints = Hints()) -> Self:
        settings = header.beside("hyperparameters.yaml") or {}
        model = header.beside("model_config.yaml") or {}
        keys: dict[str, dict[str, str]] = {}
        extras = []
        for key in header.specs:
            if (match := _KEY.match(key)) is None:
                extras.append(key)
                continue
            target, part = match["target"], match["part"]
            if target.endswith("attn.attn"):
                raise AdapterError(
                    f"{header.path}: {target} is of a LitGPT before its qkv had that name, whose rows are interleaved "
                    "by group; convert the adapter with that version (litgpt merge_lora)"
                )
            slot = {"lora_A": "down", "lora_B": "up"}[part]
            keys.setdefault(target, {})[f"merged_{slot}" if target.endswith("attn.qkv") else slot] = key
        layouts = {
            target: Layout(blocks=_blocks(header, target, keys, settings, model, hints))
            for target, slots in keys.items()
            if len(slots) == 2 and "merged_up" in slots
        }
        alpha = number(settings, "lora_alpha", "hyperparameters.yaml")
        warnings = []
        if alpha is None:
            alpha = hints.alpha
            warnings += [f"no hyperparameters.yaml with a lora_alpha: {UNKNOWN_ALPHA}"] if alpha is None else []
        return cls(None, alpha, keys, layouts, tuple(extras), {}, tuple(warnings), model)

    def place(self, target: str) -> Placement | None:
        rule = "LitGPT names"
        if target == "lm_head":
            return lone(rule, "", target)
        if not self._is_llama:
            return None
        _, _, layer, path = target.split(".", 3)
        stem = f"model.layers.{layer}"
        if path == "attn.qkv":
            pieces, start = [], 0
            total = sum(size for size, _ in self.layouts[target].blocks)
            for part, (size, updated) in zip("qkv", self.layouts[target].blocks, strict=True):
                if updated:
                    rows = Rows(((start, start + size),), total)
                    pieces.append(Piece(Module("", f"{stem}.self_attn.{part}_proj"), rows))
                start += size
            return Placement(rule, tuple(pieces))
        if (expert := re.match(r"mlp\.experts\.(\d+)\.(fc_1|fc_2|proj)$", path)) is not None:
            return lone(rule, "", f"{stem}.block_sparse_moe.experts.{expert[1]}.{_EXPERT_NAMES[expert[2]]}")
        return lone(rule, "", f"{stem}.{_NAMES[path]}") if path in _NAMES else None

    @property
    def _is_llama(self) -> bool:
        """Whether the model is one that transformers names as it does Llama; others fuse and name otherwise."""
        if (kind := self.model.get("mlp_class_name")) is not None:
            return kind in _LLAMA_MLPS
        return any(target.endswith(("fc_1", "fc_2")) for target in self.keys)


def _blocks(
    header: Header,
    target: str,
    keys: Mapping[str, Mapping[str, str]],
    settings: Mapping[str, Any],
    model: Mapping[str, Any],
    hints: Hints,
) -> tuple[tuple[int, bool], ...]:
    """The rows of queries, keys and values, and which of them are updated."""
    flags = [settings.get(f"lora_{part}") for part in _PARTS]
    enabled = tuple(map(bool, flags)) if all(isinstance(flag, bool) for flag in flags) else hints.enable_lora
    slots = keys[target]
    a, b = header.specs[slots["merged_down"]].shape, header.specs[slots["merged_up"]].shape
    if len(a) != 2 or len(b) != 2 or not b[1]:
        raise AdapterError(f"{header.path}: {target}: factors of shape {b} and {a} hold no rank")
    if enabled is None and a[0] == 3 * b[1]:
        enabled = (True, True, True)
    if enabled is None or len(enabled) != 3:
        raise AdapterError(
            f"{header.path}: {target}: which of query, key and value are updated is not in the weights; put "
            "hyperparameters.yaml beside them, or pass --enable-lora, such as 1,0,1"
        )
    queries, keyed = _sizes(header, target, keys, model, hints, b[0], enabled)
    if queries is None or keyed is None or min(queries, keyed) < 1:
        raise AdapterError(
            f"{header.path}: {target}: how many rows are queries and how many keys is not in the weights; {_REMEDY}"
        )
    return ((queries, enabled[0]), (keyed, enabled[1]), (keyed, enabled[2]))


def _sizes(
    header: Header,
    target: str,
    keys: Mapping[str, Mapping[str, str]],
    model: Mapping[str, Any],
    hints: Hints,
    rows: int,
    enabled: tuple[bool, ...],
) -> tuple[int | None, int | None]:
    """(rows of the queries, rows of the keys, as many as of the values); None for what follows from nothing known."""
    heads, size = (number(model, name, "model_config.yaml") for name in ("n_head", "head_size"))
    if heads:
        size = size or (number(model, "n_embd", "model_config.yaml") or 0.0) / heads
        groups = number(model, "n_query_groups", "model_config.yaml") or heads
        if size:
            return int(heads * size), int(groups * size)
    projection = keys.get(f"{target.removesuffix('qkv')}proj", {}).get("down")
    shape = hints.base_shape(f"{target}.weight") if hints.base_shape else None
    queries = header.specs[projection].shape[-1] if projection else None  # what the output projection reads
    keyed = None
    count = enabled[1] + enabled[2]
    if queries is None and enabled[0] and not count:
        queries = rows
    if queries is None and shape and count:
        # rows = q * enabled_q + count * k and total = q + 2 k
        if not enabled[0]:
            queries = shape[0] - 2 * rows // count
        elif count == 1:
            queries = 2 * rows - shape[0]
    if queries is not None and count:
        keyed = (rows - queries * enabled[0]) // count
    elif queries is not None and shape:
        keyed = (shape[0] - queries) // 2
    return queries, keyed
