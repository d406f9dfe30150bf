"""The page of a transfer in a real browser: what it draws, in both themes and on a phone, and that texts are texts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsers import launched, opened
from training.test_transfer_page import HOSTILE, carried
from training.transfer_run import transfer_report

from loratools.reports import weight_transfer_page
from loratools.training.transfer.page import write_page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as browser:
        yield browser


def test_what_is_drawn(browser: Any, tmp_path: Path) -> None:
    report = transfer_report(tmp_path / "work")
    with opened(browser, write_page(report, tmp_path / "a.html")) as page:
        assert page.locator("h1").inner_text() == "my-adapter, moved to base2"
        assert page.locator("#tags .tag").count() == 0
        assert page.locator("#nav a").count() == page.locator("#sections section").count() == 7
        assert page.locator("#acceptance .histograms rect").count() > 20
        assert page.locator("#curves svg.drawing[role=img]").count() == 2
        first = page.locator("#curves svg[role=img]").first
        # The held-out loss at step 0, by the labels of the axes: 2.5 of 3 on the left edge.
        texts = first.locator("text").all_text_contents()
        assert {"0", "1", "2", "3", "step", "nats", "100"} <= set(texts)
        circle = first.locator("circle").first
        left, low, high = (float(first.locator("line.axis").last.get_attribute(key) or 0) for key in ("x1", "y2", "y1"))
        assert float(circle.get_attribute("cx")) == pytest.approx(left)
        assert float(circle.get_attribute("cy")) == pytest.approx(low + (high - low) * 2.5 / 3, abs=0.1)
        assert page.locator("#samples table").first.locator("tbody tr").count() == 20
        assert "Number: 3\\nWords:" in page.locator("#samples").inner_text()
        page.locator("#moved summary").click()
        assert "train.learning_rate" in page.locator("#moved .facts").last.inner_text()
        outside = "[...document.querySelectorAll('#curves svg text')].filter(t => { const a = t.getBoundingClientRect(), b = t.ownerSVGElement.getBoundingClientRect(); return a.left < b.left - 1 || a.right > b.right + 1 || a.bottom > b.bottom + 1 || a.top < b.top - 1 }).length"  # noqa: E501
        assert page.evaluate(outside) == 0


def test_themes_and_a_phone(browser: Any, tmp_path: Path) -> None:
    path = write_page(transfer_report(tmp_path / "work", seeds=0), tmp_path / "a.html")
    with opened(browser, path, color_scheme="dark") as page:
        assert page.locator("html").get_attribute("data-theme") == "dark"
        assert page.locator("#tags .tag").all_inner_texts() == ["self-prompted"]
        painted = "getComputedStyle(document.querySelector('#curves path.first')).stroke"
        dark = page.evaluate(painted)
        page.locator("#theme").click()
        assert page.evaluate(painted) != dark
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_texts_are_texts(browser: Any, tmp_path: Path) -> None:
    with opened(browser, write_page(transfer_report(tmp_path / "work", HOSTILE), tmp_path / "a.html")) as page:
        shown = page.locator("#samples tbody th").all_inner_texts()
        assert set(HOSTILE[:3]) <= set(shown)
        assert page.locator("main img, main script, main b").count() == 0
    with opened(browser, weight_transfer_page.write_page(carried(), tmp_path / "w.html")) as page:
        assert page.locator("#tags .tag").all_inner_texts() == ["weights only"]
        assert HOSTILE[1] in page.locator("#targets tbody th").all_inner_texts()
        assert page.locator("main img, main script").count() == 0
