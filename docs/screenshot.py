"""Photograph a page that `--report` wrote: python docs/screenshot.py report.html out.png [--dark] [--width N].

Needs playwright and a Chromium, Chrome or Edge on the PATH; run by hand when the page changes.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "microsoft-edge")


def photograph(page: Path, picture: Path, *, dark: bool, width: int, height: int) -> None:
    """Write the first `height` pixels of `page` as PNG, once all its plots are drawn."""
    from playwright.sync_api import sync_playwright

    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        sys.exit(f"no browser: install one of {', '.join(BROWSERS)}")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light", device_scale_factor=1
        )
        tab.set_default_timeout(120_000)
        tab.goto(page.resolve().as_uri())
        tab.wait_for_selector("html[data-ready]", state="attached")
        tab.screenshot(path=picture)
        browser.close()


def main() -> None:
    """Read the arguments, take the picture."""
    parser = argparse.ArgumentParser(description="Photograph a page that --report wrote.")
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--dark", action="store_true", help="in dark colours")
    parser.add_argument("--width", type=int, default=1280, metavar="N", help="pixels (390: a phone)")
    parser.add_argument("--height", type=int, default=1500, metavar="N", help="pixels from the top")
    given = parser.parse_args()
    if not given.page.is_file():
        parser.error(f"{given.page}: no such file")
    photograph(given.page, given.picture, dark=given.dark, width=given.width, height=given.height)
    print(f"wrote {given.picture}: {given.picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
