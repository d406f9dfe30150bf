"""`loratools inspect`: the command around the library's view."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Run = Callable[..., Any]
Make = Callable[..., Path]


def test_it_shows_modules_or_every_target(run: Run, peft: Make) -> None:
    source = peft(n_layers=10)
    grouped, single = run("inspect", source), run("inspect", source, "--all")
    assert (grouped.code, grouped.err) == (0, "")
    assert "Module types" in grouped.out
    assert "9.self_attn.q_proj" in single.out
    assert all(len(line) <= 80 for line in grouped.out.splitlines())


def test_target_and_nested(run: Run, peft: Make) -> None:
    found = run("inspect", peft(), "--target", "q_proj", "--nested", "--json").json
    assert len(found["targets"]) == 2
    assert found["nested"]["verdict"]


def test_a_plot_is_written_once(run: Run, peft: Make, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    source, plot = peft(), tmp_path / "s.svg"
    assert run("inspect", source, "--plot", plot).code == 0
    assert plot.read_text().lstrip().startswith("<?xml")
    assert run("inspect", source, "--plot", plot).code == 5
    assert run("inspect", source, "--plot", plot, "--force").code == 0
    assert run("inspect", source, "--plot", tmp_path / "s.jpeg").code == 2


def test_nan_is_an_error_unless_allowed(run: Run, peft: Make) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        next(iter(tensors.values()))[0, 0] = float("nan")

    source = peft(edit=spoil)
    assert run("inspect", source).code == 4
    assert run("inspect", source, "--allow-nonfinite").code == 0


def test_warnings_appear_once(run: Run, kohya: Make, peft: Make) -> None:
    folder = peft()
    (folder / "adapter_config.json").unlink()
    done = run("inspect", folder)
    assert done.err.count("no adapter_config.json") == 1
    assert "no adapter_config.json" not in done.out
