"""Whether a server takes an adapter, requirement by requirement."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One requirement that the adapter does not meet: by what, why that matters, where it is written, what helps.

    `severity`: `refused` where it does not load, `wrong` where it loads and computes another delta, `old` where that
    concerns old versions alone. `where` names the first offenders, `count` tells how many there are.
    """

    requirement: str
    severity: str
    where: tuple[str, ...]
    count: int
    reason: str
    source: str
    fix: str


@dataclass(frozen=True)
class CheckReport:
    """The findings; `loads` where none is `refused` or `wrong`.

    `met` are the other requirements. `setting` is what the server must be started with.
    """

    path: str
    server: str
    title: str
    loads: bool
    findings: tuple[Finding, ...]
    met: tuple[str, ...]
    setting: str | None = None
    warnings: tuple[str, ...] = ()
    output: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)
