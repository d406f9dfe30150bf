"""What a pack of many adapters holds, and what it costs."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import pandas as pd

    from loratools.reports.frames import Kind


@dataclass(frozen=True)
class PackedAdapter:
    """One adapter: `done`, or `failed` with the reason.

    `relative_error` is that of all factored deltas together, as they are read from the pack; `bytes_before` are those
    of its weights and config, `bytes_after` those of its own file, without a part of the bases. `factored` targets
    are packed, `sharing` of them with bases; `as_they_are` are stored whole, `first_as_it_is` says of one why.
    """

    name: str
    status: str
    reason: str = ""
    bytes_before: int = 0
    bytes_after: int = 0
    relative_error: float | None = None
    factored: int = 0
    sharing: int = 0
    as_they_are: int = 0
    first_as_it_is: str = ""


@dataclass(frozen=True)
class PackedTarget:
    """One target: how it is kept, by how many adapters, and what that takes.

    `width` vectors to a side in each of `groups` pairs of bases; `components` are those that adapters have of their
    own, all together.
    """

    name: str
    shape: tuple[int, int]
    method: str
    width: int
    groups: int
    adapters: int
    sharing: int
    components: int
    base_bytes: int
    own_bytes: int


@dataclass(frozen=True)
class PackReport:
    """A pack as it was written.

    The objective was the sum over adapters of the squared relative error. `expected` are the values of it that were
    planned for each method that was fitted, by itself at the same budget, rounding estimated.
    """

    columns: ClassVar[Mapping[str, Kind]] = {
        "name": "text",
        "status": "text",
        "reason": "text",
        "bytes_before": "integer",
        "bytes_after": "integer",
        "relative_error": "number",
        "factored": "integer",
        "sharing": "integer",
        "as_they_are": "integer",
        "first_as_it_is": "text",
    }

    output: str
    method: str
    budget: int
    bytes_before: int
    bytes_after: int
    adapters: tuple[PackedAdapter, ...]
    targets: tuple[PackedTarget, ...]
    expected: Mapping[str, float] = field(default_factory=dict)

    @property
    def errors(self) -> list[float]:
        """Of the adapters that were packed."""
        return [a.relative_error for a in self.adapters if a.relative_error is not None]

    @property
    def methods(self) -> Mapping[str, int]:
        """How many targets chose each."""
        return Counter(target.method for target in self.targets)

    @property
    def failed(self) -> tuple[PackedAdapter, ...]:
        """Those that are not in the pack."""
        return tuple(a for a in self.adapters if a.status == "failed")

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know."""
        lost = [a.name for a in self.adapters if a.relative_error is not None and a.relative_error > 0.5]
        kept = [a for a in self.adapters if a.as_they_are]
        notes = []
        if lost:
            notes.append(
                f"{len(lost)} adapter{' has' if len(lost) == 1 else 's have'} a relative error above 0.5; "
                f"first: {lost[0]}; allow a larger budget"
            )
        if kept:
            count = sum(a.as_they_are for a in kept)
            what = "target is" if count == 1 else "targets are"
            notes.append(f"{count} {what} stored as they are; first: {kept[0].name}: {kept[0].first_as_it_is}")
        return tuple(notes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        errors = self.errors
        return {
            "output": self.output,
            "method": self.method,
            "budget": self.budget,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "relative_error": {
                "max": max(errors, default=0.0),
                "median": statistics.median(errors) if errors else 0.0,
                "sum_of_squares": math.fsum(e * e for e in errors),
            },
            "methods": dict(self.methods),
            "expected": dict(self.expected),
            "adapters": [asdict(a) for a in self.adapters],
            "targets": [asdict(t) | {"shape": list(t.shape)} for t in self.targets],
            "warnings": list(self.warnings),
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each adapter, with the keys of `columns`."""
        for adapter in self.adapters:
            yield asdict(adapter)

    def to_frame(self) -> pd.DataFrame:
        """`rows` as a pandas frame; MissingExtraError without pandas."""
        from loratools.reports.frames import to_frame

        return to_frame(self)


@dataclass(frozen=True)
class PackAddReport:
    """An adapter that joined a pack, and the pack's bytes before and after.

    `components` it has of its own, in all targets; `budget` bounds the bytes of its file, None where none was given.
    """

    output: str
    adapter: PackedAdapter
    bytes_before: int
    bytes_after: int
    components: int
    budget: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "output": self.output,
            "adapter": asdict(self.adapter),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "components": self.components,
            "budget": self.budget,
        }


@dataclass(frozen=True)
class UnpackReport:
    """An adapter that was written out of a pack."""

    output: str
    name: str
    dialect: str
    targets: int
    largest_rank: int
    relative_error: float
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)
