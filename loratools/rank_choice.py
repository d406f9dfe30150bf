"""The rank rule that was typed: text becomes a value here, once."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from loratools.errors import UsageError
from loratools.sizes import format_size, parse_size

if TYPE_CHECKING:
    from loratools.ranks import Policy


@dataclass(frozen=True)
class RankChoice:
    """Every rank rule of the command line; exactly one is given."""

    rank: int | None = None
    energy: float | None = None
    budget: str | None = None
    ratio: float | None = None
    threshold: float | None = None
    elbow: bool = False
    sv_ratio: float | None = None
    sv_fro: float | None = None
    sv_cumulative: float | None = None
    adaptertune: str | None = None

    @property
    def is_given(self) -> bool:
        """Whether there is any rule."""
        return self != RankChoice()

    @property
    def given(self) -> str:
        """The option that was given; UsageError unless it is one."""
        names = {f.name: f"--{f.name.replace('_', '-')}" for f in fields(self)}
        found = [name for name in names if getattr(self, name) is not None and getattr(self, name) is not False]
        if len(found) == 1:
            return found[0]
        if found:
            raise UsageError(f"{' and '.join(names[name] for name in found)} exclude each other; give one of them")
        raise UsageError(f"no ranks are chosen; give one of {', '.join(names.values())}")

    @property
    def tag(self) -> str:
        """What the default output's name says about the rule."""
        short = {"rank": "r", "energy": "e", "ratio": "x", "threshold": "t", "sv_ratio": "svr", "sv_fro": "svf"}
        name, value = self.given, getattr(self, self.given)
        if name == "elbow":
            return "elbow"
        if name == "budget":
            return re.sub(r"\s+", "", value)
        if name == "adaptertune":
            return f"at{value.replace(':', '-')}"
        return f"{short.get(name, 'svc')}{value:g}"

    def policy(self, size: int, relative_to: Literal["base", "self"] | None = None) -> Policy:
        """The rule as a value; `size` is the input's, which a ratio divides. UsageError for what lies out of range."""
        from loratools import ranks

        rule = self.given
        if relative_to and rule not in ("budget", "ratio"):
            raise UsageError("--relative-to weighs the errors of a budget; give --budget or --ratio with it")
        if self.budget is not None or self.ratio is not None:
            return ranks.Budget(self.bytes(size), relative_to)
        if self.adaptertune is not None:
            return ranks.AdapterTuneElbow(*_noise_and_samples(self.adaptertune))
        if self.rank is not None:
            return ranks.Fixed(self.rank)
        if self.elbow:
            return ranks.Elbow()
        rules: dict[str, Callable[[float], Policy]] = {
            "energy": ranks.Energy,
            "threshold": ranks.Threshold,
            "sv_ratio": ranks.Ratio,
            "sv_fro": ranks.Frobenius,
            "sv_cumulative": ranks.Cumulative,
        }
        return rules[rule](getattr(self, rule))

    def bytes(self, size: int) -> int:
        """The size that a budget or a ratio asks for; UsageError for one that makes no sense."""
        if self.budget is not None:
            return parse_size(self.budget)
        assert self.ratio is not None
        if not 1 <= self.ratio <= size:
            raise UsageError(f"--ratio {self.ratio:g}: of {format_size(size)} this leaves nothing or more; try 4")
        return int(size / self.ratio)


def _noise_and_samples(text: str) -> tuple[float, int]:
    noise, _, samples = text.partition(":")
    try:
        return float(noise), int(samples)
    except ValueError:
        raise UsageError(f"--adaptertune {text}: write noise and training samples, such as 1e-4:5000") from None
