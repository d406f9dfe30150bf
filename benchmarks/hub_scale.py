"""What a hub of many adapters costs: its catalog written, read and searched, and the receipts of a run counted."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from contestants import ROOT, table

if TYPE_CHECKING:
    from loratools.hub.catalog import CatalogRow

T = TypeVar("T")

MANY, QUICK = 100_000, 2_000
ON_PAGE = 10_000

# Layers, hidden size, modules, and how many of ten adapters are of this kind.
_KINDS = (
    (32, 4096, ("q_proj", "v_proj"), 4),
    (32, 4096, ("q_proj", "k_proj", "v_proj", "o_proj"), 2),
    (16, 2048, ("q_proj", "v_proj"), 2),
    (24, 1024, ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"), 2),
)
_RANKS = (4, 8, 8, 16, 16, 16, 32, 64)
_BASES = ("meta-llama/Llama-3.1-8B", "mistralai/Mistral-7B-v0.3", "meta-llama/Llama-3.2-1B", "Qwen/Qwen2.5-0.5B")


def simulated_rows(count: int, seed: int = 0) -> Iterator[CatalogRow]:
    """Rows as a hub of many authors has them: mixed sizes, ranks and spectra, by name; one in 500 failed."""
    sys.path.insert(0, str(ROOT))
    from loratools.hub.catalog import CatalogRow

    rng = np.random.default_rng(seed)
    shares = np.array([kind[3] for kind in _KINDS]) / sum(kind[3] for kind in _KINDS)
    names = [tuple(f"model.layers.{i}.{m}" for i in range(n) for m in modules) for n, _, modules, _ in _KINDS]
    digits = len(str(max(count - 1, 0)))
    for number in range(count):
        name = f"author-{number // 20:0{digits}}/adapter-{number:0{digits}}"
        sha256 = rng.bytes(32).hex()
        if rng.random() < 1 / 500:
            yield CatalogRow(name, "failed", "has 0 bytes, too few for a safetensors file; download it again")
            continue
        kind = int(rng.choice(len(_KINDS), p=shares))
        side, targets, rank = _KINDS[kind][1], names[kind], int(rng.choice(_RANKS))
        # Power laws with exponents and sizes of their own, jittered so that they descend all the same.
        steps = np.arange(1, rank + 1) + 0.8 * rng.random((len(targets), rank))
        spectra = (rng.lognormal(0, 1, (len(targets), 1)) * steps ** -rng.uniform(0.3, 1.5)).astype(np.float32)
        stored = 4 * rank * side * len(targets)
        path = f"{name}/adapter_model.safetensors"
        yield CatalogRow(
            name,
            "done",
            path=path,
            dialect="peft",
            families=("lora",),
            base_model=_BASES[kind],
            recipe="simulated",
            version="0",
            bytes_before=2 * stored,
            bytes=stored,
            relative_error=float(rng.uniform(0, 0.4)),
            seconds=float(np.round(rng.uniform(0, 5), 3)),
            sha256=sha256,
            sources=(f"{sha256} {path}",),
            rank=rank,
            targets=targets,
            target_families=("lora",) * len(targets),
            target_rows=(side,) * len(targets),
            target_columns=(side,) * len(targets),
            target_ranks=(rank,) * len(targets),
            target_norms=tuple(np.sqrt((spectra.astype(np.float64) ** 2).sum(1)).tolist()),
            target_reasons=("",) * len(targets),
            singular_values=tuple(spectra),
        )


def simulated_receipts(out: Path, count: int) -> None:
    """An output folder as a run of so many adapters leaves it, without the outputs themselves."""
    from loratools.hub.receipts import FOLDER, Receipt, Stamp

    for number, row in enumerate(simulated_rows(count)):
        stamp = {row.path: Stamp(row.bytes, number, row.sha256 or "")}
        facts = {"dialect": "peft", "families": ["lora"], "targets": 64, "rank": row.rank, "base_model": row.base_model}
        receipt = Receipt(row.name, "done", "simulated", "0", stamp, stamp, row.bytes_before or 0, row.bytes,
                          row.relative_error, {"squeeze": 0.1}, facts, (), row.seconds or 0.0)  # fmt: skip
        place = out / FOLDER / "receipts" / f"{row.name}.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(receipt.to_json())  # not fsynced one by one
    stated = {"hub": str(out / "gone"), "recipe": ["squeeze rank=8"]}
    (out / FOLDER / "run.json").write_text(json.dumps(stated), encoding="utf-8")


def main(*, quick: bool = False) -> str:
    """The table, as Markdown."""
    count = QUICK if quick else MANY
    with tempfile.TemporaryDirectory() as folder:
        rows = [*_catalog(Path(folder), count), *_status(Path(folder), count)]
    text = f"A simulated hub of {count:,} adapters of mixed shapes and ranks; one process, times of one run."
    return f"# Hubs of many adapters\n\n{text}\n\n{table(['', 'seconds', 'result'], rows)}"


def _catalog(folder: Path, count: int) -> Iterator[list[str]]:
    sys.path.insert(0, str(ROOT))
    from loratools.hub.catalog import read_catalog, write_catalog
    from loratools.hub.page import write_page

    path = folder / "catalog.parquet"
    seconds, _ = _timed(lambda: sum(1 for _ in simulated_rows(count)))
    yield ["simulating the rows", f"{seconds:.1f}", ""]
    before = _peak()
    both, _ = _timed(lambda: write_catalog(simulated_rows(count), path))
    size = path.stat().st_size
    yield ["writing the catalog", f"{both - seconds:.1f}", f"{size / 1e6:.0f} MB, {_peak() - before:.0f} MiB of memory"]
    for columns in (["name", "rank", "relative_error"], ["singular_values"], None):
        told = "all columns" if columns is None else ", ".join(columns)
        seconds, found = _timed(lambda c=columns: sum(len(batch) for batch in read_catalog(path, c)))
        yield [f"reading {told}", f"{seconds:.2f}", f"{found:,} rows"]
    small = folder / "page.parquet"
    write_catalog(simulated_rows(min(count, ON_PAGE)), small)
    seconds, page = _timed(lambda: write_page(small, folder / "page.html"))
    yield [f"the page of {min(count, ON_PAGE):,}", f"{seconds:.1f}", f"{page.stat().st_size / 1e6:.1f} MB"]


def _status(folder: Path, count: int) -> Iterator[list[str]]:
    from loratools.hub.listing import status

    simulated_receipts(folder / "out", count)
    seconds, report = _timed(lambda: status(folder / "out"))
    yield ["hub status", f"{seconds:.1f}", f"{len(report.adapters):,} receipts"]


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    print(main(quick="--quick" in sys.argv))
