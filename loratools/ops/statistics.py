"""What inputs an adapter's targets meet, as squeezing by it needs it: small moments, in a file of their own."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.errors import AdapterError, InputError
from loratools.storage import open_source
from loratools.storage.atomic import printable, refuse_existing
from loratools.storage.safetensors import SafetensorsSink

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.adapter import Adapter, Entry
    from loratools.families.base import Update

MOMENT, CHANNELS = ".moment", ".channels"
VERSION = "1"
_KEY = "loratools.statistics"
_REMEDY = "make statistics of this adapter with `loratools calibrate`"


@dataclass(frozen=True, eq=False)
class Statistics:
    """Second moments of what enters each target of one adapter.

    A moment is E[(down x)(down x)^T] with `down` as stored, so it belongs to those very factors, which `fingerprints`
    tell by. `tokens` is how many inputs they are means over; 0 for those estimated without data.
    """

    moments: Mapping[str, Tensor]  # target -> (r, r) float64
    means: Mapping[str, Tensor]  # target -> (n,) float64
    tokens: int
    fingerprints: Mapping[str, str]

    def moment(self, target: str) -> Tensor:
        """E[(down x)(down x)^T] as (r, r) float64."""
        return self._of(self.moments, target)

    def channels(self, target: str) -> Tensor:
        """E[x_j^2] of each input channel as (n,) float64."""
        return self._of(self.means, target)

    def _of(self, found: Mapping[str, Tensor], target: str) -> Tensor:
        if target not in found:
            raise AdapterError(f"{target}: the statistics have no such target; {_REMEDY}")
        return found[target]

    def moment_of(self, target: str, update: Update) -> Tensor:
        """As `moment`; AdapterError where it is not of the factors of `update`."""
        self.refuse_other(target, update)
        return self.moment(target)

    def refuse_other(self, target: str, update: Update) -> None:
        """AdapterError where the statistics of `target` are not of the factors of `update`."""
        self.moment(target)
        if self.fingerprints.get(target) != fingerprint(update):
            raise AdapterError(f"{target}: the statistics are of another adapter, whose factors differ; {_REMEDY}")

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Write a safetensors file: `<target>.moment` and `<target>.channels`."""
        place = Path(path)
        refuse_existing(place, force=force)
        stated = {"version": VERSION, "tokens": self.tokens, "fingerprints": dict(self.fingerprints)}
        with SafetensorsSink(place) as sink:
            for target, moment in self.moments.items():
                sink.write(target + MOMENT, moment)
                sink.write(target + CHANNELS, self.means[target])
            sink.commit({"format": "pt", _KEY: json.dumps(stated, sort_keys=True)})
        return place


def weighed_targets(adapter: Adapter) -> tuple[str, ...]:
    """The targets with ranks, which is what statistics are about; AdapterError for one that they cannot weigh."""
    targets = tuple(target for target, entry in adapter.entries.items() if entry.is_factored)
    for target in targets:
        if (what := _unweighable(adapter.entries[target])) is not None:
            raise AdapterError(
                f"{target}: {what}, and inputs are weighed for linear layers and embeddings alone; squeeze without "
                "--weights"
            )
    if not targets:
        raise AdapterError("the adapter has no LoRA or DoRA target whose inputs could be weighed")
    return targets


def _unweighable(entry: Entry) -> str | None:
    if entry.layout.experts > 1:
        return "a stack of experts"
    if "mid" in entry.specs or len(entry.specs["down"].shape) > 2:
        return "a convolution"
    return "a magnitude per input" if "magnitude" in entry.specs and entry.layout.magnitude_axis == 1 else None


def fingerprint(update: Update) -> str:
    """What tells one `down` factor from another: the SHA-256 of its shape, dtype and bytes."""
    down = update.parameters()["down"]
    digest = hashlib.sha256(f"{tuple(down.shape)} {down.dtype}".encode())
    digest.update(down.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_statistics(path: str | os.PathLike[str], adapter: Adapter) -> Statistics:
    """Read what `save` wrote; InputError for anything else, AdapterError where it is of another adapter."""
    source = open_source(path)
    name = printable(source.path)
    try:
        version, tokens, prints = _stated(source.metadata.get(_KEY))
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{name}: holds no statistics of activations; {_REMEDY}") from None
    if version != VERSION:
        raise InputError(f"{name}: statistics of version {version!r}, which this loratools does not know; {_REMEDY}")
    moments: dict[str, Tensor] = {}
    means: dict[str, Tensor] = {}
    for target in prints:
        if not {target + MOMENT, target + CHANNELS} <= set(source.specs):
            raise InputError(f"{name}: lacks the statistics of {target}; {_REMEDY}")
        moments[target], means[target] = source.read(target + MOMENT), source.read(target + CHANNELS)
        _check(f"{name}: {target}", moments[target], means[target])
    found = Statistics(moments, means, tokens, prints)
    for target in weighed_targets(adapter):
        found.refuse_other(target, adapter[target])
    return found


def _stated(text: str | None) -> tuple[str, int, dict[str, str]]:
    """Version, tokens and fingerprints; KeyError, TypeError or ValueError where they are not there."""
    if text is None:
        raise ValueError("no such metadata")
    fields = json.loads(text)
    prints = {str(target): str(digest) for target, digest in dict(fields["fingerprints"]).items()}
    return str(fields["version"]), int(fields["tokens"]), prints


def _check(where: str, moment: Tensor, means: Tensor) -> None:
    square = moment.ndim == 2 and moment.shape[0] == moment.shape[1]
    if not square or means.ndim != 1 or {moment.dtype, means.dtype} != {torch.float64}:
        raise InputError(f"{where}: statistics of the wrong shape or dtype; {_REMEDY}")
    if not bool(torch.isfinite(moment).all() and torch.isfinite(means).all()):
        raise InputError(f"{where}: statistics hold NaN or infinity; {_REMEDY}")
