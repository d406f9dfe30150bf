"""One adapter through a recipe, in a process of its own: the output appears whole, then its receipt."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from loratools._version import __version__
from loratools.adapter import Adapter
from loratools.configs import BESIDE
from loratools.errors import AdapterError, LoratoolsError, UsageError
from loratools.files import destination_weights, is_folder_adapter, load, locate, save
from loratools.hub.discover import Found
from loratools.hub.receipts import (
    FOLDER,
    RUN,
    UPLOADS,
    Receipt,
    Stamp,
    is_unchanged,
    read_one,
    stamp_of,
    upload_mark,
    upload_place,
)
from loratools.hub.recipe import Recipe, Worked
from loratools.hub.remote import Held, fetched, is_same
from loratools.hub.scratch import scratch
from loratools.ops.measuring import relative_error
from loratools.ops.quantize import quantize_file
from loratools.storage.atomic import explained
from loratools.storage.places import Place, shown
from loratools.storage.remote import Entry, Remote

# What bad input and bad luck raise in the work on one adapter; anything else is told by the executor.
FAILURES: Final = (LoratoolsError, OSError, MemoryError, ValueError, RuntimeError, KeyError)


@dataclass(frozen=True)
class Job:
    """One unit of work; `stem` is what its output is called in `out`, `files` are those to fetch of a hub elsewhere."""

    name: str
    stem: str
    hub: Place
    out: Place
    recipe: Recipe
    files: Mapping[str, Entry] = field(default_factory=dict)


def process(job: Job) -> Receipt:
    """Do the work and write the receipt; a failure is a receipt with its reason, never an exception of the work.

    OutputError alone is raised where not even the receipt can be written. Between places elsewhere the work is done on
    copies in a private folder, which is removed.
    """
    if isinstance(job.hub, Path) and isinstance(job.out, Path):
        receipt = _processed(job, job.hub, job.out)
    else:
        with scratch() as folder:
            hub = job.hub if isinstance(job.hub, Path) else folder / "hub"
            out = job.out if isinstance(job.out, Path) else folder / "out"
            receipt = _processed(job, hub, out)
    receipt.save(job.out, job.stem)
    return receipt


def _processed(job: Job, hub: Path, out: Path) -> Receipt:
    """The work, from files in `hub` to files in `out`, which are called by what they are copies of."""

    def told(text: str) -> str:
        return text.replace(str(hub), str(job.hub)).replace(str(out), str(job.out))

    began = time.monotonic()
    sources: dict[str, Stamp] = {}
    try:
        earlier = _withdrawn(job)
        if isinstance(job.hub, Remote):
            sources = fetched(job.hub, job.files, hub)
        else:
            sources = {str(p.relative_to(hub)): stamp_of(p) for p in sources_of(hub / job.name)}
        with load(hub / job.name) as adapter:
            worked = job.recipe.run(_hashed(adapter, sources))
            before = adapter.file_nbytes
            outputs = _written(out / job.stem, worked)
            error = _error(adapter, worked, outputs[0])
        stamps = _delivered(job, out, outputs)
        _retire(job, {name: stamp for name, stamp in earlier.items() if name not in stamps})
        size = sum(stamp.size for stamp in stamps.values())
        return Receipt(
            job.name,
            "done",
            job.recipe.digest,
            __version__,
            sources,
            stamps,
            before,
            size,
            error,
            dict(worked.errors),
            facts_of(worked.adapter),
            tuple(told(text) for text in worked.warnings),
            round(time.monotonic() - began, 3),
        )
    except FAILURES as error:
        return failed(job, told(reason_of(error)), sources, time.monotonic() - began)


def _hashed(adapter: Adapter, sources: Mapping[str, Stamp]) -> Adapter:
    """The adapter with the hash that its stamp has, which the record of the output would read the file again for."""
    name, stamp = next(iter(sources.items()))  # the weights
    if adapter.origin is None or name.endswith(".index.json"):  # whose container is all shards
        return adapter
    return replace(adapter, origin=replace(adapter.origin, sha256=lambda: stamp.sha256))


def _delivered(job: Job, out: Path, outputs: list[Path]) -> dict[str, Stamp]:
    """The stamps of the outputs where they belong, by name. Weights come last: they make an adapter of a folder."""
    stamps = {path.relative_to(out).as_posix(): stamp_of(path) for path in outputs}
    if isinstance(job.out, Path):
        return stamps
    told = {name: (job.out / name).put(out / name, upload_place(job.out, job.stem)) for name in reversed(stamps)}
    return {name: Stamp(s.size, told[name].mtime_ns, s.sha256, told[name].etag) for name, s in stamps.items()}


def failed(job: Job, reason: str, sources: dict[str, Stamp] | None = None, seconds: float = 0.0) -> Receipt:
    """The receipt of an adapter that could not be done; what another recipe made of it once is removed, if that can be.

    What this recipe made of it stays until it is done again.
    """
    left: Mapping[str, Stamp] = {}
    with suppress(*FAILURES):  # the reason is told whatever becomes of this
        if (earlier := read_one(job.out, job.stem)) is not None:
            left = earlier.outputs
            if earlier.recipe != job.recipe.digest:
                _retire(job, left)
                left = {}
    digest, spent = job.recipe.digest, round(seconds, 3)
    return Receipt(job.name, "failed", digest, __version__, sources or {}, left, seconds=spent, reason=reason)


def reason_of(error: BaseException) -> str:
    """One line."""
    if isinstance(error, MemoryError):
        return "it does not fit into memory"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, LoratoolsError | OSError) else f"{type(error).__name__}: {text}"


def is_fresh(job: Job, receipt: Receipt | None, there: Mapping[str, Entry]) -> bool:
    """Whether an earlier run did this very work, and both its sources and its outputs are what they were then.

    `there` is what lies in an output elsewhere. InputError where that cannot be told.
    """
    if receipt is None or (receipt.status, receipt.recipe, receipt.version) != ("done", job.recipe.digest, __version__):
        return False
    if isinstance(job.hub, Remote):
        now = set(job.files)
    else:
        try:
            now = {str(p.relative_to(job.hub)) for p in sources_of(job.hub / job.name)}
        except (LoratoolsError, OSError):
            return False
    return (
        receipt.name == job.name
        and now == set(receipt.sources)
        and all(_is_still(job.hub, name, job.files, stamp) for name, stamp in receipt.sources.items())
        and all(name in there or isinstance(job.out, Path) for name in receipt.outputs)
        and all(_is_still(job.out, name, there, stamp) for name, stamp in receipt.outputs.items())
    )


def _is_still(place: Place, name: str, there: Mapping[str, Entry], stamp: Stamp) -> bool:
    if isinstance(place, Path):
        return is_unchanged(place / name, stamp)
    return is_same(place / name, there.get(name), stamp)


def sources_of(path: Path) -> Iterator[Path]:
    """The files that an adapter is read from."""
    weights, _ = locate(path)
    yield weights
    if weights.name.endswith(".index.json"):
        yield from sorted(p for p in weights.parent.glob("*.safetensors") if p.is_file())
    yield from (config for name in BESIDE if (config := weights.parent / name).is_file())


def _written(place: Path, worked: Worked) -> list[Path]:
    """The files of the output, weights first."""
    if worked.packing is not None:
        saved, _ = quantize_file(worked.adapter, _named(place), worked.packing, force=True)
        return [saved.path]
    if not is_folder_adapter(worked.adapter):
        return [save(worked.adapter, destination_weights(worked.adapter, _named(place)), force=True).weights]
    saved = save(worked.adapter, place, force=True, shared=True)  # adapters may lie in folders of others
    return [saved.weights, *([saved.config] if saved.config else [])]


def _error(before: Adapter, worked: Worked, weights: Path) -> float | None:
    """Of all steps together as written; None where targets have other names now, or their deltas need the base."""
    is_known = worked.packing is None and not worked.rounded
    if is_known and (worked.whole is not None or not worked.errors):
        return worked.whole
    with load(weights) as after:
        if list(before) != list(after):
            return None
        try:
            return relative_error(before, after)
        except AdapterError:
            return None


def _named(place: Path) -> Path:
    """A path whose suffix no dialect takes for its own: dots in names are no suffixes."""
    return place.with_name(f"{place.name}.safetensors")


def facts_of(adapter: Adapter) -> dict[str, Any]:
    """What its header tells: dialect, families, targets, largest rank, and the base model where it is named."""
    ranks = [entry.rank for entry in adapter.entries.values()]
    families = sorted({entry.family.family for entry in adapter.entries.values()})
    base = (adapter.config or {}).get("base_model_name_or_path")
    return {
        "dialect": adapter.format.name,
        "families": families,
        "targets": len(ranks),
        "rank": max(ranks, default=0),
        "base_model": base if isinstance(base, str) else None,
    }


def _withdrawn(job: Job) -> Mapping[str, Stamp]:
    """What the receipt names: from here on it vouches for none of that. Elsewhere uploads of the output are removed."""
    if isinstance(job.out, Remote):
        _clear_uploads(job.out, job.stem)
    if (earlier := read_one(job.out, job.stem)) is None:
        return {}
    if earlier.status == "done":
        replace(earlier, status="stale").save(job.out, job.stem)
    return earlier.outputs


def _retire(job: Job, outputs: Mapping[str, Stamp]) -> None:
    """Remove outputs of an earlier run that this one did not replace, where they are what that one wrote."""
    for name, stamp in outputs.items():
        folder, _, leaf = name.rpartition("/")
        own = folder == job.stem and leaf not in ("", ".", "..")
        if (own or name in (f"{job.stem}.safetensors", f"{job.stem}.gguf")) and _is_still(job.out, name, {}, stamp):
            if isinstance(job.out, Remote):
                (job.out / name).delete()
            else:
                with explained(job.out / name):
                    (job.out / name).unlink()
    if outputs and isinstance(job.out, Path):
        with suppress(OSError):  # nothing of it, or something of others there
            (job.out / job.stem).rmdir()


def _clear_uploads(out: Remote, stem: str) -> None:
    if out.has_whole_puts:
        files = (f"{stem}.safetensors", f"{stem}.gguf")
        out.abort_uploads(lambda name: name in files or name.rpartition("/")[0] == stem)
        return
    uploads = out / UPLOADS
    for name in uploads.files():
        if name.startswith(f"{upload_mark(stem)}."):
            (uploads / name).delete()


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def check_names(places: Sequence[Found | Held]) -> dict[str, str]:
    """Names of adapters whose outputs would lie where those of others do, with the other's name; the first wins."""
    taken: dict[str, str] = {}
    clashes: dict[str, str] = {}
    for place in places:
        key = place.stem.casefold()  # of one file on some file systems
        if key in taken:
            clashes[place.name] = taken[key]
        else:
            taken[key] = place.name
    return clashes


def refuse_results(out: Place, *, resume: bool, force: bool) -> None:
    """UsageError where an earlier run has left receipts and nobody said what to do with them."""
    if resume or force:
        return
    if (out / FOLDER).exists() if isinstance(out, Path) else (out / RUN).stat() is not None:
        raise UsageError(
            f"{shown(out)}: holds results of an earlier run; pass --resume to go on with it, or --force to redo it"
        )
