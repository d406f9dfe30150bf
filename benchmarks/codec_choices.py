"""Whether each choice of the codecs lowers the error of real adapters in files of equal bytes."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from contestants import ROOT, table

if TYPE_CHECKING:
    from loratools import Quantize
    from loratools.adapter import Adapter
    from loratools.quant.gauges import Gauge

ADAPTERS = {"en_lora_r64": 10, "en_lora_r8": 3}  # every so many of their targets
GAUGES: tuple[Gauge, ...] = ("svd", "hadamard", "random", "learned")


def main(*, quick: bool = False) -> str:
    """The tables, as Markdown."""
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}  # before torch is imported
    sys.path.append(str(ROOT / "tests"))
    from real.smollm2 import missing

    title = "# What the choices of the codecs are worth"
    if reason := missing():
        return f"{title}\n\nSkipped: {reason}."
    with tempfile.TemporaryDirectory() as folder:
        return f"{title}\n\n{_choices(Path(folder), step=2 if quick else 1)}"


def _choices(folder: Path, *, step: int) -> str:
    import loratools
    from loratools import Quantize

    rows = []
    for name, every in ADAPTERS.items():
        whole = loratools.load(_place(name))
        adapter = replace(whole, entries=dict(list(whole.entries.items())[:: every * step]))

        def add(choice: str, results: dict[str, tuple[int, float]], name: str = name) -> None:
            least = min(error for _, error in results.values())
            for what, (size, error) in results.items():
                shown = f"**{error:.4f}**" if error <= least * 1.0005 else f"{error:.4f}"
                rows.append([name, choice, what, f"{size:,}", shown])

        def run(options: Quantize, adapter: Adapter = adapter) -> tuple[int, float]:
            saved, report = loratools.quantize_file(adapter, folder / "out", options, force=True)
            return saved.nbytes, float(report.total["relative_error"] or 0.0)

        base = Quantize("balanced", 2)
        for bits in (1, 2, 4):
            found = {gauge: run(replace(base, bits=bits, gauge=gauge)) for gauge in GAUGES}
            add(f"gauge, {bits} bits", found)
        sweeps = {s: run(replace(base, sweeps=s)) for s in (0, 2, 4)}
        add("sweeps of least squares, 2 bits", {str(s): r for s, r in sweeps.items()})
        twice = run(replace(base, bits=1, rounds=2, group=128))
        add("rounds, as many bytes", {"2 bits": sweeps[2], "1 + 1 bits": twice})
        size = sweeps[2][0]
        others = {m: run(Quantize(m, 2)) for m in ("rtn", "lloyd", "nf", "petl", "loraquant")}
        on = run(Quantize(budget=size))
        with mock.patch("loratools.storage.packed.compress", _stored):
            off = run(Quantize(budget=size))
        add("deflating, a grid of as many bytes", {"on": on, "off": off})
        add("grid against all of 2 bits", {"grid": on, "balanced": sweeps[2], **others})
    text = (
        "Relative Frobenius error of the whole delta. en_lora_r64: every tenth target of the LoRA of rank 64 on all "
        "linear layers of SmolLM2-135M-Instruct; en_lora_r8: every third of the one of rank 8. Within each group of "
        "rows files have the same size but where the bytes say otherwise; the least error is in bold. 1 + 1 bits: two "
        "rounds of signs in groups of 128, whose scales take what those of one round of 2 bits take in groups of 64. "
        "Deflating off: the same container, streams of whole numbers stored as they are."
    )
    return f"{text}\n\n" + table(["adapter", "choice", "", "bytes", "error"], rows)


def _stored(numbers: Any) -> Any:
    """As `compress`, without deflating."""
    from loratools.quant.grid import compress

    made: list[Callable[..., Any]] = [zlib.compressobj]

    def level_0(level: int, *rest: Any) -> Any:
        return made[0](0, *rest)

    with mock.patch("loratools.quant.grid.zlib.compressobj", level_0):
        return compress(numbers)


def _place(name: str) -> Path:
    from real.smollm2 import ADAPTERS

    return ADAPTERS / name


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    sys.path.insert(0, str(ROOT))
    print(main(quick=parser.parse_args().quick))
