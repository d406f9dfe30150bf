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
from functools import partial
from typing import TYPE_CHECKING, Final

from loratools._lazy import torch
from loratools.errors import UsageError
from loratools.hub.pack.choices import Choices, Option, Pick, choices_of
from loratools.hub.pack.fits import Candidate
from loratools.hub.pack.layout import METHODS, Numbers, PackTarget
from loratools.hub.pack.measure import Measured
from loratools.sizes import format_size

if TYPE_CHECKING:
    from torch import Tensor

OWN: Final = "own"
AUTO: Final = "auto"
CHOICES: Final = (AUTO, OWN, *METHODS)
_HALVINGS: Final = 40
_AROUND: Final = (0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0)  # prices beside the one that fits
_TRIES: Final = 12


@dataclass(frozen=True, eq=False)
class Planned:
    """One target: its bases, if any, and for each adapter that has it which pair, how many components, coefficients."""

    target: PackTarget
    measured: Measured
    candidate: Candidate | None
    form: Tensor  # (t,) int64: that of `choices` which it has, -1 for an adapter without bases
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


_Picks = Sequence["Pick | None"]  # for each target


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
    all_ = [choices_of(target, numbers, bases, weights) for target in targets]
    live = (squares > 0).double()
    empty = _finished(_under(all_, _MODES[OWN]), [None] * len(all_), OWN, 0, live)
    least = size_of(empty)
    if least > budget:
        raise UsageError(
            f"a budget of {format_size(budget)} is too small: names, configs and what cannot be factored take "
            f"{format_size(least)} alone"
        )
    found: dict[str, Plan] = {}
    fitted = {o.candidate.shared.method for c in all_ for o in c.options}
    for name in [OWN, *(m for m in METHODS if m in fitted), AUTO] if method == AUTO else [method]:
        choices, others = _under(all_, _MODES[name]), list(found.values()) if name == AUTO else []
        room = budget - least
        for _ in range(_TRIES):
            best = _best(choices, name, max(room, 0), live, others)
            if (over := size_of(best) - budget) <= 0:
                break
            room -= over
        else:
            best = empty
        found[name] = min([best, *others], key=lambda p: p.error)
    return found[method], {name: each.error for name, each in found.items()}


def _under(choices: Sequence[Choices], mode: _Mode) -> list[Choices]:
    return [c.under(mode.methods, own=mode.own, private=mode.private) for c in choices]


def _best(choices: Sequence[Choices], method: str, room: int, live: Tensor, others: Sequence[Plan]) -> Plan:
    """The best plan that needs at most `room` bytes, of those with the bases of some prices and of other plans."""
    price = _fitting_price(partial(_at, choices), room)
    tried = [_at(choices, price * factor)[0] for factor in _AROUND]
    tried += [[_again(c, p) for c, p in zip(choices, other.targets, strict=True)] for other in others]
    plans = {}
    for picks in tried:
        fit = _fitting(picks, room)
        bases = tuple(None if pick is None else id(pick.option) for pick in fit)
        if bases not in plans:
            plans[bases] = _finished(choices, _settled(choices, fit, room), method, room, live)
    return min(plans.values(), key=lambda p: p.error)


def _fitting_price(at: Callable[[float], tuple[_Picks, float]], room: float) -> float:
    """The lowest price of a byte at which what is picked fits."""
    low, high = 1e-18, 1.0
    for _ in range(_HALVINGS):
        price = (low * high) ** 0.5
        low, high = (low, price) if at(price)[1] <= room else (price, high)
    return high


def _again(choices: Choices, planned: Planned) -> Pick | None:
    """What another plan picked."""
    option = next((o for o in choices.options if o.candidate is planned.candidate), None)
    return None if option is None else Pick(option, planned.form)


def _at(choices: Sequence[Choices], price: float) -> tuple[list[Pick | None], float]:
    """What every target would choose at a price, and the bytes of all of it."""
    picks: list[Pick | None] = []
    total = 0.0
    for c in choices:
        own = c.own.value(price)
        best, pick = float(own.sum()), None
        for option in c.options:
            worth, found = _used(option, own, price)
            if worth > best * (1 + 1e-12) and bool((found.form >= 0).any()):
                best, pick = worth, found
        picks.append(pick)
        total += _spent(c, pick, price)
    return picks, total


def _used(option: Option, own: Tensor, price: float) -> tuple[float, Pick]:
    """What bases are worth with each adapter in its best form, of `own` value without them."""
    value, form = torch.stack([own, *(f.value(price) for f in option.forms)]).max(0)
    return float(value.sum()) - price * option.bytes, Pick(option, form - 1)


def _spent(choices: Choices, pick: Pick | None, price: float) -> float:
    """Bytes with the components that are worth the price."""
    spent = choices.own.spent(price)
    if pick is None:
        return float(spent.sum())
    for i, form in enumerate(pick.option.forms):
        spent = torch.where(pick.form == i, form.spent(price), spent)
    return pick.option.bytes + float(spent.sum())


def _settled(choices: Sequence[Choices], picks: _Picks, room: float) -> _Picks:
    """The same bases, the adapters in the forms of the price at which these fit."""

    def at(price: float) -> tuple[_Picks, float]:
        now = [
            None if pick is None else _used(pick.option, c.own.value(price), price)[1]
            for c, pick in zip(choices, picks, strict=True)
        ]
        return now, sum(_spent(c, pick, price) for c, pick in zip(choices, now, strict=True))

    return at(_fitting_price(at, room))[0]


def _finished(choices: Sequence[Choices], picks: _Picks, method: str, room: int, live: Tensor) -> Plan:
    """The plan with these bases and forms, the bytes that are left spent on components.

    Components have one cost along each chain and gains that fall, so the best first is the best, up to the last few.
    """
    left = room - sum(pick.bytes for pick in picks if pick is not None)
    chains = [_chains(c, pick) for c, pick in zip(choices, picks, strict=True)]
    bought = _bought(
        torch.cat([gains.flatten() for gains, _ in chains]), torch.cat([costs.flatten() for _, costs in chains]), left
    )
    errors, targets, at = live.clone(), [], 0
    for c, pick, (gains, _) in zip(choices, picks, chains, strict=True):
        taken = bought[at : at + gains.numel()].reshape(gains.shape)
        at += gains.numel()
        planned, captured = _planned(c, pick, taken.sum(1), (gains * taken).sum(1))
        errors.index_add_(0, c.measured.members, -captured)
        targets.append(planned)
    return Plan(method, tuple(targets), errors.clamp_min(0))


def _chains(choices: Choices, pick: Pick | None) -> tuple[Tensor, Tensor]:
    """Gains and costs (t, k) of the components that each adapter can have in its form."""
    forms = [] if pick is None else list(enumerate(pick.option.forms))
    width = max(form.chain.shape[1] for form in (choices.own, *(form for _, form in forms)))
    gains, costs = _wider(choices.own.chain, width), choices.own.cost
    for i, form in forms:
        assert pick is not None
        inside = pick.form == i
        gains = torch.where(inside.unsqueeze(1), _wider(form.chain, width), gains)
        costs = torch.where(inside, form.cost, costs)
    return gains, costs.unsqueeze(1).expand_as(gains)


def _wider(chain: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(chain, (0, width - chain.shape[1]))


def _planned(choices: Choices, pick: Pick | None, count: Tensor, captured: Tensor) -> tuple[Planned, Tensor]:
    """A target with as many components as were bought, and what each adapter gains by all of it.

    An adapter without a part of its core does not use the bases after all.
    """
    target, rank = choices.measured, count.long()
    form, kept = torch.full_like(rank, -1), torch.zeros_like(rank)
    candidate = None
    if pick is not None:
        for i, each in enumerate(pick.option.forms):
            inside = (pick.form == i) & ((rank > 0) if each.of_core else torch.ones_like(rank, dtype=torch.bool))
            form = torch.where(inside, i, form)
            kept = torch.where(inside, rank if each.of_core else each.kept, kept)
            captured = torch.where(inside, captured + each.gain, captured)
        of_core = [i for i, each in enumerate(pick.option.forms) if each.of_core]
        rank = torch.where(torch.isin(form, torch.tensor(of_core, dtype=form.dtype)), 0, rank)
        candidate = pick.option.candidate if bool((form >= 0).any()) else None
    group = torch.full_like(form, -1) if candidate is None else torch.where(form >= 0, candidate.group, -1)
    record = PackTarget(target.name, target.shape, None if candidate is None else candidate.shared)
    return Planned(record, target, candidate, form, group, rank, kept), captured


def _fitting(picks: _Picks, room: float) -> _Picks:
    """The bases that fit, those that gain most for a byte first."""
    kept: list[Pick | None] = [None] * len(picks)
    there = [(i, pick) for i, pick in enumerate(picks) if pick is not None]
    for i, pick in sorted(there, key=lambda each: (-each[1].density, each[0])):
        if pick.bytes <= room:
            kept[i], room = pick, room - pick.bytes
    return kept


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
    for i in _still_fitting(costs[order[count:]], left):
        bought[order[count + i]] = 1
    return bought


def _still_fitting(costs: Tensor, left: float) -> Iterator[int]:
    """Later ones that are cheaper than the first that did not fit; a chain's own later ones cost as much as that."""
    if not len(costs):
        return
    for i in (costs <= left).nonzero().flatten().tolist():
        if float(costs[i]) <= left:
            left -= float(costs[i])
            yield i
