"""Safetensors: opened from the header alone, read by position, written as a stream."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Final, final

from loratools._lazy import torch
from loratools.errors import InputError, OutputError
from loratools.storage.atomic import AtomicFile, printable
from loratools.storage.base import DTYPES, TensorSink, TensorSource, TensorSpec
from loratools.storage.header import (
    MAX_HEADER,
    METADATA_KEY,
    HeaderError,
    file_size,
    header_bytes,
    parse_header,
    quoted,
    rounded,
    spec_of,
)

__all__ = ["SafetensorsSink", "SafetensorsSource", "file_size", "header_bytes"]

_CHUNK: Final = 8 << 20
_AGAIN: Final = "download or export it again"


# For reading a number without torch.
_STRUCT_CODES: Final = {
    "F64": "d",
    "F32": "f",
    "F16": "e",
    "I64": "q",
    "I32": "i",
    "I16": "h",
    "I8": "b",
    "U64": "Q",
    "U32": "I",
    "U16": "H",
    "U8": "B",
}


@final
class SafetensorsSource(TensorSource):
    """A safetensors file of which only the header is read until a tensor is asked for.

    Reads go by position rather than through a memory map: a file truncated meanwhile is then an error instead of
    a SIGBUS, no mapped page counts as resident memory, and threads share no cursor.
    """

    container = "safetensors"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._fd = open_regular_file(self.path)
        self._release = weakref.finalize(self, os.close, self._fd)  # also for one that is dropped, not closed
        try:
            self._read_header()
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> torch.Tensor:
        spec, start = self.specs[name], self._data + self._starts[name]
        dtype = getattr(torch, DTYPES[spec.dtype][0])
        try:
            flat = torch.empty(spec.nbytes, dtype=torch.uint8)
        except RuntimeError:
            raise InputError(
                f"{printable(self.path)}: tensor {quoted(name)} needs {spec.nbytes} bytes, more than there is memory; "
                "use a larger machine"
            ) from None
        rest = flat.numpy().data
        while rest:
            count = self._fill(rest, start)
            start, rest = start + count, rest[count:]
        return flat.view(dtype).reshape(spec.shape)

    def read_bytes(self, name: str) -> bytes:
        """The bytes of the tensor `name`, without torch."""
        return bytes(self._read_bytes(self.specs[name].nbytes, self._data + self._starts[name]))

    def read_scalar(self, name: str) -> float:
        spec = self.specs[name]
        code = "f" if spec.dtype == "BF16" else _STRUCT_CODES.get(spec.dtype)
        if spec.numel != 1 or code is None:
            return super().read_scalar(name)
        data = bytes(self._read_bytes(spec.nbytes, self._data + self._starts[name]))
        if spec.dtype == "BF16":  # the upper half of a float32
            data = b"\0\0" + data
        return float(struct.unpack(f"<{code}", data)[0])

    def close(self) -> None:
        self._fd = -1
        self._release()

    def sha256(self) -> str:
        digest = hashlib.sha256()
        self.digest_into(digest)
        return digest.hexdigest()

    def digest_into(self, digest: hashlib._Hash) -> None:
        """Feed every byte of the file to `digest`."""
        size, offset = self.nbytes, 0
        chunk = bytearray(_CHUNK)
        while offset < size:
            view = memoryview(chunk)[: size - offset]
            count = self._fill(view, offset)
            digest.update(view[:count])
            offset += count

    def _fill(self, view: memoryview, offset: int) -> int:
        if self._fd < 0:
            raise InputError(f"{printable(self.path)}: is closed; open it again")
        try:
            count = os.preadv(self._fd, [view], offset)
        except OSError as error:
            raise InputError(f"{printable(self.path)}: cannot be read: {error.strerror}; check the disk") from error
        if count == 0:
            raise InputError(f"{printable(self.path)}: became shorter while it was read; {_AGAIN}")
        return count

    def _read_header(self) -> None:
        self.nbytes = os.fstat(self._fd).st_size
        try:
            if self.nbytes < 8:
                raise HeaderError(f"has {self.nbytes} bytes, too few for a safetensors file")
            length = int.from_bytes(self._read_bytes(8, 0), "little")
            if length > MAX_HEADER:
                raise HeaderError(f"is no safetensors file: a header of {length} bytes exceeds {MAX_HEADER}")
            if not 0 < length <= self.nbytes - 8:
                raise HeaderError(f"its header should have {length} bytes, but {self.nbytes - 8} follow")
            self._data = 8 + length
            header = parse_header(self._read_bytes(length, 8), self.nbytes - self._data)
        except HeaderError as error:
            raise InputError(f"{printable(self.path)}: {error}; {_AGAIN}") from None
        self.specs, self.metadata, self._starts = header.specs, header.metadata, header.starts

    def _read_bytes(self, size: int, offset: int) -> bytearray:
        buffer = bytearray(size)
        rest = memoryview(buffer)
        while rest:
            count = self._fill(rest, offset)
            offset, rest = offset + count, rest[count:]
        return buffer


@final
class SafetensorsSink(TensorSink):
    """A safetensors file being streamed to disk, holding one tensor at a time.

    The data starts after `reserve` bytes. A header that needs less is padded with spaces; one that needs more moves
    the data, which costs one more copy of the file. So the size is `file_size(specs, metadata, reserve=reserve)` to the
    byte; `reserve=0` writes the smallest file, and `reserve=len(header_bytes(specs, metadata))` saves the copy.
    `named=False` as `AtomicFile.commit`.
    """

    def __init__(self, path: str | os.PathLike[str], *, reserve: int = 0, named: bool = True) -> None:
        if not 0 <= reserve <= MAX_HEADER:
            raise ValueError(f"reserve={reserve} lies outside 0 to {MAX_HEADER}")
        self._specs: dict[str, TensorSpec] = {}
        self._start = self._end = rounded(reserve)
        self._named = named
        self._file = AtomicFile(Path(path))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        self._refuse_if_closed()
        if name in self._specs or name == METADATA_KEY:
            raise ValueError(f"tensor {quoted(name)} was written before, or has a reserved name")
        name.encode("utf-8")  # half a surrogate pair: UnicodeEncodeError is a ValueError
        spec = spec_of(tensor)
        flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
        self._file.write_at(self._end, flat.numpy().data)
        self._specs[name] = spec
        self._end += spec.nbytes

    def commit(self, metadata: Mapping[str, str]) -> int:
        self._refuse_if_closed()
        if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
            raise ValueError("safetensors metadata must map text to text")
        header = header_bytes(self._specs, metadata, reserve=self._start)
        if len(header) - 8 > MAX_HEADER:
            raise OutputError(
                f"{printable(self._file.path)}: its header has {len(header)} bytes, readers accept {MAX_HEADER}; write "
                "fewer tensors or less metadata"
            )
        by = len(header) - self._start
        if by:
            self._file.shift(self._start, self._end, by)
        self._file.write_at(0, header)
        self._file.commit(self._end + by, named=self._named)
        return self._end + by

    def abort(self) -> None:
        self._file.abort()

    def _refuse_if_closed(self) -> None:
        if self._file.closed:
            raise ValueError(f"{printable(self._file.path)}: was committed or aborted already")


_OPEN_REMEDIES: Final = {
    errno.ENOENT: "no such file; check the path",
    errno.EACCES: "permission denied; make it readable",
    errno.EISDIR: "is a folder; name a file in it",
    errno.ENOTDIR: "a parent of it is a file; check the path",
}


def open_regular_file(path: Path) -> int:
    """File descriptor for reading `path`; InputError where it is missing, unreadable or no regular file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a named pipe would block here for ever
    except (OSError, ValueError) as error:
        number = error.errno if isinstance(error, OSError) else None
        problem = _OPEN_REMEDIES.get(number or 0, f"cannot be opened ({quoted(str(error))}); check the path")
        raise InputError(f"{printable(path)}: {problem}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        kind = "is a folder; name a file in it" if path.is_dir() else "is no regular file; copy it to one first"
        raise InputError(f"{printable(path)}: {kind}")
    return fd
