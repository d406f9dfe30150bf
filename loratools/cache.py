"""What is worth keeping of a base model between runs: its singular vectors, by the content of each weight.

Every file is written whole and renamed into place, so that any number of processes may share a folder; two that compute
the same thing write the same file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.errors import LoratoolsError
from loratools.storage import open_source
from loratools.storage.header import header_bytes, spec_of
from loratools.storage.safetensors import SafetensorsSink

if TYPE_CHECKING:
    from torch import Tensor

_SUFFIX = ".safetensors"
_PREFIX = "base-"
_VERSION = 1  # of what the files hold
_THREADS = 2  # that hash or read side by side
_CHUNK = 4 << 20


@dataclass(frozen=True)
class CacheEntry:
    """One file: what it was made from, as its maker said, and its size in bytes."""

    path: Path
    name: str
    nbytes: int


@dataclass(frozen=True)
class Cache:
    """A folder of tensors by key; what cannot be read counts as absent, and what cannot be written is left out."""

    folder: Path

    def read(self, key: str) -> dict[str, Tensor] | None:
        """The tensors stored under `key`, or None."""
        try:
            source = open_source(self._place(key))
            try:
                with ThreadPoolExecutor(_THREADS) as pool:
                    return dict(zip(source.specs, pool.map(source.read, source.specs), strict=True))
            finally:
                source.close()
        except (LoratoolsError, OSError):
            return None

    def write(self, key: str, tensors: Mapping[str, Tensor], *, name: str) -> bool:
        """Keep `tensors` under `key`; `name` is what `entries` shows. False where that was not possible."""
        metadata = {"name": name}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            room = len(header_bytes({t: spec_of(x) for t, x in tensors.items()}, metadata))
            with SafetensorsSink(self._place(key), reserve=room) as sink:
                for tensor_name, tensor in tensors.items():
                    sink.write(tensor_name, tensor)
                sink.commit(metadata)
        except (LoratoolsError, OSError):
            return False
        return True

    def entries(self) -> tuple[CacheEntry, ...]:
        """Everything kept, the largest first."""
        found = []
        for path in self.folder.glob(f"{_PREFIX}*{_SUFFIX}"):
            try:
                source = open_source(path)
                found.append(CacheEntry(path, source.metadata.get("name", "?"), source.nbytes))
                source.close()
            except (LoratoolsError, OSError):
                with contextlib.suppress(OSError):
                    found.append(CacheEntry(path, "damaged", path.stat().st_size))
        return tuple(sorted(found, key=lambda e: (-e.nbytes, e.name, e.path)))

    def clear(self) -> int:
        """Remove everything kept, and what interrupted writers left; the bytes that this freed."""
        freed = 0
        for path in (*self.folder.glob(f"{_PREFIX}*{_SUFFIX}"), *self.folder.glob(f".{_PREFIX}*.tmp")):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                size = path.stat().st_size
                path.unlink()
                freed += size
        return freed

    def _place(self, key: str) -> Path:
        return self.folder / f"{_PREFIX}{key}{_SUFFIX}"


def default_cache() -> Cache:
    """The user's own: LORATOOLS_CACHE, or loratools in XDG_CACHE_HOME, or in ~/.cache."""
    named = os.environ.get("LORATOOLS_CACHE")
    if named:
        return Cache(Path(named))
    home = os.environ.get("XDG_CACHE_HOME")
    return Cache((Path(home) if home else Path.home() / ".cache") / "loratools")


def content_key(weight: Tensor, kind: str) -> str:
    """A key that stands for what `kind` is computed from: the dtype, shape and bytes of a weight."""
    data = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    chunks = [data[start : start + _CHUNK] for start in range(0, len(data), _CHUNK)]
    with ThreadPoolExecutor(_THREADS) as pool:
        parts = pool.map(lambda chunk: hashlib.sha256(chunk).digest(), chunks)
        described = repr((_VERSION, kind, str(weight.dtype), tuple(weight.shape)))
        return hashlib.sha256(described.encode() + b"".join(parts)).hexdigest()
