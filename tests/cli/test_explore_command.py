"""What the explorer decides without a screen, and the command that opens it."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import loratools
from loratools_cli.explorer.app import Explorer
from loratools_cli.explorer.chart import Cut, chart
from loratools_cli.explorer.choice import Choice, Mode
from loratools_cli.explorer.grouping import Branch
from loratools_cli.explorer.session import Session

Run = Callable[..., Any]
Make = Callable[..., Path]


# Logic without a screen


def test_a_choice_in_words_for_the_name() -> None:
    choice = Choice(most=16, rank=8)
    assert choice.tag == "r8"
    assert replace(choice, mode=Mode.ENERGY).tag == "e0.95"
    assert choice.with_own({"a": 3}).tag == "r8-own"
    assert choice.with_own({"a": 3}).without_own(["a"]) == choice
    assert [choice.moved_to(p).rank for p in (0.0, 0.5, 1.0)] == [1, 9, 16]
    assert all(replace(choice, rank=r).moved_to(replace(choice, rank=r).position).rank == r for r in range(1, 17))
    energy = replace(choice, mode=Mode.ENERGY)
    assert [energy.stepped(by).share for by in (-1, 1, 5, 99)] == [0.94, 0.96, 0.995, 1.0]


def test_a_chart_has_as_many_bars_left_of_the_cut_as_are_kept() -> None:
    values = [2.0**-i for i in range(10)]
    for keep in (1, 4, 9):
        rows = chart(values, 6 + 10 + 1, 9, cut=Cut(keep, keep))
        bottom = rows[-2][6:]
        assert [cell.role for cell in bottom] == ["kept"] * keep + ["mark"] + ["cut"] * (10 - keep)
        heights = [sum(rows[y][6 + i + (i >= keep)].sign != " " for y in range(8)) for i in range(10)]
        assert heights == sorted(heights, reverse=True)
        assert heights[0] == 8
    assert all(cell.sign == " " for row in chart([0.0, 0.0], 30, 6) for cell in row)
    for n in (1, 3, 24, 25, 300):
        assert {len(row) for row in chart([1.0 + 1 / (i + 1) for i in range(n)], 31, 5, cut=Cut(1, 2))} == {31}


def test_ranks_of_their_own_move_in_whole_steps(samples: Callable[[str], Path]) -> None:
    session = Session(loratools.load(samples("peft/lora_conv_grouped")))
    (target,) = (t for t, e in session.adapter.entries.items() if e.rank_step > 1)
    entry = session.adapter.entries[target]
    session.selected = Branch("target", "grouped", (target,))
    session.choice = session.choice.with_own({target: entry.rank_step})
    for steps in range(2, entry.rank // entry.rank_step + 1):
        session.choice = session.with_own(by=1)
        assert session.own_rank() == steps * entry.rank_step


# The command


def test_without_a_terminal(run: Run, peft: Make) -> None:
    done = run("explore", peft())
    assert done.code == 2
    assert "loratools inspect" in done.err
    assert len(done.err.splitlines()) == 1


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratools_cli.explore._has_screen", lambda: True)


def test_without_textual(run: Run, peft: Make, terminal: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [
        name for name in sys.modules if name.partition(".")[0] == "textual" or "loratools_cli.explorer" in name
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "textual", None)
    done = run("explore", peft())
    assert done.code == 4
    assert "pip install 'loratools[explore]'" in done.err


def test_what_cannot_be_opened_is_said_before_the_screen_is_taken(
    run: Run, terminal: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Explorer, "run", lambda self: pytest.fail("the screen was taken"))
    assert run("explore", tmp_path / "missing").code == 3


def test_the_command_opens_what_it_is_given(
    run: Run, peft: Make, terminal: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Session] = []
    monkeypatch.setattr(Explorer, "run", lambda self: seen.append(self.session))
    a, b = peft("a"), peft("b")
    assert run("explore", a, b / "adapter_model.safetensors", "--with", b).code == 0
    (session,) = seen
    assert session.base is not None
    assert session.other is not None
    assert len(session.pairs) == 6


def test_on_a_real_terminal(peft: Make) -> None:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "loratools_cli", "explore", str(peft())]
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    seen, limit = b"", time.monotonic() + 60

    def read() -> bytes:
        assert select.select([ours], [], [], limit - time.monotonic())[0], seen
        try:
            return os.read(ours, 65536)
        except OSError:  # the program has gone
            return b""

    try:
        while b"q_proj" not in seen:
            seen += read()
        os.write(ours, b"q")
        while chunk := read():
            seen += chunk
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert b"Traceback" not in seen
    assert b"\x1b[?1049l" in seen  # the screen is given back
