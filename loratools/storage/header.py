"""The safetensors header: parsed with suspicion, spelt canonically."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, final

from loratools.storage.base import DTYPES, TensorSpec

if TYPE_CHECKING:
    import torch

MAX_HEADER: Final = 100_000_000  # the official library refuses more
METADATA_KEY: Final = "__metadata__"
MAX_DIMENSIONS: Final = 64  # torch's own kernels go no further
MAX_INT: Final = 2**63 - 1

_SPACE: Final = re.compile(r"[ \t\n\r]*")
_ENTRY: Final = re.compile(r"\{[^{}]{0,4096}\}")
_DECODER: Final = json.JSONDecoder()
_FIELDS: Final = frozenset({"dtype", "shape", "data_offsets"})
_DTYPE_NAMES: Final = {attribute: name for name, (attribute, _) in DTYPES.items()}


class HeaderError(ValueError):
    """What is wrong with a header, in words that need only the file's name in front of them."""


@dataclass(frozen=True)
class Header:
    """What a valid header says, in the order of the data; `starts` counts from the first byte of data."""

    specs: Mapping[str, TensorSpec]
    starts: Mapping[str, int]
    metadata: Mapping[str, str]


def quoted(text: object, limit: int = 80) -> str:
    """`text` safe to print: cut to `limit` characters, in quotes, control characters escaped."""
    whole = text if isinstance(text, str) else repr(text)
    return repr(whole if len(whole) <= limit else whole[:limit] + "...")


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    """Spec under which `tensor` is stored; ValueError for a dtype or layout that safetensors cannot hold."""
    name = _DTYPE_NAMES.get(str(tensor.dtype).removeprefix("torch."))
    if name is None or str(tensor.layout) != "torch.strided":
        raise ValueError(f"safetensors cannot hold a tensor of {tensor.dtype}, {tensor.layout}")
    return TensorSpec(name, tuple(tensor.shape))


def unique_pairs(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs of a JSON object as a dictionary; HeaderError for a key given twice."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise HeaderError(f"{quoted(key)} appears twice")
        result[key] = value
    return result


def parse_header(raw: bytes | bytearray, data_size: int) -> Header:
    """The header in `raw`, whose tensors must cover exactly `data_size` bytes; HeaderError otherwise.

    Parsing stops at the first byte that no safetensors header can have, so that junk costs neither time nor memory.
    """
    try:
        scanner = _Scanner(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise HeaderError("its header is not UTF-8") from None
    entries: dict[str, tuple[TensorSpec, int]] = {}
    metadata: dict[str, str] = {}
    for key in scanner.members():
        if key != METADATA_KEY:
            entries[key] = _entry(key, scanner.text_of_entry())
        elif not scanner.take("null"):
            metadata = {inner: scanner.string() for inner in scanner.members()}
    scanner.finish()
    ordered = sorted(entries.items(), key=lambda item: (item[1][1], item[1][0].nbytes))
    end = 0
    for name, (spec, start) in ordered:
        if start != end:
            fault = "overlap" if start < end else "leave a hole after"
            raise HeaderError(f"the bytes of tensor {quoted(name)} {fault} the one before")
        end += spec.nbytes
    if end != data_size:
        raise HeaderError(f"its header describes {end} bytes of data, but the file holds {data_size}")
    return Header({name: spec for name, (spec, _) in ordered}, {name: start for name, (_, start) in ordered}, metadata)


def header_bytes(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str], *, reserve: int = 0) -> bytes:
    """All that precedes the data: length, JSON, and spaces up to a multiple of 8 that is no smaller than `reserve`.

    `specs` are in write order. Without `reserve` these are the bytes that the official library writes.
    """
    tree: dict[str, Any] = {METADATA_KEY: dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name, spec in specs.items():
        start, end = end, end + spec.nbytes
        tree[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (start, end)}
    text = json.dumps(tree, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    length = max(rounded(8 + len(text)), rounded(reserve)) - 8
    return length.to_bytes(8, "little") + text.ljust(length)


def file_size(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str], *, reserve: int = 0) -> int:
    """Exact size of the file that a sink with the same `reserve` writes from the same specs and metadata."""
    return len(header_bytes(specs, metadata, reserve=reserve)) + sum(spec.nbytes for spec in specs.values())


def rounded(size: int) -> int:
    """The smallest multiple of 8 that is at least `size`."""
    return -(-size // 8) * 8


def _entry(name: str, text: str) -> tuple[TensorSpec, int]:
    try:
        fields, _ = _DECODER.raw_decode(text)
    except ValueError as error:
        raise HeaderError(f"the entry of tensor {quoted(name)} is malformed ({quoted(str(error))})") from None
    if fields.keys() != _FIELDS or text.count(":") != len(_FIELDS):  # a field given twice leaves one key
        raise HeaderError(f"the entry of tensor {quoted(name)} must have dtype, shape and data_offsets, nothing else")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise HeaderError(f"tensor {quoted(name)} has the unknown dtype {quoted(dtype)}")
    if "-" in text:  # -0 is an integer to Python, and none to the official library
        raise HeaderError(f"the entry of tensor {quoted(name)} has a negative number")
    if not _are_naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise HeaderError(f"tensor {quoted(name)} has the impossible shape {quoted(shape)}")
    spec = TensorSpec(dtype, tuple(shape))
    if math.prod(size for size in shape if size) * 8 > MAX_INT:
        raise HeaderError(f"tensor {quoted(name)} has the absurd shape {quoted(shape)}")
    if not _are_naturals(offsets) or len(offsets) != 2:
        raise HeaderError(f"tensor {quoted(name)} has the impossible data_offsets {quoted(offsets)}")
    if offsets[1] - offsets[0] != spec.nbytes:
        raise HeaderError(f"tensor {quoted(name)} needs {spec.nbytes} bytes, its data_offsets say {quoted(offsets)}")
    return spec, offsets[0]


def _are_naturals(value: object) -> bool:
    return isinstance(value, list) and {type(item) for item in value} <= {int}  # a bool is no size


@final
class _Scanner:
    """Cursor over the few JSON shapes that a header may have."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def take(self, token: str) -> bool:
        """Step over white space, and over `token` where it follows; whether it did."""
        if not self._text.startswith(token, self._at) or not token:
            space = _SPACE.match(self._text, self._at)
            if space is None or not self._text.startswith(token, space.end()):
                return False
            self._at = space.end()
        self._at += len(token)
        return True

    def members(self) -> Iterator[str]:
        """Each key of the object that follows; the caller must consume the value before asking for the next key."""
        self._expect("{")
        if self.take("}"):
            return
        seen = set()
        while True:
            key = self.string()
            if key in seen:
                raise HeaderError(f"its header has the key {quoted(key)} twice")
            seen.add(key)
            self._expect(":")
            yield key
            if self.take("}"):
                return
            self._expect(",")

    def string(self) -> str:
        if not self.take('"'):
            raise self._unexpected("a string")
        try:
            value, self._at = _DECODER.raw_decode(self._text, self._at - 1)
            value.encode("utf-8")  # half a surrogate pair is valid JSON, and no text
        except ValueError:
            raise self._unexpected("a well-formed string") from None
        return str(value)

    def text_of_entry(self) -> str:
        self.take("")
        match = _ENTRY.match(self._text, self._at)
        if match is None:
            raise self._unexpected("a tensor entry")
        self._at = match.end()
        return match.group()

    def finish(self) -> None:
        self.take("")
        if self._at != len(self._text):
            raise self._unexpected("the end")

    def _expect(self, token: str) -> None:
        if not self.take(token):
            raise self._unexpected(quoted(token))

    def _unexpected(self, wanted: str) -> HeaderError:
        found = quoted(self._text[self._at : self._at + 20])
        return HeaderError(f"its header should have {wanted} at character {self._at}, but has {found}")
