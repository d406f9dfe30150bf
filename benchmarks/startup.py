"""What the command line costs before any work: whole processes, from start to exit."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from contestants import ROOT, table
from synthetic import header_only


def seconds(command: list[str], repeats: int) -> list[float]:
    found = []
    # An installed package has its bytecode on disk, which this variable would keep from being written.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {"PYTHONPATH": ""}
    for _ in range(repeats + 1):  # the first one fills the caches and does not count
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=env)
        found.append(time.perf_counter() - start)
    return found[1:]


def main(*, quick: bool = False) -> str:
    """The table, as Markdown."""
    title = "### Starting up\n\n"
    program = Path(sys.executable).with_name("loratools")
    if not program.exists():
        return f"{title}Skipped: there is no command `loratools` beside this Python; `pip install -e .` makes it."
    repeats = 3 if quick else 10
    weights = header_only(1 << 30)
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "loratools --help": [str(program), "--help"],
        f"loratools info, file of {weights.stat().st_size / 1e9:.2f} GB": [str(program), "info", str(weights.parent)],
        "python -c 'import torch'": [sys.executable, "-c", "import torch"],
    }
    rows = []
    for label, command in commands.items():
        times = seconds(command, repeats)
        rows.append([label, f"{statistics.median(times):.2f}", f"{min(times):.2f}"])
    method = (
        f"Whole processes, {repeats} runs each after one that does not count. The file has 2048 tensors, of which only "
        "the header is read.\n\n"
    )
    return title + method + table(["", "median s", "fastest s"], rows)


if __name__ == "__main__":
    print(main(quick="--quick" in sys.argv))
