"""Pages in a real browser: opened from disk, and watched for what goes wrong on them or leaves them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def launched() -> Iterator[Any]:
    """A browser; the test is skipped where there is none, or nothing to drive it with."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright to drive a browser with")
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    with sync_api.sync_playwright() as play:
        # Root in a container has no sandbox to give; the page under test is our own.
        browser = play.chromium.launch(executable_path=found[0], args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, path: Path, **settings: Any) -> Iterator[Any]:
    """A page for a while; what went wrong on it, or left it, is its `trouble`, of which there may be none."""
    context = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | settings))
    context.set_default_timeout(120_000)  # a machine with other things to do
    trouble: list[str] = []
    page = context.new_page()
    page.on("console", lambda message: trouble.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: trouble.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (trouble.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: trouble.append(request.url) if request.url != path.as_uri() else None)
    page.trouble = trouble
    try:
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]", state="attached")
        yield page
        assert not trouble
    finally:
        context.close()
