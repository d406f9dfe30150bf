"""What a squeeze at given ranks would do, from spectra that are measured once: fast enough for every key press."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

from loratools.errors import LoratoolsError, NeedsBaseError, OutputError
from loratools.files import header_room
from loratools.formats.base import Written
from loratools.ops.initial import AT_OTHER_RANKS, refuse_mutated
from loratools.ops.squeeze import Squeeze, arguments, bytes_at, not_above, spectrum_of, unsqueezable, whole_steps
from loratools.ranks import Fixed, Limits, LocalPolicy, PerTarget, Spectrum
from loratools.reports.preview import Preview, TargetPreview, energy_kept, relative_error

if TYPE_CHECKING:
    from loratools.adapter import Adapter, Entry
    from loratools.ops.spectra import Measured


@dataclass(frozen=True)
class Curve:
    """What each rank of one measured target loses: `tails[k]` is the squared error at rank k."""

    tails: tuple[float, ...]
    spectrum: Spectrum | None  # None for a family without ranks

    @property
    def squared_norm(self) -> float:
        """sum s^2."""
        return self.tails[0]

    def error_at(self, rank: int) -> float:
        """The squared error of the best approximation of this rank."""
        return self.tails[min(rank, len(self.tails) - 1)]


def curve_of(entry: Entry, measured: Measured) -> Curve:
    """The curve of a target that holds neither NaN nor infinity."""
    spectrum = spectrum_of(entry, measured.blocks) if entry.is_factored else None
    values = measured.values if spectrum is None else spectrum.values
    tails = list(accumulate((value * value for value in reversed(values)), initial=0.0))  # the small ones first
    return Curve(tuple(reversed(tails)), spectrum)


def preview(
    adapter: Adapter,
    curves: Mapping[str, Curve],
    policy: LocalPolicy | PerTarget,
    *,
    unmeasured: Mapping[str, str] | None = None,
    has_base: bool = False,
) -> Preview:
    """What `squeeze_file(adapter, ..., policy)` would do; `curves` may lack targets that are still to be measured.

    `unmeasured` gives the reason of targets that have no curve and will have none: a squeeze carries them over.
    """
    return sized(adapter, unsized(adapter, curves, policy, unmeasured=unmeasured, has_base=has_base), policy)


def unsized(
    adapter: Adapter,
    curves: Mapping[str, Curve],
    policy: LocalPolicy | PerTarget,
    *,
    unmeasured: Mapping[str, str] | None = None,
    has_base: bool = False,
) -> Preview:
    """As `preview`, without the size: a dialect that lists ranks by pattern takes long to state a thousand of them."""
    rules = policy if isinstance(policy, PerTarget) else PerTarget(policy, {})
    held = dict(adapter.unsupported) | dict(unmeasured or {}) | unsqueezable(adapter)
    targets = {
        target: preview_target(entry, curves.get(target), rules.of(target), held.get(target))
        for target, entry in adapter.entries.items()
    }
    return Preview(
        targets=targets,
        bytes_before=adapter.file_nbytes,
        bytes_after=None,
        energy_kept=energy_kept(targets.values()),
        relative_error=relative_error(targets.values()),
        refused=_refusal(adapter, targets, has_base),
    )


def sized(adapter: Adapter, ranks: Preview, policy: LocalPolicy | PerTarget) -> Preview:
    """`ranks` with the size of the file, or with the reason why no file can hold them."""
    if ranks.refused is not None:
        return ranks
    try:
        return replace(ranks, bytes_after=file_size(adapter, ranks.targets, policy))
    except LoratoolsError as error:  # a dialect with one rank for all
        return replace(ranks, refused=str(error))


def _refusal(adapter: Adapter, targets: Mapping[str, TargetPreview], has_base: bool) -> str | None:
    """What a squeeze would say of this adapter whatever the ranks, as far as headers tell."""
    try:
        _refuse(adapter, targets, has_base)
    except LoratoolsError as error:
        return str(error)
    return None


def _refuse(adapter: Adapter, targets: Mapping[str, TargetPreview], has_base: bool) -> None:
    """Raise what a squeeze would raise, as far as headers tell."""
    refuse_mutated(adapter, AT_OTHER_RANKS)
    if not adapter.format.writable:
        raise OutputError(f"{adapter.format.name} files are read, not written; try loratools convert --to peft")
    if has_base:
        return
    for target, entry in adapter.entries.items():
        if entry.needs_base and targets[target].unchanged is None:
            raise NeedsBaseError(f"{target}: lowering the rank of {entry.family.family} takes the base weight, too")


def preview_target(entry: Entry, curve: Curve | None, rule: LocalPolicy, held: str | None = None) -> TargetPreview:
    """One target under its rule; `held` says why it is carried over whatever the rule."""
    norm = None if curve is None else curve.squared_norm
    error = None if curve is None else 0.0
    if held is not None:
        return TargetPreview(entry.rank, entry.rank, entry.nbytes, entry.nbytes, norm, error, held)
    spectrum = None if curve is None else curve.spectrum
    if isinstance(rule, Fixed):
        wanted = whole_steps(entry, rule.value, rule)
    elif spectrum is not None:
        wanted = whole_steps(entry, rule.rank(spectrum), rule)
    else:
        return TargetPreview(entry.rank, None, entry.nbytes, None, norm, None, None)
    if wanted >= entry.rank:
        return TargetPreview(entry.rank, entry.rank, entry.nbytes, entry.nbytes, norm, error, not_above(entry, wanted))
    rank = min(wanted, entry.largest_rank)
    error = None if curve is None else curve.error_at(rank)
    return TargetPreview(entry.rank, rank, entry.nbytes, bytes_at(entry, rank), norm, error, None)


def file_size(adapter: Adapter, targets: Mapping[str, TargetPreview], policy: LocalPolicy | PerTarget) -> int | None:
    """Bytes of the weights file that a squeeze to these ranks writes; None where a rank is not known yet.

    Exact for safetensors: header with the record of the run, tensors, alphas in the dtype that holds them, and extras.
    """
    if any(target.bytes_after is None for target in targets.values()):
        return None
    recorded = adapter.recorded("squeeze", arguments(policy, Limits(), Squeeze()))
    tensors = sum(target.bytes_after or 0 for target in targets.values())
    extras = sum(extra.spec.nbytes for extra in adapter.extras.values())
    declared = adapter.format.declare(_written(adapter, targets), adapter.metadata)
    return header_room(recorded) + tensors + extras + sum(spec.nbytes for _, spec in declared.scalars.values())


def _written(adapter: Adapter, targets: Mapping[str, TargetPreview]) -> dict[str, Written]:
    """Ranks and scales as a squeeze declares them."""
    written = {}
    for target, entry in adapter.entries.items():
        rank, scale = targets[target].rank_after or entry.rank, entry.scale
        if targets[target].unchanged is None:
            scale = adapter.format.writable_scale(target, rank, scale, Squeeze().scale)
        written[target] = Written(rank, scale, entry.alpha)
    return written
