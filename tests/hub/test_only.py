"""A run on some adapters of a hub: patterns, lists, what the output says of it, and plans whose commands work."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import pytest
from hub.conftest import contents, write_kohya, write_peft
from hub.test_plan import catalogued, write

from loratools.errors import InputError, OutputError, UsageError
from loratools.files import load
from loratools.hub.listing import status
from loratools.hub.only import Only, glob_of, only_of, written_names
from loratools.hub.plan import Plan, plan
from loratools.hub.plan_commands import write_lists
from loratools.hub.recipe import parse_steps
from loratools.hub.run import Run, run

RECIPE = parse_steps(["squeeze rank=2"])


def here() -> Executor:
    return ThreadPoolExecutor(1)


def names(hub: Path, out: Path, only: Only, *, resume: bool = False) -> list[str]:
    return [row.name for row in run(RECIPE, hub, out, Run(executor=here, only=only, resume=resume)).adapters]


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    for i, name in enumerate(("law/a", "law/b", "odd[1]", "new\nline", "zoo")):
        write_peft(tmp_path / "hub" / name, i)
    write_kohya(tmp_path / "hub" / "k.safetensors", 9)
    return tmp_path / "hub"


def test_patterns_and_names_choose(hub: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert names(hub, out, Only(("law/*",))) == ["law/a", "law/b"]
    assert {name.split("/")[0] for name in contents(out)} == {"law"}
    assert names(hub, out, Only(("*o*",), ("k",)), resume=True) == ["k.safetensors", "odd[1]", "zoo"]
    assert names(hub, out, Only((glob_of("odd[1]"), glob_of("new\nline"))), resume=True) == ["new\nline", "odd[1]"]
    assert glob_of("new\nline").isprintable()
    assert names(hub, tmp_path / "other", Only((), ("odd[1]",))) == ["odd[1]"]


def test_what_is_not_there_is_refused_before_anything_is_written(hub: Path, tmp_path: Path) -> None:
    for only in (Only(("low/*",)), Only((), ("law/c", "zoo")), Only(("law",))):
        with pytest.raises(UsageError, match="holds no"):
            names(hub, tmp_path / "out", only)
    assert not (tmp_path / "out").exists()


def test_status_counts_what_runs_were_for(hub: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    names(hub, out, Only(("law/*",)))
    assert status(out).missing == ()
    names(hub, out, Only(("zoo",)), resume=True)
    assert (len(status(out).adapters), status(out).missing) == (3, ())
    (out / ".loratools" / "receipts" / "law" / "a.json").unlink()
    assert status(out).missing == ("law/a",)
    run(RECIPE, hub, out, Run(executor=here, resume=True))
    names(hub, out, Only(("zoo",)), resume=True)  # all were wanted once
    (out / ".loratools" / "receipts" / "k.json").unlink()
    assert status(out).missing == ("k.safetensors",)


def test_status_tells_of_what_no_run_can_do(tmp_path: Path) -> None:
    write_peft(tmp_path / "hub" / "twin", 0)
    write_kohya(tmp_path / "hub" / "twin.safetensors", 1)
    os.symlink("/", tmp_path / "hub" / "away")
    report = run(RECIPE, tmp_path / "hub", tmp_path / "out", Run(executor=here))
    told = status(tmp_path / "out")
    assert told.counts == report.counts == {"done": 1, "failed": 2}
    assert told.missing == ()
    assert [row.name for row in told.adapters] == [row.name for row in report.adapters]


def test_a_file_has_a_name_a_line(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    there = ("a b", "#c", "d[1]", "caf\u00e9", "bad\udcff")
    file.write_bytes(written_names(there))
    assert only_of([], file) == Only((), there)
    file.write_bytes(b"\xef\xbb\xbfa\r\n\r\nb")
    assert only_of(["x*"], file) == Only(("x*",), ("a", "b"))
    assert only_of([], None) is None
    file.write_text("\n")
    with pytest.raises(InputError, match="names no adapter"):
        only_of([], file)
    with pytest.raises(InputError, match="cannot be read"):
        only_of([], tmp_path)
    with pytest.raises(UsageError, match="pattern"):
        only_of([""], None)


def wide_hub(tmp_path: Path, count: int) -> Path:
    for i in range(count):
        write(tmp_path / "hub" / "topic one", f"a{i}", 8, decay=0.3)
        write(tmp_path / "hub", f"flat{i}", 8)
    write(tmp_path / "hub", "lone [x]$(touch ran)", 8, decay=0.3)
    return tmp_path / "hub"


@pytest.mark.parametrize("count", [1, 6])
def test_commands_of_a_plan_work_as_printed(
    tmp_path: Path, count: int, run_program: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few adapters are named by the command; of many the first command writes the names that the others read."""
    monkeypatch.chdir(tmp_path)
    hub = wide_hub(tmp_path, count)
    how = Plan("slora", memory=10_000_000, largest_error=0.2, buckets=2, hub=hub)
    report = plan(catalogued(hub, tmp_path), how)
    wanted = {row["name"]: row["bucket"] for row in report.rows() if row["action"] == "squeeze"}
    assert (len(wanted), len(set(wanted.values()))) == (2 * count + 1, 2)
    assert ("--lists" in report.commands[0]) == (count == 6)
    for command in report.commands:
        program, *arguments = shlex.split(command)
        assert program == "loratools"
        done = run_program(*arguments)
        assert done.returncode == 0, done.stderr  # type: ignore[attr-defined]
    made = {p.parent.relative_to("OUT").as_posix() for p in Path("OUT").rglob("adapter_model.safetensors")}
    assert made == set(wanted)
    for name, rank in wanted.items():
        assert {entry.rank for entry in load(Path("OUT") / name).entries.values()} <= set(range(1, rank + 1))
    assert not Path("ran").exists()


def test_lists_are_not_overwritten(tmp_path: Path) -> None:
    hub = wide_hub(tmp_path, 6)
    how = Plan("slora", memory=10_000_000, largest_error=0.2, buckets=2, hub=hub, lists=tmp_path / "lists")
    report = plan(catalogued(hub, tmp_path), how)
    files = write_lists(report.groups, tmp_path / "lists", force=False)
    for file, command in zip(files, report.commands, strict=True):
        assert f"--only-from {file} --resume" in command
        rank = int(file.stem.removeprefix("rank-"))
        assert file.read_text().splitlines() == [row["name"] for row in report.rows() if row["bucket"] == rank]
    with pytest.raises(OutputError, match="exists already"):
        write_lists(report.groups, tmp_path / "lists", force=False)
    write_lists(report.groups, tmp_path / "lists", force=True)
    first = plan(tmp_path / "catalog.parquet", Plan("slora", 10_000_000, 2, largest_error=0.2, hub=hub)).commands
    assert "hub plan" in first[0]
    assert first[0].endswith("--lists lists")
    assert "--only-from lists/" in first[1]
