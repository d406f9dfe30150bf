"""`loratools hub`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub.conftest import write_kohya, write_peft

Run = Callable[..., Any]


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    for i in range(3):
        write_peft(tmp_path / "hub" / f"a{i}", i)
    write_kohya(tmp_path / "hub" / "k.safetensors", 9)
    return tmp_path / "hub"


def test_list_run_status(run: Run, hub: Path, tmp_path: Path) -> None:
    done = run("hub", "ls", hub)
    assert (done.code, done.err) == (0, "")
    assert "4 adapters" in done.out
    out = tmp_path / "out"
    done = run("hub", "run", hub, out, "--step", "squeeze rank=2", "--step", "quantize bits=4")
    assert done.code == 0
    assert "4 done" in done.out
    assert all(len(line) <= 80 for line in done.out.splitlines())
    assert run("hub", "status", out, "--json").json["counts"] == {"done": 4}
    assert run("hub", "ls", out).out.count("a1.safetensors") == 1
    again = run("hub", "run", hub, out, "--step", "squeeze rank=2", "--step", "quantize bits=4", "--resume", "--json")
    assert again.json["counts"] == {"kept": 4}
    assert run("hub", "ls", hub, "--table", tmp_path / "t.csv").code == 0
    assert (tmp_path / "t.csv").read_text().count("\n") == 5


def test_a_recipe_in_a_file_and_a_failure_in_the_hub(run: Run, hub: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('[[step]]\nverb = "squeeze"\nrank = 2\n')
    (hub / "bad\x1b[2J.safetensors").write_bytes(b"no adapter")
    done = run("hub", "run", tmp_path / "recipe.toml", hub, tmp_path / "out")
    assert done.code == 3
    assert "1 failed" in done.out
    assert "\x1b" not in done.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("out",), "name a recipe, a hub and an output"),
        (("out", "more", "still more"), "name a recipe, a hub and an output"),
        (("out", "--step", "squeeze ranks=2"), "no option"),
        (("out", "--step", "squeeze rank=2", "--shard", "3"), "I/N"),
        (("out", "--step", "squeeze rank=2", "--shard", "4/3"), "part"),
        (("out", "--step", "squeeze rank=2", "--engine", "dask"), "--scheduler"),
    ],
)
def test_wrong_calls_fail_in_one_line(run: Run, hub: Path, arguments: tuple[str, ...], says: str) -> None:
    done = run("hub", "run", hub, *arguments)
    assert done.code == 2
    assert says in done.err
    assert len(done.err.strip().splitlines()) == 1
