"""`loratools hub pack`, `unpack` and `pack-add`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub.pack_hubs import write_hub

Run = Callable[..., Any]


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    return write_hub(tmp_path / "hub", "shared", 6)


def test_pack_unpack_add(run: Run, hub: Path, tmp_path: Path) -> None:
    out = tmp_path / "pack"
    done = run("hub", "pack", hub, "-o", out, "--budget", "70%", "--table", tmp_path / "t.csv")
    assert (done.code, done.err) == (0, f"wrote {tmp_path / 't.csv'}\n")
    assert "relative error: median" in done.out
    assert f"wrote {out}" in done.out.replace("\n", "")
    assert all(len(line) <= 80 for line in done.out.splitlines() if str(tmp_path) not in line)
    assert (tmp_path / "t.csv").read_text().count("\n") == 7
    again = run("hub", "pack", hub, "-o", out, "--budget", "70%")
    assert (again.code, "exists already" in again.err) == (5, True)
    told = run("hub", "pack", hub, "-o", out, "--budget", "12kB", "--method", "own", "--bits", "8", "--force", "--json")
    assert told.json["budget"] == 12000 >= told.json["bytes_after"]
    assert told.json["methods"] == {"own": 2}
    done = run("hub", "unpack", out, "a02", "-o", tmp_path / "a02")
    assert done.code == 0
    assert "2 targets, ranks up to" in done.out
    done = run("hub", "pack-add", out, tmp_path / "a02", "--name", "twin", "--json")
    assert done.json["adapter"]["name"] == "twin"
    assert run("hub", "unpack", out, "twin", "-o", tmp_path / "twin", "--quiet").out == f"{tmp_path / 'twin'}\n"
    wrong = run("hub", "unpack", out, "nobody", "-o", tmp_path / "x")
    assert (wrong.code, "holds no 'nobody'" in wrong.err) == (2, True)


def test_what_cannot_be_packed_is_a_row(run: Run, hub: Path, tmp_path: Path) -> None:
    (hub / "broken\x1b[31m.safetensors").write_bytes(b"\0" * 20)
    done = run("hub", "pack", hub, "-o", tmp_path / "pack", "--budget", "90%")
    assert done.code == 3
    assert "\x1b" not in done.out
    assert "broken" in done.out
    assert run("hub", "pack", tmp_path / "nowhere", "-o", tmp_path / "p").code == 3
    assert run("hub", "pack", hub, "-o", tmp_path / "p", "--budget", "many").code == 2
