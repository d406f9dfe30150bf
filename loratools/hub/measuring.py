"""One adapter's row of a catalog, measured from its files in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loratools.errors import AdapterError, InputError
from loratools.files import load
from loratools.hub.catalog import CatalogRow
from loratools.hub.receipts import Stamp, is_unchanged, stamp_of
from loratools.hub.sketches import SEED, sketch
from loratools.hub.work import FAILURES, facts_of, reason_of, sources_of
from loratools.linalg.norms import frobenius_norm
from loratools.ops.spectra import measure

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loratools.adapter import Adapter, Entry
    from loratools.ops.spectra import Measured

_CHANGED = "has changed since the run; what the receipt says of it may not hold"


@dataclass(frozen=True, eq=False)
class Place:
    """Where an adapter lies, and what is known of it already.

    `stated` is its row as far as it goes without its files. `stamps` are those of its receipt, by path relative to
    `hub`. `known` is its row in an earlier catalog of this version of loratools.
    """

    stated: CatalogRow
    hub: Path
    path: Path
    stamps: Mapping[str, Stamp] = field(default_factory=dict)
    known: CatalogRow | None = None


def ready(place: Place) -> CatalogRow | None:
    """The row of an adapter, where it is known without reading its files."""
    if place.stated.status == "failed":
        return place.stated
    if place.known is None or not place.stamps:
        return None
    try:
        names = [name for name, _ in _files(place)]
    except FAILURES:
        return None
    stamps = [place.stamps.get(name) for name in names]
    if any(s is None or not is_unchanged(place.hub / n, s, read=False) for n, s in zip(names, stamps, strict=True)):
        return None
    return _reused(place, tuple(_source(n, s.sha256) for n, s in zip(names, stamps, strict=True) if s is not None))


def measured(place: Place) -> CatalogRow:
    """The row of an adapter, measured unless its known row is of the same files; a failure is a row with its reason."""
    try:
        stamps = {name: stamp_of(path) for name, path in _files(place)}
        sources = tuple(_source(name, stamp.sha256) for name, stamp in stamps.items())
        if (row := _reused(place, sources)) is not None:
            return row
        with load(place.path) as adapter:
            warnings = tuple(dict.fromkeys((*place.stated.warnings, *adapter.warnings)))
            row = replace(place.stated, sources=sources, warnings=warnings, **_facts(adapter))
            row = replace(row, **_targets(adapter), **_sketch(adapter))
        name, stamp = next(iter(stamps.items()))
        if not all(is_unchanged(place.hub / name, stamp) for name, stamp in stamps.items()):
            raise InputError(f"{name}: was changed while it was read; do it again")
        return _checked(replace(row, path=name, sha256=stamp.sha256), place)
    except FAILURES as error:
        return replace(place.stated, status="failed", reason=reason_of(error))


def given_up(place: Place, reason: str) -> CatalogRow:
    """The row of an adapter that no worker survives."""
    return replace(place.stated, status="failed", reason=reason)


def _files(place: Place) -> Iterator[tuple[str, Path]]:
    """The files of an adapter by their names in the hub, the weights first."""
    for path in sources_of(place.path):
        yield path.relative_to(place.hub).as_posix(), path


def _source(name: str, sha256: str) -> str:
    return f"{sha256} {name}"


def _reused(place: Place, sources: tuple[str, ...]) -> CatalogRow | None:
    """The known row under what is stated now, where it is of these files and of the same work."""
    known, stated = place.known, place.stated
    if known is None or (known.status, known.sources) != (stated.status, sources) or not sources:
        return None
    kept = ("name", "recipe", "version", "bytes_before")
    if any(getattr(known, name) != getattr(stated, name) for name in kept):
        return None
    if known.warnings[: len(stated.warnings)] != stated.warnings:
        return None
    warnings = tuple(text for text in known.warnings if text != _CHANGED)
    known = replace(known, warnings=warnings, relative_error=stated.relative_error, seconds=stated.seconds)
    return _checked(known, place)


def _checked(row: CatalogRow, place: Place) -> CatalogRow:
    """The row, without what the receipt says of files that are others now."""
    stamped = {_source(name, stamp.sha256) for name, stamp in place.stamps.items()}
    if not stamped or stamped == set(row.sources):
        return row
    return replace(row, relative_error=None, warnings=tuple(dict.fromkeys((*row.warnings, _CHANGED))))


def _facts(adapter: Adapter) -> dict[str, Any]:
    facts = facts_of(adapter)
    return {
        "dialect": facts["dialect"],
        "families": tuple(facts["families"]),
        "base_model": facts["base_model"],
        "rank": facts["rank"],
        "bytes": adapter.file_nbytes,
    }


def _targets(adapter: Adapter) -> dict[str, Any]:
    """The columns that have an entry for each target: those that can be measured, then the unsupported ones."""
    reasons = {t: reason for t, entry in adapter.entries.items() if (reason := _blind(entry))}
    spectra: dict[str, NDArray[np.float32]] = {}
    norms: dict[str, float] = {}
    for found in _measured(adapter, [t for t in adapter.entries if t not in reasons], reasons):
        spectra[found.target] = np.array(found.values, np.float32)
        norms[found.target] = frobenius_norm(found.values)
    reasons |= adapter.unsupported
    names = (*adapter.entries, *(t for t in adapter.unsupported if t not in adapter.entries))
    entries = [adapter.entries.get(name) for name in names]
    sides = [(None, None) if entry is None else _sides(entry) for entry in entries]
    return {
        "targets": names,
        "target_families": tuple("" if entry is None else entry.family.family for entry in entries),
        "target_rows": tuple(rows for rows, _ in sides),
        "target_columns": tuple(columns for _, columns in sides),
        "target_ranks": tuple(0 if entry is None else entry.rank for entry in entries),
        "target_norms": tuple(norms.get(name) for name in names),
        "target_reasons": tuple(reasons.get(name, "") for name in names),
        "singular_values": tuple(spectra.get(name) for name in names),
    }


def _blind(entry: Entry) -> str:
    return f"the delta of {entry.family.family} depends on the base weight" if entry.needs_base else ""


def _sides(entry: Entry) -> tuple[int | None, int | None]:
    """Rows and columns of the base parameter as a matrix, where the file tells; of one expert of several."""
    if entry.base_shape is None:
        return None, None
    shape = entry.base_shape[1:] if entry.layout.experts > 1 else entry.base_shape
    return shape[0], int(np.prod(shape[1:], dtype=np.int64))


def _measured(adapter: Adapter, targets: list[str], reasons: dict[str, str]) -> Iterator[Measured]:
    """The spectra of all targets at once; where one stands in the way one at a time, each with its own reason."""
    try:
        found = list(measure(adapter, targets, allow_nonfinite=True))
    except AdapterError:
        found = []
        for target in targets:
            try:
                found += measure(adapter, [target], allow_nonfinite=True)
            except AdapterError as error:
                reasons[target] = reason_of(error)
    for each in found:
        if each.blocks:
            yield each
        else:
            reasons[each.target] = "holds NaN or infinity"


def _sketch(adapter: Adapter) -> dict[str, Any]:
    """The sketch of an adapter and what it is of; none where its delta cannot be had."""
    try:
        return {"sketch": sketch(adapter), "sketch_targets": tuple(adapter.entries), "sketch_seed": SEED}
    except AdapterError:
        return {}
