"""What each target could store, in bytes and gains: the ways among which a plan chooses.

A gain is what a way takes off the sum of the squared relative errors, so that those of all adapters add up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final

from loratools._lazy import torch
from loratools.hub.pack.fits import CODED, Candidate
from loratools.hub.pack.layout import Numbers
from loratools.hub.pack.measure import Measured

if TYPE_CHECKING:
    from torch import Tensor

_BASE_ROOM: Final = 96  # bytes that the header of a file says of one pair of bases, at most


@dataclass(frozen=True, eq=False)
class Form:
    """One form in which adapters store a target: what it costs and gains at once, and what can be bought beside it.

    That is a chain of components, whose gains fall and which cost the same: of the adapter's own, or `of_core`.
    """

    bytes: Tensor  # (t,)
    gain: Tensor  # (t,)
    kept: Tensor  # (t,) int64, as in `Part`; of a chain `of_core`, as many as are bought
    chain: Tensor  # (t, k) gains
    cost: Tensor  # (t,) bytes of a component
    of_core: bool = False

    def bare(self) -> Form:
        """Without components of the adapter's own."""
        return self if self.of_core else replace(self, chain=self.chain[:, :0])

    def value(self, price: float) -> Tensor:
        """Gains less bytes, (t,), with the components that are worth a price for a byte."""
        beside = (self.chain - price * self.cost.unsqueeze(1)).clamp_min(0).sum(1)
        return self.gain - price * self.bytes + beside

    def spent(self, price: float) -> Tensor:
        """The bytes of that, (t,)."""
        return self.bytes + self.cost * (self.chain > price * self.cost.unsqueeze(1)).sum(1)


@dataclass(frozen=True, eq=False)
class Option:
    """Bases that a target could share, and the forms in which its adapters could use them."""

    candidate: Candidate
    bytes: int
    forms: tuple[Form, ...]


@dataclass(frozen=True, eq=False)
class Pick:
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


@dataclass(frozen=True, eq=False)
class Choices:
    """One target: what adapters store of it without bases, and the bases that there could be."""

    measured: Measured
    own: Form
    options: tuple[Option, ...]

    def under(self, methods: frozenset[str], *, own: bool, private: bool) -> Choices:
        """Those of some methods, with components of an adapter's own alone or beside bases, or not."""
        options = [o for o in self.options if o.candidate.shared.method in methods]
        if not private:
            options = [replace(o, forms=tuple(form.bare() for form in o.forms)) for o in options]
        return Choices(self.measured, self.own if own else self.own.bare(), tuple(options))


def choices_of(target: Measured, numbers: Sequence[Numbers], bases: Numbers, weights: Tensor) -> Choices:
    """All that a target offers, where an adapter's squared norms count `weights`."""
    own = [numbers[i] for i in target.members.tolist()]
    gain = target.norms.square() * weights[target.members]
    cost = _each(own, lambda n: sum(n.size(1, side) for side in target.shape))
    chain = target.spectra * gain.unsqueeze(1) * (1 - 2 * CODED[bases.bits])
    none = torch.zeros_like(gain)
    options = tuple(
        Option(c, c.base_bytes + _BASE_ROOM * c.shared.groups, tuple(_forms(c, own, gain, cost, bases)))
        for c in target.candidates
    )
    return Choices(target, Form(none, none, none.long(), chain, cost), options)


def _forms(candidate: Candidate, own: Sequence[Numbers], gain: Tensor, cost: Tensor, bases: Numbers) -> list[Form]:
    """All that bases say of an adapter, with components of its own beside, and as many components of its core as pay.

    What those of its own gain is known beside all that bases say, not beside a part of a core.
    """
    shared, none = candidate.shared, torch.zeros_like(gain)
    further = candidate.private * gain.unsqueeze(1)
    bytes_ = none
    for kept in candidate.kept.unique().tolist():
        bytes_ = torch.where(candidate.kept == kept, _each(own, partial(shared.core_size, kept=kept)), bytes_)
    whole = Form(bytes_, candidate.captured * gain, candidate.kept, further, cost)
    most = candidate.inner.shape[1]
    if not most:
        return [whole]
    inner = candidate.inner.double() * gain.unsqueeze(1)
    each = _each(own, partial(shared.core_size, kept=1))
    parts = Form(none, none, candidate.kept, inner, each, of_core=True)
    exact = (candidate.rank > 0) & (candidate.rank <= most)
    if not bool(exact.any()):
        return [whole, parts]
    factors = Form(
        torch.where(exact, candidate.rank * each, bytes_),
        torch.where(exact, inner.sum(1), whole.gain),
        torch.where(exact, candidate.rank, candidate.kept),
        further,
        cost,
    )
    return [parts, factors, *([whole] if bases.bits else [])]  # two roundings lose more than one


def _each(own: Sequence[Numbers], size: Callable[[Numbers], int]) -> Tensor:
    """Bytes for each adapter, (t,), which has numbers of its own dtype."""
    sizes = {numbers: size(numbers) for numbers in set(own)}
    return torch.tensor([sizes[numbers] for numbers in own], dtype=torch.float64)
