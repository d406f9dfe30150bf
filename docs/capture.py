"""Draw docs/images/inspect.svg, the terminal view of the example adapter; run by hand when that view changes."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI

import loratools
from loratools_cli.render_inspect import render_inspect

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 80
LINES = 36  # of the view: module types, layers and effective rank by depth


def main() -> None:
    """Write the picture."""
    (example,) = (path.parent for path in (ROOT / "examples").glob("*/adapter_config.json"))
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
