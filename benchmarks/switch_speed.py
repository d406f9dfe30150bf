"""How long an adapter takes to get into a weight and out again: SHiRA's entries against a LoRA of as many numbers."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from contestants import table

SIDES = {4096: 6, 1024: 48}  # of the weights, and how many: more than caches hold, as in a model
RANKS = (8, 32)  # PEFT's defaults for LoRA and for SHiRA, which has as many numbers as a LoRA of its r
THREADS = 2


def seconds(contestants: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """The fastest of each, as others use the machine too; every contestant once, then every one again."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + 2):
        for name, contestant in contestants.items():
            start = time.perf_counter()
            contestant()
            if turn > 1:  # the first ones fill the caches
                found[name].append(time.perf_counter() - start)
    return {name: min(times) for name, times in found.items()}


def measured(side: int, rank: int, dtype_name: str, repeats: int) -> list[str]:
    """One row of the table."""
    import torch

    from loratools.adapter import Adapter, entry_of
    from loratools.families import SHiRA
    from loratools.families.base import Layout
    from loratools.formats.native import Described, Native
    from loratools.training.switch import Switch

    dtype = getattr(torch, dtype_name)
    generator = torch.Generator().manual_seed(0)
    names = [f"layer{i}" for i in range(SIDES[side])]
    model = torch.nn.ModuleDict({name: torch.nn.Linear(side, side, bias=False) for name in names})
    model = model.to(dtype).requires_grad_(False)
    weights = [model[name].weight for name in names]
    first = [weight.clone() for weight in weights]
    up, down = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((side, rank), (rank, side)))
    updates = {}
    for name in names:
        places = torch.randperm(side * side, generator=generator)[: rank * 2 * side].sort().values
        indices = torch.stack([places // side, places % side]).int()
        values = torch.randn(len(places), generator=generator)
        updates[name] = SHiRA(values, indices, 1.0, Layout(shape=(side, side)))
    described = {name: Described(update.layout) for name, update in updates.items()}
    slots = {name: tuple(update.parameters()) for name, update in updates.items()}
    dialect = Native.of(described, slots, {})
    switch = Switch.of(model, Adapter(dialect, {name: entry_of(u) for name, u in updates.items()}, {}, {}))

    def merged(sign: float) -> None:
        for weight in weights:
            weight.add_((up @ down) * sign)

    def product(sign: float) -> None:
        for weight in weights:
            weight.addmm_(up, down, alpha=sign)

    lora = {
        "as PEFT": lambda: merged(1.0),
        "as PEFT, off": lambda: merged(-1.0),
        "one product": lambda: product(1.0),
        "one product, off": lambda: product(-1.0),
    }
    times = seconds(lora, repeats)
    drift = sum(int((weight != before).sum()) for weight, before in zip(weights, first, strict=True))
    for weight, before in zip(weights, first, strict=True):
        weight.copy_(before)
    times |= seconds({"SHiRA": switch.apply, "SHiRA, off": switch.undo}, repeats)
    assert all(torch.equal(weight, before) for weight, before in zip(weights, first, strict=True))
    both = {name: times[name] + times[f"{name}, off"] for name in ("as PEFT", "one product", "SHiRA")}
    each = 1000 / len(names)
    return [
        f"{side} x {side}, {dtype_name}",
        f"{rank}",
        *(f"{each * times[name]:.2f} + {each * times[f'{name}, off']:.2f}" for name in both),
        f"{both['as PEFT'] / both['SHiRA']:.1f}x",
        f"{both['one product'] / both['SHiRA']:.1f}x",
        f"{100 * drift / (len(names) * side * side):.0f} %",
    ]


def main(*, quick: bool = False) -> str:
    """The table, as Markdown."""
    import torch

    torch.set_num_threads(THREADS)
    repeats = 3 if quick else 9
    dtypes = ("float32", "bfloat16")
    rows = [measured(side, rank, dtype, repeats) for side in SIDES for dtype in dtypes for rank in RANKS]
    head = [
        "weight",
        "r",
        "LoRA as PEFT, ms",
        "LoRA in one product, ms",
        "SHiRA, ms",
        "than PEFT's LoRA",
        "than one product",
        "LoRA leaves changed",
    ]
    method = (
        f"A model of {' or '.join(f'{n} weights of {side} x {side}' for side, n in SIDES.items())}, more than caches "
        f"hold, on the CPU with {THREADS} threads. A LoRA of rank r is added and subtracted as PEFT merges it, "
        "`W += (B A) s`, and by one product into the weight, `addmm_`; SHiRA has as many numbers, r (m + n) entries at "
        "random places, and `loratools.Switch` puts them on, and back the very bits of before. The fastest of "
        f"{repeats} turns, on + off in milliseconds a weight, and how many times faster SHiRA's way there and back is. "
        "The last column says how many of the weights a LoRA left other than they were at first.\n\n"
    )
    return "# Switching adapters in a running model\n\n" + method + table(head, rows)


if __name__ == "__main__":
    print(main(quick="--quick" in sys.argv))
