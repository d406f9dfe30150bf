"""How near a conversion comes to merely reading the file and writing one of the same size."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from contestants import clock, command_line, fastest, interleaved, median, report, sync, table, with_output
from synthetic import flux_like

GOAL = "at most 1.5 times the time of reading the file and writing it"


def floor(weights: Path, output: Path) -> None:
    """Read every tensor and write it again."""
    import torch  # noqa: F401
    from safetensors import safe_open
    from safetensors.torch import save_file

    with clock() as elapsed:
        with safe_open(weights, "pt") as file:
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 -- not a mapping
        save_file(tensors, output, metadata={"format": "pt"})
        sync(output)
        wall, cpu = elapsed()
    report(wall, cpu)


def diffusers(weights: Path, output: Path) -> None:
    _convert(weights, output, "diffusers")


def comfy(weights: Path, output: Path) -> None:
    _convert(weights, output, "comfy")


def _convert(weights: Path, output: Path, to: str) -> None:
    """File to file, as the command line does it: atomic, hashed, every key accounted for."""
    import torch  # noqa: F401

    from loratools.files import load
    from loratools.ops.convert import convert_file

    with clock() as elapsed:
        saved, _ = convert_file(load(weights), output, to)
        wall, cpu = elapsed()
    report(wall, cpu, str(saved.nbytes))


CONTESTANTS = {f.__name__: f for f in (floor, diffusers, comfy)}
NAMES = {
    "floor": "read all, write all",
    "diffusers": "loratools convert --to diffusers",
    "comfy": "loratools convert --to comfy",
}


def main(*, quick: bool = False) -> str:
    """The table, as Markdown."""
    repeats = 3 if quick else 9
    weights = flux_like()
    size = len(weights.read_bytes())  # into the page cache
    runs = interleaved({name: partial(with_output, __file__, name, weights) for name in NAMES}, repeats)
    base, base_median = fastest(runs["floor"]), median(runs["floor"])
    rows = []
    for name, label in NAMES.items():
        own = runs[name]
        written = int(own[0].note or size)
        numbers = (fastest(own) / base, median(own) / base_median, fastest(own), min(r.cpu for r in own))
        rows.append([label, f"{written / 1e6:.0f}", *(f"{x:.2f}" for x in numbers)])
    method = (
        f"A kohya LoRA on all linear layers of FLUX's blocks, bf16 ({size / 1e6:.0f} MB), synthetic. diffusers has q, "
        "k and v apart, each with its copy of the down factor, so that file is larger. Fresh process each, "
        f"{repeats} interleaved repeats, the fastest unless a column says medians; imports outside the seconds, input "
        f"in the page cache, output synced to disk. Goal: {GOAL}."
    )
    header = ["", "MB written", "× read and write", "×, medians", "s", "CPU s"]
    return f"### Converting an image model's adapter\n\n{method}\n\n{table(header, rows)}"


if __name__ == "__main__":
    command_line(__doc__, CONTESTANTS, main)
