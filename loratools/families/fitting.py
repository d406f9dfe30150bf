"""Families in which any delta can be written, exactly or as well as they can: what their encoders take and promise."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from loratools._lazy import torch
from loratools.errors import AdapterError, UsageError
from loratools.families.base import Layout, Update
from loratools.operators import LowRank

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from loratools.operators import Operator

# `exact`: every delta, but for rounding; `optimal`: the nearest update of the family with these options; `local`: one
# that no small change of its numbers brings nearer, found from seeded starts.
Guarantee = Literal["exact", "optimal", "local"]


@dataclass(frozen=True, eq=False)
class Source:
    """A delta to be written in another family, scale included: (m, n), with the layout of its base parameter.

    `layout.shape` is always stated. `base` is the base weight in its own layout, None where nobody gave it; `dtype` is
    what numbers are stored in, `seed` what random choices begin with. `squares` are the mean squares of the inputs
    (n,), where they are known and a family has a use for them.
    """

    delta: Operator
    layout: Layout
    base: Tensor | None = None
    dtype: torch.dtype | None = None  # None: float32
    seed: int = 0
    squares: Tensor | None = None

    @property
    def stored(self) -> torch.dtype:
        """The dtype of stored numbers."""
        return torch.float32 if self.dtype is None else self.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.delta.shape

    @property
    def rank(self) -> int:
        """The rank that the delta has at most, as its structure tells."""
        return min(*self.shape, self.delta.rank) if isinstance(self.delta, LowRank) else min(self.shape)


@dataclass(frozen=True)
class NoOptions:
    """A family with nothing to choose."""


class Fittable(Update):
    """A family with an encoder.

    `Options` is a frozen dataclass of plain numbers, words and flags, all with defaults, which `--set NAME=VALUE`
    fills; `guarantee` says how good a fit is, `formula` what the delta is, `count` how many numbers are stored, `paper`
    where it comes from, and `reconstruction` what of it is this project's own reading, where no source tells.
    `fits_with_base`: the encoder needs the base weight. `most` is the number of entries of a delta up to which a fit is
    feasible, None for any.
    """

    Options: ClassVar[type[Any]] = NoOptions
    guarantee: ClassVar[Guarantee]
    formula: ClassVar[str]
    count: ClassVar[str]
    paper: ClassVar[str]
    reconstruction: ClassVar[str] = ""
    fits_with_base: ClassVar[bool] = False
    most: ClassVar[int | None] = None

    @classmethod
    @abstractmethod
    def encode(cls, source: Source, options: Any) -> Self:
        """The update nearest to `source` with these `options`, as far as `guarantee` goes; scale is 1.

        Raises AdapterError where the family has none of such a shape, NeedsBaseError without a base that it needs, and
        UsageError for options that no shape allows.
        """

    @classmethod
    @abstractmethod
    def within(cls, source: Source, nbytes: int) -> Any:
        """The richest options whose stored tensors take at most `nbytes`; None where none do, or there is no choice."""

    @classmethod
    @abstractmethod
    def size(cls, source: Source, options: Any) -> int:
        """Bytes of the stored tensors of a fit with these options, without those that targets share; nothing is fitted.

        A delta that lacks the rank it is asked for may take less, where the family leaves out what is zero.
        """

    @classmethod
    def within_together(cls, sources: Mapping[str, Source], nbytes: int) -> dict[str, Any]:
        """The richest options of every target for `nbytes` of all stored tensors, shared ones included.

        By default each gets its share by the sides of its matrix, and the next ones what it leaves over. UsageError
        names a target for which that is too little.
        """
        left, sides = nbytes, sum(sum(source.shape) for source in sources.values())
        found = {}
        for target, source in sources.items():
            share = left * sum(source.shape) // sides
            options = cls.within(source, share)
            if options is None:
                few = f"a budget of {nbytes} bytes is too small for {cls.family}"
                raise UsageError(f"{target}: {few}: {share} are this target's share; raise --budget")
            if not cls.references:
                left -= cls.size(source, options)
                sides -= sum(source.shape)
            found[target] = options
        return found

    @classmethod
    def encode_together(cls, sources: Mapping[str, Source], options: Any) -> dict[str, Self]:
        """Every target's update; a family whose targets share tensors fits these to all of them."""
        return {target: cls._encoded(target, source, options) for target, source in sources.items()}

    @classmethod
    def _encoded(cls, target: str, source: Source, options: Any) -> Self:
        try:
            return cls.encode(source, options)
        except AdapterError as error:
            raise type(error)(f"{target}: {error}") from error

    @classmethod
    def expected_energy(cls, source: Source, options: Any) -> float | None:
        """The share of a generic delta's squared norm that a random subspace keeps; None where it is not random."""
        return None


def check_rank(rank: int | None) -> None:
    """UsageError for a rank below 1."""
    if rank is not None and rank < 1:
        raise UsageError(f"rank {rank} is below 1")


def options_of(family: type[Fittable], given: Mapping[str, str]) -> Any:
    """The family's options from text; UsageError names the option that it lacks or cannot read, with those there are.

    The types are those of the defaults; `none` stands for None.
    """
    known = {f.name: f for f in fields(family.Options)}
    values: dict[str, Any] = {}
    for name, text in given.items():
        if name not in known:
            there = ", ".join(known) or "none"
            raise UsageError(f"{family.family} has no option {name!r}; there are: {there}")
        values[name] = _value(f"{family.family}: {name}", str(known[name].type), text)
    return family.Options(**values)


def _value(where: str, kind: str, text: str) -> Any:
    kinds = [part.strip() for part in kind.split("|")]
    if "None" in kinds and text.lower() == "none":
        return None
    try:
        if "bool" in kinds:
            return {"true": True, "yes": True, "false": False, "no": False}[text.lower()]
        if "int" in kinds:
            return int(text)
        if "float" in kinds:
            return float(text)
    except (ValueError, KeyError):
        raise UsageError(f"{where} is {text!r}, not of type {kind}") from None
    return text
