"""Stopped at any moment: the destination is absent or complete, and nothing else is left."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import loratools
from loratools_cli.app import main
from loratools_cli.interrupts import Interrupts, resumable

Make = Callable[..., Path]
Spawn = Callable[..., "subprocess.Popen[str]"]

STORAGE = "/loratools/storage/"
BETWEEN = ("__enter__", "__exit__", "abort", "_remove")  # too short for a signal, and no place to unwind from


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def wait_for_temporary(folder: Path, process: subprocess.Popen[str]) -> None:
    while process.poll() is None and not hidden(folder):
        time.sleep(0.001)


@pytest.fixture
def large(peft: Make) -> Path:
    """Some 50 MB, so that writing takes a while."""
    return peft("in", rank=64, n_layers=64, size=512)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delay", [None, 0.0, 0.05, 0.2])
def test_a_signal_leaves_nothing_behind(
    spawn: Spawn, large: Path, tmp_path: Path, number: signal.Signals, delay: float | None
) -> None:
    process = spawn("squeeze", large, "--rank", 48)
    if delay is None:
        time.sleep(0.5)  # importing or reading
    else:
        wait_for_temporary(tmp_path, process)
        time.sleep(delay)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert hidden(tmp_path) == []
    if process.returncode == 0:  # it was faster
        assert len(loratools.load(tmp_path / "in.r48")) == 192
    else:
        assert (process.returncode, out, err) == (130, "", "interrupted\n")
        assert not (tmp_path / "in.r48").exists()


@pytest.mark.parametrize("delay", [0.0, 0.1, 0.4])
def test_a_kill_leaves_the_destination_absent_or_complete(
    spawn: Spawn, large: Path, tmp_path: Path, delay: float
) -> None:
    process = spawn("squeeze", large, "--rank", 48)
    wait_for_temporary(tmp_path, process)
    time.sleep(delay)
    process.kill()
    process.communicate(timeout=60)
    if (tmp_path / "in.r48").exists():
        assert len(loratools.load(tmp_path / "in.r48")) == 192
        assert (tmp_path / "in.r48" / "adapter_config.json").is_file()


def interrupted_at(step: int, arguments: list[str]) -> bool:
    """Run with a KeyboardInterrupt at the given line event in the code that writes; whether it came to that."""
    count = 0

    def local(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if event == "line":
            count += 1
            if count == step:
                raise KeyboardInterrupt
        return local

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        return local if STORAGE in code.co_filename and code.co_name not in BETWEEN else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        main(arguments)
    finally:
        sys.settrace(before)
    return count >= step


def steps() -> Iterator[int]:
    """Dense at first, then ever sparser."""
    step = 1.0
    while True:
        yield int(step)
        step = max(step + 1, step * 1.1)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["peft", "kohya"])
@pytest.mark.parametrize("replace", [False, True])
def test_every_line_of_writing_may_be_the_last(
    peft: Make, kohya: Make, tmp_path: Path, kind: str, replace: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    source = peft("in", n_layers=1) if kind == "peft" else kohya("in.safetensors", n_layers=1)
    place = tmp_path / ("out" if kind == "peft" else "out.safetensors")
    arguments = ["squeeze", str(source), "--rank", "2", "-o", str(place), "--force"]
    if replace:
        assert main(["squeeze", str(source), "--rank", "4", "-o", str(place)]) == 0
    for step in steps():
        if not interrupted_at(step, arguments):
            break
        assert hidden(tmp_path) == [], f"after step {step}"
        if place.exists():
            ranks = {entry.rank for entry in loratools.load(place).entries.values()}
            assert ranks <= {2, 4}
        assert place.exists() or not replace, f"lost at step {step}"
    assert step > 100


def test_the_exit_status_is_ours_whatever_was_interrupted(tmp_path: Path) -> None:
    (tmp_path / "interrupted_in_exec.py").write_text(
        "import signal, sys\n"
        "from loratools_cli import app\n"
        "app._run = lambda arguments: exec('signal.raise_signal(signal.SIGINT)')\n"
        "sys.exit(app.main([]))\n"
    )
    command = [sys.executable, "-m", "interrupted_in_exec"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_repeats_within_two_seconds_do_not_disturb_the_cleaning_up() -> None:
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    assert interrupts.received
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_who_interrupts_what_can_be_resumed_is_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), resumable():
        raise KeyboardInterrupt
    assert "--resume goes on" in capsys.readouterr().err
    with resumable():
        pass
    assert capsys.readouterr().err == ""
