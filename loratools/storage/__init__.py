"""Containers: from a path to named tensors, and back."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loratools.errors import InputError
from loratools.storage.atomic import AtomicFile, printable
from loratools.storage.base import DTYPES, TensorSink, TensorSource, TensorSpec
from loratools.storage.gguf import MAGIC, GGUFSink, GGUFSource
from loratools.storage.header import MAX_HEADER, file_size, header_bytes, spec_of
from loratools.storage.packed import MARK, PackedSink, PackedSource
from loratools.storage.pickle import PickleSource
from loratools.storage.safetensors import SafetensorsSink, SafetensorsSource, open_regular_file
from loratools.storage.sharded import ShardedSource

__all__ = [
    "CONTAINERS",
    "DTYPES",
    "AtomicFile",
    "Container",
    "GGUFSink",
    "GGUFSource",
    "PackedSink",
    "PackedSource",
    "PickleSource",
    "SafetensorsSink",
    "SafetensorsSource",
    "ShardedSource",
    "TensorSink",
    "TensorSource",
    "TensorSpec",
    "file_size",
    "header_bytes",
    "open_source",
    "spec_of",
]


@dataclass(frozen=True)
class Container:
    """A row of the table: how a file of this kind begins, how it is usually called, what opens it."""

    matches: Callable[[bytes], bool]
    suffixes: tuple[str, ...]
    open: Callable[[Path], TensorSource]


def _is_safetensors(head: bytes) -> bool:
    return int.from_bytes(head[:8], "little") <= MAX_HEADER and head[8:9] in (b"{", b" ", b"\t", b"\n", b"\r")


def _is_gguf(head: bytes) -> bool:
    return head.startswith(MAGIC)


def _is_index(head: bytes) -> bool:
    return head.lstrip()[:1] == b"{" and b"\0" not in head


def _is_pickle(head: bytes) -> bool:
    legacy = head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    return legacy or head.startswith(b"PK\x03\x04")


CONTAINERS: Final = (
    Container(_is_safetensors, (".safetensors",), SafetensorsSource),
    Container(_is_gguf, (".gguf",), GGUFSource),
    Container(_is_index, (".index.json",), ShardedSource),
    Container(_is_pickle, (".bin", ".pt", ".pth", ".ckpt"), PickleSource),
)

_LFS_POINTER: Final = b"version https://git-lfs"
_HDF5: Final = b"\x89HDF\r\n\x1a\n"


def open_source(path: str | os.PathLike[str]) -> TensorSource:
    """The container at `path`, recognised by its content; a folder stands for its index, or for its only file."""
    file = Path(path)
    if os.path.isdir(file):  # unlike Path.is_dir, false for a name that is too long
        file = _file_of_folder(file)
    with open(open_regular_file(file), "rb") as stream:
        head = stream.read(64)
    if head.startswith(_LFS_POINTER):
        raise InputError(f"{printable(file)}: is a Git LFS pointer, not the file itself; run git lfs pull")
    if head.startswith(_HDF5):
        raise InputError(
            f"{printable(file)}: is an HDF5 file; a .lora.h5 of Keras numbers layers by their place in the model, so "
            "that the model is needed: save the adapter as PEFT with Keras itself"
        )
    for container in CONTAINERS:
        if container.matches(head):
            source = container.open(file)
            if isinstance(source, SafetensorsSource) and MARK in source.metadata:
                return PackedSource(source)
            return source
    for container in CONTAINERS:  # damaged at its very start: the reader its name asks for says what is wrong
        if file.name.endswith(container.suffixes):
            return container.open(file)
    known = ", ".join(suffix for container in CONTAINERS for suffix in container.suffixes)
    raise InputError(f"{printable(file)}: is no container of tensors; known are {known}")


def _file_of_folder(folder: Path) -> Path:
    """An index goes before a whole file, and safetensors before pickles."""
    try:
        files = sorted(entry for entry in folder.iterdir() if entry.is_file())
    except OSError as error:
        raise InputError(f"{printable(folder)}: cannot be listed: {error.strerror}; make it readable") from None
    for suffixes in ((".safetensors.index.json",), (".safetensors",), (".bin", ".pt", ".pth", ".ckpt"), (".gguf",)):
        found = [file for file in files if file.name.endswith(suffixes)]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(printable(Path(file.name)) for file in found[:4])
            raise InputError(f"{printable(folder)}: holds {len(found)} candidates ({names}); name one of them")
    raise InputError(f"{printable(folder)}: holds no tensors; name a file")
