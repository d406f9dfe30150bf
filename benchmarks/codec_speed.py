"""How fast the element codecs turn 16-bit factors into bytes of codes and back, beside a copy of the memory."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from contestants import ROOT, table

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.storage.packed import Coded

RANK, SIDE, TARGETS = 64, 4096, 8
GROUP = 64
DIRECT = [
    ("rtn", (1, 2, 3, 4, 8)),
    ("sign", (1,)),
    ("nf", (2, 3, 4)),
    ("petl", (1, 2, 3, 4)),
]
ALTERNATING = [("lloyd", (1, 2, 3, 4))]
GOAL = "0.5 GB/s each way for the direct codecs, and 0.025 GB/s for the others"


def main(*, quick: bool = False) -> str:
    """The table, as Markdown."""
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}  # before torch is imported
    sys.path.insert(0, str(ROOT))
    import torch

    from loratools.ops.coders import Plain, balanced, loraquant

    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    pairs = [(noise(SIDE, RANK), noise(RANK, SIDE)) for _ in range(TARGETS)]
    repeats = 3 if quick else 15
    copy = _rate(lambda: _all(lambda pair: [side.clone() for side in pair], pairs), repeats)
    rows = [["copy of the memory", "", f"{copy:.2f}", "", f"{copy:.2f}", ""]]

    def add(kind: str, bits: int | str, encode: Callable[[Any], Any], decode: Callable[[Any], Any], n: int) -> None:
        made = _all(encode, pairs)
        there = _rate(lambda: _all(encode, pairs), n)
        back = _rate(lambda: _all(decode, made), n)
        rows.append([kind, str(bits), *(c for rate in (there, back) for c in (f"{rate:.3f}", f"{rate / copy:.3f}"))])

    for kind, widths in (*DIRECT, *ALTERNATING):
        for bits in widths:
            coder = Plain(kind, bits, "group", GROUP)  # type: ignore[arg-type]
            add(kind, bits, lambda pair, c=coder: [_bytes(c.tensor(side, components_last=False)) for side in pair],
                lambda made: [_values(one) for one in made], repeats)  # fmt: skip
    few = max(1, repeats // 4)
    for name, bits, banded in (
        ("balanced, no sweeps", 2, balanced(2, group=GROUP, gauge="hadamard", sweeps=0)),
        ("balanced, 2 sweeps", 2, balanced(2, group=GROUP, gauge="hadamard", sweeps=2)),
        ("loraquant", 2, loraquant([1.0] * RANK, high_bits=2, energy=0.8)),
    ):
        add(name, bits, lambda pair, c=banded: [_bytes(one) for one in c.pair(pair[0].double(), pair[1].double())],
            lambda made: [_values(one) for one in made], few)  # fmt: skip
    add("grid, one step", "about 2", _on_grid, _off_grid, few)
    text = (
        f"{TARGETS} pairs of factors of {SIDE} x {RANK} in bf16, Gaussian, groups of {GROUP}; GB of those bf16 numbers "
        "a second, coded to bytes and decoded from them to float32, by the threads with which `loratools quantize` "
        f"works; each the fastest of {repeats} runs ({few} of those that decompose). lloyd, balanced and loraquant "
        "find scales and codes by turns or singular vectors first; one step of the grid is decomposition, rounding, "
        f"gains and deflating. Goal: {GOAL}."
    )
    header = ["codec", "bits", "encode GB/s", "of a copy", "decode GB/s", "of a copy"]
    return f"# Speed of the codecs\n\n{text}\n\n{table(header, rows)}"


def _all(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    from loratools.pipeline import ordered_map, worker_count

    return list(ordered_map(work, items, workers=worker_count("cpu")))


def _rate(work: Callable[[], object], repeats: int) -> float:
    least = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        least = min(least, time.perf_counter() - start)
    return TARGETS * 2 * SIDE * RANK * 2 / least / 1e9


def _bytes(coded: Coded) -> tuple[Coded, list[Tensor]]:
    assert isinstance(coded.parts, tuple)
    return coded, [part.coded.to_bytes() for part in coded.parts]


def _values(made: tuple[Coded, list[Tensor]]) -> Tensor:
    """From the bytes; of what was coded, only what an index tells of it is used."""
    from loratools.quant.codec import Part, from_bytes
    from loratools.storage.packed import Coded

    coded, data = made
    assert isinstance(coded.parts, tuple)
    parts = tuple(
        Part(part.start, from_bytes(one, part.coded.coding, *part.coded.codes.shape))
        for part, one in zip(coded.parts, data, strict=True)
    )
    return Coded(coded.shape, parts, coded.transposed).decode()


def _on_grid(pair: tuple[Tensor, Tensor]) -> list[Any]:
    from loratools.operators import LowRank
    from loratools.ops.gridding import components_of, on_grid
    from loratools.quant.grid import classes_of, collect, compress

    components = components_of(LowRank(pair[0].double(), pair[1].double())).single(1.0)
    step = float(components.s.mean()) / SIDE**0.5
    made = []
    for coded in on_grid(components, step):
        codes = coded.parts.codes  # type: ignore[union-attr] -- on a grid
        streams = collect(zip(classes_of(codes), codes, strict=True))
        made.append((coded, [compress(numbers) for numbers in streams.values()]))
    return made


def _off_grid(made: list[Any]) -> list[Tensor]:
    import torch

    from loratools.quant.grid import Gridded, expand
    from loratools.storage.packed import Coded

    out = []
    for coded, streams in made:
        numbers = torch.cat([expand(stream, data) for stream, data in streams])
        gridded = Gridded(numbers.reshape(coded.parts.codes.shape), coded.parts.scales)
        out.append(Coded(coded.shape, gridded, coded.transposed).decode())
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    print(main(quick=parser.parse_args().quick))
