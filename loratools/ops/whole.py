"""What fine-tuning changed, as it is: full differences in one file, for the commands that make less of them."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.errors import UnchangedError
from loratools.files import save
from loratools.ops.convert import convert
from loratools.reports.extract import ExtractedTarget, ExtractReport

if TYPE_CHECKING:
    from loratools.adapter import Adapter, Entry
    from loratools.families.base import Update
    from loratools.ops.extract import Differences

_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def whole(found: Differences) -> Adapter:
    """What fine-tuning changed of the matrices, all of it: full differences as LyCORIS writes them, lazily.

    In the dtype of the tuned weights, which rounds a difference in its last digit. Raises UnchangedError where no
    matrix differs.
    """
    if not found.adapter.entries:
        raise UnchangedError("no matrix differs between the two checkpoints, so that there is nothing to hold")
    entries = {target: _rounded(entry) for target, entry in found.adapter.entries.items()}
    return convert(replace(found.adapter, entries=entries), "kohya")[0]


def extract_whole(found: Differences, path: str | os.PathLike[str] | None, *, force: bool = False) -> ExtractReport:
    """Write `whole` to one file; without a path nothing is written. Errors are those of rounding to its dtype."""
    held = whole(found)
    rows: dict[str, ExtractedTarget] = {}
    squares: list[tuple[float, float]] = []
    for target, entry in found.adapter.entries.items():
        change, exact = found.changes[target], entry.read().parameters()["diff"]
        error = float((exact - exact.to(_dtype(entry)).double()).norm())
        squares.append((error**2, change.change**2))
        share = error / change.change
        rows[target] = ExtractedTarget(0, change.relative, share, change.noise / change.change, entry.nbytes)
    saved = None if path is None else save(held, path, force=force)
    error, square = (math.fsum(column) for column in zip(*squares, strict=True))
    total = {
        "targets": len(rows),
        "rank_out": 0,
        "relative_error": math.sqrt(error / square),
        "norm": math.sqrt(square),
        "bytes": held.nbytes if saved is None else saved.nbytes,
    }
    warnings: tuple[str, ...] = ()
    if found.left_out:
        worst = max(found.left_out, key=lambda name: found.left_out[name].relative)
        warnings = (f"{len(found.left_out)} changed parameters are no matrices and stay out; most of all {worst}",)
    left = {name: change.relative for name, change in found.left_out.items()}
    output = None if saved is None else str(saved.path)
    return ExtractReport(rows, left, found.unchanged, total, warnings, output)


def _rounded(entry: Entry) -> Entry:
    """In the dtype that the entry states."""

    def read() -> Update:
        update = entry.read()
        return update.with_tensors({"diff": update.parameters()["diff"].to(_dtype(entry))})

    return replace(entry, read=read)


def _dtype(entry: Entry) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, _DTYPES[entry.specs["diff"].dtype])
    return dtype
