"""`loratools hub plan`."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub.test_plan import CELL, write

from loratools.hub.plan import Plan, plan
from loratools_cli.render import table

Run = Callable[..., Any]


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    for i, rank in enumerate((2, 3, 8, 8, 16)):
        write(tmp_path / "hub", f"a{i}", rank)
    write(tmp_path / "hub", "grouped\x1b[2J", 4, grouped=8)
    return tmp_path / "hub"


@pytest.mark.parametrize("server", ["slora", "vllm"])
def test_the_plan_in_80_columns(run: Run, hub: Path, tmp_path: Path, server: str) -> None:
    (tmp_path / "log.csv").write_text("name,count\na4,60\na0,30\nnobody,10\n")
    more = ("--popularity", tmp_path / "log.csv", "--buckets", 2, "--table", tmp_path / "t.csv")
    done = run("hub", "plan", hub, "--server", server, "--memory", "20kB", *more)
    assert done.code == 0
    assert all(len(line) <= 80 for line in done.out.splitlines())
    assert "\x1b" not in done.out
    assert "5 of 6 adapters can be served" in done.out
    assert "unknown names (nobody)" in done.out
    assert "1 not: " in done.out
    assert (tmp_path / "t.csv").read_text().count("\n") == 7
    asked = run("hub", "plan", hub, "--server", server, "--memory", "20kB", "--json", *more[:4]).json
    assert (asked["fit"], asked["unknown"], len(asked["buckets"])) == (5, 0.1, 2)
    for setting in asked["settings"]:
        assert setting in " ".join(done.out.split())


def test_a_million_adapters_fit_the_columns(hub: Path) -> None:
    report = plan(hub, Plan("slora", 10**6))
    big = replace(
        report.buckets[0], rank=512, adapters=1_000_000, padded=999_999, squeezed=123_456, waste=0.12345,
        bytes=10**14, saved_bytes=10**13, largest_error=4.16e-05, resident=12_345, requests=0.99996,
    )  # fmt: skip
    text = table(replace(report, buckets=(big,) * 3, largest_error=0.1), io.StringIO())
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "512    1000000" in text


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--server", "slora", "--memory", CELL), 2, "hold no adapter"),
        (("--server", "slora", "--memory", "lots"), 2, "not a size"),
        (("--server", "vllm", "--memory", "1GB", "--reserve-tokens", 9), 2, "--reserve-tokens"),
        (("--server", "slora", "--memory", "1GB", "--max-error", 0.1), 2, "catalog"),
        (("--server", "slora", "--memory", "1GB", "--popularity", "log.csv"), 3, "line 2"),
        (("--server", "slora", "--memory", "1GB", "--base", "x"), 2, "base model"),
    ],
)
def test_wrong_calls_fail_in_one_line(
    run: Run, hub: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...], code: int, says: str
) -> None:
    monkeypatch.chdir(hub.parent)
    Path("log.csv").write_text("name,count\na0,many\n")
    done = run("hub", "plan", hub, *arguments)
    assert done.code == code
    assert says in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_commands_are_never_wrapped(run: Callable[..., Any], tmp_path: Path) -> None:
    """A shell would take the rest of a line for a command of its own."""
    hub = tmp_path / "a name that is rather long for a hub" / "and another one that is just as long for it"
    for i in range(2):
        write(hub, f"a{i}", 4, ranks={"q_proj": 4, "k_proj": 2, "v_proj": 2, "o_proj": 2})
    ran = run("hub", "plan", hub, "--server", "vllm", "--memory", "1MB")
    told = run("hub", "plan", hub, "--server", "vllm", "--memory", "1MB", "--json").json["commands"]
    assert len(told[0]) > 120
    assert all(command in ran.out.splitlines() for command in told)
