"""What became of each adapter: one small JSON file, written after its output, which says that it is complete."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, overload

from loratools.storage.places import Place, put_whole
from loratools.storage.remote import Remote

FOLDER = ".loratools"  # in the output: receipts, and what the run was
RECEIPTS = f"{FOLDER}/receipts"
UPLOADS = f"{FOLDER}/uploads"  # of a remote output: what is being uploaded, where that is seen while it grows
RUN = f"{FOLDER}/run.json"
_AT_ONCE = 64  # receipts elsewhere that are read together
_LARGEST = 16 << 20  # of a receipt elsewhere
_LARGEST_RUN = 256 << 20  # of what states a run, which may name many adapters
Status = Literal["done", "failed", "stale"]  # `stale`: done once, and being done again, or interrupted in that


@dataclass(frozen=True)
class Stamp:
    """What tells whether a file has changed: its size and time of change first, its hash where those differ.

    Of a file elsewhere, the server's `etag` goes before its time.
    """

    size: int
    mtime_ns: int
    sha256: str
    etag: str = ""


@dataclass(frozen=True)
class Receipt:
    """One adapter's outcome.

    `sources` and `outputs` are stamps of files, by path relative to the hub and to the output, the outputs of one that
    is not `done` those that an earlier run left, which nothing vouches for; `relative_error` is
    that of all deltas as written, None where it is not known, `errors` those of the steps, each against what it was
    given; `seconds` is what the work took.
    """

    name: str
    status: Status
    recipe: str  # digest
    version: str
    sources: Mapping[str, Stamp] = field(default_factory=dict)
    outputs: Mapping[str, Stamp] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    relative_error: float | None = None
    errors: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0
    reason: str = ""

    def to_json(self) -> bytes:
        """What its file holds."""
        text = json.dumps(asdict(self), sort_keys=True, indent=1, ensure_ascii=False)
        return text.encode("utf-8", "surrogatepass")

    def save(self, out: Place, stem: str) -> None:
        """Write it, whole or not at all."""
        # Not fsynced, for the output was: a receipt that a failing machine loses only has the work done again.
        put_whole(place_of(out, stem), self.to_json(), upload_place(out, stem), durable=False)


@overload
def place_of(out: Path, stem: str) -> Path: ...
@overload
def place_of(out: Remote, stem: str) -> Remote: ...
def place_of(out: Place, stem: str) -> Place:
    """Where the receipt of an adapter lies."""
    return out / f"{RECEIPTS}/{stem}.json"


@overload
def upload_place(out: Path, stem: str) -> Path: ...
@overload
def upload_place(out: Remote, stem: str) -> Remote: ...
def upload_place(out: Place, stem: str) -> Place:
    """Where a file of an adapter may lie while it is uploaded; its name begins with `upload_mark`."""
    return out / f"{UPLOADS}/{upload_mark(stem)}.{secrets.token_hex(4)}.tmp"


def upload_mark(stem: str) -> str:
    """Tells whose an upload is, whatever characters are in its name."""
    return hashlib.sha256(stem.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def read_receipt(path: Path) -> Receipt | None:
    """The receipt in a file; None where there is none, or nothing that could be one."""
    try:
        return parse_receipt(path.read_bytes())
    except OSError:
        return None


def parse_receipt(data: bytes) -> Receipt | None:
    """The receipt of these bytes; None where they can be none."""
    try:
        fields = json.loads(data.decode("utf-8", "surrogatepass"))
        for name in ("sources", "outputs"):
            fields[name] = {key: Stamp(**stamp) for key, stamp in fields[name].items()}
        receipt = Receipt(**{**fields, "warnings": tuple(fields["warnings"])})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return receipt if _is_sound(receipt) else None


def _is_sound(receipt: Receipt) -> bool:
    """Whether all is of the kind that it should be: somebody may have edited the file."""
    texts = (receipt.name, receipt.recipe, receipt.version, receipt.reason, *receipt.warnings)
    numbers = (receipt.seconds, 0 if receipt.relative_error is None else receipt.relative_error)
    stamps = (*receipt.sources.values(), *receipt.outputs.values())
    sizes = (receipt.bytes_before, receipt.bytes_after, *(n for s in stamps for n in (s.size, s.mtime_ns)))
    return (
        receipt.status in ("done", "failed", "stale")
        and all(isinstance(text, str) for text in texts)
        and all(type(number) in (int, float) for number in numbers)
        and all(type(size) is int and abs(size) < 1 << 63 for size in sizes)
        and all(isinstance(text, str) for stamp in stamps for text in (stamp.sha256, stamp.etag))
    )


def receipt_stems(out: Path) -> Iterator[str]:
    """What the outputs of all receipts are called, in no order; nothing is read."""
    top = str(out / RECEIPTS)
    folders = [top]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif entry.name.endswith(".json") and not entry.name.startswith("."):
                        yield entry.path[len(top) + 1 : -len(".json")].replace(os.sep, "/")
        except OSError:  # gone since, or none yet
            continue


def receipts(out: Place) -> Iterator[Receipt]:
    """All that can be read, in the order of their stems."""
    if isinstance(out, Remote):
        names = [name for name in (out / RECEIPTS).listing() if name.endswith(".json")]
        yield from (found for found in read_receipts(out, [n.removesuffix(".json") for n in names]) if found)
        return
    for stem in sorted(receipt_stems(out)):
        if (found := read_receipt(place_of(out, stem))) is not None:
            yield found


def read_receipts(out: Place, stems: list[str]) -> Iterator[Receipt | None]:
    """The receipts of these adapters, one for each; None where there is none."""
    if isinstance(out, Path):
        yield from (read_receipt(place_of(out, stem)) for stem in stems)
        return
    for first in range(0, len(stems), _AT_ONCE):
        names = [f"{stem}.json" for stem in stems[first : first + _AT_ONCE]]
        for data in (out / RECEIPTS).read_many(names, _LARGEST):
            yield None if data is None else parse_receipt(data)


def read_one(out: Place, stem: str) -> Receipt | None:
    """The receipt of an adapter; None where there is none, or nothing that could be one."""
    return next(read_receipts(out, [stem]))


def read_stated(out: Place) -> dict[str, Any] | None:
    """What the last run into `out` stated; None where none has, or it says nothing that can be read.

    Its `parts` say for each work (a recipe and a version) which adapters it is for, None for all others.
    """
    try:
        if isinstance(out, Path):
            data = (out / RUN).read_bytes()
        elif (out / RUN).stat() is None:
            return None
        else:
            data = (out / RUN).read(_LARGEST_RUN)
        stated = json.loads(data.decode("utf-8", "surrogatepass"))
        parts = stated.get("parts", {work_of(stated.get("digest"), stated.get("version")): None})
        stated["parts"] = {w: None if names is None else frozenset(map(str, names)) for w, names in parts.items()}
    except (OSError, ValueError, RecursionError, AttributeError, TypeError):
        return None
    return dict(stated)


def work_of(recipe: Any, version: Any) -> str:
    """What is done to an adapter: the digest of the recipe, and the version that works by it."""
    return f"{recipe} {version}"


def stamp_of(path: Path) -> Stamp:
    """The stamp of a file as it is now."""
    with path.open("rb") as file:
        before = os.fstat(file.fileno())
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _digest(file)
    return Stamp(before.st_size, before.st_mtime_ns, digest.hexdigest())


def _digest(file: Any) -> Any:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest


def is_unchanged(path: Path, stamp: Stamp, *, read: bool = True) -> bool:
    """Whether a file is what it was; it is read only where its time of change says that it may not be.

    Without `read` such a file counts as changed.
    """
    try:
        now = path.stat()
        if now.st_size != stamp.size:
            return False
        return now.st_mtime_ns == stamp.mtime_ns or (read and stamp_of(path).sha256 == stamp.sha256)
    except OSError:
        return False
