"""loratools' own container: the tensors of any adapter, in codes of a few bits, in a safetensors file.

It is what `loratools quantize` writes. Its metadata hold `loratools.packed`, the version, and loratools' record. Its
tensors, all U8, are `index`, a JSON object deflated by zlib, and `data.0`, `data.1`, ...: pieces of a few megabytes,
which hold whole tensors each. Numbers are little-endian.

The index has `metadata` and `config`, those of the adapter that was packed (`config` is adapter_config.json, or
null); `pieces`, for each piece the streams at its end; and `tensors`, in order, each a list: name, dtype and shape
once decoded, piece, first byte in it, kind, and then

* `raw`: nothing; its bytes are those of the tensor;
* `parts`: whether rows run along the last axis (else the first), and a list of parts that add up where they overlap:
  first row, rows, bits, codebook, group, whether there are offsets, dtype of scales. Each part takes its scales, its
  offsets if it has some, and its codes, row by row, the first in the lowest bits. value = scale * level + offset; a
  group is that many numbers of a row, all of a row for 0, the whole part for -1. The codebooks stand in
  `quant/codebooks.py`;
* `grid`: as for parts whether rows run along the last axis; the number of scales, one for each row or one for all;
  their dtype; and the class of each row. Its bytes are the scales; the whole numbers that they multiply are in the
  streams.

A piece's streams, in the order of their classes at its end, hold the rows of each class one after the other, deflated
without a header: `class: [base, numbers to a byte, numbers, bytes]`. A number x is folded to 2x - 1 above zero and to
-2x elsewhere, which is below the base; a byte holds several as digits of that base, the first the lowest; where it
holds none, each number has two bytes. Where the index has `crc`, the last four bytes of every piece, after its
streams, are the CRC-32 of those before them.
"""

from __future__ import annotations

import json
import math
import threading
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias, final

from loratools._lazy import torch
from loratools.errors import InputError
from loratools.quant.codec import Coding, Part, decoded, from_bytes
from loratools.quant.grid import Gridded, Stream, classes_of, collect, compress, expand
from loratools.storage.atomic import printable
from loratools.storage.base import DTYPES, TensorSink, TensorSource, TensorSpec
from loratools.storage.header import file_size, spec_of
from loratools.storage.safetensors import SafetensorsSink, SafetensorsSource

if TYPE_CHECKING:
    from torch import Tensor

INDEX: Final = "index"  # the tensor that holds it
MARK: Final = "loratools.packed"  # in the metadata of the file; its value is the version
VERSION: Final = "1"
CONFIG_KEY: Final = "loratools.config"  # in the metadata as they are shown: the adapter_config.json
_PLAIN: Final = "loratools"  # metadata that begin so are not deflated: a hash must not change the size of a file
_PIECE: Final = 8 << 20  # bytes of a piece before it is closed
_PIECE_NUMBERS: Final = 8 << 20  # numbers on the grid likewise
_MAX_INDEX: Final = 256 << 20
_MAX_NUMBERS: Final = 2**31  # of one tensor: beyond, a file claims what it does not hold
# What reading an index that is not as it should be may end in.
_DAMAGE: Final = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True, eq=False)
class Raw:
    """A tensor by its own bytes."""

    tensor: Tensor


@dataclass(frozen=True, eq=False)
class Coded:
    """A tensor whose rows are in codes; the rows run along its last axis where it is `transposed`."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...] | Gridded
    transposed: bool = False

    def decode(self) -> Tensor:
        """The float32 tensor."""
        rows, columns = sides(self.shape, transposed=self.transposed)
        parts = self.parts
        matrix = parts.decode() if isinstance(parts, Gridded) else decoded(parts, rows, columns)
        return (matrix.T if self.transposed else matrix).reshape(self.shape).contiguous()


Content: TypeAlias = Raw | Coded


def sides(shape: tuple[int, ...], *, transposed: bool) -> tuple[int, int]:
    """(rows, columns) of the matrix of a tensor: its first axis against the others, or the other way round."""
    first, rest = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    return (rest, first) if transposed else (first, rest)


@final
class _Counted(TensorSink):
    """A file that is not written, for its size."""

    def __init__(self) -> None:
        self._specs: dict[str, TensorSpec] = {}

    def write(self, name: str, tensor: Tensor) -> None:
        self._specs[name] = spec_of(tensor)

    def commit(self, metadata: Mapping[str, str]) -> int:
        return file_size(self._specs, metadata)

    def abort(self) -> None:
        return


@final
class PackedSink(TensorSink):
    """A packed file being written, one piece in memory at a time; without a path, what it would take is counted."""

    config: Mapping[str, Any] | None = None  # adapter_config.json, known when the last tensor is

    def __init__(self, path: Path | None) -> None:
        self._sink: TensorSink = _Counted() if path is None else SafetensorsSink(path)
        self._entries: list[list[Any]] = []
        self._names: set[str] = set()
        self._pieces: list[dict[str, list[int]]] = []
        self._bytes: list[Tensor] = []
        self._size = self._numbers = 0
        self.coded = 0  # bytes of codes and scales, without names and what is raw
        self._rows: list[tuple[int, Tensor]] = []

    def write(self, name: str, tensor: Tensor) -> None:
        self.pack(name, Raw(tensor))

    def pack(self, name: str, content: Content) -> None:
        """Append one tensor in its codes. ValueError for a name written before."""
        if name in self._names:
            raise ValueError(f"tensor {name!r} was written before")
        self._names.add(name)
        piece, at = len(self._pieces), self._size
        if isinstance(content, Raw):
            spec = spec_of(content.tensor)
            self._append(content.tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8))
            self._entries.append([name, spec.dtype, list(spec.shape), piece, at, "raw"])
        else:
            entry = [name, "F32", list(content.shape), piece, at]
            before = self._size
            if isinstance(content.parts, Gridded):
                codes, scales = content.parts.codes, content.parts.scales
                self._append(scales.contiguous().view(torch.uint8))
                kinds = classes_of(codes)
                self._rows += zip(kinds, codes, strict=True)
                self._numbers += codes.numel()
                stored = spec_of(scales).dtype
                self._entries.append([*entry, "grid", int(content.transposed), len(scales), stored, kinds])
            else:
                listed = []
                for part in content.parts:
                    self._append(part.coded.to_bytes())
                    listed.append([part.start, len(part.rows), *part.coded.coding.to_json()])
                self._entries.append([*entry, "parts", int(content.transposed), listed])
            self.coded += self._size - before
        if self._size >= _PIECE or self._numbers >= _PIECE_NUMBERS:
            self._close_piece()

    def _append(self, data: Tensor) -> None:
        self._bytes.append(data)
        self._size += data.numel()

    def _close_piece(self) -> None:
        streams: dict[str, list[int]] = {}
        for kind, numbers in collect(self._rows).items():
            stream, data = compress(numbers)
            streams[str(kind)] = stream.to_json()
            self.coded += len(data)
            if data:
                self._append(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        whole = torch.cat(self._bytes)
        self._sink.write(f"data.{len(self._pieces)}", torch.cat([whole, _checksum(whole)]))
        self._pieces.append(streams)
        self._bytes, self._size, self._rows, self._numbers = [], 0, [], 0

    def commit(self, metadata: Mapping[str, str]) -> int:
        if self._bytes or self._rows:
            self._close_piece()
        record = {key: text for key, text in metadata.items() if key.startswith(_PLAIN)}
        index = {
            "metadata": {key: text for key, text in metadata.items() if key not in record},
            "config": None if self.config is None else dict(self.config),
            "tensors": self._entries,
            "pieces": self._pieces,
            "crc": 1,
        }
        text = json.dumps(index, ensure_ascii=False, separators=(",", ":")).encode()
        self._sink.write(INDEX, torch.frombuffer(bytearray(zlib.compress(text, 9)), dtype=torch.uint8))
        return self._sink.commit({MARK: VERSION, **record})

    def abort(self) -> None:
        self._sink.abort()


@dataclass(frozen=True)
class _Entry:
    """A tensor as the index describes it; `cursors` count the numbers before its rows in each class of its piece."""

    spec: TensorSpec
    piece: int
    at: int
    kind: str
    fields: tuple[Any, ...]
    cursors: Mapping[int, int] = field(default_factory=dict)


@final
class PackedSource(TensorSource):
    """The tensors of a packed file, decoded as they are read."""

    container = "packed"

    def __init__(self, file: SafetensorsSource) -> None:
        self._file, self.path, self.nbytes = file, file.path, file.nbytes
        self._lock = threading.Lock()
        self._last: _Piece | None = None  # targets are mostly read in order
        try:
            if file.metadata[MARK] != VERSION:
                raise ValueError(f"is of version {file.metadata[MARK]!r}; this loratools reads version {VERSION}")
            self._read_index()
        except _DAMAGE as error:
            file.close()
            raise self._damaged(error) from None

    def read(self, name: str) -> Tensor:
        entry = self._entries[name]
        try:
            return self._decoded(entry, self._piece(entry.piece))
        except (*_DAMAGE, RuntimeError) as error:
            raise self._damaged(f"tensor {name!r}: {error}") from None

    def close(self) -> None:
        self._last = None
        self._file.close()

    def sha256(self) -> str:
        return self._file.sha256()

    def _damaged(self, error: object) -> InputError:
        return InputError(f"{printable(self.path)}: a packed adapter that is damaged ({error}); pack it again")

    def _read_index(self) -> None:
        stretcher = zlib.decompressobj()
        try:
            text = stretcher.decompress(self._file.read_bytes(INDEX), _MAX_INDEX)
        except zlib.error as error:
            raise ValueError(f"its index cannot be inflated: {error}") from None
        if not stretcher.eof:
            raise ValueError("its index is cut off or too long")
        index = json.loads(text)
        metadata = index["metadata"]
        if not all(isinstance(v, str) for pair in metadata.items() for v in pair):
            raise ValueError("its metadata are not text")
        stated = {key: text for key, text in self._file.metadata.items() if key != MARK} | metadata
        if not isinstance(index["config"], dict | None):
            raise ValueError("its config is no JSON object")
        if index["config"] is not None:
            stated[CONFIG_KEY] = json.dumps(index["config"])
        self.metadata = stated
        self._has_checksums = bool(index.get("crc"))
        self._streams = [
            {int(kind): Stream.from_json(fields) for kind, fields in piece.items()} for piece in index["pieces"]
        ]
        self._entries: dict[str, _Entry] = {}
        cursors: list[dict[int, int]] = [dict.fromkeys(streams, 0) for streams in self._streams]
        for name, dtype, shape, piece, at, kind, *fields in index["tensors"]:
            spec = _checked_spec(name, dtype, shape)
            if name in self._entries or not 0 <= piece < len(self._streams) or not isinstance(at, int) or at < 0:
                raise ValueError(f"tensor {name!r} is described wrongly")
            self._entries[name] = _Entry(spec, piece, at, kind, tuple(fields), dict(cursors[piece]))
            if kind == "grid":
                rows, columns = sides(spec.shape, transposed=bool(fields[0]))
                if len(fields[3]) != rows:
                    raise ValueError(f"tensor {name!r} has {rows} rows and {len(fields[3])} classes")
                for each in fields[3]:
                    cursors[piece][each] += columns
            elif kind not in ("raw", "parts"):
                raise ValueError(f"tensor {name!r} is written as {kind!r}, which this loratools does not know")
        for piece, streams in enumerate(self._streams):
            if {kind: stream.count for kind, stream in streams.items()} != cursors[piece]:
                raise ValueError(f"the streams of data.{piece} are not those of its tensors")
        self.specs = {name: entry.spec for name, entry in self._entries.items()}
        self.codings = Counter(said for entry in self._entries.values() for said in _said(entry))

    def _piece(self, number: int) -> _Piece:
        with self._lock:
            if self._last is None or self._last.number != number:
                data = self._file.read(f"data.{number}")
                if self._has_checksums:
                    data, stated = data[:-4], data[-4:]
                    if not torch.equal(_checksum(data), stated):
                        raise ValueError(f"data.{number} has changed since it was written")
                self._last = _Piece(number, data, self._streams[number])
            return self._last

    def _decoded(self, entry: _Entry, piece: _Piece) -> Tensor:
        shape = entry.spec.shape
        if entry.kind == "raw":
            dtype = getattr(torch, DTYPES[entry.spec.dtype][0])
            return piece.bytes(entry.at, entry.spec.nbytes).clone().view(dtype).reshape(shape)
        transposed = bool(entry.fields[0])
        rows, columns = sides(shape, transposed=transposed)
        if entry.kind == "grid":
            _, count, stored, kinds = entry.fields
            dtype = {"F16": torch.float16, "F32": torch.float32}[stored]
            if count not in (1, rows):
                raise ValueError(f"it has {count} scales for {rows} rows")
            scales = piece.bytes(entry.at, count * dtype.itemsize).clone().view(dtype)
            codes = piece.rows(kinds, columns, entry.cursors)
            return Coded(shape, Gridded(codes, scales), transposed).decode()
        parts, at = [], entry.at
        for start, height, *fields in entry.fields[1]:
            coding = Coding.from_json(fields)
            if not 0 <= start <= start + height <= rows:
                raise ValueError(f"rows {start} to {start + height} of {rows}")
            size = coding.size(height, columns)
            parts.append(Part(start, from_bytes(piece.bytes(at, size), coding, height, columns)))
            at += size
        return Coded(shape, tuple(parts), transposed).decode()


def _said(entry: _Entry) -> Iterator[str]:
    """How a tensor is coded, in a word or two for each kind of code."""
    if entry.kind == "grid":
        yield "grid"
    elif entry.kind == "parts":
        yield from dict.fromkeys(f"{bits}-bit {levels}" for _, _, bits, levels, *_ in entry.fields[1])


class _Piece:
    """A piece of the data, its streams inflated when first asked for."""

    def __init__(self, number: int, data: Tensor, streams: Mapping[int, Stream]) -> None:
        self.number, self._data, self._streams = number, data, streams
        self._numbers: dict[int, Tensor] = {}
        self._lock = threading.Lock()

    def bytes(self, at: int, size: int) -> Tensor:
        """`size` bytes from `at` on; ValueError beyond the end."""
        if at < 0 or at + size > self._data.numel():
            raise ValueError(f"bytes {at} to {at + size} of {self._data.numel()}")
        return self._data[at : at + size]

    def rows(self, kinds: list[int], columns: int, cursors: Mapping[int, int]) -> Tensor:
        """Rows of whole numbers, each the next of its class."""
        numbers = {kind: self._class(kind) for kind in dict.fromkeys(kinds)}  # first: bytes that are there bound them
        out = torch.zeros(len(kinds), columns, dtype=torch.int16)
        at = dict(cursors)
        for i, kind in enumerate(kinds):
            out[i] = numbers[kind][at[kind] : at[kind] + columns]
            at[kind] += columns
        return out

    def _class(self, kind: int) -> Tensor:
        with self._lock:
            if kind not in self._numbers:
                at = self._data.numel() - sum(s.nbytes for k, s in self._streams.items() if k >= kind)
                stream = self._streams[kind]
                self._numbers[kind] = expand(stream, self.bytes(at, stream.nbytes).numpy().tobytes())
            return self._numbers[kind]


def _checksum(data: Tensor) -> Tensor:
    """CRC-32 as four bytes."""
    return torch.frombuffer(bytearray(zlib.crc32(data.numpy().data).to_bytes(4, "little")), dtype=torch.uint8)


def _checked_spec(name: Any, dtype: Any, shape: Any) -> TensorSpec:
    sound = isinstance(name, str) and dtype in DTYPES and all(isinstance(n, int) and n >= 0 for n in shape)
    if not sound or math.prod(shape) > _MAX_NUMBERS:
        raise ValueError(f"tensor {name!r} cannot be of {dtype} {shape}")
    return TensorSpec(dtype, tuple(shape))
