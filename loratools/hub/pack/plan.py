"""Who shares what, and how many components each adapter keeps: the least error within a budget of bytes.

The error of an adapter is the squared relative error of all its deltas together, and what is minimised is the sum over
the adapters, each counting the same. At a price for a byte every target decides alone: which bases, who uses them, who
keeps components of its own; the price is then raised or lowered until the bytes fit (Lagrange; the choices are on the
convex hull of each target's bytes and errors), and what is left goes to the best components that still fit. The same
is done for each method by itself, and the best of all is taken: so no single method does better at the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from loratools._lazy import torch
from loratools.errors import UsageError
from loratools.hub.pack.fits import CODED, Candidate
from loratools.hub.pack.layout import METHODS, Numbers, PackTarget
from loratools.hub.pack.measure import Measured
from loratools.sizes import format_size

if TYPE_CHECKING:
    from torch import Tensor

OWN: Final = "own"
AUTO: Final = "auto"
CHOICES: Final = (AUTO, OWN, *METHODS)
_BASE_ROOM: Final = 96  # bytes that the header of a file says of one pair of bases, at most
_HALVINGS: Final = 60
_AROUND: Final = (0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0)  # prices beside the one that fits
_TRIES: Final = 12


@dataclass(frozen=True, eq=False)
class Planned:
    """One target: its bases, if any, and for each adapter that has it which pair, how many components, coefficients."""

    target: PackTarget
    measured: Measured
    candidate: Candidate | None
    group: Tensor  # (t,) int64, -1 for an adapter that uses none
    rank: Tensor  # (t,) int64
    kept: Tensor  # (t,) int64


@dataclass(frozen=True, eq=False)
class Plan:
    """A whole pack by one method: `errors` are the squared relative errors that are expected of each adapter."""

    method: str
    targets: tuple[Planned, ...]
    errors: Tensor  # (adapters,)

    @property
    def error(self) -> float:
        """The sum that is minimised."""
        return float(self.errors.sum())


@dataclass(frozen=True, eq=False)
class _Option:
    """A candidate in bytes and gains."""

    candidate: Candidate
    base: int
    core: Tensor  # (t,) bytes
    gain: Tensor  # (t,)
    further: Tensor  # (t, PRIVATE)


@dataclass(frozen=True, eq=False)
class _Choices:
    """A target in bytes and gains."""

    measured: Measured
    own: Tensor  # (t, r) gains
    cost: Tensor  # (t,) bytes of a component
    options: tuple[_Option, ...]


@dataclass(frozen=True)
class _Mode:
    """What a plan may use."""

    method: str
    methods: frozenset[str]
    own: bool
    private: bool


_MODES: Final = {
    AUTO: _Mode(AUTO, frozenset(METHODS), own=True, private=True),
    OWN: _Mode(OWN, frozenset(), own=True, private=False),
    **{m: _Mode(m, frozenset({m}), own=False, private=False) for m in METHODS},
}


def plan(
    targets: Sequence[Measured],
    numbers: Sequence[Numbers],
    bases: Numbers,
    budget: int,
    size_of: Callable[[Plan], int],
    *,
    method: str = AUTO,
) -> tuple[Plan, dict[str, float]]:
    """The best plan whose `size_of` is within `budget`, with the expected error of each method by itself.

    UsageError where not even the headers fit.
    """
    squares = torch.zeros(len(numbers), dtype=torch.float64)
    for target in targets:
        squares.index_add_(0, target.members, target.norms.square())
    weights = torch.where(squares > 0, 1 / squares, 0.0)
    choices = [_choices(target, numbers, bases, weights) for target in targets]
    live = (squares > 0).double()
    empty = _finished(choices, [None] * len(choices), [None] * len(choices), _MODES[OWN], 0, live)
    least = size_of(empty)
    if least > budget:
        raise UsageError(
            f"a budget of {format_size(budget)} is too small: names, configs and what cannot be factored take "
            f"{format_size(least)} alone"
        )
    found: dict[str, Plan] = {}
    fitted = {o.candidate.shared.method for c in choices for o in c.options}
    for name in [OWN, *(m for m in METHODS if m in fitted), AUTO] if method == AUTO else [method]:
        room = budget - least
        for _ in range(_TRIES):
            best = _best(choices, _MODES[name], max(room, 0), live, list(found.values()) if name == AUTO else [])
            if (over := size_of(best) - budget) <= 0:
                break
            room -= over
        else:
            best = empty
        found[name] = best
    return found[method], {name: each.error for name, each in found.items()}


def _choices(target: Measured, numbers: Sequence[Numbers], bases: Numbers, weights: Tensor) -> _Choices:
    members = target.members.tolist()
    gain = target.norms.square() * weights[target.members]
    coded = 1 - 2 * CODED[bases.bits]
    cost = torch.tensor([sum(numbers[i].size(1, side) for side in target.shape) for i in members], dtype=torch.float64)
    options = []
    for c in target.candidates:
        core = [c.shared.core_size(numbers[i], kept) for i, kept in zip(members, c.kept.tolist(), strict=True)]
        base = c.base_bytes + _BASE_ROOM * c.shared.groups
        further = c.private * gain.unsqueeze(1)
        options.append(_Option(c, base, torch.tensor(core, dtype=torch.float64), c.captured * gain, further))
    return _Choices(target, target.spectra * gain.unsqueeze(1) * coded, cost, tuple(options))


def _best(choices: Sequence[_Choices], mode: _Mode, room: int, live: Tensor, others: Sequence[Plan]) -> Plan:
    """The best plan of a mode that needs at most `room` bytes."""
    low, high = 1e-18, 1.0  # prices of a byte
    for _ in range(_HALVINGS):
        price = (low * high) ** 0.5
        _, _, bytes_ = _at(choices, mode, price)
        low, high = (low, price) if bytes_ <= room else (price, high)
    plans = []
    for factor in _AROUND:
        chosen, inside, _ = _at(choices, mode, high * factor)
        plans.append(_finished(choices, chosen, inside, mode, room, live))
    for other in others:
        chosen = [_index(c, p) for c, p in zip(choices, other.targets, strict=True)]
        inside = [p.group >= 0 for p in other.targets]
        plans.append(_finished(choices, chosen, inside, mode, room, live))
    return min(plans, key=lambda p: p.error)


def _index(choices: _Choices, planned: Planned) -> int | None:
    return next((i for i, o in enumerate(choices.options) if o.candidate is planned.candidate), None)


def _at(choices: Sequence[_Choices], mode: _Mode, price: float) -> tuple[list[int | None], list[Tensor | None], float]:
    """What every target would choose at a price: the option, who uses it, and the bytes of all of it."""
    chosen: list[int | None] = []
    inside: list[Tensor | None] = []
    total = 0.0
    for c in choices:
        cost = c.cost.unsqueeze(1)
        paid = (c.own > price * cost) & mode.own
        own = ((c.own - price * cost) * paid).sum(1)
        best, who, which = float(own.sum()), None, None
        bytes_ = float((paid * cost).sum())
        for i, option in enumerate(c.options):
            if option.candidate.shared.method not in mode.methods:
                continue
            more = (option.further > price * cost) & mode.private
            value = option.gain - price * option.core + ((option.further - price * cost) * more).sum(1)
            better = value > own
            worth = float(torch.where(better, value, own).sum()) - price * option.base
            if worth > best * (1 + 1e-12) and bool(better.any()):
                best, who, which = worth, better, i
                outside = (paid & ~better.unsqueeze(1)) * cost
                bytes_ = option.base + float((option.core * better).sum() + outside.sum())
                bytes_ += float(((more & better.unsqueeze(1)) * cost).sum())
        chosen.append(which)
        inside.append(who)
        total += bytes_
    return chosen, inside, total


def _finished(
    choices: Sequence[_Choices],
    chosen: Sequence[int | None],
    inside: Sequence[Tensor | None],
    mode: _Mode,
    room: int,
    live: Tensor,
) -> Plan:
    """The plan with these bases and members, the bytes that are left spent on components; without bases if too large.

    Components have one cost along each chain and gains that fall, so the best first is the best, up to the last few.
    """
    left = float(room)
    for c, which, who in zip(choices, chosen, inside, strict=True):
        if which is not None and who is not None:
            left -= c.options[which].base + float((c.options[which].core * who).sum())
    if left < 0:
        chosen, inside, left = _dropped(choices, chosen, inside, float(room))
    gains, costs = [], []
    for c, which, who in zip(choices, chosen, inside, strict=True):
        gain = c.own * mode.own
        if which is not None and who is not None:
            further = torch.zeros_like(gain)
            width = min(gain.shape[1], c.options[which].further.shape[1])
            further[:, :width] = c.options[which].further[:, :width] * mode.private
            gain = torch.where(who.unsqueeze(1), further, gain)
        gains.append(gain)
        costs.append(c.cost.unsqueeze(1).expand_as(gain))
    bought = _bought(torch.cat([g.flatten() for g in gains]), torch.cat([c.flatten() for c in costs]), left)
    errors, targets, at = live.clone(), [], 0
    for c, which, who, gain in zip(choices, chosen, inside, gains, strict=True):
        taken = bought[at : at + gain.numel()].reshape(gain.shape)
        at += gain.numel()
        captured = (gain * taken).sum(1)
        group = torch.full_like(c.measured.members, -1)
        kept = torch.zeros_like(group)
        candidate = None
        if which is not None and who is not None:
            option = c.options[which]
            candidate = option.candidate
            captured = captured + option.gain * who
            group, kept = torch.where(who, candidate.group, group), torch.where(who, candidate.kept, kept)
        errors.index_add_(0, c.measured.members, -captured)
        target = PackTarget(c.measured.name, c.measured.shape, None if candidate is None else candidate.shared)
        targets.append(Planned(target, c.measured, candidate, group, taken.sum(1), kept))
    return Plan(mode.method, tuple(targets), errors.clamp_min(0))


def _dropped(
    choices: Sequence[_Choices], chosen: Sequence[int | None], inside: Sequence[Tensor | None], room: float
) -> tuple[list[int | None], list[Tensor | None], float]:
    """The bases that fit, those that gain most for a byte first."""
    worth = []
    for i, (c, which, who) in enumerate(zip(choices, chosen, inside, strict=True)):
        if which is not None and who is not None:
            option = c.options[which]
            bytes_ = option.base + float((option.core * who).sum())
            worth.append((-float((option.gain * who).sum()) / bytes_, i, bytes_))
    which_, who_ = [None] * len(choices), [None] * len(choices)
    kept: list[int | None] = list(which_)
    users: list[Tensor | None] = list(who_)
    for _, i, bytes_ in sorted(worth):
        if bytes_ <= room:
            kept[i], users[i], room = chosen[i], inside[i], room - bytes_
    return kept, users, room


def _bought(gains: Tensor, costs: Tensor, room: float) -> Tensor:
    """Which components are bought: by gain for a byte while they fit, then whatever of the next few still does."""
    bought = torch.zeros_like(gains)
    density = torch.where(gains > 0, gains / costs, 0.0)
    order = density.argsort(descending=True, stable=True)
    order = order[density[order] > 0]
    spent = costs[order].cumsum(0)
    count = int((spent <= room).sum())
    bought[order[:count]] = 1
    left = room - (float(spent[count - 1]) if count else 0.0)
    for i in _fitting(costs[order[count:]], left):
        bought[order[count + i]] = 1
    return bought


def _fitting(costs: Tensor, left: float) -> Iterator[int]:
    """Later ones that are cheaper than the first that did not fit; a chain's own later ones cost as much as that."""
    if not len(costs):
        return
    for i in (costs <= left).nonzero().flatten().tolist():
        if float(costs[i]) <= left:
            left -= float(costs[i])
            yield i
