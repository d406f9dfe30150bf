"""The adapters that go into a pack, from their headers: what of them is factored, and what is kept as it is."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loratools._lazy import torch
from loratools.configs import config_beside
from loratools.errors import AdapterError, InputError, LoratoolsError
from loratools.files import adapter_of, check_writable, config_of, is_folder_adapter, locate
from loratools.linalg.svd import thin_svd
from loratools.operators import LowRank
from loratools.ops.initial import AT_OTHER_RANKS, refuse_mutated
from loratools.storage import open_source
from loratools.storage.base import DTYPES, TensorSource, TensorSpec
from loratools.storage.header import spec_of

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.adapter import Adapter, Entry
    from loratools.families.base import Update

FACTORS: Final = frozenset({"down", "up", "mid"})
Size = tuple[int, int]


@dataclass(frozen=True)
class Place:
    """One factored target of one adapter: its own name for it, and the rank."""

    target: str
    rank: int


@dataclass(frozen=True)
class Member:
    """One adapter as its header tells.

    `places`: what it has of each target of the pack, by the name and the shape that adapters agree on. `kept` are the
    keys that are stored as they are, `reasons` why targets among them are. `header` is what opens it again.
    """

    name: str
    path: Path
    dtype: str
    nbytes: int
    places: Mapping[tuple[str, Size], Place]
    kept: tuple[tuple[str, int], ...]
    reasons: Mapping[str, str]
    header_size: int


@contextmanager
def opened(path: Path) -> Iterator[tuple[Adapter, TensorSource, dict[str, Any] | None]]:
    """An adapter with its container and its config; AdapterError where its dialect reads a further file."""
    weights, config_path = locate(path)
    with open_source(weights) as source:
        config = config_of(source, config_path)
        read: list[str] = []

        def beside(name: str) -> Mapping[str, Any] | None:
            found = config_beside(weights.parent, name)
            if found is not None:
                read.append(name)
            return found

        adapter = adapter_of(source, config, beside=beside)
        if read:
            raise AdapterError(f"its settings are in {read[0]} too, which no pack holds; convert it: --to peft")
        yield adapter, source, config


def member_of(name: str, path: Path) -> Member:
    """What goes into a pack of one adapter; LoratoolsError where it cannot go into one."""
    with opened(path) as (adapter, source, config):
        adapter.require_weights()
        check_writable(adapter, path)
        refuse_mutated(adapter, AT_OTHER_RANKS)
        places, reasons = _places(adapter)
        factored = factor_keys(adapter, places)
        kept = tuple((key, spec.nbytes) for key, spec in source.specs.items() if key not in factored)
        header = header_of(name, adapter, source, config, places)
        nbytes = source.nbytes
        if config is not None and is_folder_adapter(adapter):
            nbytes += (locate(path)[1] or path).stat().st_size
        return Member(name, path, adapter.usual_dtype, nbytes, places, kept, reasons, len(header))


def factor_keys(adapter: Adapter, places: Mapping[tuple[str, Size], Place]) -> frozenset[str]:
    """The keys whose tensors a pack holds in another form."""
    targets = [place.target for place in places.values()]
    return frozenset(adapter.format.spell(t, slot) for t in targets for slot in adapter.entries[t].specs)


def _places(adapter: Adapter) -> tuple[dict[tuple[str, Size], Place], dict[str, str]]:
    places: dict[tuple[str, Size], Place] = {}
    reasons = dict(adapter.unsupported)
    for target, entry in adapter.entries.items():
        reason = why_kept(entry)
        if reason:
            reasons[target] = reason
            continue
        template = template_of(entry)
        shape = template.operator().shape
        key = (shared_name(adapter, target, entry), shape)
        if key in places:
            key = (f"{adapter.format.name}:{target}", shape)
        places[key] = Place(target, entry.rank)
    return places, reasons


def why_kept(entry: Entry) -> str:
    """Why a target is stored as it is; "" for one that is a product of two factors."""
    if not entry.is_factored or entry.needs_base or not set(entry.specs) <= FACTORS:
        return f"{entry.family.family} with {', '.join(entry.specs)}: only products of factors are packed"
    if entry.layout.experts > 1 or entry.rank_step > 1:
        return "a stack of matrices: only single ones are packed"
    return ""


def template_of(entry: Entry) -> Any:
    """An update of the entry's shapes, without numbers, to be fitted."""
    empty = {slot: torch.empty(spec.shape, dtype=_dtype(spec)) for slot, spec in entry.specs.items()}
    return entry.family.from_parameters(empty, scale=entry.scale, layout=entry.layout)


def _dtype(spec: TensorSpec) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, DTYPES[spec.dtype][0])
    return dtype


def fitted(before: Entry, low: LowRank, rank: int, scale: float) -> Update:
    """An update like the one before for another delta, of `rank`, which is not below that of `low`, and `scale`."""
    spare = rank - low.rank
    left = torch.nn.functional.pad(low.left, (0, spare))
    right = torch.nn.functional.pad(low.right, (0, 0, 0, spare))
    update: Update = template_of(before).fit(LowRank(left, right, low.scale), scale=scale)
    return update


def specs_at(one: Update, rank: int) -> dict[str, TensorSpec]:
    """The specs of an update at a rank, from one of rank 1."""
    found = {slot: spec_of(tensor) for slot, tensor in one.parameters().items()}
    down, up = found["down"], found["up"]
    return found | {
        "down": TensorSpec(down.dtype, (rank, *down.shape[1:])),
        "up": TensorSpec(up.dtype, (up.shape[0], rank, *up.shape[2:])),
    }


def shared_name(adapter: Adapter, target: str, entry: Entry) -> str:
    """What a target is called in all dialects, where its name tells which whole module it is."""
    place = adapter.format.place(target)
    whole = place is not None and len(place.pieces) == 1 and place.pieces[0].rows.is_whole
    name = str(place.pieces[0].module) if place is not None and whole else f"{adapter.format.name}:{target}"
    return f"{name} transposed" if entry.layout.transposed else name


def header_of(
    name: str,
    adapter: Adapter,
    source: TensorSource,
    config: Mapping[str, Any] | None,
    places: Mapping[tuple[str, Size], Place],
) -> bytes:
    """What opens an adapter of a pack again, deflated."""
    factored = factor_keys(adapter, places)
    fields = {
        "name": name,
        "weights": source.path.name,
        "dtype": adapter.usual_dtype,
        "metadata": dict(source.metadata),
        "config": config,
        "specs": [[key, spec.dtype, int(key not in factored), *spec.shape] for key, spec in source.specs.items()],
        "targets": [[place.target, key, *shape] for (key, shape), place in places.items()],
    }
    return zlib.compress(json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8"), 9)


@dataclass(frozen=True, eq=False)
class Delta:
    """The canonical thin SVD of a delta divided by its Frobenius norm: u (m, r), s (r,), vt (r, n), float64."""

    norm: float
    u: Tensor
    s: Tensor
    vt: Tensor


def delta_of(update: Update) -> Delta:
    """The delta of a factored update; AdapterError where it holds NaN or infinity."""
    operator = update.operator()
    assert isinstance(operator, LowRank)
    if not bool(torch.isfinite(operator.left).all() and torch.isfinite(operator.right).all()):
        raise AdapterError("holds NaN or infinity")
    u, s, vt = thin_svd(operator)
    norm = float(s.norm())
    if norm == 0:
        return Delta(0.0, u[:, :0], s[:0], vt[:0])
    if not 1e-30 < norm < 1e30:
        raise AdapterError(f"its delta has the norm {norm:.3g}, beyond what float32 holds well")
    live = s > 1e-12 * s[0]
    return Delta(norm, u[:, live], s[live] / norm, vt[live])


REFUSED = (LoratoolsError, OSError, ValueError, KeyError)


def unreadable(error: BaseException) -> str:
    """The reason in one line."""
    if isinstance(error, UnicodeEncodeError):
        return "its name is no UTF-8, which the index of a pack is; rename it"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, InputError | AdapterError | OSError) else f"{type(error).__name__}: {text}"
