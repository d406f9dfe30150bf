"""How long an adapter takes to get into a weight and out again: SHiRA's entries against a LoRA of as many numbers."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

from contestants import table

SIDES = (4096, 1024)
RANK = 32  # PEFT's default for SHiRA: as many numbers as a LoRA of this rank
THREADS = 2


def seconds(contestants: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Medians; every contestant once, then every one again."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + 2):
        for name, contestant in contestants.items():
            start = time.perf_counter()
            contestant()
            if turn > 1:  # the first ones fill the caches
                found[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in found.items()}


def measured(side: int, dtype_name: str, repeats: int) -> list[str]:
    """One row of the table."""
    import torch

    from loratools.adapter import Adapter, entry_of
    from loratools.families import SHiRA
    from loratools.families.base import Layout
    from loratools.formats.native import Described, Native
    from loratools.training.switch import Switch

    dtype = getattr(torch, dtype_name)
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(side, side, bias=False).to(dtype).requires_grad_(False)
    model = torch.nn.ModuleDict({"linear": linear})
    weight, first = linear.weight, linear.weight.clone()
    up, down = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((side, RANK), (RANK, side)))
    count = RANK * 2 * side
    places = torch.randperm(side * side, generator=generator)[:count].sort().values
    indices = torch.stack([places // side, places % side]).int()
    update = SHiRA(torch.randn(count, generator=generator), indices, 1.0, Layout(shape=(side, side)))
    slots = tuple(update.parameters())
    dialect = Native.of({"linear": Described(update.layout)}, {"linear": slots}, {"linear": "linear.weight"})
    switch = Switch.of(model, Adapter(dialect, {"linear": entry_of(update)}, {}, {}))
    times = seconds(
        {
            "as PEFT": lambda: weight.add_((up @ down) * 1.0),
            "as PEFT, off": lambda: weight.sub_((up @ down) * 1.0),
            "one product": lambda: weight.addmm_(up, down),
            "one product, off": lambda: weight.addmm_(up, down, alpha=-1),
        },
        repeats,
    )
    drift = int((weight != first).sum())
    weight.copy_(first)
    times |= seconds({"SHiRA": switch.apply, "SHiRA, off": switch.undo}, repeats)
    assert torch.equal(weight, first)
    both = {name: times[name] + times[f"{name}, off"] for name in ("as PEFT", "one product", "SHiRA")}
    shown = [f"{1000 * times[name]:.2f} + {1000 * times[f'{name}, off']:.2f}" for name in both]
    return [
        f"{side} x {side}, {dtype_name}",
        *shown,
        f"{both['as PEFT'] / both['SHiRA']:.1f}x",
        f"{both['one product'] / both['SHiRA']:.1f}x",
        f"{100 * drift / first.numel():.0f} %",
    ]


def main(*, quick: bool = False) -> str:
    """The table, as Markdown."""
    import torch

    torch.set_num_threads(THREADS)
    repeats = 5 if quick else 51
    rows = [measured(side, dtype, repeats) for side in SIDES for dtype in ("float32", "bfloat16")]
    head = [
        "weight",
        "LoRA as PEFT, ms",
        "LoRA in one product, ms",
        "SHiRA, ms",
        "than PEFT's LoRA",
        "than one product",
        "LoRA leaves changed",
    ]
    method = (
        f"One weight on the CPU with {THREADS} threads. A LoRA of rank {RANK} is added and subtracted as PEFT merges "
        f"it, `W += (B A) s`, and by one product into the weight, `addmm_`; SHiRA has as many numbers, {RANK} (m + n) "
        "entries at random places, and `loratools.Switch` puts them on, and back the very bits of before. Medians of "
        f"{repeats} turns, on + off in milliseconds, and how many times faster SHiRA's way there and back is. The last "
        "column says how many of the weights a LoRA left other than they were at first.\n\n"
    )
    return "# Switching adapters in a running model\n\n" + method + table(head, rows)


if __name__ == "__main__":
    print(main(quick="--quick" in sys.argv))
