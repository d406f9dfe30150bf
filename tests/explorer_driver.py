"""Runs the explorer without a terminal, presses keys and reads its screen."""

from __future__ import annotations

import asyncio
import html
import json
import math
import re
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from textual.pilot import Pilot

import loratools
from loratools.adapter import Adapter
from loratools_cli.explorer.app import Explorer
from loratools_cli.explorer.save_screen import SaveScreen
from loratools_cli.explorer.session import Session

Steps = Callable[[Pilot[None]], Awaitable[None]]


def explore(session: Session, steps: Steps, *, size: tuple[int, int] = (100, 30), settle: bool = True) -> Explorer:
    """Run the app without a terminal, and the steps once everything is measured."""
    app = Explorer(session)

    async def drive() -> None:
        async with app.run_test(size=size) as pilot:
            if settle:
                await settled(pilot)
            await steps(pilot)

    asyncio.run(drive())
    return app


def of(path: Path, other: Path | None = None, base: Path | None = None) -> Session:
    return Session(
        loratools.load(path),
        None if base is None else loratools.load_base(base),
        None if other is None else loratools.load(other),
    )


async def until(pilot: Pilot[None], holds: Callable[[], bool]) -> None:
    limit = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < limit, "it never came"
        await pilot.pause(0.02)
    await pilot.pause()


async def settled(pilot: Pilot[None]) -> None:
    app = explorer(pilot)
    await until(pilot, lambda: app.session.done >= app.session.work and not app._is_due)


def explorer(pilot: Pilot[None]) -> Explorer:
    assert isinstance(pilot.app, Explorer)
    return pilot.app


def screen(pilot: Pilot[None]) -> str:
    """What stands on the screen, line by line."""
    rows: dict[int, dict[int, str]] = {}
    for x, row, text in re.findall(
        r'<text[^>]* x="([\d.]+)"[^>]*clip-path="url\(#[^)]*-line-(\d+)\)"[^>]*>([^<]*)</text>',
        pilot.app.export_screenshot(),
    ):
        rows.setdefault(int(row), {})[round(float(x) / 12.2)] = html.unescape(text).replace("\xa0", " ").rstrip("\n")
    lines = []
    for row in sorted(rows):
        line = ""
        for x in sorted(rows[row]):
            line = line.ljust(x) + rows[row][x]
        lines.append(line)
    return "\n".join(lines)


def naive(source: Path) -> dict[str, np.ndarray]:
    """Target -> singular values of the dense delta; the scale of the test adapters is 2."""
    stored = load_file(source / "adapter_model.safetensors")
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): np.linalg.svd(
            2 * stored[key.replace("lora_A", "lora_B")].double().numpy() @ down.double().numpy()
        )[1]
        for key, down in stored.items()
        if ".lora_A." in key
    }


def error_at(spectra: list[np.ndarray], rank: int) -> float:
    return math.sqrt(sum((s[rank:] ** 2).sum() for s in spectra) / sum((s**2).sum() for s in spectra))


def shown_error(value: float) -> str:
    return f"{value:#.3g}".rstrip(".")


def written(folder: Path, tensors: dict[str, torch.Tensor], rank: int) -> Path:
    folder.mkdir()
    save_file({k: t.clone() for k, t in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def saved(pilot: Pilot[None]) -> SaveScreen:
    assert isinstance(pilot.app.screen, SaveScreen)
    return pilot.app.screen


def slowed(adapter: Adapter, gate: threading.Event, seconds: float) -> Adapter:
    """Every target takes a while to read once the gate is open."""

    def waiting(read: Callable[[], Any]) -> Callable[[], Any]:
        def reading() -> Any:
            if gate.is_set():
                time.sleep(seconds)
            return read()

        return reading

    return replace(adapter, entries={t: replace(e, read=waiting(e.read)) for t, e in adapter.entries.items()})
