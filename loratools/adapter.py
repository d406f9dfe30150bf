"""An adapter: an ordered, immutable, lazy mapping from target to update."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from loratools._version import __version__
from loratools.errors import AdapterError, NotAWeightDeltaError
from loratools.families.base import LowRankUpdate
from loratools.formats.base import Written
from loratools.storage.header import spec_of

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from typing_extensions import Self

    from loratools.families.base import Layout, Update
    from loratools.formats.base import Format
    from loratools.storage.base import TensorSpec

RECORD_KEY = "loratools"


@dataclass(frozen=True)
class Entry:
    """One target as its header describes it, and the way to read it."""

    family: type[Update]
    specs: Mapping[str, TensorSpec]  # slot -> spec
    layout: Layout
    rank: int
    scale: float
    read: Callable[[], Update]
    alpha: float | None = None  # as the file states it for this target, where it does

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def base_shape(self) -> tuple[int, ...] | None:
        """Shape of the base parameter; None where the file does not tell."""
        return self.family.base_shape(self.specs, self.layout)

    @property
    def needs_base(self) -> bool:
        """Whether its delta cannot be had without the base weight."""
        return self.family.awaits_base(self.layout)

    @property
    def is_factored(self) -> bool:
        """Whether it has ranks that can be lowered."""
        return issubclass(self.family, LowRankUpdate)

    @property
    def rank_step(self) -> int:
        """Ranks are multiples of this."""
        return self.family.rank_step(self.specs, self.layout) if issubclass(self.family, LowRankUpdate) else 1

    @property
    def bytes_per_rank(self) -> int:
        """Bytes that each rank takes in the stored dtypes; 0 for a family whose ranks cannot be lowered."""
        return self.family.bytes_per_rank(self.specs, self.layout) if issubclass(self.family, LowRankUpdate) else 0

    @property
    def largest_rank(self) -> int:
        """The rank that holds any update of these shapes: the smaller side of a block, for all groups together."""
        assert self.base_shape is not None  # of a factored family it is known
        shape = self.base_shape[1:] if self.layout.experts > 1 else self.base_shape
        return min(shape[0] // self.rank_step, math.prod(shape[1:])) * self.rank_step


def entry_of(update: Update) -> Entry:
    """The entry of an update in memory."""
    family, specs = type(update), {slot: spec_of(t) for slot, t in update.parameters().items()}
    return Entry(family, specs, update.layout, family.rank_of(specs, update.layout), update.scale, lambda: update)


@dataclass(frozen=True)
class Extra:
    """A tensor that belongs to no update and is carried along."""

    spec: TensorSpec
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Origin:
    """The container that an adapter was read from; `codings` counts how its tensors are written, where in codes."""

    path: Path
    container: str
    nbytes: int
    sha256: Callable[[], str]
    close: Callable[[], None]
    codings: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """What made a file: stored as JSON under `loratools` in its metadata, without times or paths."""

    verb: str
    arguments: Mapping[str, Any]
    source_sha256: Callable[[], str]

    def to_json(self, *, placeholder: bool = False) -> str:
        """The stored text; with `placeholder`, one of the same length that needs no hash yet."""
        digest = "0" * 64 if placeholder else self.source_sha256()
        fields = {"version": __version__, "verb": self.verb, "arguments": dict(self.arguments), "source_sha256": digest}
        return json.dumps(fields, sort_keys=True)


@dataclass(frozen=True, eq=False)
class Adapter(Mapping[str, "Update"]):
    """Targets in file order; looking one up reads its tensors and nothing else.

    `warnings` are what a user should know about the file; `origin` is None for an adapter made in memory.
    """

    format: Format
    entries: Mapping[str, Entry]
    extras: Mapping[str, Extra]
    metadata: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    origin: Origin | None = None
    record: Record | None = None  # None for an adapter as loaded

    def __getitem__(self, target: str) -> Update:
        return self.entries[target].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        where = self.origin.path if self.origin else "memory"
        return f"<Adapter {self.format.name} of {len(self)} targets from {where}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file; targets not yet read can no longer be."""
        if self.origin:
            self.origin.close()

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The config that a saved file would carry."""
        return self.format.declare(self.written(), self.metadata).config

    @property
    def unsupported(self) -> Mapping[str, str]:
        """Targets that are carried along but cannot be worked on, with the reason."""
        return self.format.unsupported

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, extras included, without headers."""
        return sum(e.nbytes for e in self.entries.values()) + sum(e.spec.nbytes for e in self.extras.values())

    @property
    def file_nbytes(self) -> int:
        """Bytes of the container that it was read from, or of all tensors of one made in memory."""
        return self.origin.nbytes if self.origin else self.nbytes

    @property
    def usual_dtype(self) -> str:
        """The dtype of F32, F16 and BF16 in which most numbers of its targets are stored; F32 where none are."""
        counts: Counter[str] = Counter()
        for entry in self.entries.values():
            for spec in entry.specs.values():
                if spec.dtype in ("F32", "F16", "BF16"):
                    counts[spec.dtype] += spec.numel
        return counts.most_common(1)[0][0] if counts else "F32"

    def written(self) -> dict[str, Written]:
        """Rank and scale of every target."""
        return {target: Written(e.rank, e.scale, e.alpha) for target, e in self.entries.items()}

    @property
    def loose_extras(self) -> tuple[str, ...]:
        """The extra keys that no target reads."""
        read = {key for target in self.entries for key in self.format.references(target).values()}
        return tuple(key for key in self.extras if key not in read)

    def recorded(self, verb: str, arguments: Mapping[str, Any]) -> Adapter:
        """The same adapter with the record that saving it will store; its source is the container it was read from."""
        digest = self.origin.sha256 if self.origin else lambda: ""
        return replace(self, record=Record(verb, arguments, digest))

    def with_updates(self, updates: Mapping[str, Update]) -> Adapter:
        """The same adapter with some targets replaced; KeyError for a target that it does not have.

        Metadata that states ranks, alphas or hashes is made true, or dropped.
        """
        if unknown := sorted(set(updates) - set(self.entries)):
            raise KeyError(unknown[0])
        if not updates:
            return self
        entries = {t: entry_of(updates[t]) if t in updates else e for t, e in self.entries.items()}
        changed = replace(self, entries=entries)
        stated = self.format.declare(changed.written(), self.metadata).metadata
        return replace(changed, metadata={key: value for key, value in stated.items() if key not in self.format.stale})

    def map(self, fn: Callable[[str, Update], Update]) -> Adapter:
        """Apply `fn` to every update, now."""
        return self.with_updates({target: fn(target, update) for target, update in self.items()})

    def require_weights(self) -> None:
        """NotAWeightDeltaError where nothing in the file is an update of a weight, though it is known what it is."""
        if self.entries or not self.unsupported or self.format.replacements():
            return
        where = f"{self.origin.path}: " if self.origin else ""
        if self.format.bottlenecks:
            kinds = ", ".join(sorted({place.kind for place in self.format.bottlenecks.values()}))
            raise NotAWeightDeltaError(
                f"{where}holds nonlinear bottlenecks ({kinds}), h + scale * up(act(down h)), which no update of a "
                "weight equals; use loratools neurons or loratools prune-neurons"
            )
        key, why = next(iter(self.unsupported.items()))
        raise NotAWeightDeltaError(f"{where}holds no update of a weight that can be worked on: {key}: {why}")

    def select(self, pattern: str) -> tuple[str, ...]:
        """Targets that match a shell pattern, at the end of the name at a dot or as a whole; AdapterError for none."""
        from fnmatch import fnmatchcase

        found = tuple(t for t in self.entries if fnmatchcase(t, pattern) or fnmatchcase(t, f"*.{pattern}"))
        if not found:
            raise AdapterError(
                f"no target matches {pattern!r}; the first of {len(self)} is {next(iter(self), 'missing')}"
            )
        return found
