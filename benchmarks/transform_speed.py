"""Walsh-Hadamard and wavelet transforms of a 4096 x 4096 matrix, beside a copy of the same matrix."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from contestants import ROOT, table

SIZE = 4096
THREADS = 2


def fastest(tasks: dict[str, Callable[[], object]], clock: Callable[[], float], rounds: int) -> dict[str, float]:
    """Seconds of each task: the least of so many rounds, in which all take turns."""
    best = dict.fromkeys(tasks, float("inf"))
    for _ in range(rounds):
        for name, task in tasks.items():
            start = clock()
            task()
            best[name] = min(best[name], clock() - start)
    return best


def main(*, quick: bool = False) -> str:
    """The table, as Markdown."""
    import pywt
    import torch

    from loratools.linalg.hadamard import walsh_hadamard
    from loratools.linalg.wavelets import Wavelet, decomposed

    x = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    out = torch.empty_like(x)
    as_numpy = x.numpy()
    haar = Wavelet("db1", SIZE)
    # Matrices of 5120 columns go through a core of 40, those of 11008 through one of 172.
    wide = {
        n: (x.reshape(-1)[: SIZE * SIZE // n * n].reshape(-1, n), torch.empty(SIZE * SIZE // n, n))
        for n in (5120, 11008)
    }
    into: dict[str, Callable[[], object]] = {
        "copy": lambda: out.copy_(x),
        "Walsh-Hadamard along rows": lambda: walsh_hadamard(x, out=out),
        "its inverse": lambda: walsh_hadamard(x, transposed=True, out=out),
        **{
            f"Walsh-Hadamard, rows of {n}": lambda source=source, target=target: walsh_hadamard(source, out=target)
            for n, (source, target) in wide.items()
        },
        **{
            f"{name}, {levels} level{'s' * (levels > 1)}, rows and columns": lambda name=name, levels=levels: (
                decomposed(x, name, levels, out=out)
            )
            for name, levels in (("db1", 1), ("db1", 3), ("db2", 1), ("db4", 1), ("db10", 1))
        },
    }
    fresh: dict[str, Callable[[], object]] = {
        "copy": x.clone,
        "Walsh-Hadamard along rows": lambda: walsh_hadamard(x),
        "db1, 1 level, rows and columns": lambda: decomposed(x, "db1", 1),
        "db1, columns alone (of factors)": lambda: haar.analyse(x),
        "db1, columns alone, inverse": lambda: haar.synthesise(x),
        "PyWavelets, db1, rows and columns": lambda: pywt.dwt2(as_numpy, "db1", mode="periodization"),
    }
    rounds = 3 if quick else 40
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    wall = [fastest(tasks, time.perf_counter, rounds) for tasks in (into, fresh)]
    torch.set_num_threads(1)
    spent = [fastest(tasks, time.thread_time, rounds) for tasks in (into, fresh)]
    torch.set_num_threads(before)
    rows = []
    for where, clocked, worked in zip(("an existing matrix", "a new matrix"), wall, spent, strict=True):
        for name in clocked:
            ratios = [found[name] / found["copy"] for found in (clocked, worked)]
            times = [f"{1e3 * found[name]:.0f}" for found in (clocked, worked)]
            rows.append([name, where, times[0], f"{ratios[0]:.1f}", times[1], f"{ratios[1]:.1f}"])
    header = ["", "into", f"ms, {THREADS} threads", "copies", "ms of processor, 1 thread", "copies"]
    method = (
        f"A {SIZE} x {SIZE} float32 matrix, the fastest of {rounds} rounds in which all take turns. Times by the clock "
        "suffer from whatever else runs on the machine; those of the processor, of one thread alone, do not. A new "
        "matrix of this size costs more to get from the system than to fill.\n\n"
    )
    return "### Walsh-Hadamard and wavelets\n\n" + method + table(header, rows) + TRIED


TRIED = """

Tried, and slower by the processor's time of one thread: butterflies by tensor operations, one for each power of two;
Walsh-Hadamard in two steps by matrices of 64 rows, in three of 16, and in four with the last ones as additions, against
32, 16 and 8 rows; chunks that fill less or more of the cache; wavelets by PyTorch's convolutions, by additions of
strided views (for Haar), and by blocks of 8 or 32 pairs of coefficients, against 16. What is left is arithmetic: the
steps multiply by 56 numbers for each entry where butterflies would add 12, but these pass through the cache 12 times.
"""


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    print(main(quick="--quick" in sys.argv))
