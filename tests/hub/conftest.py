"""A hub of small adapters in several dialects."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "base_model_name_or_path": "tiny"}


def write_peft(folder: Path, seed: int, *, rank: int = 4, layers: int = 2) -> Path:
    """A PEFT adapter as a folder."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i in range(layers):
        stem = f"base_model.model.model.layers.{i}.self_attn.q_proj"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, 24, generator=generator)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(32, rank, generator=generator)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, "r": rank}))
    return folder


def write_kohya(path: Path, seed: int) -> Path:
    """A file of kohya's."""
    generator = torch.Generator().manual_seed(seed)
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {
        f"{stem}.lora_down.weight": torch.randn(4, 24, generator=generator),
        f"{stem}.lora_up.weight": torch.randn(32, 4, generator=generator),
        f"{stem}.alpha": torch.tensor(2.0),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


@pytest.fixture
def make_hub(tmp_path: Path) -> Callable[[int], Path]:
    """A hub with so many adapters of PEFT, one of kohya, and places that are none."""

    def make(count: int = 3) -> Path:
        hub = tmp_path / "hub"
        for i in range(count):
            write_peft(hub / f"a{i}", i)
        write_kohya(hub / "deep" / "er" / "k.safetensors", 90)
        (hub / "notes.txt").write_text("no adapter")
        return hub

    return make


def contents(out: Path) -> dict[str, bytes]:
    """Every output file by name; receipts, which tell times, left out."""
    return {
        p.relative_to(out).as_posix(): p.read_bytes()
        for p in sorted(out.rglob("*"))
        if p.is_file() and ".loratools" not in p.parts
    }


@pytest.fixture
def run_program() -> Callable[..., subprocess.CompletedProcess[str]]:
    """The program as people run it, with all that it prints."""

    def call(*arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "loratools_cli", *map(str, arguments)],
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            check=False,
        )

    return call


@pytest.fixture
def memory() -> Iterator[Any]:
    """The file system memory://, empty."""
    fsspec = pytest.importorskip("fsspec", reason="needs fsspec: pip install 'loratools[hub]'")
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]
