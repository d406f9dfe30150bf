"""MLX-LM itself loads what a conversion wrote, and fuses exactly the delta that loratools says is in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

mx: Any = pytest.importorskip("mlx.core", reason="compares with MLX-LM: pip install 'loratools[mlx]'")
pytest.importorskip("mlx_lm", reason="compares with MLX-LM: pip install 'loratools[mlx]'")

from mlx_lm.models import llama  # noqa: E402
from mlx_lm.tuner.utils import load_adapters  # noqa: E402

from loratools.base_weights import load_base  # noqa: E402
from loratools.files import load  # noqa: E402
from loratools.ops.convert import convert_file  # noqa: E402

Samples = Callable[[str], Path]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


def model() -> Any:
    arguments = llama.ModelArgs(
        model_type="llama", num_hidden_layers=2, rms_norm_eps=1e-5, vocab_size=64, tie_word_embeddings=False, **SIZES
    )
    return llama.Model(arguments)


def fused(folder: Path, made: Any, base: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The deltas after MLX-LM's own loading and fusing, of the modules that it adapts."""
    made.load_weights([(name, mx.array(weight)) for name, weight in base.items()], strict=False)
    load_adapters(made, str(folder))
    changed = [(name, module) for name, module in made.named_modules() if hasattr(module, "fuse")]
    return {f"{name}.weight": np.array(module.fuse().weight) - base[f"{name}.weight"] for name, module in changed}


def weights_of(made: Any) -> dict[str, np.ndarray]:
    from mlx.utils import tree_flatten

    return {name: np.array(weight) for name, weight in tree_flatten(made.parameters())}


ADAPTERS = (
    "lora_plain",
    "rslora",
    "rank_alpha_pattern",
    "lora_all_linear",
    "lora_embedding",
    "exclude_modules",
    "dora",
)


@pytest.mark.parametrize("name", ADAPTERS)
def test_mlx_fuses_what_peft_trained(samples: Samples, tmp_path: Path, name: str) -> None:
    adapter = load(samples(f"peft/{name}"))
    made = model()
    base = weights_of(made)
    shapes = {f"{target}.weight": entry.base_shape for target, entry in adapter.entries.items()}
    for parameter, shape in shapes.items():  # the samples' own sizes
        if base[parameter].shape != shape:
            pytest.skip(f"{parameter} is {shape} in the sample")
    stored = load_base(samples(f"peft/{name}") / "base.safetensors") if name == "dora" else None
    if stored is not None:
        base |= {p: stored.find(p, s).numpy() for p, s in shapes.items()}
    convert_file(adapter, tmp_path / "out", "mlx")
    found = fused(tmp_path / "out", made, base)
    for target, update in adapter.items():
        truth = update.delta(torch.from_numpy(base[f"{target}.weight"])).numpy()
        delta = found.pop(f"{target}.weight")
        assert np.linalg.norm(delta - truth) <= 1e-5 * np.linalg.norm(base[f"{target}.weight"]), target
        assert np.linalg.norm(truth) > 1e-3
    for parameter, delta in found.items():  # adapted, for a name stands for all layers, but not changed
        assert np.linalg.norm(delta) <= 1e-6 * np.linalg.norm(base[parameter])
