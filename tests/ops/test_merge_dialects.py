"""Merges are written in the dialect of the first adapter, whatever it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from loratools import load, merge, save
from loratools.errors import AdapterError
from loratools.files import is_folder_adapter

Samples = Callable[[str], Path]


@pytest.mark.parametrize(
    "name",
    [
        "diffusers/sd_unet_te/pytorch_lora_weights.safetensors",
        "diffusers/sd_unet_te_nometa/pytorch_lora_weights.safetensors",
        "gguf/llama_f32/adapter.gguf",
        "kohya/flux_bfl/lora.safetensors",
        "mlx/llama_lora",
        "peft/lora_plain",
    ],
)
def test_every_dialect_takes_a_merge(samples: Samples, tmp_path: Path, name: str) -> None:
    """0.75 and 0.5 of one adapter are 1.25 of it, in its own dialect, on disk."""
    adapter = load(samples(name))
    merged, _ = merge([(adapter, 0.75), (load(samples(name)), 0.5)])
    assert merged.format.name == adapter.format.name
    suffix = f".{adapter.format.container}"
    again = load(save(merged, tmp_path / ("out" if is_folder_adapter(merged) else f"out{suffix}")).path)
    assert set(again) == set(adapter)
    for target, update in adapter.items():
        wanted = 1.25 * update.delta().double()
        assert (again[target].delta().double() - wanted).norm() <= 1e-6 * wanted.norm()


def test_a_new_target_of_another_dialect_is_refused_by_name(samples: Samples) -> None:
    fewer, more = (load(samples(f"gguf/{name}/adapter.gguf")) for name in ("llama_f32", "llama_lm_head"))
    assert set(more) - set(fewer)
    with pytest.raises(AdapterError, match=r"is in other adapters alone, which the dialect gguf .* --to peft"):
        merge([(fewer, 1.0), (more, 1.0)])
