"""The page of a comparison in a real browser: what it shows, what it does, and that it asks nobody for anything."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
from browsers import launched, opened
from compare_reports import HOSTILE, compare_report, gaps

from loratools.reports.compare import CompareReport
from loratools.reports.html import write_html

pytest.importorskip("plotly")

NAMES = (*HOSTILE, "plain", "\ud800 half a pair")
PLOTS = 8
Open = Callable[..., AbstractContextManager[Any]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def open_page(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Open:
    """Open a report from disk for a while."""
    folder = tmp_path_factory.mktemp("pages")
    return lambda report, **settings: opened(browser, write_html(report, folder / "a.html", force=True), **settings)


# Before the large page, which stays open for the tests after these.


def test_a_phone_scrolls_one_way_only(open_page: Open) -> None:
    report = compare_report(NAMES[:3], layers=6)
    with open_page(report, viewport={"width": 390, "height": 844}, color_scheme="dark") as page:
        assert page.locator("html").get_attribute("data-theme") == "dark"  # as the system says
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert page.evaluate("document.querySelector('#rows').scrollWidth") > 390  # the table has its own way
        things = "[...document.querySelectorAll('.plot .main-svg, .card, section')]"
        assert page.evaluate(f"{things}.length") > 20
        assert page.evaluate(f"{things}.filter(e => e.getBoundingClientRect().right > 390.5).length") == 0
        page.set_viewport_size({"width": 844, "height": 390})  # turned around
        page.wait_for_selector("#where .plot[data-form=wide]", state="attached")


def test_paper_is_light_and_narrow(open_page: Open) -> None:
    with open_page(compare_report(layers=2), color_scheme="dark") as page:
        state = "[document.documentElement.dataset.theme, document.querySelector('#where .main-svg').clientWidth]"
        screen = page.evaluate(state)
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        theme, width = page.evaluate(state)
        assert theme == "light"
        assert width < 700 < screen[1]  # A4 has 718 pixels between its margins
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.evaluate(state) == screen


def test_targets_are_text_in_plots_too(open_page: Open) -> None:
    with open_page(compare_report(layers=2, modules=(HOSTILE[1], "$x$ <br>"), rank=2)) as page:
        ticks = page.locator("#where .ytick").all_text_contents()
        assert ticks[0].startswith("<b>x</b><a")
        assert ticks[1] == "$x$ <br>"
        page.locator("#shape .plot").scroll_into_view_if_needed()
        page.locator("#shape path.point").first.hover(force=True)
        label = page.locator("#shape .hoverlayer .hovertext")
        label.wait_for()
        assert f"model.layers.0.{HOSTILE[1]}" in label.text_content()
        assert page.locator(".plot a[href]").count() == 0


def test_a_report_full_of_gaps_leaves_sections_out(open_page: Open) -> None:
    with open_page(gaps(compare_report(["only one"], layers=1, modules=("m",)))) as page:
        assert not page.locator("#missed, #growth, #overlap").locator("visible=true").count()
        assert page.locator("#rows tbody tr").count() == 1
        assert cells(page, "Rank") == ["–"]  # 0: its family has none
        assert "Nothing was measured here." in page.locator("#where figcaption").inner_text()
    with open_page(gaps(compare_report(layers=2))) as page:
        assert "–" in page.locator("#pairs").inner_text()


@pytest.fixture(scope="module")
def page(open_page: Open) -> Iterator[Any]:
    """Five fine-tunes of 224 matrices, with names that want to be markup."""
    with open_page(compare_report(NAMES, layers=32)) as page:
        yield page


def cells(page: Any, name: str) -> list[str]:
    """What one column of the table says, read at once."""
    script = """name => {
        const place = [...document.querySelectorAll("#rows th[scope=col]")].findIndex(e => e.textContent === name);
        return [...document.querySelectorAll("#rows tbody tr")].map(row => row.children[place].textContent);
    }"""
    return page.evaluate(script, name)


def heading(page: Any, name: str) -> Any:
    return page.locator("#rows th[scope=col]").filter(has_text=name).first


def test_every_plot_is_drawn_and_nothing_went_wrong(page: Any) -> None:
    assert page.locator(".plot .main-svg").count() >= PLOTS
    assert page.locator("section:visible").count() == 10
    assert page.trouble == []
    headings = page.locator("#rows th[scope=col]").all_inner_texts()
    assert len(headings) == len(CompareReport.columns) - 1  # all but the spectra
    assert "Base norm" in headings[-4:]


def test_names_are_text(page: Any) -> None:
    assert page.locator("main img, main b, main i, .plot a[href]").count() == 0
    assert page.locator(".card h3").all_inner_texts()[:2] == list(HOSTILE[:2])
    assert "\\u202eoverridden\\n" in page.locator(".card h3").nth(2).inner_text()
    legend = page.locator("#shape .legendtext").all_text_contents()
    assert legend[0] == HOSTILE[0]
    assert legend[1].startswith("<b>x</b><a href=")
    assert legend[1].endswith("&lt;i&gt;")


def test_hovering_a_point_names_its_target(page: Any) -> None:
    box = page.locator("#shape .trace.scatter").first.locator("path.point").nth(5)
    box.scroll_into_view_if_needed()
    box.hover(force=True)
    label = page.locator("#shape .hoverlayer .hovertext")
    label.wait_for()
    text = label.text_content()
    assert "model.layers." in text
    assert "_proj" in text
    assert "fine-tune: " in text


def test_a_cell_of_a_heat_map_names_its_target(page: Any) -> None:
    plot = page.locator("#where .plot")
    plot.scroll_into_view_if_needed()
    area = page.locator("#where .nsewdrag").bounding_box()
    page.mouse.move(area["x"] + 3, area["y"] + 3)
    label = page.locator("#where .hoverlayer .hovertext")
    label.wait_for()
    assert label.text_content().startswith("model.layers.0.q_proj")
    assert HOSTILE[0] in label.text_content()


def test_sorting_by_click_and_by_keyboard(page: Any) -> None:
    column = heading(page, "Relative norm")
    began = time.monotonic()
    column.locator("button").click()
    assert column.get_attribute("aria-sort") == "descending"
    values = [float(text) for text in cells(page, "Relative norm")]
    assert time.monotonic() - began < 3  # 1120 rows; the limit is for slow machines
    assert values == sorted(values, reverse=True)
    assert len(set(values)) > 10
    column.locator("button").focus()
    page.keyboard.press("Enter")
    assert column.get_attribute("aria-sort") == "ascending"
    values = [float(text) for text in cells(page, "Relative norm")]
    assert values == sorted(values)
    heading(page, "Matrix").locator("button").focus()
    page.keyboard.press("Space")
    assert column.get_attribute("aria-sort") is None
    names = list(dict.fromkeys(cells(page, "Matrix")))
    layers = [int(name.split(".")[2]) for name in names]
    assert layers == sorted(layers)  # 2 before 10


def test_filters(page: Any) -> None:
    page.get_by_label("Filter by words in names").fill("layers.7. Q_PROJ")
    assert set(cells(page, "Matrix")) == {"model.layers.7.q_proj"}
    assert page.locator("#count").inner_text() == "5 of 1,120 rows"
    page.locator("#table select").select_option("3")
    assert cells(page, "Fine-tune") == ["plain"]
    page.get_by_label("Filter by words in names").fill("no such thing")
    assert cells(page, "Matrix") == []
    page.get_by_label("Filter by words in names").fill("")
    page.locator("#table select").select_option("")
    assert page.locator("#count").inner_text() == "1,120 rows; the first 200 are shown"


def test_choices_redraw(page: Any) -> None:
    page.locator("#spectra select").select_option("10")
    assert page.locator("#spectra figcaption").inner_text().startswith("model.layers.1.o_proj")
    assert "base model" in page.locator("#spectra .legendtext").all_text_contents()
    before = page.locator("#overlap > figure figcaption").inner_text()
    page.locator("#overlap > .controls select").nth(2).select_option("input")
    assert page.locator("#overlap > figure figcaption").inner_text() != before
    page.locator("#intruders select").first.select_option("4")  # tuned whole
    assert page.locator("#intruders figcaption").inner_text().startswith("0 intruders")


def test_dark_and_light(page: Any) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    ticks = "getComputedStyle(document.querySelector('#shape .xtick text')).fill"
    light = page.evaluate(f"[{ground}, {ticks}]")
    page.get_by_role("button", name="Dark").click()
    assert page.locator("html").get_attribute("data-theme") == "dark"
    dark = page.evaluate(f"[{ground}, {ticks}]")
    assert sum(map(int, dark[0][4:-1].split(","))) < 100 < 600 < sum(map(int, light[0][4:-1].split(",")))
    assert dark[1] != light[1]  # the plots follow
    page.get_by_role("button", name="Dark").click()
    assert page.evaluate(f"[{ground}, {ticks}]") == light


@pytest.mark.parametrize("name", ["light", "dark"])
def test_text_has_contrast(page: Any, name: str) -> None:
    """WCAG's ratio for what is written in the page's own colours, and for lines that tell fine-tunes apart."""
    page.evaluate("name => { document.documentElement.dataset.theme = name }", name)
    colours = page.evaluate(
        "() => Object.fromEntries(['--page', '--panel', '--empty', '--ink', '--soft', '--accent', '--warn'].map("
        "v => [v, getComputedStyle(document.documentElement).getPropertyValue(v).trim()]))"
    )
    page.evaluate("() => { document.documentElement.dataset.theme = 'light' }")

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for ground in ("--page", "--panel", "--empty", "--warn"):
        for ink in ("--ink", "--soft", "--accent"):
            dark, light = sorted((luminance(colours[ground]), luminance(colours[ink])))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, ground)


def test_gaps_sort_last_in_both_directions(page: Any) -> None:
    column = heading(page, "Misses")
    page.get_by_label("Filter by words in names").fill("layers.7.")
    for _ in range(2):
        column.locator("button").click()
        values = cells(page, "Misses")
        assert len(values) == 7 * 5
        assert values[-7:] == ["–"] * 7  # of what was tuned whole
        assert "–" not in values[:-7]
    page.get_by_label("Filter by words in names").fill("")


def test_all_rows_on_demand(page: Any) -> None:
    assert len(cells(page, "Matrix")) == 200
    page.evaluate("document.querySelector('#more').click()")
    assert len(cells(page, "Matrix")) == 224 * 5
    assert page.locator("#count").inner_text() == "1,120 rows"
    assert not page.locator("#more").is_visible()
