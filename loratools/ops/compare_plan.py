"""What is to be read to compare fine-tunes, in which order: updates of one base parameter meet, whatever names it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from loratools.errors import AdapterError, naming
from loratools.ops.delta import parameters_of_target
from loratools.ops.matrices import matrices_of_target, unsuitable
from loratools.storage.atomic import printable

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.adapter import Entry
    from loratools.base_weights import BaseWeights
    from loratools.operators import Operator
    from loratools.ops.fine_tunes import FineTuneSource

Key = tuple[str, str]  # a fine-tune's name, and one of its targets

_NO_MATRIX = "no matrix with singular vectors"


@dataclass(frozen=True)
class Plan:
    """What is to be read: targets that change one parameter meet in one job."""

    jobs: tuple[tuple[Key, ...], ...]
    parameters: frozenset[str]
    skipped: Mapping[str, str]
    left_alone: int  # targets in no job


@dataclass(frozen=True, eq=False)
class Member:
    """One update of one matrix."""

    entry: Entry
    change: Operator
    gain: Tensor | None


def planned(sources: Mapping[str, FineTuneSource], base: BaseWeights, pattern: str | None) -> Plan:
    """From headers alone; AdapterError for a target that the base has no parameter for."""
    members: dict[Key, list[str]] = {}
    skipped: dict[str, str] = {}
    for name, source in sources.items():
        reasons = _set_aside(source, base)
        for target, entry in source.adapter.entries.items():
            found = parameters_of_target(source.adapter, target, base)
            weights = [parameter for parameter in found if not parameter.endswith(".bias")]
            if not found:
                with naming(f"{printable(source.path)}: {target}"):
                    base.find(source.adapter.format.parameter(target), entry.base_shape)
            if reason := unsuitable(source.adapter, target):
                reasons[target] = reason
            elif not weights or any(len(base.source.specs[parameter].shape) < 2 for parameter in weights):
                reasons[target] = _NO_MATRIX
            elif chosen := [parameter for parameter in weights if _matches(parameter, pattern)]:
                members[name, target] = chosen
        skipped |= {f"{name}: {t}": reason for t, reason in reasons.items() if _matches(t, pattern)}
    jobs = _meeting(members)
    parameters = frozenset(parameter for chosen in members.values() for parameter in chosen)
    left_alone = sum(len(source.adapter.entries) for source in sources.values()) - len(members)
    return Plan(jobs, parameters, skipped, left_alone)


def _set_aside(source: FineTuneSource, base: BaseWeights) -> dict[str, str]:
    """What a fine-tune changes beside its updates, with the reason why it is not looked at."""
    reasons = dict(source.adapter.unsupported)
    reasons |= dict.fromkeys(source.adapter.format.replacements().values(), "replaces a parameter outright")
    for parameter, change in source.left_out.items():
        kind = "an embedding table" if len(base.shape_of(parameter) or ()) == 2 else _NO_MATRIX
        reasons[parameter] = f"{kind}, changed by {100 * change:.2g} %"
    return reasons


def _matches(name: str, pattern: str | None) -> bool:
    module = name.removesuffix(".weight")
    return pattern is None or fnmatchcase(module, pattern) or fnmatchcase(module, f"*.{pattern}")


def _meeting(members: Mapping[Key, Sequence[str]]) -> tuple[tuple[Key, ...], ...]:
    """Groups of targets that change a parameter in common, as a fused projection does with each of its parts."""
    groups: dict[str, list[Key]] = {}  # by parameter
    for key, parameters in members.items():
        met = {id(groups[p]): groups[p] for p in parameters if p in groups}
        joined = [*(other for group in met.values() for other in group), key]
        for other in joined:
            groups |= dict.fromkeys(members[other], joined)
    return tuple(tuple(group) for group in {id(group): group for group in groups.values()}.values())


def matrices_of(
    job: Sequence[Key],
    sources: Mapping[str, FineTuneSource],
    base: BaseWeights,
    plan: Plan,
    step: Callable[[], None] | None,
) -> Iterator[tuple[str, Tensor, dict[str, Member]]]:
    """(parameter, W0, updates by fine-tune) for every matrix of a job."""
    weights: dict[str, Tensor] = {}
    found: dict[str, dict[str, Member]] = {}
    for name, target in job:
        adapter = sources[name].adapter
        with naming(printable(sources[name].path)):
            for matrix in matrices_of_target(adapter, target, base):
                if matrix.parameter not in plan.parameters:
                    continue
                members = found.setdefault(matrix.parameter, {})
                if name in members:
                    raise AdapterError(f"{target}: another target changes {matrix.parameter}, too; merge the two first")
                weights.setdefault(matrix.parameter, matrix.weight)
                members[name] = Member(adapter.entries[target], matrix.change, matrix.gain)
        if step is not None:
            step()
    for parameter in found:
        order = [name for name in sources if name in found[parameter]]
        yield parameter, weights[parameter], {name: found[parameter][name] for name in order}
