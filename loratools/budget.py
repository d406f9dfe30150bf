"""The knapsack behind a byte budget: which steps to buy so that the total gain is largest, with proof.

A *chain* is a list of steps `(gain, cost)` that can only be bought in order, with gain per byte never increasing. Buy
steps by falling gain per byte until one does not fit: this gives levels x*, a price `p` (that step's gain per byte)
and `room` unspent bytes. At price p no level of any chain earns more than its level in x* (chains are concave), so for
every purchase x

    gain(x) = gain(x*) + p * room - sum_i loss_i(x_i) - p * unspent(x),      loss_i >= 0,

where `loss_i` is what chain i gives up against its level in x* after paying p per byte. The first two terms bound every
purchase (the linear relaxation; Dantzig 1957), so the optimum is the purchase of least `sum loss + p * unspent`; x* is
itself optimal when room is 0, as it always is when all costs are equal. The least loss is found by dynamic programming
over (bytes moved, loss), nearest chains first, as in Pisinger's minimal-core method for the multiple-choice knapsack
(1995). A state is dropped only if another costs no more and earns no less, or if its lower bound reaches the best loss.

Chains whose steps all have one cost are first merged into one, best gains first: gains never rise along a chain, so the
order within each is kept, and exchanging a step for a better one of the same cost never loses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, TypeAlias

Step: TypeAlias = tuple[float, int]  # (gain > 0, cost >= 1)
Chain: TypeAlias = Sequence[Step]

MOST_WORK = 1_000_000  # states made before the search gives up with a certified gap: a second or so
_ROUNDING = 1e-12  # a loss smaller by less than this share is the same loss


class Purchase(NamedTuple):
    """How many steps of each chain to buy, and the most gain that any other purchase could still add."""

    levels: list[int]
    gap: float


class _Move(NamedTuple):
    cost: int
    loss: float
    chain: int
    level: int


class _Trail(NamedTuple):
    """The moves behind a state, last first."""

    move: _Move
    earlier: _Trail | None


class _State(NamedTuple):
    cost: int  # units spent beyond x*, may be negative
    loss: float
    trail: _Trail | None


class _Neighbourhood(NamedTuple):
    """The levels of one chain that are worth a look, and the least loss per unit on the way up and on the way down."""

    moves: list[_Move]
    up: float
    down: float


def buy(chains: Sequence[Chain], capacity: int, *, most_work: int = MOST_WORK) -> Purchase:
    """The purchase of largest total gain whose cost is at most `capacity`; `gap` is 0 when that is proven."""
    merged, owners = _merged(chains)
    best, gap = _buy(merged, capacity, most_work)
    levels = [0] * len(chains)
    for level, owner in zip(best, owners, strict=True):
        for chain in owner[:level]:
            levels[chain] += 1
    return Purchase(levels, gap)


def _merged(chains: Sequence[Chain]) -> tuple[list[Chain], list[list[int]]]:
    """Equivalent chains, at most one for each common step cost, and the original chain behind each of their steps."""
    merged: list[Chain] = []
    owners: list[list[int]] = []
    shared: dict[int, list[tuple[float, int]]] = {}
    for index, chain in enumerate(chains):
        costs = {cost for _, cost in chain}
        if len(costs) == 1:
            shared.setdefault(costs.pop(), []).extend((gain, index) for gain, _ in chain)
        else:
            merged.append(chain)
            owners.append([index] * len(chain))
    for cost, steps in shared.items():
        steps.sort(key=lambda step: -step[0])
        merged.append([(gain, cost) for gain, _ in steps])
        owners.append([index for _, index in steps])
    return merged, owners


def _buy(chains: Sequence[Chain], capacity: int, most_work: int) -> Purchase:
    unit = math.gcd(*(cost for chain in chains for _, cost in chain)) or 1
    scaled = [[(gain, cost // unit) for gain, cost in chain] for chain in chains]
    room = capacity // unit
    order = _by_density(scaled)
    levels = [0] * len(chains)
    taken = 0
    for _, chain, level in order:
        cost = scaled[chain][level - 1][1]
        if cost > room:
            break
        room -= cost
        levels[chain] = level
        taken += 1
    if taken == len(order) or room == 0:
        return Purchase(levels, 0.0)
    price = order[taken][0]
    moved, least = _fill(scaled, levels, [step[1:] for step in order[taken:]], room, price)
    improved, gap = _search(scaled, levels, room, price, least, most_work)
    for chain, level in (moved if improved is None else improved).items():
        levels[chain] = level
    return Purchase(levels, gap)


def _by_density(chains: Sequence[Chain]) -> list[tuple[float, int, int]]:
    """(gain per unit, chain, level reached) for all steps, best first, each chain in its own order."""
    steps = []
    for index, chain in enumerate(chains):
        # the running minimum only undoes rounding: it keeps a chain's steps in order
        densities = accumulate((gain / cost for gain, cost in chain), min)
        steps += [(density, index, level) for level, density in enumerate(densities, 1)]
    return sorted(steps, key=lambda step: -step[0])


def _fill(
    chains: Sequence[Chain], levels: list[int], left: list[tuple[int, int]], room: int, price: float
) -> tuple[dict[int, int], float]:
    """Whatever later steps still fit, in order of density: a first purchase, and its loss."""
    filled: dict[int, int] = {}
    loss = 0.0
    for chain, level in left:
        gain, cost = chains[chain][level - 1]
        if cost <= room and filled.get(chain, levels[chain]) == level - 1:
            filled[chain] = level
            loss += max(0.0, price * cost - gain)
            room -= cost
    return filled, loss + price * room


def _neighbourhood(chain: Chain, index: int, level: int, price: float, least: float) -> _Neighbourhood:
    moves = []
    cost, loss = 0, 0.0
    for up in range(level, len(chain)):
        cost += chain[up][1]
        loss += max(0.0, price * chain[up][1] - chain[up][0])
        if loss >= least:
            break
        moves.append(_Move(cost, loss, index, up + 1))
    cost, loss = 0, 0.0
    for down in range(level - 1, -1, -1):
        cost -= chain[down][1]
        loss += max(0.0, chain[down][0] - price * chain[down][1])
        if loss >= least:
            break
        moves.append(_Move(cost, loss, index, down))
    rise = max(0.0, price - chain[level][0] / chain[level][1]) if level < len(chain) else math.inf
    fall = max(0.0, chain[level - 1][0] / chain[level - 1][1] - price) if level else math.inf
    return _Neighbourhood(moves, rise, fall)


def _search(
    chains: Sequence[Chain], levels: list[int], room: int, price: float, least: float, most_work: int
) -> tuple[dict[int, int] | None, float]:
    """The moves away from `levels` of smaller loss than `least`, if there are any, and the loss still in doubt."""
    around = [
        _neighbourhood(chain, index, level, price, least)
        for index, (chain, level) in enumerate(zip(chains, levels, strict=True))
    ]
    core = sorted((near for near in around if near.moves), key=lambda near: min(near.up, near.down))
    # rates that the chains after a position cannot beat
    ups = list(accumulate((near.up for near in reversed(core)), min, initial=price))[::-1]
    downs = list(accumulate((near.down for near in reversed(core)), min, initial=math.inf))[::-1]

    def bound(state: _State, position: int) -> float:
        """No completion of `state` by the chains from `position` on loses less."""
        spare = room - state.cost
        if spare == 0:
            return state.loss
        return state.loss + (ups[position] * spare if spare > 0 else downs[position] * -spare)

    best: _Trail | None = None
    states = [_State(0, 0.0, None)]
    work = 0
    for position, near in enumerate(core):
        moves = [move for move in near.moves if move.loss < least]  # `least` has fallen since
        work += len(states) * (len(moves) + 1)
        if work > most_work:
            doubt = max(0.0, least - min(bound(state, position) for state in states))
            return _unwound(best), doubt
        grown = list(states)
        for state in states:
            for move in moves:
                loss = state.loss + move.loss
                if loss >= least:
                    continue
                reached = _State(state.cost + move.cost, loss, _Trail(move, state.trail))
                grown.append(reached)
                if reached.cost <= room:
                    total = loss + price * (room - reached.cost)
                    if total < least * (1 - _ROUNDING):
                        least, best = total, reached.trail
        goal = least * (1 - _ROUNDING)
        states = [state for state in _undominated(grown, price) if bound(state, position + 1) < goal]
        if not states:
            break
    return _unwound(best), 0.0


def _undominated(states: list[_State], price: float) -> list[_State]:
    """The states that no other one beats in both cost and gain."""
    kept = []
    most = -math.inf
    for state in sorted(states, key=lambda state: (state.cost, state.loss)):
        gain = price * state.cost - state.loss
        if gain > most:
            most = gain
            kept.append(state)
    return kept


def _unwound(trail: _Trail | None) -> dict[int, int] | None:
    if trail is None:
        return None
    moved = {}
    while trail is not None:
        moved[trail.move.chain] = trail.move.level
        trail = trail.earlier
    return moved
