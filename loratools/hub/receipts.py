"""What became of each adapter: one small JSON file, written after its output, which says that it is complete."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from loratools.storage.atomic import write_whole

FOLDER = ".loratools"  # in the output: receipts, and what the run was
Status = Literal["done", "failed"]


@dataclass(frozen=True)
class Stamp:
    """What tells whether a file has changed: its size and time of change first, its hash where those differ."""

    size: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True)
class Receipt:
    """One adapter's outcome.

    `sources` and `outputs` are stamps of files, by path relative to the hub and to the output; `relative_error` is
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

    def save(self, out: Path, stem: str) -> None:
        """Write it, whole or not at all."""
        write_whole(place_of(out, stem), self.to_json())


def place_of(out: Path, stem: str) -> Path:
    """Where the receipt of an adapter lies."""
    return out / FOLDER / "receipts" / f"{stem}.json"


def read_receipt(path: Path) -> Receipt | None:
    """The receipt in a file; None where there is none, or nothing that could be one."""
    try:
        fields = json.loads(path.read_bytes().decode("utf-8", "surrogatepass"))
        for name in ("sources", "outputs"):
            fields[name] = {key: Stamp(**stamp) for key, stamp in fields[name].items()}
        receipt = Receipt(**{**fields, "warnings": tuple(fields["warnings"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return receipt if _is_sound(receipt) else None


def _is_sound(receipt: Receipt) -> bool:
    """Whether all is of the kind that it should be: somebody may have edited the file."""
    texts = (receipt.name, receipt.recipe, receipt.version, receipt.reason, *receipt.warnings)
    numbers = (receipt.seconds, 0 if receipt.relative_error is None else receipt.relative_error)
    stamps = (*receipt.sources.values(), *receipt.outputs.values())
    sizes = (receipt.bytes_before, receipt.bytes_after, *(n for s in stamps for n in (s.size, s.mtime_ns)))
    return (
        receipt.status in ("done", "failed")
        and all(isinstance(text, str) for text in texts)
        and all(type(number) in (int, float) for number in numbers)
        and all(type(size) is int and abs(size) < 1 << 63 for size in sizes)
        and all(isinstance(stamp.sha256, str) for stamp in stamps)
    )


def receipt_stems(out: Path) -> Iterator[str]:
    """What the outputs of all receipts are called, in no order; nothing is read."""
    top = str(out / FOLDER / "receipts")
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


def receipts(out: Path) -> Iterator[Receipt]:
    """All that can be read, in the order of their stems."""
    for stem in sorted(receipt_stems(out)):
        if (found := read_receipt(place_of(out, stem))) is not None:
            yield found


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
