"""The adapters of a hub as a server would see them: ranks and shapes in arrays, a signature for equal shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from loratools.errors import UsageError
from loratools.files import load
from loratools.hub.discover import Found, discover
from loratools.hub.work import FAILURES
from loratools.ops.check import check, server_named

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loratools.adapter import Adapter
    from loratools.ops.servers import Server
    from loratools.reports.check import Finding

Shapes = tuple[tuple[str, int, int], ...]  # target, rows and columns of its base parameter; sorted

# What `convert --to peft --portable` mends without a loss, in the names of the requirements.
MENDED = frozenset({"one-rank", "no-rslora"})
UNREADABLE = "cannot be read"


class Spectra(Protocol):
    """What singular values tell of every adapter, -1 or NaN where they are not all known."""

    def needed(self, largest_error: float) -> NDArray[np.int64]:
        """The least rank of all targets that keeps the relative error of all deltas within `largest_error`."""
        ...

    def errors(self, ranks: NDArray[np.int64]) -> NDArray[np.float64]:
        """The relative error of all deltas at one rank for each adapter."""
        ...


@dataclass(frozen=True, eq=False)
class Population:
    """Arrays with an entry for each adapter, in the order of the hub.

    `shapes` and `bases` are places in `signatures` and `base_names`. `reasons` are places in `reason_texts`, and -1 for
    an adapter that the server takes. `mended`: it takes it after a conversion that loses nothing. `spectra` is None
    where nothing tells singular values, and `caveat` says what the source did not tell.
    """

    source: str
    names: Any  # a list, or an array of pyarrow
    ranks: NDArray[np.int64]
    shapes: NDArray[np.int64]
    bases: NDArray[np.int64]
    reasons: NDArray[np.int64]
    mended: NDArray[np.bool_]
    signatures: tuple[Shapes, ...]
    base_names: tuple[str, ...]
    reason_texts: tuple[str, ...]
    spectra: Spectra | None = None
    caveat: str = ""

    def name(self, place: int) -> str:
        """Of one adapter."""
        found = self.names[place]
        return found if isinstance(found, str) else str(found.as_py())


class Numbered:
    """Numbers things in the order in which they are first met."""

    def __init__(self) -> None:
        self._known: dict[Any, int] = {}

    def __call__(self, thing: Any) -> int:
        return self._known.setdefault(thing, len(self._known))

    @property
    def things(self) -> tuple[Any, ...]:
        """All, in the order of their numbers."""
        return tuple(self._known)


# Given how many there are of what, what to call after each of them.
Steps = Callable[[int, str], Callable[[], None]]


def population_of_hub(hub: Path, server: str, *, steps: Steps | None = None) -> Population:
    """From the headers of a hub, each checked against the requirements of `server`; InputError for no hub."""
    row = server_named(server)
    names: list[str] = []
    columns: list[tuple[int, int, int, int, bool]] = []
    shapes, bases, reasons = Numbered(), Numbered(), Numbered()
    places = list(discover(hub))
    step = steps(len(places), "adapters") if steps else lambda: None
    for found in places:
        names.append(found.name)
        try:
            if not isinstance(found, Found):
                raise UsageError(found.reason)
            with load(found.path) as adapter:
                columns.append(_columns(adapter, row, server, shapes, bases, reasons))
        except FAILURES:
            columns.append((0, shapes(()), bases(""), reasons(UNREADABLE), False))
        step()
    table = np.array(columns, np.int64).reshape(-1, 5)
    return Population(
        str(hub), names, table[:, 0], table[:, 1], table[:, 2], table[:, 3], table[:, 4].astype(bool),
        shapes.things, bases.things, reasons.things,
    )  # fmt: skip


def requirement_text(row: Server, name: str) -> str:
    """What is said of an adapter that does not meet a requirement: its name and the reason."""
    (found,) = (r for r in row.requirements if r.name == name)
    return f"{name}: {found.reason}"


def _columns(
    adapter: Adapter, row: Server, server: str, shapes: Numbered, bases: Numbered, reasons: Numbered
) -> tuple[int, int, int, int, bool]:
    findings = [f for f in check(adapter, server).findings if f.severity != "old"]
    grave: list[Finding] = [f for f in findings if f.requirement not in MENDED]
    rank = max((e.rank for e in adapter.entries.values()), default=0)
    base = (adapter.config or {}).get("base_model_name_or_path")
    known = [(t, *_matrix(e.base_shape)) for t, e in adapter.entries.items()]
    if not grave and not known:
        reason = reasons("it has no targets")
    else:
        reason = reasons(requirement_text(row, grave[0].requirement)) if grave else -1
    return (
        rank,
        shapes(tuple(sorted(known))),
        bases(base if isinstance(base, str) else ""),
        reason,
        bool(findings) and not grave,
    )


def _matrix(shape: tuple[int, ...] | None) -> tuple[int, int]:
    return (shape[0], int(np.prod(shape[1:]))) if shape else (0, 0)
