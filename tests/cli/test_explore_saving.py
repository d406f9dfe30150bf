"""Saving from the explorer, leaving it in the middle of things, and terminals of every size."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from explorer_driver import explore, explorer, of, saved, screen, settled, shown_error, slowed, until
from textual.pilot import Pilot
from textual.widgets import Checkbox, Input

import loratools
from loratools.ops.spectra import BATCH_BYTES
from loratools_cli.explorer.save_screen import SaveScreen
from loratools_cli.explorer.session import Session

Make = Callable[..., Path]

ROOT = Path(__file__).resolve().parents[2]


# Saving


def test_the_saved_copy_is_what_squeeze_writes(peft: Make, tmp_path: Path) -> None:
    source = peft()

    async def steps(pilot: Pilot[None]) -> None:
        await pilot.press("left", "s")
        await pilot.pause()
        assert saved(pilot).query_one("#path", Input).value == str(tmp_path / "adapter.r3")
        await pilot.press("enter")
        await until(pilot, lambda: saved(pilot).report is not None)
        text = screen(pilot)
        report = loratools.squeeze_file(loratools.load(source), tmp_path / "wanted", 3)[1]
        assert f"error as stored {shown_error(float(report.total['relative_error']))}" in text
        await pilot.press("enter")  # Close has the focus
        await pilot.pause()
        assert not isinstance(pilot.app.screen, SaveScreen)

    explore(of(source), steps)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "adapter.r3" / name).read_bytes() == (tmp_path / "wanted" / name).read_bytes()


def test_ranks_of_their_own_are_saved(kohya: Make, tmp_path: Path) -> None:
    source = kohya()

    async def steps(pilot: Pilot[None]) -> None:
        await pilot.press("down", "down", "o", "left", "left", "s")
        await pilot.pause()
        expected = explorer(pilot).session.preview
        await pilot.press("enter")
        await until(pilot, lambda: saved(pilot).report is not None)
        assert expected.bytes_after == (tmp_path / "lora.r4-own.safetensors").stat().st_size

    app = explore(of(source), steps)
    (own,) = app.session.choice.own
    ranks = {t: e.rank for t, e in loratools.load(tmp_path / "lora.r4-own.safetensors").entries.items()}
    assert ranks == dict.fromkeys(ranks, 4) | {own: 2}


def test_nothing_is_overwritten_unless_confirmed(peft: Make, tmp_path: Path) -> None:
    source = peft()
    (tmp_path / "adapter.r4").mkdir()
    taken = tmp_path / "adapter.r4" / "adapter_model.safetensors"
    taken.write_bytes(b"precious")

    async def steps(pilot: Pilot[None]) -> None:
        await pilot.press("s")
        await pilot.pause()
        await pilot.press("enter")
        await pilot.pause()
        assert "exists already" in saved(pilot).problem
        assert "exists already" in screen(pilot)
        assert taken.read_bytes() == b"precious"
        await pilot.press("tab", "space")
        assert saved(pilot).query_one("#force", Checkbox).value
        await pilot.press("tab", "enter")
        await until(pilot, lambda: saved(pilot).report is not None)

    explore(of(source), steps)
    assert len(loratools.load(tmp_path / "adapter.r4")) == 6


@pytest.mark.parametrize("name", ["", "no/such/[folder]/x", "adapter/adapter_model.safetensors", "~nobody_here/x"])
def test_a_failed_save_is_a_message(peft: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    source = peft()
    monkeypatch.chdir(tmp_path)
    before = source.joinpath("adapter_model.safetensors").read_bytes()
    (tmp_path / "no").write_text("a file, so no folder can be made here")

    async def steps(pilot: Pilot[None]) -> None:
        await pilot.press("s")
        await pilot.pause()
        saved(pilot).query_one("#path", Input).value = name
        await pilot.press("enter")
        await until(pilot, lambda: bool(saved(pilot).problem))
        assert "Traceback" not in screen(pilot)
        await pilot.press("escape")
        await pilot.pause()
        assert not isinstance(pilot.app.screen, SaveScreen)

    explore(of(source), steps)
    assert {p.name for p in tmp_path.iterdir()} == {"adapter", "no"}
    assert source.joinpath("adapter_model.safetensors").read_bytes() == before


def test_a_save_can_be_stopped(peft: Make, tmp_path: Path) -> None:
    gate = threading.Event()
    session = Session(slowed(loratools.load(peft(n_layers=20)), gate, 0.05))

    async def steps(pilot: Pilot[None]) -> None:
        await pilot.press("s")
        await pilot.pause()
        gate.set()
        await pilot.press("enter")
        await pilot.pause(0.1)
        assert "writing" in screen(pilot)
        await pilot.press("escape")
        await until(pilot, lambda: bool(saved(pilot).problem))
        assert "stopped" in saved(pilot).problem
        gate.clear()
        await pilot.press("escape")

    explore(session, steps)
    assert {p.name for p in tmp_path.iterdir()} == {"adapter"}


# Opening, leaving, and the sizes of terminals


def test_the_tree_is_there_before_anything_is_read(peft: Make) -> None:
    hold = threading.Event()

    def held(read: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: (hold.wait(20), read())[1]

    adapter = loratools.load(peft())
    adapter = replace(adapter, entries={t: replace(e, read=held(e.read)) for t, e in adapter.entries.items()})

    async def steps(pilot: Pilot[None]) -> None:
        await pilot.press("down", "down", "left")
        await pilot.pause()
        text = screen(pilot)
        hold.set()
        assert "q_proj" in text
        assert "8→3" in text
        assert "measuring" in text
        await settled(pilot)
        assert "6 measured" in screen(pilot)

    explore(Session(adapter), steps, settle=False)


def test_quitting_while_measuring(peft: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    gate.set()
    monkeypatch.setitem(BATCH_BYTES, "cpu", 8000)
    session = Session(slowed(loratools.load(peft(n_layers=200)), gate, 0.02))

    async def steps(pilot: Pilot[None]) -> None:
        await until(pilot, lambda: session.done > 0)
        await pilot.press("q")

    began = time.monotonic()
    app = explore(session, steps, settle=False)
    assert app.return_code == 0
    assert session.done < 300
    assert time.monotonic() - began < 600 * 0.02


@pytest.mark.parametrize("size", [(80, 24), (160, 50), (60, 16), (30, 8)])
def test_sizes_of_terminals(size: tuple[int, int]) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        await pilot.press("down", "down")
        await pilot.resize_terminal(*size)
        await pilot.pause(0.1)
        text = screen(pilot)
        assert max(map(len, text.splitlines())) <= size[0]
        assert len(text.splitlines()) <= size[1]
        if size[0] < 80:
            return
        for essential in (
            "smollm2-en-r8", "210 targets", "210 measured", "layer 0", "down_proj", "8→4", "576×1536", "bf16",
            "model.layers.0.mlp.down_proj", "effective", "stable", "rank 4", "4.94 MB → 2.50 MB", "energy", "error",
            "210 of 210 targets", "Save", "Filter", "Help", "q Quit", "█", "│",
        ):  # fmt: skip
            assert essential in text, essential

    explore(of(ROOT / "examples" / "smollm2-en-r8"), steps)


def test_help_and_light(peft: Make) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        await pilot.press("question_mark")
        await pilot.pause()
        assert "half and twice the rank" in screen(pilot)
        await pilot.press("escape", "d")
        await pilot.pause()
        assert not pilot.app.current_theme.dark
        assert "q_proj" in screen(pilot)

    explore(of(peft()), steps)
