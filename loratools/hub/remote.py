"""A hub elsewhere: its adapters by a listing, their headers by their first bytes, their files by copies."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loratools.configs import BESIDE
from loratools.errors import InputError
from loratools.files import SUFFIXES, WEIGHTS_NAMES
from loratools.hub.discover import Refused, is_weights
from loratools.hub.receipts import Stamp, stamp_of
from loratools.sizes import format_size
from loratools.storage.header import MAX_HEADER, HeaderError, parse_header
from loratools.storage.packed import INDEX, MARK
from loratools.storage.remote import Entry, Remote

_PROBE: Final = 4096  # bytes of a file that are read to learn how long its header is
_WHOLE: Final = 64 << 20  # what is fetched of a file whose header is not at its start, only to list it
_INDEX: Final = ".safetensors.index.json"
_TEXTS: Final = (".json", ".yaml", ".yml")


@dataclass(frozen=True)
class Held:
    """One place of a remote hub where an adapter seems to lie, and the files that it is read from, by their names."""

    name: str
    files: Mapping[str, Entry]

    @property
    def stem(self) -> str:
        """What its outputs are called."""
        return self.name.removesuffix(".safetensors")


def discover_remote(hub: Remote, *, without: Remote | None = None) -> tuple[Remote, list[Held | Refused]]:
    """The hub, and what `discover` would find in it; where the URL is that of a file, its folder and this file alone.

    Raises InputError where there is nothing at all, or no answer.
    """
    if hub.name.endswith((*SUFFIXES, _INDEX)) and (entry := hub.stat()) is not None:
        names = {hub.name: entry}
        for name in BESIDE:
            try:
                beside = (hub.parent / name).stat()
            except InputError:  # a signature may be good for one file
                continue
            names |= {} if beside is None else {name: beside}
        return hub.parent, list(adapters_in(names))
    names = hub.listing()
    if not names:
        raise InputError(f"{hub}: is no folder of adapters: nothing lies there, or it is not listed; check the address")
    apart = None if without is None else without.within(hub)
    if apart is not None:
        names = {name: entry for name, entry in names.items() if not name.startswith(f"{apart}/")}
    return hub, list(adapters_in(names))


def adapters_in(names: Mapping[str, Entry]) -> Iterator[Held | Refused]:
    """The adapters among these files, by the rules of `discover`, in the order of their names."""
    folders: dict[str, dict[str, Entry]] = defaultdict(dict)
    found: list[Held | Refused] = []
    for name, entry in names.items():
        parts = name.split("/")
        if "\0" in name or not {"", ".", ".."}.isdisjoint(parts):
            if is_weights(parts[-1]):
                found.append(Refused(name, "a name that is no path within a folder"))
        elif not any(part.startswith(".") for part in parts):
            folder, _, leaf = name.rpartition("/")
            folders[folder][leaf] = entry
    for folder, files in folders.items():
        weights = next((w for w in WEIGHTS_NAMES if w in files), None) if folder else None
        if weights is not None:
            found.append(Held(folder, dict(_files(folder, weights, folders))))
        else:
            found += [Held(_in(folder, f), dict(_files(folder, f, folders))) for f in files if is_weights(f)]
    yield from sorted(found, key=lambda each: each.name.split("/"))


def fetched(hub: Remote, files: Mapping[str, Entry], into: Path) -> dict[str, Stamp]:
    """Copies of the files in the folder `into`, under their names; the stamp of each."""
    return {name: _fetched(hub / name, into / name, entry) for name, entry in files.items()}


def headers(hub: Remote, held: Held, into: Path) -> Path:
    """What `load` needs to tell what an adapter is, in the folder `into`: configs, and weights with holes for data.

    Only the first bytes of safetensors files are read. Others are fetched whole, InputError for one above 64 MiB.
    """
    for name, entry in held.files.items():
        to, at = into / name, hub / name
        to.parent.mkdir(parents=True, exist_ok=True)
        if not name.endswith(".safetensors"):
            size = _size(at, entry)
            if size > _WHOLE:
                kind = "text" if name.endswith(_TEXTS) else "container without a header at its start"
                most = format_size(_WHOLE)
                raise InputError(f"{at}: is not listed: a {kind} of {format_size(size)}, above {most}; fetch it first")
            at.fetch(to, entry)
        else:
            _write_header(at, to, _size(at, entry))
    return into / held.name


def is_same(at: Remote, entry: Entry | None, stamp: Stamp) -> bool:
    """Whether a file is what it was; it is fetched only where neither its tag nor its time tells."""
    if entry is None or entry.size is None:  # a listing without sizes
        entry = at.stat()
    if entry is None or entry.size not in (None, stamp.size):
        return False
    if entry.etag and entry.etag == stamp.etag:
        return True
    if not entry.etag and entry.mtime_ns and entry.mtime_ns == stamp.mtime_ns:
        return True
    with tempfile.TemporaryDirectory(prefix="loratools-") as folder:
        return _fetched(at, Path(folder) / "file", entry).sha256 == stamp.sha256


def _fetched(at: Remote, to: Path, entry: Entry) -> Stamp:
    told = at.fetch(to, entry)
    here = stamp_of(to)
    return Stamp(here.size, told.mtime_ns, here.sha256, told.etag)


def _write_header(at: Remote, to: Path, size: int) -> None:
    """The header of a safetensors file, of a packed one its index too, and a hole for the rest of its `size` bytes.

    The hole takes no place, however large the server says that the file is.
    """
    head = at.head(min(size, _PROBE))
    length = 8 + int.from_bytes(head[:8], "little")
    if len(head) < length <= min(size, 8 + MAX_HEADER):
        head = at.head(length)
    with to.open("wb") as file:
        file.write(head)
        file.truncate(size)
        try:
            header = parse_header(head[8:length], size - length)
        except HeaderError:
            return  # `load` says what is wrong with it
        if MARK in header.metadata and INDEX in header.specs:
            start = length + header.starts[INDEX]
            file.seek(start)
            file.write(at.span(start, start + min(header.specs[INDEX].nbytes, _WHOLE)))


def _size(at: Remote, entry: Entry) -> int:
    told = entry if entry.size is not None else at.stat()
    if told is None or told.size is None:
        raise InputError(f"{at}: its server does not tell its size; fetch it first")
    return told.size


def _files(folder: str, weights: str, folders: Mapping[str, Mapping[str, Entry]]) -> Iterator[tuple[str, Entry]]:
    """What an adapter is read from: its weights, the shards of an index, and the configs that dialects look for."""
    beside = folders[folder]
    wanted = [weights]
    if weights.endswith(_INDEX):
        wanted += [name for name in beside if name.endswith(".safetensors")]
    wanted += [name for name in BESIDE if name in beside and not weights.endswith(".gguf")]
    stem = weights.removesuffix(".bin")
    texts = [f"{stem}{suffix}" for suffix in (".yaml", ".yml")] if stem != weights else []
    wanted += [name for name in texts if name in beside]
    yield from ((_in(folder, name), beside[name]) for name in wanted)
    above, _, last = folder.rpartition("/")
    configs = _in(above.rpartition("/")[0], f"configs/{last}")  # where PETL-ViT keeps them
    yield from ((_in(configs, name), folders[configs][name]) for name in texts if name in folders.get(configs, {}))


def _in(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
