"""The adapters of a catalog as a server would see them, a batch of rows at a time and no object for any of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loratools.errors import InputError
from loratools.hub.catalog import read_catalog
from loratools.hub.footprint import unfit_shapes
from loratools.hub.population import UNREADABLE, Numbered, Population, Shapes, Steps, requirement_text
from loratools.ops.check import server_named
from loratools.storage.atomic import printable

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

_COLUMNS: Final = (
    *("name", "status", "dialect", "families", "base_model", "rank"),
    *("targets", "target_rows", "target_columns", "target_ranks"),
)
_PARALLEL: Final = ("target_rows", "target_columns", "target_ranks")
_MOST: Final = 1 << 24  # of ranks and sides: sums of their products are to fit into 64 bits
_CAVEAT: Final = (
    "a catalog does not tell of rsLoRA, biases, convolutions, other tensors and initialisations; "
    "loratools check does, for one adapter"
)


def population_of_catalog(path: Path, server: str, *, steps: Steps | None = None) -> Population:
    """From the columns that matter; InputError for what is no catalog, or holds what no adapter has."""
    row = server_named(server)
    batches = read_catalog(path, _COLUMNS)
    import pyarrow as pa
    from pyarrow import parquet

    step = steps(parquet.read_metadata(path).num_rows, "adapters") if steps else None
    texts = _Texts(server)
    rules: list[tuple[int, Callable[[_Facts], Any]]] = [
        (texts.number(UNREADABLE), lambda f: f.status == "failed"),
        (texts.number("it has no targets"), lambda f: (f.targets == 0) | (f.ranks == 0)),
        (texts.number(requirement_text(row, "peft-dialect")), lambda f: f.dialect != "peft"),
        (texts.number(requirement_text(row, "only-lora")), lambda f: f.other_family),
        (texts.number(requirement_text(row, "no-dora")), lambda f: f.dora),
        (texts.number(requirement_text(row, "no-other-tensors")), lambda f: f.unsupported),
    ]
    if server == "vllm":
        rules.append((texts.number(requirement_text(row, "rank-at-most-512")), lambda f: f.ranks > row.max_ranks[-1]))
    names, columns = [], []
    for batch in batches:
        _refuse_misfits(batch, path)
        facts = _Facts.of(batch, texts)
        reasons = texts.shape_reasons(facts.shapes)
        for number, broken in reversed(rules):  # the first that is broken is told
            reasons = np.where(broken(facts), number, reasons)
        columns.append((facts.ranks, facts.shapes, facts.bases, reasons, facts.mixed & (reasons < 0)))
        names.append(batch.column("name"))
        if step:
            for _ in range(batch.num_rows):
                step()
    joined = [np.concatenate(parts) for parts in zip(*columns, strict=True)] if columns else [np.empty(0, int)] * 5
    ranks, shapes, bases, whys, mixed = joined
    return Population(
        str(path), pa.chunked_array(names, pa.string()).combine_chunks(),
        ranks, shapes, bases, whys, mixed.astype(bool),
        texts.shapes.things, texts.bases.things, texts.reasons.things, CatalogSpectra(path), _CAVEAT,
    )  # fmt: skip


def _refuse_misfits(batch: pa.RecordBatch, path: Path) -> None:
    """InputError where the columns of targets are not parallel, or hold numbers that no adapter has."""
    remedy = "write it again with loratools hub catalog"
    lengths = _integers(batch.column("targets").value_lengths())
    for name in _PARALLEL:
        if not np.array_equal(lengths, _integers(batch.column(name).value_lengths())):
            raise InputError(f"{printable(path)}: {name} does not go with the targets; {remedy}")
    for name in ("rank", *_PARALLEL):
        column = batch.column(name)
        numbers = _integers(column if name == "rank" else column.flatten())
        if numbers.min(initial=0) < 0 or numbers.max(initial=0) > _MOST:
            raise InputError(f"{printable(path)}: {name} holds numbers below 0 or above {_MOST}; {remedy}")


class _Texts:
    """Everything that has a number, for the whole catalog."""

    def __init__(self, server: str) -> None:
        self._server = server
        self.shapes, self.bases, self.reasons, self.names = Numbered(), Numbered(), Numbered(), Numbered()
        self.by_hash: dict[int, int] = {}
        self._shape_reasons: list[int] = []

    def number(self, reason: str) -> int:
        return self.reasons(reason)

    def shape_reasons(self, shapes: NDArray[np.int64]) -> NDArray[np.int64]:
        """The reason of each signature, -1 where the server takes it."""
        for signature in self.shapes.things[len(self._shape_reasons) :]:
            why = unfit_shapes(self._server, signature) if signature else None
            self._shape_reasons.append(-1 if why is None else self.reasons(why))
        return np.array(self._shape_reasons, np.int64)[shapes]


@dataclass(frozen=True, eq=False)
class _Facts:
    """The columns of a batch, as numbers."""

    status: NDArray[np.str_]
    dialect: NDArray[np.str_]
    dora: NDArray[np.bool_]
    other_family: NDArray[np.bool_]
    targets: NDArray[np.int64]
    ranks: NDArray[np.int64]
    mixed: NDArray[np.bool_]
    unsupported: NDArray[np.bool_]
    shapes: NDArray[np.int64]
    bases: NDArray[np.int64]

    @staticmethod
    def of(batch: pa.RecordBatch, texts: _Texts) -> _Facts:
        ranks = _integers(batch.column("rank"))
        lengths = _integers(batch.column("targets").value_lengths())
        starts = np.concatenate([[0], np.cumsum(lengths)])
        each = _integers(batch.column("target_ranks").flatten())
        unequal = np.concatenate([[0], np.cumsum(each != np.repeat(ranks, lengths))])
        gaps = np.concatenate([[0], np.cumsum(each == 0)])  # of targets that cannot be worked on
        families = batch.column("families")
        kinds = _coded(families.flatten(), np.array)
        rows = np.repeat(np.arange(len(ranks)), _integers(families.value_lengths()))
        return _Facts(
            _coded(batch.column("status"), np.array),
            _coded(batch.column("dialect"), np.array),
            np.bincount(rows[kinds == "dora"], minlength=len(ranks)) > 0,
            np.bincount(rows[(kinds != "lora") & (kinds != "dora")], minlength=len(ranks)) > 0,
            lengths,
            ranks,
            unequal[starts[1:]] > unequal[starts[:-1]],
            gaps[starts[1:]] > gaps[starts[:-1]],
            _signatures(batch, starts, texts),
            _coded(batch.column("base_model"), lambda values: np.array([texts.bases(v or "") for v in values], int)),
        )


def _signatures(batch: pa.RecordBatch, starts: NDArray[np.int64], texts: _Texts) -> NDArray[np.int64]:
    """The number of each row's shapes: equal sets of target, rows and columns have equal sums of hashes."""
    targets = batch.column("targets").flatten()
    named = _coded(targets, lambda values: np.array([texts.names(v) for v in values], np.int64))
    high = _integers(batch.column("target_rows").flatten())
    wide = _integers(batch.column("target_columns").flatten())
    mixed = _mixed(_mixed(_mixed(named.astype(np.uint64)) + high.astype(np.uint64)) + wide.astype(np.uint64))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed, dtype=np.uint64)])
    hashes, first, inverse = np.unique(sums[starts[1:]] - sums[starts[:-1]], return_index=True, return_inverse=True)
    numbers = []
    names = texts.names.things
    for value, row in zip(hashes.tolist(), first.tolist(), strict=True):
        if value not in texts.by_hash:
            own = slice(starts[row], starts[row + 1])
            parts = zip(named[own].tolist(), high[own].tolist(), wide[own].tolist(), strict=True)
            shapes: Shapes = tuple(sorted((names[n], m, k) for n, m, k in parts))
            texts.by_hash[value] = texts.shapes(shapes)
        numbers.append(texts.by_hash[value])
    return np.array(numbers, np.int64)[inverse.reshape(-1)] if numbers else np.empty(0, np.int64)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser, which is a bijection that scatters."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _coded(column: Any, numbered: Any) -> NDArray[Any]:
    """The values of a column, after `numbered` has made numbers or an array of the different ones; a gap is ""."""
    found = column.dictionary_encode()
    values = [*found.dictionary.to_pylist(), ""]
    places = found.indices.fill_null(len(values) - 1).to_numpy(zero_copy_only=False)
    return np.asarray(numbered(values))[places]


def _integers(column: Any) -> NDArray[np.int64]:
    """A column of integers; a gap is 0."""
    return np.asarray(column.fill_null(0).to_numpy(zero_copy_only=False), np.int64)


@dataclass(frozen=True)
class CatalogSpectra:
    """The singular values of a catalog, read again for each question."""

    path: Path

    def needed(self, largest_error: float) -> NDArray[np.int64]:
        """The least rank of all targets within `largest_error`; -1 where a target has no singular values."""
        found = []
        for lost, known in self._lost():
            # lost[:, k]: the squared error at rank k, which falls to 0 at the last
            within = lost <= largest_error**2 * lost[:, :1]
            found.append(np.where(known, np.maximum(1, np.argmax(within, axis=1)), -1))
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def errors(self, ranks: NDArray[np.int64]) -> NDArray[np.float64]:
        """The relative error at one rank for each adapter; NaN where a target has no singular values."""
        found, at = [], 0
        for lost, known in self._lost():
            own = np.minimum(ranks[at : at + len(lost)], lost.shape[1] - 1)
            at += len(lost)
            whole = np.where(lost[:, 0] > 0, lost[:, 0], 1.0)
            error = np.sqrt(np.take_along_axis(lost, own[:, None], axis=1)[:, 0] / whole)
            found.append(np.where(known, error, np.nan))
        return np.concatenate(found) if found else np.empty(0)

    def _lost(self) -> Iterator[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
        """(rows, ranks + 1): the energy beyond the first k values of every target; and whether all are known."""
        for batch in read_catalog(self.path, ["singular_values"]):
            column = batch.column("singular_values")
            targets = _integers(column.value_lengths())
            rows = np.repeat(np.arange(len(targets)), targets)
            inner = column.flatten()
            lengths = _integers(inner.value_lengths())
            values = inner.flatten().to_numpy(zero_copy_only=False).astype(np.float64)
            starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
            places = np.arange(len(values)) - starts
            width = int(lengths.max(initial=0)) + 1
            cells = np.repeat(rows, lengths) * width + places
            energy = np.zeros(len(targets) * width)
            energy += np.bincount(cells, weights=values * values, minlength=len(energy))
            lost = np.cumsum(energy.reshape(len(targets), width)[:, ::-1], axis=1)[:, ::-1]
            gaps = np.bincount(rows, weights=inner.is_null().to_numpy(zero_copy_only=False), minlength=len(targets))
            yield lost, (gaps == 0) & (targets > 0) & np.isfinite(lost[:, 0])
