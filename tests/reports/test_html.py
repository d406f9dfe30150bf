"""The page of a comparison as text: what it holds, what it lets through, and what is refused."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from compare_reports import HOSTILE, MODULES, compare_report, gaps

from loratools.errors import MissingExtraError, OutputError, UsageError
from loratools.reports.html import write_html

pytest.importorskip("plotly")

SECTIONS = ("overview", "spectra", "where", "shape", "overlap", "intruders", "missed", "growth", "table", "skipped")


class Page(HTMLParser):
    """A page taken apart by a parser that knows nothing of how it was made."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[int, str] = {}  # of scripts and styles, by the place of the tag
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:
            place = len(self.tags) - 1
            self.text[place] = self.text.get(place, "") + data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def scripts(self) -> list[str]:
        return [text for place, text in self.text.items() if self.tags[place] == ("script", {})]

    def data(self) -> Any:
        (text,) = (t for place, t in self.text.items() if self.tags[place][1].get("type") == "application/json")
        return json.loads(text)

    def policy(self) -> str:
        (meta,) = (m for m in self.named("meta") if m.get("http-equiv") == "Content-Security-Policy")
        return meta["content"] or ""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write_html(compare_report(HOSTILE), tmp_path_factory.mktemp("page") / "a.html")
    return path.read_text(encoding="utf-8")


def test_structure(hostile: str) -> None:
    page = Page(hostile)
    assert hostile.startswith("<!doctype html>\n")
    assert page.named("html") == [{"lang": "en"}]
    assert len(page.named("h1")) == 1
    sections = page.named("section")
    assert [s["id"] for s in sections] == list(SECTIONS)
    headings = {h.get("id") for h in page.named("h2")}
    assert all(s["aria-labelledby"] in headings for s in sections)
    assert len(page.named("summary")) == len(page.named("details")) >= 6
    assert "heuristic" in hostile.split('id="h-growth"')[1].split("</h2>")[0]


def test_hostile_names_stay_inside_their_data(hostile: str) -> None:
    page = Page(hostile)
    assert len(page.named("script")) == 3  # data, Plotly, the page's own
    assert not page.named("img")
    before, after = hostile.split('<script type="application/json" id="data">')
    data, after = after.split("</script>", 1)
    markup = before + after.split("<script>")[0]
    assert not any(sign in data for sign in "<>&\u2028\u2029\u202e\n")
    assert data.isascii()
    assert not any(word in markup for word in ("onerror", "javascript:", "overridden"))
    names = [tune["name"] for tune in page.data()["fineTunes"]]
    assert names[:2] == list(HOSTILE[:2])
    assert names[2] == HOSTILE[2].replace("\u202e", "\\u202e").replace("\n", "\\n")


def test_text_from_files_is_data_wherever_it_stands(tmp_path: Path) -> None:
    mark = "<i>mark</i>"
    report = compare_report([mark, "b"], layers=1, modules=(mark,))
    (target,) = report.targets.values()
    (overlap, *_) = report.overlap_maps
    update = replace(target.updates[mark], family=mark)
    tunes = {name: replace(t, path=mark, families=(mark,)) for name, t in report.fine_tunes.items()}
    report = replace(
        report,
        base=mark,
        fine_tunes=tunes,
        targets={mark: replace(target, layer=mark, updates={mark: update})},
        overlap_maps=(replace(overlap, layers=(mark,)),),
        skipped={mark: mark},
        warnings=(mark,),
    )
    page = write_html(report, tmp_path / "a.html").read_text(encoding="utf-8")
    assert mark not in page
    before, rest = page.split('id="data">')
    data, after = rest.split("</script>", 1)
    assert "mark" not in before
    # base, 2 x (path, family), name, its layers and modules (2 x 1), target with layer and module, a row's 4 texts with
    # the fine-tune's, the map's module and layer, what is skipped and why, and the warning
    assert data.count("\\u003ci\\u003emark\\u003c/i\\u003e") == 1 + 4 + 1 + 2 + 3 + 5 + 2 + 2 + 1
    assert "u003emark" not in after


def test_the_policy_allows_the_two_scripts_and_no_request(hostile: str) -> None:
    page = Page(hostile)
    scripts = page.scripts()
    assert len(scripts) == 2
    hashes = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    assert page.policy() == (
        f"default-src 'none'; script-src 'sha256-{hashes[0]}' 'sha256-{hashes[1]}'; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def test_nothing_but_plotly_names_an_address(hostile: str) -> None:
    page = Page(hostile)
    plotly, own = page.scripts()
    assert "plotly.js v" in plotly[:200]
    rest = hostile.replace(plotly, "")
    assert len(rest) < len(hostile) / 2
    assert re.findall(r"https?://[^\"'\s]*", rest) == ["http://www.w3.org/2000/svg"]  # a namespace
    assert not {"src", "srcset", "action", "poster", "ping"} & {key for _, keys in page.tags for key in keys}
    style = "".join(text for place, text in page.text.items() if page.tags[place][0] == "style")
    assert "--ink" in style
    assert not re.findall(r"url\(|@import", style)
    assert not re.findall(r"fetch\(|XMLHttp|WebSocket|\bimport\b", own)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", own)
    assert all((a["href"] or "").startswith("#") for a in page.named("a"))
    assert not page.named("link")


def test_the_table_of_the_page_is_the_rows(tmp_path: Path) -> None:
    report = compare_report(layers=2)
    data = Page(write_html(report, tmp_path / "a.html").read_text(encoding="utf-8")).data()
    keys = [column["key"] for column in data["columns"]]
    assert keys == [name for name in report.columns if name != "spectrum"]
    rows = list(report.rows())
    assert len(data["rows"]) == len(rows) == 2 * len(MODULES) * 3
    for cells, row, spectrum in zip(data["rows"], rows, data["spectra"], strict=True):
        for key, cell in zip(keys, cells, strict=True):
            assert cell == (pytest.approx(row[key], rel=1e-5) if isinstance(row[key], float) else row[key])
        assert spectrum == pytest.approx(list(row["spectrum"]), rel=1e-5)
    names = [(data["targets"][t]["name"], data["fineTunes"][f]["name"]) for t, f in data["at"]]
    assert names == [(row["target"], row["fine_tune"]) for row in rows]


def test_gaps_and_what_json_has_no_number_for(tmp_path: Path) -> None:
    report = gaps(compare_report(layers=2))
    assert next(report.rows())["relative_norm"] == math.inf
    data = Page(write_html(report, tmp_path / "a.html").read_text(encoding="utf-8")).data()
    row = dict(zip((column["key"] for column in data["columns"]), data["rows"][0], strict=True))
    assert (row["relative_norm"], row["stable_rank"], row["missed_error"], row["gain_mean"]) == (None,) * 4
    assert data["pairs"][0]["cosine"] is None


def test_the_same_report_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write_html(compare_report(HOSTILE, layers=2), tmp_path / f"{i}.html") for i in range(2))
    assert first.read_bytes() == second.read_bytes()
    other = write_html(compare_report(HOSTILE, layers=2, seed=1), tmp_path / "other.html")
    assert first.read_bytes() != other.read_bytes()


def test_refusals(tmp_path: Path) -> None:
    report = compare_report(layers=1)
    with pytest.raises(UsageError, match=r"a page is written as \.html; choose this suffix"):
        write_html(report, tmp_path / "a.htm")
    taken = tmp_path / "a.html"
    taken.write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists already"):
        write_html(report, taken)
    assert taken.read_bytes() == b"mine"
    assert write_html(report, taken, force=True) == taken
    assert taken.read_bytes().startswith(b"<!doctype html>")
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"]


def test_a_missing_plotly_names_the_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'loratools\[report\]'"):
        write_html(compare_report(layers=1), tmp_path / "a.html")
    assert not list(tmp_path.iterdir())
