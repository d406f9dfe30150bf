"""A pack on disk as a mapping from names to adapters, each read when it is asked for."""

from __future__ import annotations

import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

from loratools._lazy import torch
from loratools.adapter import Adapter, Entry
from loratools.errors import InputError, UsageError
from loratools.files import adapter_of
from loratools.hub.pack.coding import Pair, damaged, decoded, pair_of
from loratools.hub.pack.layout import Numbers, PackTarget, Part, piece_sizes, places, share_of
from loratools.hub.pack.members import fitted, specs_at
from loratools.operators import LowRank
from loratools.storage.atomic import printable
from loratools.storage.base import DTYPES, TensorSource, TensorSpec
from loratools.storage.header import quoted
from loratools.storage.safetensors import SafetensorsSource

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.families.base import Update

INDEX: Final = "index.json"
FORMAT: Final = "loratools pack"
VERSION: Final = 1
_MAX_INDEX: Final = 256 << 20
_CACHE: Final = 64 << 20  # bytes of decoded bases that are kept for the next adapter
_DAMAGE: Final = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, zlib.error)


@dataclass(frozen=True)
class Listing:
    """One adapter of a pack: its name, its file, the relative error as it was measured, bytes of what it was."""

    name: str
    file: str
    relative_error: float
    bytes_before: int


@dataclass(frozen=True)
class Index:
    """What `index.json` says."""

    method: str
    numbers: Numbers  # of the bases
    targets: tuple[PackTarget, ...]
    adapters: tuple[Listing, ...]

    def to_text(self) -> str:
        """As it is written: of the same length whatever the errors are."""
        fields = {
            "format": FORMAT,
            "version": VERSION,
            "method": self.method,
            "dtype": self.numbers.dtype,
            "bits": self.numbers.bits,
            "targets": [target.to_json() for target in self.targets],
            "adapters": [[a.name, a.file, f"{a.relative_error:.4e}", a.bytes_before] for a in self.adapters],
        }
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":")) + "\n"


def read_index(path: Path) -> Index:
    """The index of the pack at `path`; InputError where it is none."""
    place = path / INDEX
    if not place.is_file():
        raise InputError(f"{printable(path)}: is no pack ({INDEX} is missing); make one: loratools hub pack")
    try:
        if place.stat().st_size > _MAX_INDEX:
            raise InputError(f"{printable(place)}: too large for an index")
        fields = json.loads(place.read_text(encoding="utf-8"))
        if fields["format"] != FORMAT or fields["version"] != VERSION:
            raise InputError(f"{printable(place)}: is not of version {VERSION}; use a newer loratools")
        numbers = Numbers(str(fields["dtype"]), int(fields["bits"]))
        if numbers.dtype not in ("F32", "F16", "BF16") or numbers.bits not in (0, 4, 8):
            raise ValueError("numbers of no known kind")
        targets = tuple(PackTarget.from_json(t) for t in fields["targets"])
        adapters = tuple(Listing(str(n), _inside(f), float(e), int(b)) for n, f, e, b in fields["adapters"])
        return Index(str(fields["method"]), numbers, targets, adapters)
    except OSError as error:
        raise InputError(f"{printable(place)}: cannot be read: {error.strerror}") from error
    except _DAMAGE as error:
        raise damaged(printable(place), error) from None


def _inside(file: Any) -> str:
    """A file of the pack, and no other."""
    folder, _, name = str(file).partition("/")
    if folder != "adapters" or "/" in name or name.startswith(".") or not name.endswith(".safetensors"):
        raise ValueError(f"{quoted(file)} is no file of a pack")
    return str(file)


@final
class Pack(Mapping[str, Adapter]):
    """The adapters of a pack by name; memory is that of one target, and of a few bases that were used last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index = read_index(path)
        self._listed = {a.name: a for a in self.index.adapters}
        self._sources: dict[str, SafetensorsSource] = {}
        self._pairs: OrderedDict[tuple[int, int], Pair] = OrderedDict()

    def __getitem__(self, name: str) -> Adapter:
        return self.member(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._listed)

    def __len__(self) -> int:
        return len(self._listed)

    def __enter__(self) -> Pack:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the files of the bases."""
        for source in self._sources.values():
            source.close()
        self._sources.clear()

    def listing(self, name: str) -> Listing:
        """What the index says of an adapter; UsageError where there is none of the name."""
        if name not in self._listed:
            near = get_close_matches(name, self._listed, 3) or list(self._listed)[:3]
            there = f"{', '.join(map(quoted, near))}{', ...' if len(self) > len(near) else ''}" if near else "nothing"
            raise UsageError(f"{printable(self.path)}: holds no {quoted(name)}; it holds {there}")
        return self._listed[name]

    def member(self, name: str) -> Adapter:
        """An adapter in its own dialect; KeyError for an unknown name, InputError where its file is damaged."""
        source = _MemberSource(self, self.path / self._listed[name].file)
        try:
            return source.adapter()
        except BaseException:
            source.close()
            raise

    def parts(self, name: str) -> list[tuple[PackTarget, Part, int]]:
        """What an adapter has of each factored target, and the bytes of it."""
        with _MemberSource(self, self.path / self.listing(name).file) as source:
            return [(self.index.targets[p.index], p.part, p.size) for p in source.packed.values()]

    def pair(self, target: int, group: int) -> Pair:
        """The bases of a target; those used last are kept."""
        key = (target, group)
        if key in self._pairs:
            self._pairs.move_to_end(key)
            return self._pairs[key]
        record = self.index.targets[target]
        file = share_of(record.shape)
        if file not in self._sources:
            self._sources[file] = SafetensorsSource(self.path / file)
        try:
            if record.shared is None or not 0 <= group < record.shared.groups:
                raise ValueError(f"there are no bases {group} of {record.name!r}")
            found = pair_of(
                self._sources[file].read(f"{target}.{group}"), record.shared, record.shape, self.index.numbers
            )
        except _DAMAGE as error:
            raise damaged(printable(self.path / file), error) from None
        self._pairs[key] = found
        while len(self._pairs) > 1 and sum(p.left.nbytes + p.right.nbytes for p in self._pairs.values()) > _CACHE:
            self._pairs.popitem(last=False)
        return found


def open_pack(path: str | os.PathLike[str]) -> Pack:
    """The adapters of a pack by name, read when they are asked for; InputError where there is no pack."""
    return Pack(Path(path))


@dataclass(frozen=True)
class _Packed:
    """One target of an adapter: its place in the index, its part, and the bytes of that."""

    index: int
    part: Part
    size: int


@final
class _MemberSource(TensorSource):
    """The container that an adapter was read from, as far as a pack holds it: all but the factors."""

    container = "safetensors"

    def __init__(self, pack: Pack, file: Path) -> None:
        self._pack, self._file = pack, SafetensorsSource(file)
        try:
            header = header_fields(self._file.read_bytes("header"))
            self.path = Path(Path(str(header["weights"])).name)
            self.specs = {str(key): _spec(dtype, shape) for key, dtype, _, *shape in header["specs"]}
            self.metadata = {str(k): str(v) for k, v in header["metadata"].items()}
            self.nbytes = self._file.nbytes
            self._config = header["config"]
            self._numbers = Numbers(str(header["dtype"]), pack.index.numbers.bits)
            self.packed = self._located(header)
            kept = [str(key) for key, _, is_kept, *_ in header["specs"] if is_kept]
            sizes = [*(p.size for p in self.packed.values()), *(self.specs[key].nbytes for key in kept)]
            if piece_sizes(sizes) != [self._file.specs[f"data.{i}"].nbytes for i in range(len(self._file.specs) - 2)]:
                raise ValueError("its pieces have other sizes")
            spots = list(places(sizes))
            self._spots = dict(zip([*self.packed], spots[: len(self.packed)], strict=True))
            self._kept = dict(zip(kept, spots[len(self.packed) :], strict=True))
        except BaseException as error:
            self._file.close()
            if isinstance(error, _DAMAGE):
                raise damaged(printable(file), error) from None
            raise
        self._piece: tuple[int, Tensor] | None = None

    def _located(self, header: Mapping[str, Any]) -> dict[str, _Packed]:
        """By the adapter's own names of its targets."""
        records = self._pack.index.targets
        where = {(t.name, t.shape): i for i, t in enumerate(records)}
        found = {}
        for (own, name, m, n), row in zip(header["targets"], self._file.read("layout").tolist(), strict=True):
            part, i = Part(*row), where[name, (m, n)]
            shared = records[i].shared
            groups, kept = (0, 0) if shared is None else (shared.groups, shared.most_kept)
            if part.group < 0:
                kept = 0
            if not (-1 <= part.group < groups and part.rank >= 0 and 0 <= part.kept <= kept):
                raise ValueError(f"{own!r} has an impossible part")
            found[str(own)] = _Packed(i, part, part.size((m, n), shared, self._numbers))
        return found

    def adapter(self) -> Adapter:
        """The adapter, its factored targets at the ranks that the pack holds."""
        whole = adapter_of(self, self._config)
        if missing := [t for t in self.packed if t not in whole.entries]:
            raise damaged(printable(self._file.path), ValueError(f"no target {missing[0]!r}"))
        records = self._pack.index.targets
        widest = max((p.part.width(records[p.index].shared) for p in self.packed.values()), default=0)
        entries = dict(whole.entries)
        for target, place in self.packed.items():
            entries[target] = self._entry(whole, target, place, widest if whole.format.uniform else 0)
        changed = replace(whole, entries=entries)
        stated = whole.format.declare(changed.written(), whole.metadata).metadata
        return replace(changed, metadata={k: v for k, v in stated.items() if k not in whole.format.stale})

    def _entry(self, whole: Adapter, target: str, place: _Packed, least: int) -> Entry:
        before = whole.entries[target]
        record = self._pack.index.targets[place.index]
        rank = max(place.part.width(record.shared), least)
        scale = whole.format.writable_scale(target, rank, before.scale, "fold")

        def read() -> Update:
            try:
                data = self._bytes(*self._spots[target], place.size)
                pair = self._pack.pair(place.index, place.part.group) if place.part.group >= 0 else None
                low = decoded(data, record, place.part, pair, self._numbers)
            except _DAMAGE as error:
                raise damaged(printable(self._file.path), error) from None
            return fitted(before, low, rank, scale)

        one = fitted(before, LowRank(torch.zeros(record.shape[0], 1), torch.zeros(1, record.shape[1])), 1, scale)
        return Entry(before.family, specs_at(one, rank), before.layout, rank, scale, read, before.alpha)

    def read(self, name: str) -> Tensor:
        if name not in self._kept:
            raise KeyError(name)
        spec = self.specs[name]
        data = self._bytes(*self._kept[name], spec.nbytes)
        return data.clone().view(getattr(torch, DTYPES[spec.dtype][0])).reshape(spec.shape)

    def _bytes(self, piece: int, at: int, size: int) -> Tensor:
        if self._piece is None or self._piece[0] != piece:
            self._piece = piece, self._file.read(f"data.{piece}")
        data = self._piece[1][at : at + size]
        if len(data) != size:
            raise ValueError(f"piece {piece} ends too soon")
        return data

    def close(self) -> None:
        self._file.close()

    def sha256(self) -> str:
        return self._file.sha256()


def header_fields(data: bytes) -> dict[str, Any]:
    """What opens an adapter again, from its deflated header; ValueError for what cannot be one."""
    expander = zlib.decompressobj()
    text = expander.decompress(data, _MAX_INDEX)
    if expander.unconsumed_tail:
        raise ValueError("its header is too large")
    fields: dict[str, Any] = json.loads(text)
    return fields


def _spec(dtype: Any, shape: list[Any]) -> TensorSpec:
    if dtype not in DTYPES or not all(isinstance(s, int) and 0 <= s < 2**40 for s in shape):
        raise ValueError(f"{dtype!r} {shape!r} describe no tensor")
    return TensorSpec(dtype, tuple(shape))
