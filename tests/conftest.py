"""Fixtures and settings for every test."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

# Read once, when the libraries load: so before torch and the Hugging Face libraries are imported.
if "PYTEST_XDIST_WORKER" in os.environ:  # two processes share two cores, each with the programs that it starts
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import pytest
import torch

if TYPE_CHECKING:
    from training.tiny_task import Places

ROOT = Path(__file__).resolve().parents[1]

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

# A job in the background starts with SIGINT ignored, and so would the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_collection_finish() -> None:
    """Let no collection of garbage look through all modules and tests: code that frees models asks for many."""
    gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of sample data beside the checkout; a test that asks for it is skipped where it is absent."""
    folder = ROOT.parent / "shared"
    if not (folder / "samples").is_dir():
        pytest.skip(f"no sample data: {folder / 'samples'} does not exist")
    return folder


@pytest.fixture(scope="session")
def samples(shared: Path) -> Callable[[str], Path]:
    """The path of a sample by name: `samples("peft/lora_plain")`."""

    def sample(name: str) -> Path:
        path = shared / "samples" / name
        if not path.exists():
            known = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
            pytest.fail(f"no sample {name!r}; {path.parent} holds {', '.join(known) or 'nothing'}")
        return path

    return sample


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees what another one, or the user, has kept of base models."""
    monkeypatch.setenv("LORATOOLS_CACHE", str(tmp_path_factory.getbasetemp() / "no-cache" / os.urandom(4).hex()))


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """Two tiny bases and an adapter of one of them, which tests leave as they are."""
    from training.tiny_task import save_places

    made = save_places(tmp_path_factory.mktemp("places"))
    gc.freeze()  # transformers and peft are there by now
    return made
