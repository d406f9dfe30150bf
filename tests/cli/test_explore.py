"""The explorer, driven by keys as a user does; what it shows is judged by numpy and by what squeezing writes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from explorer_driver import error_at, explore, explorer, naive, of, saved, screen, settled, shown_error, until, written
from safetensors.torch import save_file
from textual.pilot import Pilot
from textual.widgets import Input

import loratools
from loratools.sizes import format_size
from loratools_cli.explorer.grouping import matching
from loratools_cli.explorer.save_screen import SaveScreen
from loratools_cli.explorer.session import Session
from loratools_cli.explorer.slider import Slider

Make = Callable[..., Path]


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


def test_what_only_a_base_shows(samples: Callable[[str], Path]) -> None:
    async def steps(pilot: Pilot[None]) -> None:
        await pilot.press("down", "down")
        await pilot.pause()
        assert "ia3 depends on the base weight; open it with a BASE" in " ".join(screen(pilot).split())

    explore(of(samples("peft/ia3")), steps, size=(140, 30))


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
