"""The explorer, driven by keys as a user does; what it shows is judged by numpy and by what squeezing writes."""

from __future__ import annotations

import asyncio
import html
import json
import math
import os
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from textual.pilot import Pilot
from textual.widgets import Checkbox, Input

import loratools
from loratools.adapter import Adapter
from loratools.ops.spectra import BATCH_BYTES
from loratools.sizes import format_size
from loratools_cli.explorer.app import Explorer
from loratools_cli.explorer.chart import Cut, chart
from loratools_cli.explorer.choice import Choice, Mode
from loratools_cli.explorer.grouping import matching
from loratools_cli.explorer.save_screen import SaveScreen
from loratools_cli.explorer.session import Session
from loratools_cli.explorer.slider import Slider

Run = Callable[..., Any]
Make = Callable[..., Path]
Steps = Callable[[Pilot[None]], Awaitable[None]]

ROOT = Path(__file__).resolve().parents[2]


def explore(session: Session, steps: Steps, *, size: tuple[int, int] = (100, 30), settle: bool = True) -> Explorer:
    """Run the app without a terminal, and the steps once everything is measured."""
    app = Explorer(session)

    async def drive() -> None:
        async with app.run_test(size=size) as pilot:
            if settle:
                await settled(pilot)
            await steps(pilot)

    asyncio.run(drive())
    return app


def of(path: Path, other: Path | None = None, base: Path | None = None) -> Session:
    return Session(
        loratools.load(path),
        None if base is None else loratools.load_base(base),
        None if other is None else loratools.load(other),
    )


async def until(pilot: Pilot[None], holds: Callable[[], bool]) -> None:
    limit = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < limit, "it never came"
        await pilot.pause(0.02)
    await pilot.pause()


async def settled(pilot: Pilot[None]) -> None:
    app = explorer(pilot)
    await until(pilot, lambda: app.session.done >= app.session.work and not app._is_due)


def explorer(pilot: Pilot[None]) -> Explorer:
    assert isinstance(pilot.app, Explorer)
    return pilot.app


def screen(pilot: Pilot[None]) -> str:
    """What stands on the screen, line by line."""
    rows: dict[int, dict[int, str]] = {}
    for x, row, text in re.findall(
        r'<text[^>]* x="([\d.]+)"[^>]*clip-path="url\(#[^)]*-line-(\d+)\)"[^>]*>([^<]*)</text>',
        pilot.app.export_screenshot(),
    ):
        rows.setdefault(int(row), {})[round(float(x) / 12.2)] = html.unescape(text).replace("\xa0", " ").rstrip("\n")
    lines = []
    for row in sorted(rows):
        line = ""
        for x in sorted(rows[row]):
            line = line.ljust(x) + rows[row][x]
        lines.append(line)
    return "\n".join(lines)


def naive(source: Path) -> dict[str, np.ndarray]:
    """Target -> singular values of the dense delta; the scale of the test adapters is 2."""
    stored = load_file(source / "adapter_model.safetensors")
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): np.linalg.svd(
            2 * stored[key.replace("lora_A", "lora_B")].double().numpy() @ down.double().numpy()
        )[1]
        for key, down in stored.items()
        if ".lora_A." in key
    }


def error_at(spectra: list[np.ndarray], rank: int) -> float:
    return math.sqrt(sum((s[rank:] ** 2).sum() for s in spectra) / sum((s**2).sum() for s in spectra))


def shown_error(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")


# Numbers


def test_moving_the_rank_shows_the_right_numbers(peft: Make, tmp_path: Path) -> None:
    source = peft()
    spectra = naive(source)
    first = next(iter(spectra))

    async def steps(pilot: Pilot[None]) -> None:
        await pilot.press("down", "down")
        for key, rank in (("left", 3), ("left", 2), ("]", 4), ("right", 5), ("[", 3), ("shift+right", 6)):
            await pilot.press(key)
            await pilot.pause()
            _, report = loratools.squeeze_file(loratools.load(source), tmp_path / "out", rank, force=True)
            size = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
            text = screen(pilot)
            assert f"rank {rank} " in text
            before = (source / "adapter_model.safetensors").stat().st_size
            assert f"{format_size(before)} → {format_size(size)}" in text
            change = report.targets[first]
            assert f"{format_size(change.bytes_before)} → {format_size(change.bytes_after)}" in text
            (line,) = (line for line in text.splitlines() if re.match(r"\W*error ", line))
            wanted = [
                shown_error(error_at(list(spectra.values()), rank)),
                shown_error(error_at([spectra[first]], rank)),
            ]
            assert re.findall(r"[\d.]+(?:e-\d+)?", line) == wanted
            assert explorer(pilot).session.preview.bytes_after == size
            assert f"8→{rank}" in text

    explore(of(source), steps)


def test_rank_limits(peft: Make) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        await pilot.press(*["left"] * 9)
        await pilot.pause()
        assert "rank 1 " in screen(pilot)
        await pilot.press(*["]"] * 5)
        await pilot.pause()
        assert "rank 8 " in screen(pilot)
        assert "0 of 6 targets get a lower rank" in screen(pilot)
        await pilot.press("s")
        await pilot.pause()
        assert not isinstance(pilot.app.screen, SaveScreen)
        assert [n.message for n in pilot.app._notifications] == ["no target would get a lower rank; lower it first"]

    explore(of(peft()), steps)


def test_energy_and_ranks_of_their_own(peft: Make) -> None:
    source = peft()
    kept = {t: np.cumsum(s**2) / (s**2).sum() for t, s in naive(source).items()}

    async def steps(pilot: Pilot[None]) -> None:
        session = explorer(pilot).session
        await pilot.press("m")
        await pilot.pause()
        assert "energy 95.0 %" in screen(pilot)
        for target, one in session.preview.targets.items():
            assert one.rank_after == int(np.argmax(kept[target] >= 0.95)) + 1
        await pilot.press("left", "left")
        assert session.choice.share == 0.93
        await pilot.press("down", "down", "o", "m", "m")  # another mode ends what `o` began
        assert session.choice.own == {}
        target = session.selected.target
        assert target == next(iter(kept))
        before = session.own_rank()
        assert before is not None
        await pilot.press("o", "right", "right")
        await pilot.pause()
        assert session.choice.own == {target: before + 2}
        assert f"own rank {before + 2}" in screen(pilot)
        assert "1 with a rank of its own" in screen(pilot)
        await pilot.press("escape", "left")
        assert session.choice.own == {target: before + 2}
        assert session.choice.share == 0.92
        await pilot.press("backspace")
        assert session.choice.own == {}
        await pilot.press("up", "o", "[")  # the group
        assert set(session.choice.own) == {f"model.layers.0.self_attn.{m}_proj" for m in "qkv"}

    explore(of(source), steps)


def test_the_mouse_moves_the_slider(peft: Make) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        width = pilot.app.query_one(Slider).size.width
        await pilot.click(Slider, offset=(width - 9, 0))
        assert explorer(pilot).session.choice.rank == 8
        await pilot.click(Slider, offset=(17, 0))
        assert explorer(pilot).session.choice.rank == 1

    explore(of(peft()), steps)


def test_a_base_gives_relative_norms(peft: Make, tmp_path: Path) -> None:
    source = peft(n_layers=1)
    weights = {f"{target}.weight": torch.full((32, 32), 0.5) for target in naive(source)}
    save_file(weights, tmp_path / "base.safetensors")
    share = math.sqrt((naive(source)["model.layers.0.self_attn.q_proj"] ** 2).sum()) / 16

    async def steps(pilot: Pilot[None]) -> None:
        await pilot.press("down", "down", "down")
        await pilot.pause()
        assert re.search(rf"of base +{100 * share:.1f} %", screen(pilot))

    explore(of(source, base=tmp_path / "base.safetensors"), steps)


def test_two_adapters_side_by_side(peft: Make, tmp_path: Path) -> None:
    source = peft(n_layers=1)
    small, _ = loratools.squeeze(loratools.load(source), 3)
    loratools.save(small, tmp_path / "small")
    spectrum = naive(source)["model.layers.0.self_attn.q_proj"]

    async def steps(pilot: Pilot[None]) -> None:
        await pilot.press("down", "down", "down")
        await settled(pilot)
        text = screen(pilot)
        error = error_at([spectrum], 3)
        assert re.search(rf"error +{re.escape(shown_error(error))}", text)
        assert re.search(rf"cosine +{re.escape(shown_error(math.sqrt(1 - error**2)))}", text)
        assert re.search(r"rank +8 +3 ", text)
        norms = [math.sqrt((s**2).sum()) for s in (spectrum, spectrum[:3])]
        assert re.search(r"norm +" + " +".join(re.escape(shown_error(n)) for n in norms), text)
        assert re.search(r"outputs +1\.00", text)
        assert set(text) & set("─▔▁")
        assert "beside small" in text

    explore(of(source, other=tmp_path / "small"), steps)


# The tree


def test_walking_grouping_and_filtering(peft: Make) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        session = explorer(pilot).session
        text = screen(pilot)
        assert text.index("layer 0") < text.index("q_proj") < text.index("layer 1")
        assert "By layer" in text
        await pilot.press("j", "j", "j", "j", "k")
        assert session.selected.target == "model.layers.0.self_attn.q_proj"
        await pilot.press("g")
        await pilot.pause()
        assert session.selected.target == "model.layers.0.self_attn.q_proj"
        assert "By module" in screen(pilot)
        text = "\n".join(line[:40] for line in screen(pilot).splitlines())  # the tree alone
        assert text.index("k_proj") < text.index("layer 0") < text.index("layer 1") < text.index("q_proj")
        await pilot.press("g", "slash", *"k_pr")
        await pilot.pause()
        assert "2 of 6" in screen(pilot)
        assert "v_proj" not in screen(pilot)
        assert session.shown == [f"model.layers.{i}.self_attn.k_proj" for i in range(2)]
        await pilot.press("enter", "down", "down", "left")  # the keys work again, and the filter stays
        assert session.selected.target == "model.layers.0.self_attn.k_proj"
        assert session.choice.rank == 3
        await pilot.press("escape", "slash", *"nothing")
        await pilot.pause()
        assert session.shown == []
        assert "no target matches" in screen(pilot)
        await pilot.press("escape")
        await pilot.pause()
        assert len(session.shown) == 6
        await pilot.press("home", "down", "space")
        await pilot.pause()
        assert "▸ layer 0" in screen(pilot)

    explore(of(peft()), steps)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("Q_PROJ", ["layers.0.q_proj", "layers.10.q_proj"]),
        ("layers.1?.*", ["layers.10.q_proj"]),
        ("[qk]_proj", ["layers.0.q_proj", "layers.10.q_proj", "layers.0.k_proj"]),
        ("", ["layers.0.q_proj", "layers.10.q_proj", "layers.0.k_proj"]),
    ],
)
def test_patterns(pattern: str, found: list[str]) -> None:
    assert matching(["layers.0.q_proj", "layers.10.q_proj", "layers.0.k_proj"], pattern) == found


def test_equal_short_names_are_told_apart(tmp_path: Path) -> None:
    pair = (torch.randn(4, 16), torch.randn(16, 4))
    tensors = {}
    for module in ("attn1.to_q", "attn2.to_q"):
        tensors |= dict(zip((f"base_model.model.b.0.{module}.lora_{x}.weight" for x in "AB"), pair, strict=True))
    session = Session(loratools.load(written(tmp_path / "a", tensors, 4)))
    ((_, leaves),) = session.branches()
    assert [leaf.name for leaf in leaves] == ["b.0.attn1.to_q", "b.0.attn2.to_q"]


def written(folder: Path, tensors: dict[str, torch.Tensor], rank: int) -> Path:
    folder.mkdir()
    save_file({k: t.clone() for k, t in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


# What files may hold


def test_hostile_names_broken_and_zero_targets(tmp_path: Path) -> None:
    tensors = {}
    names = ("layers.0.[red]evil[/red]", "layers.0.\x1b[31mred\x07", "layers.1.nan", "layers.1.zero", "layers.1.[/")
    for name in names:
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, 16)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(16, 4)
    tensors["base_model.model.layers.1.nan.lora_A.weight"][0, 0] = math.nan
    tensors["base_model.model.layers.1.zero.lora_B.weight"].zero_()
    source = written(tmp_path / "[bold]a[", tensors, 4)

    async def steps(pilot: Pilot[None]) -> None:
        text = screen(pilot)
        for name in ("[bold]a[", "[red]evil[/red]", r"\x1b[31mred\x07", "[/"):
            assert name in text
        seen = set()
        for _ in range(8):
            await pilot.press("down")
            await pilot.pause()
            target = explorer(pilot).session.selected.target
            text = screen(pilot)
            if target:
                seen.add(target)
                assert target.replace("\x1b", r"\x1b").replace("\x07", r"\x07") in text
            if target == "layers.1.nan":
                assert "holds NaN or infinity" in text
                assert "no spectrum" in text
            if target == "layers.1.zero":
                assert "zero update" in text
                assert re.search(r"energy +[\d.]+ % +\S* *100\.0 %", text)
        assert seen == set(names)
        await pilot.press("slash", *"[red", "enter", "o", "left", "s")
        await pilot.pause()
        assert isinstance(pilot.app.screen, SaveScreen)
        assert "1 with NaN or infinity carried over" in screen(pilot)
        await pilot.press("enter")
        await until(pilot, lambda: saved(pilot).report is not None)

    explore(of(source), steps)
    assert (tmp_path / "[bold]a[.r2-own").is_dir()


def test_families_without_ranks(samples: Callable[[str], Path]) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        assert "loha" in screen(pilot)
        assert "100%" in screen(pilot)
        await pilot.press("o")
        await pilot.pause()
        assert not explorer(pilot).own
        await pilot.press("s")
        await pilot.pause()
        assert not isinstance(pilot.app.screen, SaveScreen)

    explore(of(samples("peft/loha")), steps)


def test_dora_without_and_with_its_base(samples: Callable[[str], Path], tmp_path: Path) -> None:
    async def without(pilot: Pilot[None]) -> None:
        text = screen(pilot)
        assert "cannot be saved" in text
        await pilot.press("down", "down", "s")
        await pilot.pause()
        assert not isinstance(pilot.app.screen, SaveScreen)
        assert "takes the base weight" in screen(pilot)
        assert "spectrum of the direction" in " ".join(screen(pilot).split())

    explore(of(samples("peft/dora")), without, size=(120, 40))

    async def with_base(pilot: Pilot[None]) -> None:
        await pilot.press("s")
        await pilot.pause()
        pilot.app.screen.query_one("#path", Input).value = str(tmp_path / "small")
        await pilot.press("enter")
        await until(pilot, lambda: saved(pilot).report is not None)

    explore(of(samples("peft/dora"), base=samples("peft/dora") / "base.safetensors"), with_base)
    assert (tmp_path / "small" / "adapter_model.safetensors").is_file()


def test_one_target(tmp_path: Path) -> None:
    tensors = {"base_model.model.proj.lora_A.weight": torch.randn(1, 16)}
    tensors["base_model.model.proj.lora_B.weight"] = torch.randn(16, 1)

    async def steps(pilot: Pilot[None]) -> None:
        await pilot.press("down", "down", "left", "right", "[", "]", "m", "left", "m", "o", "right")
        await pilot.pause()
        assert "proj" in screen(pilot)
        assert "0 of 1 targets" in screen(pilot)

    explore(of(written(tmp_path / "a", tensors, 1)), steps)


def test_a_thousand_targets(peft: Make, tmp_path: Path) -> None:
    source = peft(n_layers=350, size=8, rank=4)

    async def steps(pilot: Pilot[None]) -> None:
        session = explorer(pilot).session
        assert "1050 targets" in screen(pilot)
        await pilot.press("m")
        await until(pilot, lambda: session.preview.bytes_after is not None)
        await pilot.press("end", "m", "left")
        await until(pilot, lambda: session.preview.bytes_after is not None)
        saved, _ = loratools.squeeze_file(session.adapter, tmp_path / "out", 1)
        assert session.preview.bytes_after == saved.nbytes

    explore(of(source), steps)


# Saving


def saved(pilot: Pilot[None]) -> SaveScreen:
    assert isinstance(pilot.app.screen, SaveScreen)
    return pilot.app.screen


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


def slowed(adapter: Adapter, gate: threading.Event, seconds: float) -> Adapter:
    """Every target takes a while to read once the gate is open."""

    def waiting(read: Callable[[], Any]) -> Callable[[], Any]:
        def reading() -> Any:
            if gate.is_set():
                time.sleep(seconds)
            return read()

        return reading

    return replace(adapter, entries={t: replace(e, read=waiting(e.read)) for t, e in adapter.entries.items()})


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
