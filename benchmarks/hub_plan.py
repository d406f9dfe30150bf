"""What a serving plan costs for a hub of very many adapters, from its catalog alone."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from contestants import ROOT, table

MANY, WITH_SPECTRA = 1_000_000, 100_000
QUICK = 20_000
_GROUP = 4096

# Layers, hidden size, modules of each layer, base model, and the share of adapters of this kind.
_ATTENTION = tuple(f"self_attn.{p}_proj" for p in "qkvo")
_KINDS = (
    (32, 4096, _ATTENTION, "meta-llama/Llama-2-7b-hf", 0.5),
    (32, 4096, _ATTENTION[:1] + _ATTENTION[2:3], "meta-llama/Llama-2-7b-hf", 0.2),
    (40, 5120, _ATTENTION, "meta-llama/Llama-2-13b-hf", 0.2),
    (32, 4096, (*_ATTENTION, "mlp.up_proj", "mlp.down_proj", "mlp.gate_proj"), "mistralai/Mistral-7B-v0.1", 0.1),
)
_RANKS = (4, 6, 8, 8, 12, 16, 16, 16, 20, 24, 32, 48, 64)

_RUN = """
import json, resource, sys, time
from pathlib import Path
from loratools.hub.plan import Plan, plan
start = time.perf_counter()
given = json.loads(sys.argv[2])
log = given.pop('log', None)
report = plan(Path(sys.argv[1]), Plan(**given, log=log and Path(log)))
took = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([took, peak * 1024, report.fit, report.resident, len(report.buckets)]))
"""


def write_simulated(path: Path, count: int, *, spectra: bool, seed: int = 0) -> None:
    """A catalog of mixed shapes and ranks, in arrays from the start."""
    import pyarrow as pa
    from pyarrow import parquet

    sys.path.insert(0, str(ROOT))
    from loratools.hub.catalog import schema

    rng = np.random.default_rng(seed)
    layout = schema()
    targets = [[f"model.layers.{i}.{m}" for i in range(n) for m in modules] for n, _, modules, _, _ in _KINDS]
    names = pa.array([name for kind in targets for name in kind])
    starts = np.cumsum([0, *map(len, targets)])
    with parquet.ParquetWriter(path, layout, compression="zstd") as writer:
        for begin in range(0, count, _GROUP):
            rows = min(_GROUP, count - begin)
            kinds = rng.choice(len(_KINDS), rows, p=[kind[-1] for kind in _KINDS])
            ranks = rng.choice(_RANKS, rows)
            lengths = np.array([len(kind) for kind in targets])[kinds]
            ends = np.concatenate([[0], np.cumsum(lengths)])
            flat = np.arange(ends[-1]) - np.repeat(ends[:-1], lengths) + np.repeat(starts[kinds], lengths)
            sides = np.repeat(np.array([kind[1] for kind in _KINDS])[kinds], lengths)
            each = np.repeat(ranks, lengths)

            def lists(values: Any, ends: Any = ends) -> Any:
                return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), values)

            known: dict[str, Any] = {
                "name": pa.array([f"author-{i // 20}/adapter-{i}" for i in range(begin, begin + rows)]),
                "status": pa.array(["done"] * rows),
                "dialect": pa.array(["peft"] * rows),
                "families": lists(pa.array(["lora"] * rows), np.arange(rows + 1)),
                "base_model": pa.array([_KINDS[kind][3] for kind in kinds]),
                "bytes": pa.array(ranks * lengths, pa.int64()),
                "rank": pa.array(ranks, pa.int64()),
                "targets": lists(names.take(pa.array(flat))),
                "target_rows": lists(pa.array(sides, pa.int64())),
                "target_columns": lists(pa.array(sides, pa.int64())),
                "target_ranks": lists(pa.array(each, pa.int64())),
            }
            if spectra:
                inner = np.concatenate([[0], np.cumsum(each)])
                places = np.arange(inner[-1]) - np.repeat(inner[:-1], each) + 1
                decay = np.repeat(np.repeat(rng.uniform(0.3, 1.5, rows), lengths), each)
                values = pa.array((places**-decay).astype(np.float32))
                known["singular_values"] = lists(pa.ListArray.from_arrays(pa.array(inner, pa.int32()), values))
            columns = [known.get(field.name, pa.nulls(rows, field.type)) for field in layout]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=layout))


def main(*, quick: bool = False) -> str:
    """The table, as Markdown."""
    many, fewer = (QUICK, QUICK // 10) if quick else (MANY, WITH_SPECTRA)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "catalog.parquet"
        write_simulated(path, many, spectra=False)
        log = Path(folder) / "log.csv"
        with log.open("w", encoding="utf-8") as file:
            file.writelines(f"author-{i // 20}/adapter-{i},{1 + many // (1 + i)}\n" for i in range(many))
        cases: list[tuple[str, dict[str, Any]]] = [
            ("S-LoRA", {"server": "slora", "reserve_tokens": 10_000}),
            ("S-LoRA, popularity from a log of all", {"server": "slora", "log": str(log)}),
            ("vLLM", {"server": "vllm"}),
        ]
        rows += [_row(label, path, many, options) for label, options in cases]
        path.unlink()
        write_simulated(path, fewer, spectra=True)
        options = {"server": "slora", "largest_error": 0.1}
        rows.append(_row("S-LoRA, squeezed within 0.1", path, fewer, options))
    text = (
        "Simulated catalogs of mixed shapes and ranks, most of them of 128 targets; 20 GB of memory, 100,000 simulated "
        "requests; one process each, one run."
    )
    header = ["plan", "adapters", "catalog", "seconds", "peak memory", "can be served", "resident", "ranks"]
    return f"# Plans for hubs of many adapters\n\n{text}\n\n{table(header, rows)}"


def _row(label: str, path: Path, count: int, options: dict[str, Any]) -> list[str]:
    began = time.perf_counter()
    given = json.dumps({"memory": 20 * 10**9, **options})
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(path), given], check=True, capture_output=True, text=True, cwd=ROOT
    )
    took, peak, fit, resident, ranks = json.loads(done.stdout)
    assert took <= time.perf_counter() - began
    size = f"{path.stat().st_size / 1e6:.0f} MB"
    return [label, f"{count:,}", size, f"{took:.1f}", f"{peak / 1e6:.0f} MB", f"{fit:,}", str(resident), str(ranks)]


if __name__ == "__main__":
    print(main(quick="--quick" in sys.argv))
