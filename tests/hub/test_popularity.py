"""Logs of requests, and what is assumed without one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from loratools.errors import InputError, UsageError
from loratools.hub.popularity import drawn, read_log, zipf

NAMES = ["a", "b", "c,d", "e"]


def arrow(names: list[str]) -> object:
    return pytest.importorskip("pyarrow").array(names)


@pytest.mark.parametrize("header", ["", "name,count\n", "adapter,requests\n"])
def test_counts_by_name(tmp_path: Path, header: str) -> None:
    log = tmp_path / "log.csv"
    log.write_text(f'{header}a,3\nb,2.5\n\n"c,d",1\na,1\nzz,4\n')
    for names in (NAMES, arrow(NAMES)):
        found = read_log(log, names)
        assert found.weights.tolist() == [4, 2.5, 1, 0]
        assert (found.unknown, found.unknown_names, found.trace) == (4, ("zz",), None)
        assert "11 requests" in found.stated or "12 requests" in found.stated


@pytest.mark.parametrize("header", ["", "name\n", "\ufeffname\n"])
def test_a_name_for_each_request(tmp_path: Path, header: str) -> None:
    log = tmp_path / "log.csv"
    log.write_text(f"{header}e\na\nzz\ne\nname\n", encoding="utf-8")
    for names in (NAMES, arrow(NAMES)):
        found = read_log(log, names)
        assert found.trace is not None
        assert found.trace.tolist() == [3, 0, 3]
        assert found.weights.tolist() == [1, 0, 0, 2]
        assert (found.unknown, found.unknown_names) == (2, ("zz", "name"))


def test_long_logs_come_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratools.hub.popularity._LINES", 3)
    asked = np.random.default_rng(0).integers(0, 4, 31).tolist()
    (tmp_path / "log.csv").write_text("".join(f'"{NAMES[i]}"\n' for i in asked))
    found = read_log(tmp_path / "log.csv", NAMES)
    assert found.trace is not None
    assert found.trace.tolist() == asked
    assert found.weights.tolist() == [asked.count(i) for i in range(4)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,1\nb\n", "line 2: is not name,count"),
        ("a\nb,2\n", "line 2: is not a name alone"),
        ("name,count\na,1\n\nb,many\n", "line 4: 'many' is no count"),
        ("a,-1\n", "line 1: '-1' is no count"),
        ("a,nan\n", "line 1: 'nan'"),
        ("a,1e308\nb,1e308\n", "line 1: '1e308' is no count"),
        ("a,1,2\n", "line 1"),
        (",3\n", "line 1"),
        ('a,1\n"b,2\n', "line "),
        ("", "no requests"),
        ("name,count\n", "no requests"),
        ("a,0\n", "no requests"),
        ("a\0b,1\nx,y,z\n", "line "),
    ],
)
def test_malformed_lines_are_named_by_number(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(InputError, match=says):
        read_log(tmp_path / "log.csv", NAMES)


def test_a_missing_log_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_log(tmp_path / "none.csv", NAMES)
    (tmp_path / "log.csv").write_bytes(b"a\n\xff\xfe\n")
    found = read_log(tmp_path / "log.csv", arrow(NAMES))
    assert found.unknown == 1


def test_zipf_is_a_power_law_in_an_order_that_is_drawn() -> None:
    found = zipf(100, 1.5, 7)
    assert sorted(found.weights.tolist(), reverse=True) == pytest.approx([k**-1.5 for k in range(1, 101)])
    assert found.weights.tolist() != zipf(100, 1.5, 8).weights.tolist()
    assert "1.5" in found.stated
    assert set(zipf(9, 0, 1).weights) == {1.0}
    for exponent in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="--zipf"):
            zipf(9, exponent, 0)
    with pytest.raises(UsageError, match="--seed"):
        zipf(9, 1, -1)
    with pytest.raises(UsageError, match="--requests"):
        drawn(np.ones(3), 0, 0)
