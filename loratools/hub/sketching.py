"""The sketches of a whole hub: from its catalog, or made by workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from loratools.errors import AdapterError, naming
from loratools.files import load
from loratools.hub.discover import Refused, discover
from loratools.hub.engines import outcomes
from loratools.hub.sketches import LENGTH, SEED, sketch
from loratools.hub.work import FAILURES, reason_of
from loratools.storage.atomic import printable

if TYPE_CHECKING:
    from numpy.typing import NDArray

Steps = Callable[[int, str], Callable[[], None]]


@dataclass(frozen=True, eq=False)
class Member:
    """One place of a hub: its sketch, or the reason why it has none.

    `path` is None for a place that is not looked into; `sha256` that of the weights, where they can be read.
    """

    name: str
    path: Path | None
    sketch: NDArray[np.float32] | None = None
    sha256: str | None = None
    reason: str = ""


def members_of(hub: Path, catalog: Path | None) -> list[Member]:
    """All places of a hub in the order of names; with a catalog, those that it lists, with what it knows.

    InputError where either cannot be read.
    """
    if catalog is not None:
        return sorted(_catalogued(hub, catalog), key=lambda m: m.name)
    return [
        Member(f.name, None, reason=f.reason) if isinstance(f, Refused) else Member(f.name, f.path)
        for f in discover(hub)
    ]


def _catalogued(hub: Path, catalog: Path) -> Iterator[Member]:
    from loratools.hub.catalog import read_catalog

    columns = ["name", "status", "reason", "path", "sha256", "sketch", "sketch_seed", "target_reasons"]
    for batch in read_catalog(catalog, columns):
        for i in range(batch.num_rows):
            row = {name: batch.column(name)[i] for name in columns if name != "sketch"}
            text = {name: scalar.as_py() for name, scalar in row.items()}
            path = hub / text["path"] if _is_inside(text["path"]) else None
            numbers = batch.column("sketch")[i]
            if path is None or text["status"] == "failed":
                yield Member(text["name"], None, reason=text["reason"] or "the catalog knows no file of it")
            elif not numbers.is_valid:
                why = next((reason for reason in text["target_reasons"] or () if reason), "")
                yield Member(text["name"], None, None, text["sha256"], why or "the catalog has no sketch of it")
            elif text["sketch_seed"] != SEED or len(numbers.values) != LENGTH:
                yield Member(text["name"], path)  # of another version: made anew
            else:
                held = np.array(numbers.values.to_numpy(zero_copy_only=False), np.float32)
                yield checked(Member(text["name"], path, held, text["sha256"]))


def _is_inside(path: str | None) -> bool:
    """Whether a catalog's path leads to a place in the hub."""
    return bool(path) and not Path(path or "").is_absolute() and ".." not in Path(path or "").parts


def checked(member: Member) -> Member:
    """The member without a sketch that says nothing: one of zeros, or not finite."""
    if member.sketch is None:
        return member
    if not np.isfinite(member.sketch).all():
        return replace(member, sketch=None, reason="its sketch holds NaN or infinity")
    if not member.sketch.any():
        return replace(member, sketch=None, reason="its delta is zero, and like no other")
    return member


def sketched(member: Member) -> Member:
    """The member with its sketch and hash, or with the reason why it has none."""
    assert member.path is not None  # it is one to be read
    digest = None
    try:
        with load(member.path) as adapter:
            digest = adapter.origin.sha256() if adapter.origin else None
            return checked(replace(member, sketch=sketch(adapter), sha256=digest))
    except FAILURES as error:
        return replace(member, sha256=digest, reason=reason_of(error))


def queried(path: Path) -> Member:
    """An adapter that others are compared with; AdapterError where it has no delta of its own, or one of zero."""
    with load(path) as adapter, naming(printable(path)):
        digest = adapter.origin.sha256() if adapter.origin else None
        member = checked(Member(str(path), path, sketch(adapter), digest))
        if member.sketch is None:
            raise AdapterError(member.reason)
    return member


def sketched_members(
    members: list[Member], pool: Callable[[int], Callable[[], Executor]], workers: int, steps: Steps | None
) -> list[Member]:
    """All of them, in their order; those without a sketch or a reason are read by workers."""
    todo = {m.name: m for m in members if m.sketch is None and not m.reason and m.path is not None}
    if not todo:
        return members
    step = steps(len(todo), "adapters") if steps else lambda: None
    done = {}
    for member in outcomes(pool(len(todo)), sketched, todo.values(), workers=workers, given_up=_given_up):
        done[member.name] = member
        step()
    return [done.get(m.name, m) for m in members]


def _given_up(member: Member, reason: str) -> Member:
    return replace(member, reason=reason)
