"""Sinks in a process of their own: killed, interrupted, out of room; and what they need of memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120, **options)


LIMITED = """
import resource, signal, sys, torch
from loratools.errors import OutputError
from loratools.storage import SafetensorsSink
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (99_400, 99_400))
try:
    with SafetensorsSink(sys.argv[1], reserve=int(sys.argv[2])) as sink:
        for i in range(10):
            sink.write(str(i), torch.zeros(2_475))
        sink.commit({})
except OutputError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("reserve", [0, 2000, 8192])
def test_the_limit_on_the_file_size_is_like_a_full_disk(tmp_path: Path, reserve: int) -> None:
    (tmp_path / "x").write_bytes(b"old")
    done = run_python(LIMITED, tmp_path / "x", reserve)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{tmp_path / 'x'}: cannot be written: the file would exceed the size limit")
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


SLOW = """
import os, sys, time, torch
from loratools.storage import SafetensorsSink
with SafetensorsSink(sys.argv[1], reserve=64) as sink:
    for i in range(50):
        sink.write(str(i), torch.full((50_000,), float(i)))
    if sys.argv[2] == "write":
        print("now", flush=True); time.sleep(60)
    for call in ("pread", "fsync", "replace"):
        if call == sys.argv[2]:
            setattr(os, call, lambda *a: (print("now", flush=True), time.sleep(60)))
    sink.commit({})
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("moment", ["write", "pread", "fsync", "replace"])
def test_a_killed_process_leaves_the_destination_as_it_was(tmp_path: Path, moment: str, number: int) -> None:
    (tmp_path / "x").write_bytes(b"old")
    command = [sys.executable, "-c", SLOW, str(tmp_path / "x"), moment]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        process.send_signal(number)
        assert process.wait(60) != 0
    assert (tmp_path / "x").read_bytes() == b"old"
    others = [name for name in os.listdir(tmp_path) if name != "x"]
    if number == signal.SIGINT:
        assert others == []
    assert all(name.startswith(".x.") and name.endswith(".tmp") for name in others)


def test_a_process_killed_at_any_time_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
    code = """
import sys, torch
from loratools.storage import SafetensorsSink
print("now", flush=True)
for turn in range(100_000):
    with SafetensorsSink(sys.argv[1], reserve=turn % 2 * 300) as sink:
        sink.write("turn", torch.full((20_000,), turn))
        sink.commit({})
"""
    for delay in (0.05, 0.11, 0.17):
        command = [sys.executable, "-c", code, str(tmp_path / "x")]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            deadline = time.monotonic() + 30
            while not (tmp_path / "x").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(delay)
            process.kill()
            process.wait(60)
        turn = load_file(tmp_path / "x")["turn"]
        assert turn.shape == (20_000,)
        assert turn.min() == turn.max()


def test_no_more_than_one_tensor_is_held(tmp_path: Path) -> None:
    code = """
import resource, sys, torch
from loratools.storage import SafetensorsSink
with SafetensorsSink(sys.argv[1]) as warm:
    warm.write("x", torch.zeros(4_000_000))
    warm.commit({})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with SafetensorsSink(sys.argv[1]) as sink:
    for i in range(20):
        sink.write(str(i), torch.full((4_000_000,), float(i)))
    sink.commit({})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    # A fixed threshold: else freed blocks of this size stay on a heap that small ones keep from shrinking.
    done = run_python(code, tmp_path / "x", env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"})
    assert int(done.stdout) * 1024 < 2 * 16_000_000, done
