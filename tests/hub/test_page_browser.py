"""The page of a catalog in a real browser: ten thousand adapters, found, sorted and shown at once."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsers import launched, opened
from hub.test_page import HOSTILE

from loratools.hub.catalog import CatalogRow, write_catalog
from loratools.hub.page import write_page

pytest.importorskip("pyarrow")

COUNT = 10_000
SOON = 3  # seconds; a fraction of one on a quiet machine
DIALECTS, FAMILIES = ("peft", "kohya"), (("lora",), ("dora", "lora"), ("loha",))


def adapter(number: int) -> CatalogRow:
    """Number 7, say, has rank 7 % 64 + 1 and as many singular values, halving from its number on."""
    rank = number % 64 + 1
    values = (number + 1) * 0.5 ** np.arange(rank)
    status, reason = ("failed", "it was torn") if number % 1000 == 999 else ("done", "")
    return CatalogRow(
        f"adapter{number}", status, reason, dialect=DIALECTS[number % 2], families=FAMILIES[number % 3],
        base_model="tiny" if number % 5 else None, bytes=10 * number, bytes_before=20 * number, rank=rank,
        relative_error=number / COUNT if number % 4 else None, targets=("a",), target_norms=(float(number),),
        singular_values=(values.astype(np.float32),),
    )  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    write_catalog(map(adapter, range(COUNT)), folder / "c.parquet")
    return write_page(folder / "c.parquet", folder / "c.html")


@pytest.fixture
def page(browser: Any, large: Path) -> Iterator[Any]:
    began = time.monotonic()
    with opened(browser, large) as page:
        assert time.monotonic() - began < 2 * SOON
        yield page


def shown(page: Any, place: int = 0) -> list[str]:
    """What one column says in the rows that are in the document."""
    script = "p => [...document.querySelectorAll('#rows tr[data-row]')].map(row => row.children[p].textContent)"
    return page.evaluate(script, place)


def sort_by(page: Any, name: str) -> None:
    page.locator("#rows thead button").filter(has_text=name).first.click()


def control(page: Any, name: str) -> Any:
    return page.locator("#controls label", has_text=re.compile(f"^{name}")).locator("input, select")


def until(page: Any, holds: Callable[[], Any]) -> None:
    """Wait for the page; its policy lets nobody wait within it."""
    ends = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < ends
        page.wait_for_timeout(20)


def scroll(page: Any, to: float) -> None:
    page.evaluate("to => { document.querySelector('#rows').scrollTop = to }", to)


def count(page: Any) -> str:
    return page.locator("#count").inner_text()


def test_only_the_rows_in_view_are_in_the_document(page: Any) -> None:
    assert count(page) == "10,000 adapters"
    names = shown(page)
    assert names[:3] == ["adapter0", "adapter1", "adapter2"]  # 2 before 10
    assert len(names) < 80
    assert page.locator("#rows table").get_attribute("aria-rowcount") == "10001"
    began = time.monotonic()
    scroll(page, 1e9)
    until(page, lambda: shown(page)[-1] == "adapter9999")
    assert time.monotonic() - began < SOON
    assert len(shown(page)) < 80
    last = page.locator("#rows tr[data-row]").last
    assert last.get_attribute("aria-rowindex") == "10001"
    box, view = last.bounding_box(), page.locator("#rows").bounding_box()
    assert box["y"] + box["height"] <= view["y"] + view["height"] + 1  # it can be seen
    height = page.evaluate("document.querySelector('#rows').scrollHeight")
    scroll(page, 100000)
    until(page, lambda: shown(page)[0] < "adapter9")
    assert page.evaluate("document.querySelector('#rows').scrollHeight") == pytest.approx(height, abs=2)
    top = page.locator("#rows").bounding_box()["y"] + 60
    lines = "[...document.querySelectorAll('#rows tr[data-row]')]"
    bottoms = page.evaluate(f"{lines}.map(line => [line.dataset.row, line.getBoundingClientRect().bottom])")
    first = next(row for row, bottom in bottoms if bottom > top)
    assert int(first) == pytest.approx(100000 / 34, rel=0.05)


def test_search_and_filters(page: Any) -> None:
    began = time.monotonic()
    control(page, "Search").fill("ADAPTER12 kohya")
    assert time.monotonic() - began < SOON
    found = [n for n in range(COUNT) if "adapter12" in f"adapter{n}" and n % 2]
    assert count(page) == f"{len(found)} of 10,000 adapters"
    assert shown(page)[0] == f"adapter{found[0]}"
    control(page, "Search").fill("torn")
    assert count(page) == "10 of 10,000 adapters"
    assert shown(page, 12) == ["it was torn"] * 10
    control(page, "Search").fill("")
    control(page, "Status").select_option(label="failed")
    assert count(page) == "10 of 10,000 adapters"
    control(page, "Status").select_option(label="all")
    control(page, "Family").select_option(label="dora")
    assert count(page).startswith(f"{len(range(1, COUNT, 3)):,} of")
    control(page, "Dialect").select_option(label="peft")
    control(page, "Base model").select_option(label="none")
    control(page, "Rank from").fill("10")
    control(page, "to").fill("11")
    found = [n for n in range(COUNT) if n % 3 == 1 and n % 2 == 0 and n % 5 == 0 and 10 <= n % 64 + 1 <= 11]
    assert found
    assert count(page) == f"{len(found)} of 10,000 adapters"
    assert shown(page) == [f"adapter{n}" for n in found]
    control(page, "Search").fill("nothing like it")
    assert count(page) == "0 of 10,000 adapters"
    assert shown(page) == []


def test_sorting(page: Any) -> None:
    began = time.monotonic()
    sort_by(page, "Rel. error")
    assert time.monotonic() - began < SOON
    assert shown(page)[:3] == ["adapter9999", "adapter9998", "adapter9997"]  # 9996 has none
    heading = page.locator("#rows thead th").filter(has_text="Rel. error")
    assert heading.get_attribute("aria-sort") == "descending"
    sort_by(page, "Rel. error")
    assert heading.get_attribute("aria-sort") == "ascending"
    assert shown(page)[:3] == ["adapter1", "adapter2", "adapter3"]
    scroll(page, 1e9)
    until(page, lambda: shown(page)[-1] == "adapter9996")
    assert shown(page, 9)[-1] == "–"  # gaps are last either way
    sort_by(page, "Rank")
    assert set(shown(page, 5)[:20]) == {"64"}
    sort_by(page, "Adapter")
    assert shown(page)[:2] == ["adapter0", "adapter1"]


def test_the_spectrum_of_the_row_under_the_pointer(page: Any) -> None:
    card = page.locator("#spectrum")
    assert card.is_hidden()
    control(page, "Search").fill("adapter1003")
    page.locator("#rows tr[data-row]").first.hover()
    assert card.is_visible()
    assert page.locator("#of").inner_text() == "adapter1003"
    heights = page.evaluate(
        "[...document.querySelectorAll('#drawing rect')].map(r => Number(r.getAttribute('height')))"
    )
    assert len(heights) == 1003 % 64 + 1
    falls = -np.diff(heights)[:12]  # each value is half of the one before: equal steps down, 0.301 of 4 decades
    assert falls == pytest.approx([100 * np.log10(2) / 4] * 12, abs=0.5)
    assert "1,004" in page.locator("#numbers").inner_text()
    box = card.bounding_box()
    assert box["x"] >= 0
    assert box["y"] >= 0
    assert box["x"] + box["width"] <= 1280
    page.locator("h1").hover()
    assert card.is_hidden()
    page.locator("#rows tr[data-row]").first.focus()
    assert card.is_visible()
    page.keyboard.press("Escape")
    assert card.is_hidden()


def test_themes(browser: Any, large: Path) -> None:
    with opened(browser, large, color_scheme="dark") as page:
        assert page.locator("html").get_attribute("data-theme") == "dark"
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.locator("#theme").click()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_names_are_text(browser: Any, tmp_path: Path) -> None:
    values = (np.array([1.0, 0.5], np.float32),)
    rows = [
        CatalogRow(t, "found", t, dialect=t, families=(t,), base_model=t, targets=(t,), singular_values=values)
        for t in HOSTILE
    ]
    write_catalog(rows, tmp_path / "<b>c.parquet")
    with opened(browser, write_page(tmp_path / "<b>c.parquet", tmp_path / "c.html")) as page:
        assert set(HOSTILE[:3]) <= set(shown(page))
        for line in page.locator("#rows tr[data-row]").all():
            line.hover()
            assert page.locator("#drawing rect").count() == 2
        assert page.locator("main img, main script, main b, aside img").count() == 0
        assert "<b>c.parquet" in page.locator("#about").inner_text()
        options = page.locator("#controls option").all_inner_texts()
        assert HOSTILE[0] in options


def test_an_empty_catalog_is_a_page(browser: Any, tmp_path: Path) -> None:
    write_catalog([], tmp_path / "c.parquet")
    with opened(browser, write_page(tmp_path / "c.parquet", tmp_path / "c.html")) as page:
        assert page.locator("h1").inner_text() == "0 adapters"
