"""Draw docs/images/inspect.svg and explore.svg, views of the example adapter; run by hand when those views change."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI

import loratools
from loratools_cli.explorer.app import Explorer
from loratools_cli.explorer.session import Session
from loratools_cli.render_inspect import render_inspect

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 80
LINES = 36  # of the view: module types, layers and effective rank by depth

SCREEN = (100, 30)
KEYS = ("down", "down", "down", "down", "down", "left", "o", "left", "o")  # to k_proj, rank 3, and 2 for it alone


def main() -> None:
    """Write the pictures."""
    (example,) = (path.parent for path in (ROOT / "examples").glob("*/adapter_config.json"))
    draw_inspect(example)
    asyncio.run(draw_explore(example))


async def draw_explore(example: Path) -> None:
    """The explorer as these keys leave it."""
    app = Explorer(Session(loratools.load(example)))
    async with app.run_test(size=SCREEN) as pilot:
        while app.session.done < app.session.work:
            await pilot.pause(0.1)
        await pilot.press(*KEYS)
        await pilot.pause(0.5)
        picture = app.export_screenshot(title="loratools explore")
    (ROOT / "docs" / "images" / "explore.svg").write_text(picture, encoding="utf-8")


def draw_inspect(example: Path) -> None:
    """The table as it is printed."""
    report = loratools.inspect(loratools.load(example))
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(f"$ loratools inspect {example.name}", style="bold green")
    lines = console.render_lines(render_inspect(report, WIDTH), console.options, pad=False)
    for line in lines[:LINES]:
        for segment in line:
            console.print(segment.text, style=segment.style, end="", markup=False, highlight=False, soft_wrap=True)
        console.print()
    picture = console.export_svg(title="loratools inspect", theme=MONOKAI, unique_id="inspect")
    (ROOT / "docs" / "images" / "inspect.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
