"""Time one thing in a process of its own, and print tables of the results."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parent.parent
T = TypeVar("T")
CACHE = Path(os.environ.get("LORATOOLS_BENCH_CACHE", Path(tempfile.gettempdir()) / "loratools-bench"))


def of_size(few: T, full: T, large: T, *, quick: bool) -> T:
    """What fits the size that was asked for: `large` is for GPUs."""
    return few if quick else large if os.environ.get("LORATOOLS_BENCH_SIZE") == "large" else full


def cache_of(name: str, *settings: object) -> Path:
    """The folder of the cache that belongs to one benchmark with those settings."""
    told = json.dumps(settings, default=repr, sort_keys=True)
    folder = CACHE / name / hashlib.sha256(told.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def kept(place: Path, make: Callable[[], Any]) -> Any:
    """What a file of the cache holds as JSON, which is made where it is not there."""
    if not place.is_file():
        made = json.dumps(make())
        place.with_suffix(".tmp").write_text(made, encoding="utf-8")
        place.with_suffix(".tmp").replace(place)
    return json.loads(place.read_text(encoding="utf-8"))


def device() -> str:
    """Where models run."""
    return os.environ.get("LORATOOLS_BENCH_DEVICE", "cpu")


@dataclass(frozen=True)
class Run:
    """One run of one contestant, imports not counted in the seconds."""

    wall: float
    cpu: float
    peak: int  # bytes, the high-water mark of the resident set of the whole process
    note: str = ""


@contextmanager
def clock() -> Iterator[Callable[[], tuple[float, float]]]:
    """Yields a function that tells the wall and CPU seconds since the block was entered."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield lambda: (time.perf_counter() - wall, time.process_time() - cpu)


def report(wall: float, cpu: float, note: str = "") -> None:
    """What a contestant prints as its last line."""
    print(json.dumps(asdict(Run(wall, cpu, peak_memory(), note))))


def peak_memory() -> int:
    """Bytes; 0 where the kernel does not tell. ru_maxrss would not do: it is inherited from the parent process."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("VmHWM")), 0)


def in_own_process(script: Path, *arguments: str) -> Run:
    """Run `script` in a fresh Python; its last line of output is the result."""
    environment = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{script.name} {' '.join(arguments)} failed:\n{done.stderr}")
    return Run(**json.loads(done.stdout.splitlines()[-1]))


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def with_output(script: str, name: str, weights: Path) -> Run:
    """One run of the contestant `name` of `script`, which reads `weights`; its output is removed."""
    with tempfile.TemporaryDirectory(prefix="out-", dir=weights.parent.parent) as folder:
        return in_own_process(Path(script), "--contestant", name, str(weights), str(Path(folder) / "out.safetensors"))


def command_line(
    description: str | None, contestants: dict[str, Callable[[Path, Path], None]], main: Callable[..., str]
) -> None:
    """What a script does: be one contestant, for `with_output`, or print its table."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--contestant", choices=contestants)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("paths", nargs="*", type=Path)
    options = parser.parse_args()
    if options.contestant:
        contestants[options.contestant](*options.paths)
    else:
        print(main(quick=options.quick))


def interleaved(contestants: dict[str, Callable[[], Run]], repeats: int) -> dict[str, list[Run]]:
    """Every contestant once, then every one again, so that a busy minute of the machine falls on all of them."""
    runs: dict[str, list[Run]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, contestant in contestants.items():
            runs[name].append(contestant())
    return runs


def fastest(runs: Sequence[Run]) -> float:
    return min(run.wall for run in runs)


def median(runs: Sequence[Run]) -> float:
    return statistics.median(run.wall for run in runs)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it also reads well in a terminal."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [[*header], ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in lines)


def environment() -> str:
    """What the numbers depend on, without naming a machine."""
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cpu = f"{usable} cores of a shared {platform.machine()} server CPU"
    if device().startswith("cuda"):
        cpu = f"{torch.cuda.get_device_name(device())}, {cpu}"
    return f"{cpu}, Python {platform.python_version()}, torch {torch.__version__}"
