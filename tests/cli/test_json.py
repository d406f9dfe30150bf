"""What programs read: the report's own dictionary, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loratools
from loratools.ops.inspect import inspect
from loratools.reports.squeeze import SqueezeReport

Run = Callable[..., Any]
Make = Callable[..., Path]

CHANGE = [
    "rank_before",
    "rank_after",
    "energy_kept",
    "relative_error",
    "bytes_before",
    "bytes_after",
    "weighted_error",
]
TOTAL = [
    "targets",
    "changed",
    "rank_before",
    "rank_after",
    "energy_kept",
    "relative_error",
    "bytes_before",
    "bytes_after",
]


def check(done: Any, report: Any) -> None:
    assert done.err == ""
    assert done.out == json.dumps(report.to_dict()) + "\n"


def test_info(run: Run, peft: Make) -> None:
    source = peft()
    check(run("info", source, "--json"), loratools.info(loratools.load(source)))


def test_inspect(run: Run, peft: Make) -> None:
    source = peft()
    check(run("inspect", source, "--nested", "--json"), inspect(loratools.load(source), nested=True))


@pytest.mark.parametrize("verb", ["squeeze", "truncate"])
def test_squeeze_and_truncate(run: Run, peft: Make, tmp_path: Path, verb: str) -> None:
    source = peft()
    done = run(verb, source, "--rank", 3, "--json", "-o", tmp_path / "out")
    change = {"squeeze": loratools.squeeze_file, "truncate": loratools.truncate_file}[verb]
    report: SqueezeReport = change(loratools.load(source), tmp_path / "out", 3, force=True)[1]
    check(done, report)
    found = done.json
    assert list(found) == ["targets", "unchanged", "total", "weighted_error", "warnings", "output"]
    assert list(found["total"]) == TOTAL
    assert all(list(target) == CHANGE for target in found["targets"].values())


@pytest.mark.parametrize("verb", ["squeeze", "truncate"])
def test_a_dry_run(run: Run, peft: Make, verb: str) -> None:
    source = peft()
    done = run(verb, source, "--rank", 3, "--json", "--dry-run")
    check(done, getattr(loratools, verb)(loratools.load(source), 3)[1])
    assert done.json["output"] is None


def test_diff(run: Run, peft: Make) -> None:
    a, b = peft("a", seed=1), peft("b", seed=2)
    done = run("diff", a, b, "--json")
    check(done, loratools.diff(loratools.load(a), loratools.load(b)))
    assert done.code == 1


def test_delta(run: Run, peft: Make, tmp_path: Path) -> None:
    source, out = peft(), tmp_path / "d.safetensors"
    done = run("delta", source, "-o", out, "--json")
    check(done, loratools.delta_file(loratools.load(source), out, force=True))


def test_numbers_that_json_lacks_become_null(run: Run, peft: Make) -> None:
    source = peft(rank_pattern={"nothing": float("nan")}, task_type=float("inf"))
    done = run("info", source, "--json")
    found = json.loads(done.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["config"]["task_type"] is None


def test_json_and_quiet_exclude_each_other(run: Run, peft: Make) -> None:
    done = run("squeeze", peft(), "--rank", 3, "--json", "--quiet")
    assert done.code == 2
    assert "--json and --quiet" in done.err
