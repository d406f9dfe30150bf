"""Which outputs and inputs of a model's modules a structured pruning took away.

A plan is a JSON object:

* `version`: 1.
* `attention`: `heads`, `kv_heads` and `head_dim` of the full model; only where layers prune heads, and no config of the
  base is at hand.
* `layers`: layer path (`model.layers.4`) -> `neurons` of its MLP and `kv_heads` of its attention, each a choice. The
  neurons are outputs of `mlp.gate_proj` and `mlp.up_proj` (or of both halves of `mlp.gate_up_proj`), and inputs of
  `mlp.down_proj`. A head of keys and values stands for those rows of `self_attn.k_proj` and `v_proj`, and for the whole
  group of queries that read it, in `q_proj` and in the inputs of `o_proj`; a fused `qkv_proj` has all three.
* `modules`: module path -> `outputs` and `inputs`, each a choice, for whatever else was pruned.

A choice is `{"removed": [...]}` or `{"kept": [...]}`, numbers counted from 0 in the full model, with `size`, how many
there are in the full model, where only `kept` is given. A folder of the authors' files is a plan too: one
`<layer>.mlp.gate_proj.pt` or `<layer>.self_attn.k_proj.pt` for each layer, with the removed rows in `pruned_idx`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools._lazy import torch
from loratools.configs import read_config
from loratools.errors import InputError
from loratools.storage import open_source
from loratools.storage.atomic import printable

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
_AUTHORS_FILE = re.compile(r"^(?P<layer>.+)\.(?P<module>mlp\.gate_proj|self_attn\.k_proj)\.pt$")


@dataclass(frozen=True)
class Heads:
    """How many heads of queries, and of keys and values, the full model's attention has, and how wide they are."""

    queries: int
    pairs: int
    width: int

    def __post_init__(self) -> None:
        if min(self.queries, self.pairs, self.width) < 1 or self.queries % self.pairs:
            raise InputError(
                f"{self.queries} heads over {self.pairs} of keys and values, {self.width} wide, are no GQA"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Heads | None:
        """As a model's config.json states them; None where it does not."""
        queries, width = config.get("num_attention_heads"), config.get("head_dim")
        pairs = config.get("num_key_value_heads") or queries
        if width is None and isinstance(queries, int) and isinstance(config.get("hidden_size"), int):
            width = config["hidden_size"] // queries
        if not all(type(n) is int for n in (queries, pairs, width)):
            return None
        return cls(int(queries or 0), int(pairs or 0), int(width or 0))


@dataclass(frozen=True)
class Choice:
    """Places out of `size` that were removed, or that were kept; unique and ascending. `size` None is yet unknown."""

    places: tuple[int, ...]
    removed: bool
    size: int | None = None

    def __post_init__(self) -> None:
        if list(self.places) != sorted(set(self.places)) or (self.places and self.places[0] < 0):
            raise InputError("numbers of a plan are not all different, or below 0")
        if self.size is not None and self.places and self.places[-1] >= self.size:
            raise InputError(f"number {self.places[-1]} of a plan is not among the {self.size} that there are")

    def full(self, pruned: int) -> int:
        """How many there are in the full model, where a pruned one has `pruned`; InputError where that cannot be."""
        size = pruned + len(self.places) if self.removed else self.size
        if size is None:
            raise InputError("a plan names what was kept, and not how many there were: add size")
        if (self.size is not None and size != self.size) or len(self.kept(size)) != pruned:
            raise InputError(
                f"the adapter has {pruned} where the plan leaves {len(self.kept(self.size or size))} of "
                f"{self.size or size}"
            )
        return size

    def kept(self, size: int) -> Tensor:
        """The places that stay, ascending, of `size`."""
        if self.size not in (None, size):
            raise InputError(f"there are {size} where the plan has {self.size}")
        if self.places and self.places[-1] >= size:
            raise InputError(f"number {self.places[-1]} of a plan is not among the {size} that there are")
        mask = torch.full((size,), self.removed)
        mask[torch.tensor(self.places, dtype=torch.int64)] = not self.removed
        return mask.nonzero().flatten()

    def spread(self, each: int, *, repeats: int = 1, offset: int = 0) -> tuple[int, ...]:
        """The removed places, every one standing for `each` numbers, `repeats` times over; the size must be known."""
        assert self.size is not None
        gone = sorted(set(range(self.size)) - set(self.kept(self.size).tolist()))
        block = self.size * each
        return tuple(
            offset + copy * block + place * each + i for copy in range(repeats) for place in gone for i in range(each)
        )


@dataclass(frozen=True)
class Cut:
    """What was taken of one module; None where nothing was. `halves`: outputs are two such rows of blocks."""

    outputs: Choice | None = None
    inputs: Choice | None = None
    halves: bool = False


@dataclass(frozen=True)
class PrunePlan:
    """Module path -> what was taken of it."""

    cuts: Mapping[str, Cut] = field(default_factory=dict)

    def find(self, *names: str) -> Cut | None:
        """The cut of the module with one of these names, which may be longer or shorter than the plan's, at a dot."""
        for name in names:
            if name in self.cuts:
                return self.cuts[name]
        near = {
            known for known in self.cuts for name in names if name.endswith(f".{known}") or known.endswith(f".{name}")
        }
        if len(near) > 1:
            raise InputError(f"{names[0]} may be each of {', '.join(sorted(near)[:4])} of the plan; name it in full")
        return self.cuts[near.pop()] if near else None


def read_plan(path: Path, heads: Heads | None = None) -> PrunePlan:
    """The plan at `path`, a JSON file or a folder of the authors' files; `heads` are those of the full model.

    InputError for one that is malformed, that removes part of a head, or that needs the heads and has none.
    """
    try:
        return PrunePlan(dict(_from_folder(path, heads) if path.is_dir() else _from_json(read_config(path), heads)))
    except InputError as error:
        text = str(error)
        raise InputError(text if text.startswith(str(printable(path))) else f"{printable(path)}: {text}") from None


def _from_json(whole: Mapping[str, Any], heads: Heads | None) -> Iterator[tuple[str, Cut]]:
    if whole.get("version") != VERSION:
        raise InputError(f"version {whole.get('version')!r} of a plan is not known; this loratools reads {VERSION}")
    if unknown := set(whole) - {"version", "attention", "layers", "modules"}:
        raise InputError(f"a plan has no {sorted(unknown)[0]!r}")
    if "attention" in whole:
        stated = _object(whole["attention"], "attention", {"heads", "kv_heads", "head_dim"})
        numbers = [stated.get(name) for name in ("heads", "kv_heads", "head_dim")]
        if not all(type(n) is int for n in numbers):
            raise InputError("attention of a plan states heads, kv_heads and head_dim, whole numbers")
        heads = Heads(*(int(n or 0) for n in numbers))
    for layer, given in _object(whole.get("layers", {}), "layers").items():
        parts = _object(given, layer, {"neurons", "kv_heads"})
        if "neurons" in parts:
            yield from _neurons(layer, _choice(parts["neurons"], f"neurons of {layer}"))
        if "kv_heads" in parts:
            yield from _pairs(layer, _choice(parts["kv_heads"], f"kv_heads of {layer}"), heads)
    for module, given in _object(whole.get("modules", {}), "modules").items():
        parts = _object(given, module, {"outputs", "inputs"})
        outputs, inputs = (
            _choice(parts[side], f"{side} of {module}") if side in parts else None for side in ("outputs", "inputs")
        )
        yield module, Cut(outputs, inputs)


def _from_folder(folder: Path, heads: Heads | None) -> Iterator[tuple[str, Cut]]:
    found = [(match, path) for path in sorted(folder.iterdir()) if (match := _AUTHORS_FILE.match(path.name))]
    if not found:
        raise InputError("holds no plan: neither <layer>.mlp.gate_proj.pt nor <layer>.self_attn.k_proj.pt")
    for match, path in found:
        with open_source(path) as source:
            if "pruned_idx" not in source.specs:
                raise InputError(f"{path.name}: has no pruned_idx")
            removed = Choice(tuple(sorted(int(i) for i in source.read("pruned_idx").flatten().tolist())), removed=True)
        if match["module"] == "mlp.gate_proj":
            yield from _neurons(match["layer"], removed)
        else:
            yield from _pairs(match["layer"], _whole_heads(match["layer"], removed, heads), heads)


def _whole_heads(layer: str, rows: Choice, heads: Heads | None) -> Choice:
    """The heads that removed rows of keys make up."""
    known = _known(layer, heads)
    gone = sorted({row // known.width for row in rows.places})
    if rows.places != tuple(head * known.width + i for head in gone for i in range(known.width)):
        raise InputError(f"{layer}: {len(rows.places)} rows of keys are no whole heads of {known.width}")
    return Choice(tuple(gone), removed=True, size=known.pairs)


def _known(layer: str, heads: Heads | None) -> Heads:
    if heads is None:
        raise InputError(
            f"{layer}: how many heads there are, and how wide, is not stated; pass --base with the full model's config"
        )
    return heads


def _neurons(layer: str, choice: Choice) -> Iterator[tuple[str, Cut]]:
    for module in ("gate_proj", "up_proj"):
        yield f"{layer}.mlp.{module}", Cut(outputs=choice)
    yield f"{layer}.mlp.gate_up_proj", Cut(outputs=choice, halves=True)
    yield f"{layer}.mlp.down_proj", Cut(inputs=choice)


def _pairs(layer: str, choice: Choice, heads: Heads | None) -> Iterator[tuple[str, Cut]]:
    known = _known(layer, heads)
    gone = Choice(choice.places, choice.removed, known.pairs if choice.size is None else choice.size)
    if gone.size != known.pairs:
        raise InputError(f"{layer}: {gone.size} heads of keys and values where the model has {known.pairs}")
    group = known.queries // known.pairs * known.width
    rows = known.pairs * known.width
    pairs = Choice(gone.spread(known.width), removed=True, size=rows)
    queries = Choice(gone.spread(group), removed=True, size=known.queries * known.width)
    for module, cut in (("q_proj", Cut(queries)), ("k_proj", Cut(pairs)), ("v_proj", Cut(pairs))):
        yield f"{layer}.self_attn.{module}", cut
    yield f"{layer}.self_attn.o_proj", Cut(inputs=queries)
    fused = queries.places + gone.spread(known.width, repeats=2, offset=known.queries * known.width)
    yield f"{layer}.self_attn.qkv_proj", Cut(Choice(fused, removed=True, size=known.queries * known.width + 2 * rows))


def _choice(given: Any, where: str) -> Choice:
    fields = _object(given, where, {"removed", "kept", "size"})
    if len({"removed", "kept"} & set(fields)) != 1:
        raise InputError(f"{where}: give either removed or kept")
    kind = "removed" if "removed" in fields else "kept"
    places, size = fields[kind], fields.get("size")
    if not isinstance(places, list) or not all(type(place) is int for place in places):
        raise InputError(f"{where}: {kind} is no list of whole numbers")
    if size is not None and (type(size) is not int or size < 1):
        raise InputError(f"{where}: the size {size!r} is no number of places")
    if len(set(places)) != len(places):
        raise InputError(f"{where}: {kind} names a place twice")
    try:
        return Choice(tuple(sorted(places)), kind == "removed", size)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _object(value: Any, where: str, known: set[str] | None = None) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where} of a plan is no object")
    if known is not None and (unknown := set(value) - known):
        raise InputError(f"{where} of a plan has no {sorted(unknown)[0]!r}; there are {', '.join(sorted(known))}")
    return value
