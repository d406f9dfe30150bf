"""Mixtures of sparse experts, MoSA and MoSL: split into masks, and merged again (arXiv 2312.02923).

All experts begin as copies of one tensor W0, and each trains the entries of its own mask; the masks are disjoint and
are not saved. Where there are three experts or more they tell W0 themselves: it is what all but one of them hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from loratools._lazy import torch
from loratools.adapter import Adapter, Extra, entry_of
from loratools.errors import AdapterError, UsageError
from loratools.families.base import Layout
from loratools.families.lora import LoRA, cast_to
from loratools.formats.base import Header, Hints
from loratools.formats.mosa import Mosa, is_lora
from loratools.storage.header import spec_of

if TYPE_CHECKING:
    from torch import Tensor

# `mean`: of the experts, W0 + (1 / N) sum of changes, which the authors' code calls `add`; `joint`: (W0 + sum) / N, as
# there; `sum`: W0 + sum, what disjoint masks are for, and no rule of that code; `stored`: what the file has merged.
Rule = Literal["stored", "mean", "joint", "sum"]
_EXPERT = re.compile(
    r"^(?P<stem>.*\b(adapter_(down|up)(_attn|_ffn)?|lora_[AB]_[qkvo]))\.(?P<number>\d+)\.(?P<leaf>weight|bias)$"
)
_STALE = 1e-5  # relative difference to every rule from which on a merged tensor is of other experts


def split(shape: Sequence[int], experts: int, *, seed: int = 0) -> Tensor:
    """Disjoint random masks (experts, *shape) that cover every entry once, of sizes that differ by one at most.

    The entries are ranked by random numbers and cut into equal slices, as the authors do by thresholds.
    """
    if experts < 1:
        raise UsageError(f"{experts} experts; there must be one or more")
    count = int(torch.Size(shape).numel())
    ranks = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    owner = ranks * experts // max(1, count)
    return torch.stack([(owner == i).reshape(tuple(shape)) for i in range(experts)])


def recovered(experts: Tensor) -> tuple[Tensor, Tensor]:
    """(W0, changes) of experts (N, ...), changes likewise (N, ...) in float64, to the bit.

    AdapterError for fewer than three, of which nobody can tell which one changed, and where two changed one entry.
    """
    count = len(experts)
    if count < 3:
        raise AdapterError(f"{count} experts do not tell what they began with; it takes three")
    start = experts.mode(dim=0).values
    if not _is_disjoint(experts):
        raise AdapterError("several experts changed the same entries, so that their masks are not disjoint")
    return start, experts.double() - start.double()


def merged(experts: Tensor, rule: Rule) -> Tensor:
    """One tensor of experts (N, ...), in float64; AdapterError where a rule needs W0 and the experts do not tell it."""
    if rule == "mean":
        return experts.double().mean(0)
    if rule not in ("joint", "sum"):
        raise UsageError(f"{rule!r} is no rule by which experts are merged; mean, joint and sum are")
    start, changes = recovered(experts)
    whole = start.double() + changes.sum(0)
    return whole / len(experts) if rule == "joint" else whole


def merge_experts(tensors: Mapping[str, Tensor], rule: Rule = "stored") -> dict[str, Tensor]:
    """The experts `<name>.K.weight` of each name as one tensor `<name>.weight`, biases likewise; others as they are.

    Names are those of MoSA's and MoSL's code, such as `adapter_down` or `lora_A_q`. What was merged before,
    `<name>_merge.weight`, falls away; with `stored` it is taken, where it is of these experts by one of the rules.
    AdapterError, naming the tensor, where it is not, or `merged` has none. Biases that every expert trained whole have
    no masks, and are averaged by each rule.
    """
    if rule not in get_args(Rule):
        raise UsageError(f"{rule!r} is no rule by which experts are merged; {', '.join(get_args(Rule))} are")
    groups: dict[str, dict[int, str]] = {}
    for key in tensors:
        if match := _EXPERT.match(key):
            groups.setdefault(f"{match['stem']}.{match['leaf']}", {})[int(match["number"])] = key
    gone = {key for group in groups.values() for key in group.values()} | {_before(name) for name in groups}
    made = {key: tensor for key, tensor in tensors.items() if key not in gone}
    for name, group in groups.items():
        if sorted(group) != list(range(len(group))):
            raise AdapterError(f"{name}: of its experts only {', '.join(map(str, sorted(group)))} are there")
        experts = torch.stack([tensors[group[i]] for i in range(len(group))])
        try:
            whole = _merged_by(rule, experts, tensors.get(_before(name)), is_bias=name.endswith(".bias"))
        except AdapterError as error:
            raise AdapterError(f"{name}: {error}") from error
        made[name] = cast_to(whole, experts.dtype)
    return made


def assemble(adapter: Adapter, rule: Rule = "stored", *, scale: float | None = None) -> Adapter:
    """The LoRA that a MoSL checkpoint is with its experts merged by `rule`, as `merge_experts` does it, and alone.

    `scale` is SCALAR of its config, by default what the adapter was loaded with. `loratools.convert` writes it.
    AdapterError for another dialect, such as that of MoSA's bottlenecks: `merge_experts` merges their tensors.
    """
    if not isinstance(adapter.format, Mosa):
        raise AdapterError(f"the dialect {adapter.format.name} has no experts to merge; this is for MoSL's checkpoints")
    tensors = {key: extra.read() for key, extra in adapter.extras.items() if is_lora(key)}
    for target, slots in adapter.format.keys.items():
        tensors |= {slots[slot]: tensor for slot, tensor in adapter[target].parameters().items()}
    single = merge_experts(tensors, rule)
    path = adapter.origin.path if adapter.origin else Path("assembled")
    specs = {key: spec_of(tensor) for key, tensor in single.items()}
    bound = Mosa.bind(Header(path, specs, {}), Hints(alpha=adapter.format.alpha if scale is None else scale))
    entries = {}
    for target, slots in bound.keys.items():
        factors = {slot: single[key] for slot, key in slots.items()}
        entries[target] = entry_of(LoRA.from_parameters(factors, scale=bound.scale(target, 0, None), layout=Layout()))
    extras = {key: Extra(specs[key], lambda key=key: single[key]) for key in bound.extras}  # type: ignore[misc]
    return Adapter(bound, entries, extras, {}, bound.warnings, adapter.origin)


def _before(name: str) -> str:
    """Where the merged tensor of a name is stored."""
    stem, _, leaf = name.rpartition(".")
    return f"{stem}_merge.{leaf}"


def _merged_by(rule: Rule, experts: Tensor, before: Tensor | None, *, is_bias: bool) -> Tensor:
    if rule == "stored":
        if before is None:
            raise AdapterError("its experts were not merged; say by which rule they are to be: mean, joint or sum")
        if not any(_is_near(before, one) for one in _all_merged(experts)):
            raise AdapterError(
                "the merged tensor in the file is not of these experts, by any rule; say by which they are to be "
                "merged: mean, joint or sum"
            )
        return before
    if is_bias and not _is_disjoint(experts):
        return experts.double().mean(0)
    return merged(experts, rule)


def _all_merged(experts: Tensor) -> Iterator[Tensor]:
    yield merged(experts, "mean")
    if len(experts) > 2 and _is_disjoint(experts):
        yield from (merged(experts, "joint"), merged(experts, "sum"))


def _is_disjoint(experts: Tensor) -> bool:
    return bool(((experts == experts.mode(dim=0).values).sum(0) >= len(experts) - 1).all())


def _is_near(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one.double() - other).norm() <= _STALE * other.norm())
