"""A merge before it has factors: its targets in the first adapter's dialect, with shapes, layouts and dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.adapter import Adapter, entry_of
from loratools.errors import AdapterError
from loratools.families.base import Layout
from loratools.families.lora import LoRA
from loratools.formats.base import Part
from loratools.ops.matching import flattened
from loratools.ops.merge_checks import name_of

if TYPE_CHECKING:
    from loratools.base_weights import BaseWeights


@dataclass(frozen=True, eq=False)
class Job:
    """One target of the output: what goes into it, and the update that gives its shapes and dtypes."""

    name: str
    sources: tuple[tuple[int, str], ...]  # (adapter, its target)
    template: LoRA
    to_rank: int | None = None
    shares: tuple[float, ...] | None = None  # by which the weights of the adapters are multiplied here

    def own(self, weights: Sequence[float]) -> list[float]:
        """The weight of each source."""
        return [weights[i] * (1.0 if self.shares is None else self.shares[i]) for i, _ in self.sources]


def draft_of(
    adapters: Sequence[Adapter],
    rows: Sequence[tuple[str | None, ...]],
    extras: tuple[str, ...],
    base: BaseWeights | None,
) -> tuple[Adapter, list[Job]]:
    """The output without its factors: targets spelt in the first adapter's dialect, with templates at rank 1."""
    first = adapters[0]
    dtype = _common_dtype(adapters)
    templates: dict[str, LoRA] = {}
    sources: dict[str, tuple[tuple[int, str], ...]] = {}
    for row in rows:
        held = tuple((i, target) for i, target in enumerate(row) if target is not None)
        index, target = held[0]
        name = target if index == 0 else _spelt(first, adapters[index], index, target)
        if name in templates:
            raise AdapterError(f"{name}: two targets of {name_of(adapters[index], index)} are spelt so; rename one")
        templates[name] = _template(adapters, held, dtype, base)
        sources[name] = held
    parts = {
        name: Part(tuple(template.parameters()), template.layout, entry_of(template).base_shape)
        for name, template in templates.items()
    }
    dialect = first.format.as_lora(parts, extras)
    jobs = [Job(n, sources[n], replace(t, layout=dialect.layout(n))) for n, t in templates.items()]
    entries = {job.name: entry_of(job.template) for job in jobs}
    return Adapter(dialect, entries, {}, first.metadata), jobs


def _spelt(first: Adapter, other: Adapter, index: int, target: str) -> str:
    """How the dialect of the first adapter writes a target that it lacks."""
    if first.format.flat:
        return flattened(target)
    if other.format.flat:
        raise AdapterError(
            f"{target}: only in {name_of(other, index)}, which flattens names, so {first.format.name} cannot spell it; "
            "name that adapter first"
        )
    return target


def _template(
    adapters: Sequence[Adapter], held: tuple[tuple[int, str], ...], dtype: torch.dtype, base: BaseWeights | None
) -> LoRA:
    """A LoRA of zeros whose shapes, layout and dtypes are those of the output; the first LoRA among the sources gives
    them, or else the base parameter's shape."""
    biased = any("up_bias" in adapters[i].entries[t].specs for i, t in held)
    for i, target in held:
        entry = adapters[i].entries[target]
        if issubclass(entry.family, LoRA):
            like = entry.read()
            assert isinstance(like, LoRA)
            down_dtype, up_dtype = (like.down.dtype, like.up.dtype) if i == 0 else (dtype, dtype)
            kernel = like.down.shape[2:] if like.mid is None else like.mid.shape[2:]
            step, experts = like.groups, like.layout.experts
            down = torch.zeros((), dtype=down_dtype).expand(step * experts, like.down.shape[1], *kernel)
            up = torch.zeros((), dtype=up_dtype).expand(like.up.shape[0], experts, *like.up.shape[2:])
            bias = torch.zeros(like.up.shape[0], dtype=up_dtype) if biased else None
            return LoRA(down, up, 1.0, like.layout, up_bias=bias)
    index, target = held[0]
    entry = adapters[index].entries[target]
    shape = entry.base_shape
    if shape is None:
        if base is None:
            raise AdapterError(f"{target}: the file does not tell the shape of the base weight; pass --base")
        shape = tuple(base.find(adapters[index].format.parameter(target), None).shape)
    outputs, inputs = (shape[1], shape[0]) if entry.layout.transposed else (shape[0], shape[1])
    down = torch.zeros((), dtype=dtype).expand(1, inputs, *shape[2:])
    up = torch.zeros((), dtype=dtype).expand(outputs, 1, *(1 for _ in shape[2:]))
    layout = Layout(entry.layout.transposed, embedding=entry.layout.embedding)
    return LoRA(down, up, 1.0, layout, up_bias=torch.zeros(outputs, dtype=dtype) if biased else None)


def _common_dtype(adapters: Sequence[Adapter]) -> torch.dtype:
    """The widest floating-point dtype of the first adapter's factors."""
    found = {s.dtype for e in adapters[0].entries.values() for s in e.specs.values()}
    wide = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    return next((dtype for name, dtype in wide.items() if name in found), torch.float32)


def at_rank(template: LoRA, rank: int) -> LoRA:
    """The template with another rank, of zeros that take no memory."""
    groups, experts = template.groups, template.layout.experts
    down, up = template.down[:1], template.up[:, :1]
    return replace(
        template,
        down=down.expand(rank * experts, *template.down.shape[1:]),
        up=up.expand(template.up.shape[0], rank * experts // groups, *template.up.shape[2:]),
    )
