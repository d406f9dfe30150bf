"""Small adapters, and the command line in this process or in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loratools_cli.app import main

MODULES = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Ran:
    """What a run of the command line left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run the command line in this process."""

    def run_here(*arguments: object) -> Ran:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run_here


@pytest.fixture
def spawn() -> Callable[..., subprocess.Popen[str]]:
    """Start the command line in a process of its own; keywords go to Popen."""

    def start(*arguments: object, **keywords: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "loratools_cli", *map(str, arguments)]
        environment = os.environ | keywords.pop("env", {})
        defaults: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=environment, **(defaults | keywords))

    return start


def factors(n_layers: int, rank: int, size: int, seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Target -> (down, up), with falling spectra."""
    generator = torch.Generator().manual_seed(seed)
    fall = torch.logspace(0, -2, rank)
    made = {}
    for layer in range(n_layers):
        for module in MODULES:
            down = torch.randn(rank, size, generator=generator) * fall[:, None]
            made[f"model.layers.{layer}.self_attn.{module}"] = (down, torch.randn(size, rank, generator=generator))
    return made


@pytest.fixture
def peft(tmp_path: Path) -> Callable[..., Path]:
    """Write a PEFT adapter: `peft("name", rank=8, n_layers=2, size=32, edit=...)`; `edit` may change its tensors."""

    def write(
        name: str = "adapter",
        *,
        rank: int = 8,
        n_layers: int = 2,
        size: int = 32,
        seed: int = 0,
        edit: Callable[[dict[str, torch.Tensor]], None] | None = None,
        **config: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        tensors = {}
        for target, (down, up) in factors(n_layers, rank, size, seed).items():
            tensors[f"base_model.model.{target}.lora_A.weight"] = down
            tensors[f"base_model.model.{target}.lora_B.weight"] = up
        if edit:
            edit(tensors)
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        stated = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(MODULES)} | config
        (folder / "adapter_config.json").write_text(json.dumps(stated))
        return folder

    return write


@pytest.fixture
def kohya(tmp_path: Path) -> Callable[..., Path]:
    """Write a kohya file: `kohya("name.safetensors", rank=8)`."""

    def write(name: str = "lora.safetensors", *, rank: int = 8, n_layers: int = 2, **metadata: str) -> Path:
        tensors = {}
        for target, (down, up) in factors(n_layers, rank, 32, 0).items():
            stem = f"lora_unet_{target.replace('.', '_')}"
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            tensors[f"{stem}.alpha"] = torch.tensor(float(rank))
        save_file(tensors, tmp_path / name, {"ss_network_dim": str(rank)} | metadata)
        return tmp_path / name

    return write


def left_in(folder: Path) -> set[str]:
    """The names in a folder, hidden ones included."""
    return {path.name for path in folder.iterdir()}
