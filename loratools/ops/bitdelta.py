"""What fine-tuning changed, in one bit to a number: the file that BitDelta's loader adds to the base."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from loratools.errors import AdapterError, UnchangedError, naming
from loratools.families.bitdelta import WORD, encode_bitdelta
from loratools.reports.extract import ExtractedTarget, ExtractReport
from loratools.storage.pickle import write_pickle

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from loratools.adapter import Entry
    from loratools.base_weights import BaseWeights
    from loratools.ops.extract import Differences

_HEAD = "lm_head"  # the authors keep it whole, and their loader takes the size of the vocabulary from it


def extract_bitdelta(
    found: Differences, tuned: BaseWeights, path: str | os.PathLike[str] | None, *, force: bool = False
) -> ExtractReport:
    """Write BitDelta's file: for each changed matrix its signs and their mean magnitude, what else changed as it is.

    Without a path nothing is written. Embeddings, the head, norms, biases, convolutions and matrices whose inputs are
    no multiple of 32 are kept whole, from `tuned`. UnchangedError where there is no matrix to pack.
    """
    adapter = found.adapter
    packable = [target for target, entry in adapter.entries.items() if _is_packable(target, entry)]
    if not packable:
        raise UnchangedError(f"no matrix with a multiple of {WORD} inputs differs, so that there is nothing to pack")
    whole = [adapter.format.parameter(target) for target in adapter.entries if target not in set(packable)]
    whole += found.left_out
    if moved := sorted(set(whole) & set(found.reordered)):
        raise AdapterError(
            f"{moved[0]}: lies in another order than in the base, and has to be kept whole; extract a LoRA"
        )
    tensors: dict[str, Tensor] = {}
    rows: dict[str, ExtractedTarget] = {}
    squares = []
    for target in packable:
        diff = adapter[target].parameters()["diff"].double()
        packed = _packed(target, diff)
        tensors |= packed
        square, scale = float(diff.square().sum()), float(packed[f"{target}.coeff"])
        error = max(0.0, square - 2 * scale * float(diff.abs().sum()) + scale**2 * diff.numel())
        squares.append((error, square))
        change = found.changes[target]
        rows[target] = ExtractedTarget(
            0,
            change.relative,
            math.sqrt(error / square),
            change.noise / change.change,
            sum(t.nbytes for t in packed.values()),
        )
    tensors |= {name: tuned.source.read(name) for name in whole}
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    if path is not None:
        nbytes = write_pickle(path, tensors, force=force)
    error, square = (math.fsum(column) for column in zip(*squares, strict=True))
    total = {
        "targets": len(rows),
        "rank_out": 0,
        "relative_error": math.sqrt(error / square),
        "norm": math.sqrt(square),
        "bytes": nbytes,
    }
    warnings: tuple[str, ...] = ()
    if whole:
        share = sum(tensors[name].nbytes for name in whole)
        warnings = (f"{len(whole)} changed parameters are kept whole, {share:,} bytes of the file, such as {whole[0]}",)
    if biases := [name for name in whole if not name.endswith(".weight")]:
        warnings += (
            f"{len(biases)} of them are no weights, which BitDelta's own loader passes over, such as {biases[0]}",
        )
    return ExtractReport(rows, {}, found.unchanged, total, warnings)


def write_bitdelta(
    path: str | os.PathLike[str],
    deltas: Mapping[str, Tensor],
    whole: Mapping[str, Tensor] | None = None,
    *,
    force: bool = False,
) -> int:
    """Write BitDelta's file of the (m, n) `deltas` of modules and of parameters kept `whole`; its size in bytes.

    AdapterError names a delta that has no signs, a parameter that the signs of its module would hide, and a file
    without any signs, which nobody would know for what it is.
    """
    if not deltas:
        raise AdapterError("there is no delta to pack; save whole parameters with safetensors")
    tensors: dict[str, Tensor] = {}
    for target, delta in deltas.items():
        tensors |= _packed(target, delta)
    for name, tensor in (whole or {}).items():
        target, _, part = name.rpartition(".")
        if target in deltas and part in ("weight", "mask", "coeff", "A", "B"):
            raise AdapterError(f"{name}: the signs of {target} go before it; leave one of them out")
        tensors[name] = tensor
    return write_pickle(path, tensors, force=force)


def _packed(target: str, delta: Tensor) -> dict[str, Tensor]:
    with naming(target):
        mask, coeff = encode_bitdelta(delta)
    return {f"{target}.mask": mask, f"{target}.coeff": coeff}


def _is_packable(target: str, entry: Entry) -> bool:
    shape = entry.specs["diff"].shape
    is_head = target.rpartition(".")[2] == _HEAD
    return len(shape) == 2 and shape[1] % WORD == 0 and not entry.layout.transposed and not is_head
