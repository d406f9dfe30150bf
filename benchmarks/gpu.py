"""Squeezing on a CUDA device, phase by phase; needs torch, numpy, safetensors and typing_extensions alone."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from contestants import ROOT, table
from synthetic import llama_like

T = TypeVar("T")
RANK = 16
LAYERS = 32


def main(*, quick: bool = False) -> str:
    """The table, as Markdown."""
    title = "### On a GPU\n\n"
    import torch

    if not torch.cuda.is_available():
        return f"{title}Not measured: this torch ({torch.__version__}) sees no CUDA device."
    from loratools.files import load
    from loratools.linalg.factored import balanced_factors, factored, squared_distance
    from loratools.linalg.svd import blocks_of
    from loratools.operators import LowRank, Operator
    from loratools.ops.spectra import group_targets, stack_factors
    from loratools.ops.squeeze import Squeeze, squeeze_file

    weights = llama_like(LAYERS)
    weights.read_bytes()  # into the page cache
    adapter = load(weights.parent)
    spent: dict[str, float] = {}

    def phase(name: str, fn: Callable[[], T]) -> T:
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = fn()
        torch.cuda.synchronize()
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - start
        return result

    def read(batch: list[str]) -> list[Operator]:
        return [adapter[target].low_rank_part() for target in batch]

    def to_cpu(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return up.cpu(), down.cpu()

    def one_pass() -> None:
        for batch in group_targets(adapter, list(adapter), "cuda"):
            parts = phase("read", partial(read, batch))
            lows = [block for part in parts for block in blocks_of(part) if isinstance(block, LowRank)]
            single = partial(stack_factors, lows, "cuda", torch.float32)  # as squeeze does for factors of 16 bits
            left, right = phase("stack, copy to the GPU, cast", single)
            f = phase("Gram matrices", partial(factored, left, right, single=True))
            best = phase("Cholesky, small SVD, factors", partial(balanced_factors, f, RANK))
            up, down = best.up.bfloat16(), best.down.bfloat16()
            phase("error of what is stored", partial(squared_distance, f, up, down))
            phase("copy back", partial(to_cpu, up, down))

    one_pass()  # loads kernels and workspaces
    spent.clear()
    repeats = 2 if quick else 5
    for _ in range(repeats):
        one_pass()
    rows = [[name, f"{total / repeats:.3f}"] for name, total in spent.items()]
    for device in ("cuda", "cpu"):
        times = []
        for _ in range(repeats):
            with tempfile.TemporaryDirectory(dir=weights.parent.parent) as folder:
                start = time.perf_counter()
                squeeze_file(load(weights.parent), Path(folder) / "out", RANK, options=Squeeze(device=device))
                times.append(time.perf_counter() - start)
        rows.append([f"squeeze_file on {device}, file to file", f"{min(times):.3f}"])
    major, minor = torch.cuda.get_device_capability()
    method = (
        f"The Llama-sized adapter of the first table to rank {RANK}. Phases one after another, the mean of {repeats} "
        "passes after one that does not count; whole runs, which overlap phases, the fastest of "
        f"{repeats}. Compute capability {major}.{minor}.\n\n"
    )
    return title + method + table(["", "s"], rows)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    print(main(quick="--quick" in sys.argv))
