"""`loratools hub similar`."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hub.planted import draw, gauged, summed, write

from loratools.hub import similar as module
from loratools.reports.hub_similar import Cluster, HubSimilarReport, LeftOut, MergeFound, Related, Term
from loratools_cli.render import table

Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that need no start."""
    monkeypatch.setattr(module, "local_executor", ThreadPoolExecutor)


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    hub = tmp_path / "hub"
    for i in range(4):
        write(hub / f"a{i}", draw(i))
    write(hub / "a0 again", gauged(draw(0), 9))
    shutil.copytree(hub / "a1", hub / "a1 same")
    write(hub / "half", draw(2), alpha=0.5)
    write(hub / "both", summed({0.6: draw(1), 0.4: draw(3)}))
    (hub / "bad\x1b[2J.safetensors").write_bytes(b"no adapter")
    return hub


def test_what_people_read(run: Run, hub: Path) -> None:
    done = run("hub", "similar", hub)
    assert (done.code, done.err) == (0, "")
    assert all(len(line) <= 80 for line in done.out.splitlines())
    assert "\x1b" not in done.out
    lines = [line.split() for line in done.out.splitlines()]
    assert ["a0", "a0", "again", "copy", "1.0000", "1.0000"] in lines
    assert ["a1", "a1", "same", "copy,", "same", "bytes", "1.0000", "1.0000"] in lines
    assert ["a2", "half", "scaled", "copy", "(x0.500)", "1.0000", "1.0000"] in lines
    assert "  both = 0.600 x a1 + 0.400 x a3, relative error" in done.out
    assert "  a0: 2, with a0 again" in done.out
    assert done.out.splitlines()[-1] == "8 adapters: 2 copies, 1 scaled copy, 1 merge, 3 clusters"


def test_programs_get_the_report_and_a_table(run: Run, hub: Path, tmp_path: Path) -> None:
    place = tmp_path / "t.csv"
    done = run("hub", "similar", hub, "--json", "--table", place)
    assert done.code == 0
    report = module.similar(hub, module.Similar())
    held = done.json
    assert [p["cosine"] for p in held["pairs"]] == [p.cosine for p in report.pairs]
    assert held["merges"][0]["terms"][0]["name"] == "a1"
    assert len(held["left_out"]) == 1
    rows = list(csv.DictReader(StringIO(place.read_text())))
    assert [row["relation"] for row in rows] == [*(p.relation for p in report.pairs), "merge", "merge"]
    assert run("hub", "similar", hub, "--table", place).code == 5
    assert run("hub", "similar", hub, "--table", place, "--force").code == 0


def test_ranking(run: Run, hub: Path) -> None:
    done = run("hub", "similar", hub, "--to", hub / "both", "--nearest", "2")
    assert done.code == 0
    assert [line.split()[0] for line in done.out.splitlines()[1:3]] == ["a1", "a1"]
    assert "compared with" in done.out
    assert "clusters" not in done.out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--threshold", "0"), 2, "not in (0, 1]"),
        (("--threshold", "nan"), 2, "not in (0, 1]"),
        (("--workers", "0"), 2, "at least 1"),
        (("--to", "nowhere"), 3, "no such file"),
        (("--catalog", "nowhere.parquet"), 3, "nowhere.parquet"),
        (("--table", "x.txt"), 2, "x.txt"),
    ],
)
def test_wrong_calls_fail_in_one_line(run: Run, hub: Path, arguments: tuple[str, ...], code: int, says: str) -> None:
    done = run("hub", "similar", hub, *arguments)
    assert done.code == code
    assert says in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert run("hub", "similar", hub / "nowhere").code == 3


def test_nothing_alike(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "one", draw(0))
    assert run("hub", "similar", tmp_path).out == "1 adapter: none alike to a cosine of 0.95\n"


def many(count: int) -> HubSimilarReport:
    hostile = "evil\x1b[31m\u202e" + "x" * 100
    pairs = tuple(
        Related(f"{hostile}{i}", f"{hostile}{i + 1}", "derivative", 0.9999999, -0.5, 1.0, 3) for i in range(count)
    )
    merges = tuple(MergeFound(f"{hostile}{i}", (Term(hostile, 0.5), Term("b", -2.0)), 1e-5) for i in range(count))
    clusters = (Cluster(hostile, tuple(f"{hostile}{i}" for i in range(count))),)
    left_out = tuple(LeftOut(f"{hostile}{i}", "\x1b[2J bad") for i in range(count))
    warnings = ("a few \x1b[2J",)
    return HubSimilarReport("hub", None, 0.9, 0.03, count, pairs, merges, clusters, left_out, warnings)


@pytest.mark.parametrize("everything", [False, True])
def test_long_and_hostile_names_are_folded_and_escaped(everything: bool) -> None:
    text = table(many(60), StringIO(), everything=everything)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert not any(c in text for c in "\x1b\u202e")
    assert "0.9999999 " in text
    assert ("see --all" in text) != everything
