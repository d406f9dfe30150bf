"""Who shares what, and how many components each adapter keeps: the least error within a budget of bytes.

The error of an adapter is the squared relative error of all its deltas together, and what is minimised is the sum over
the adapters, each counting the same. At a price for a byte every target decides alone: which bases, who uses them, who
keeps components of its own; the price is then raised or lowered until the bytes fit (Lagrange; the choices are on the
convex hull of each target's bytes and errors), and what is left goes to the best components that still fit. The same
is done for each method by itself, and the best of all is taken: so no single method does better at the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from loratools._lazy import torch
from loratools.errors import UsageError
from loratools.hub.pack.choices import Choices, Option, choices_of
from loratools.hub.pack.fits import Candidate
from loratools.hub.pack.layout import METHODS, Numbers, PackTarget
from loratools.hub.pack.measure import Measured
from loratools.sizes import format_size

if TYPE_CHECKING:
    from torch import Tensor

OWN: Final = "own"
AUTO: Final = "auto"
CHOICES: Final = (AUTO, OWN, *METHODS)
_HALVINGS: Final = 60
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


@dataclass(frozen=True, eq=False)
class _Pick:
    """Bases for a target, and the form in which each adapter uses them, -1 for those that do not."""

    option: Option
    form: Tensor  # (t,) int64

    @property
    def bytes(self) -> float:
        """Without what is bought beside."""
        return self.option.bytes + sum(
            float(form.bytes[self.form == i].sum()) for i, form in enumerate(self.option.forms)
        )

    @property
    def density(self) -> float:
        """What a byte gains at most, parts of cores counted as if all were bought."""
        gain, bytes_ = 0.0, self.bytes
        for i, form in enumerate(self.option.forms):
            inside = self.form == i
            gain += float(form.gain[inside].sum())
            if form.of_core:
                gain += float(form.chain[inside].sum())
                bytes_ += float((form.cost * (form.chain > 0).sum(1))[inside].sum())
        return gain / bytes_


_Picks = Sequence["_Pick | None"]  # for each target


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
        for other in others:  # of which every one may do, as it is
            same = replace(other, method=name)
            if same.error < best.error and size_of(same) <= budget:
                best = same
        found[name] = best
    return found[method], {name: each.error for name, each in found.items()}


def _under(choices: Sequence[Choices], mode: _Mode) -> list[Choices]:
    return [c.under(mode.methods, own=mode.own, private=mode.private) for c in choices]


def _best(choices: Sequence[Choices], method: str, room: int, live: Tensor, others: Sequence[Plan]) -> Plan:
    """The best plan that needs at most `room` bytes."""
    low, high = 1e-18, 1.0  # prices of a byte
    for _ in range(_HALVINGS):
        price = (low * high) ** 0.5
        _, bytes_ = _at(choices, price)
        low, high = (low, price) if bytes_ <= room else (price, high)
    tried = [_at(choices, high * factor)[0] for factor in _AROUND]
    tried += [[_again(c, p) for c, p in zip(choices, other.targets, strict=True)] for other in others]
    return min((_finished(choices, picks, method, room, live) for picks in tried), key=lambda p: p.error)


def _again(choices: Choices, planned: Planned) -> _Pick | None:
    """What another plan picked."""
    option = next((o for o in choices.options if o.candidate is planned.candidate), None)
    return None if option is None else _Pick(option, planned.form)


def _at(choices: Sequence[Choices], price: float) -> tuple[list[_Pick | None], float]:
    """What every target would choose at a price, and the bytes of all of it."""
    picks: list[_Pick | None] = []
    total = 0.0
    for c in choices:
        own = c.own.value(price)
        best, pick = float(own.sum()), None
        for option in c.options:
            value, form = torch.stack([own, *(f.value(price) for f in option.forms)]).max(0)
            worth = float(value.sum()) - price * option.bytes
            if worth > best * (1 + 1e-12) and bool((form > 0).any()):
                best, pick = worth, _Pick(option, form - 1)
        picks.append(pick)
        spent = c.own.spent(price)
        if pick is not None:
            total += pick.option.bytes
            for i, form_ in enumerate(pick.option.forms):
                spent = torch.where(pick.form == i, form_.spent(price), spent)
        total += float(spent.sum())
    return picks, total


def _finished(choices: Sequence[Choices], picks: _Picks, method: str, room: int, live: Tensor) -> Plan:
    """The plan with these bases and forms, the bytes that are left spent on components; without bases if too large.

    Components have one cost along each chain and gains that fall, so the best first is the best, up to the last few.
    """
    left = room - sum(pick.bytes for pick in picks if pick is not None)
    if left < 0:
        picks, left = _dropped(picks, float(room))
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


def _chains(choices: Choices, pick: _Pick | None) -> tuple[Tensor, Tensor]:
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


def _planned(choices: Choices, pick: _Pick | None, count: Tensor, captured: Tensor) -> tuple[Planned, Tensor]:
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


def _dropped(picks: _Picks, room: float) -> tuple[list[_Pick | None], float]:
    """The bases that fit, those that gain most for a byte first."""
    kept: list[_Pick | None] = [None] * len(picks)
    there = [(i, pick) for i, pick in enumerate(picks) if pick is not None]
    for i, pick in sorted(there, key=lambda each: (-each[1].density, each[0])):
        if pick.bytes <= room:
            kept[i], room = pick, room - pick.bytes
    return kept, room


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
