"""GGUF adapters: those that llama.cpp's own script wrote, and those written here, against the deltas of PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools import load, load_base
from loratools.adapter import Adapter
from loratools.base_weights import BaseWeights
from loratools.errors import InputError, LoratoolsError
from loratools.ops.convert import Convert, convert_file

Samples = Callable[[str], Path]
# The largest relative error of a delta that each file's element type allows.
BOUNDS = {
    "gemma3": 1e-6, "llama_embed": 1e-6, "llama_f32": 1e-6, "llama_lm_head": 1e-6, "qwen2": 1e-6, "qwen3": 1e-6,
    "llama_f16": 6e-4, "llama_q8_0": 1e-2,
}  # fmt: skip


def opened(samples: Samples, name: str) -> tuple[Path, BaseWeights]:
    folder = samples(f"gguf/{name}")
    return folder, load_base(folder / "base_hf")


def deltas(adapter: Adapter) -> dict[str, Tensor]:
    """By parameter, with the rows in the order of transformers."""
    found = {}
    for target, update in adapter.items():
        placement = adapter.format.place(target)
        assert placement is not None
        (piece,) = placement.pieces
        delta = update.delta().double()
        found[f"{piece.module.path}.weight"] = (
            delta if update.layout.embedding else delta[piece.rows.indices(len(delta))]
        )
    return found


def worst(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    assert set(found) <= set(truth)
    return max(float((found[k] - truth[k].double()).norm() / truth[k].double().norm()) for k in found)


def described(folder: Path) -> str:
    """The largest relative error of a file against PEFT's deltas, in words where the file itself is off."""
    base = load_base(folder / "base_hf")
    error = worst(deltas(load(folder / "adapter.gguf", base=base)), load_file(folder / "reference_dW.safetensors"))
    forgot = folder.name == "llama_rslora"
    return f"{error:.1e}" + (": llama.cpp's own script dropped the scale of rsLoRA" if forgot else "")


@pytest.mark.parametrize("name", BOUNDS)
def test_files_of_llama_cpp_decode_to_their_deltas(samples: Samples, name: str) -> None:
    folder, base = opened(samples, name)
    reference = load_file(folder / "reference_dW.safetensors")
    found = deltas(load(folder / "adapter.gguf", base=base))
    assert worst(found, reference) < BOUNDS[name]
    # Tied to the embedding, the output changes with it, and is no target of the file.
    assert set(reference) - set(found) <= {"lm_head.weight"}


def test_the_scale_that_llama_cpps_script_forgets_is_not_made_up(samples: Samples) -> None:
    """Its converter ignores rsLoRA: what its file says is alpha / r, where PEFT had alpha / sqrt(r)."""
    folder, base = opened(samples, "llama_rslora")
    reference = load_file(folder / "reference_dW.safetensors")
    adapter = load(folder / "adapter.gguf", base=base)
    (rank,) = {entry.rank for entry in adapter.entries.values()}
    assert worst({k: d * rank**0.5 for k, d in deltas(adapter).items()}, reference) < 1e-6


@pytest.mark.parametrize("name", [*BOUNDS, "llama_rslora"])
def test_peft_to_gguf_and_back_is_the_identity(samples: Samples, tmp_path: Path, name: str) -> None:
    folder, base = opened(samples, name)
    before = load(folder / "peft")
    written, _ = convert_file(before, tmp_path / "a.gguf", "gguf", Convert(base=base))
    assert worst(deltas(load(written.path, base=base)), load_file(folder / "reference_dW.safetensors")) < 1e-6
    again, _ = convert_file(load(written.path, base=base), tmp_path / "back", "peft", Convert(base=base))
    after = load(again.path)
    assert set(after) == set(before)
    assert after.config == before.config
    for target, update in before.items():
        for slot, tensor in update.parameters().items():
            found = after[target].parameters()[slot]
            assert found.dtype == tensor.dtype
            if name != "llama_rslora":  # whose scale had to go into a factor
                assert torch.equal(found, tensor)
        wanted = update.delta().double()
        assert (after[target].delta().double() - wanted).norm() <= 1e-6 * wanted.norm()


def test_ranks_and_alphas_of_their_own_are_folded(samples: Samples, tmp_path: Path) -> None:
    """llama.cpp has one alpha and divides it by each rank."""
    _, base = opened(samples, "llama_f32")
    tensors, prefix = {}, "base_model.model.model.layers."
    generator = torch.Generator().manual_seed(0)
    truth = {}
    for target, (m, n, rank, alpha) in {
        "0.mlp.up_proj": (48, 32, 3, 5.0),
        "1.mlp.up_proj": (48, 32, 6, 7.0),
        "1.mlp.down_proj": (32, 48, 2, 9.0),
    }.items():
        a, b = torch.randn(rank, n, generator=generator), torch.randn(m, rank, generator=generator)
        tensors |= {f"{prefix}{target}.lora_A.weight": a, f"{prefix}{target}.lora_B.weight": b}
        truth[f"model.layers.{target}.weight"] = alpha / rank * b.double() @ a.double()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["up_proj", "down_proj"],
        "rank_pattern": {"1.mlp.up_proj": 6, "1.mlp.down_proj": 2},
        "alpha_pattern": {"1.mlp.up_proj": 7, "1.mlp.down_proj": 9},
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    written, report = convert_file(load(tmp_path), tmp_path / "a.gguf", "gguf", Convert(base=base))
    assert "W_SCALE_FOLDED" in report.notices
    found = deltas(load(written.path, base=base))
    assert set(found) == set(truth)
    assert worst(found, truth) < 1e-6
    # As llama.cpp computes it from the file.
    reader = gguf.GGUFReader(written.path)
    stored = {t.name: t.data.astype(np.float64) for t in reader.tensors}
    field = reader.fields.get("adapter.lora.alpha")
    alpha = float(field.contents()) if field is not None else 0.0
    a, b = (stored[f"blk.1.ffn_down.weight.lora_{x}"] for x in "ab")
    scale = alpha / len(a) if alpha else 1.0
    np.testing.assert_allclose(
        scale * b @ a, truth["model.layers.1.mlp.down_proj.weight"].numpy(), rtol=1e-5, atol=1e-6
    )


def adapter_file(path: Path, tensors: dict[str, np.ndarray], arch: str = "llama", **strings: Any) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    for key, value in ({"general.type": "adapter", "adapter.type": "lora"} | strings).items():
        writer.add_float32(key, value) if isinstance(value, float) else writer.add_string(key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


PAIR = {
    "blk.0.ffn_up.weight.lora_a": np.ones((2, 8), np.float32),
    "blk.0.ffn_up.weight.lora_b": np.ones((6, 2), np.float32),
}


@pytest.mark.parametrize(
    ("tensors", "strings", "problem"),
    [
        (PAIR, {"general.type": "model"}, "is a GGUF model, not an adapter"),
        (PAIR, {"adapter.type": "control"}, "'control', not a LoRA"),
        (PAIR, {"adapter.lora.alpha": "much"}, "not a number"),
        (dict(list(PAIR.items())[:1]), {}, "ffn_up: .*missing"),
        (PAIR | {"blk.0.ffn_up.weight.lora_b": np.ones((6, 3), np.float32)}, {}, "ffn_up: .*do not chain"),
    ],
)
def test_what_is_no_adapter_says_so(
    tmp_path: Path, tensors: dict[str, np.ndarray], strings: dict[str, Any], problem: str
) -> None:
    path = adapter_file(tmp_path / "a.gguf", tensors, **strings)
    with pytest.raises(LoratoolsError, match=problem) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", range(60))
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, seed: int) -> None:
    """Cut off, or with bytes of the header overwritten: an error of ours or a file that still makes sense."""
    whole = adapter_file(tmp_path / "a.gguf", PAIR, **{"adapter.lora.alpha": 4.0}).read_bytes()
    draw = np.random.default_rng(seed)
    damaged = bytearray(whole)
    if seed % 3 == 0:
        damaged = damaged[: int(draw.integers(4, len(whole) - 32))]  # more than the padding at the end
    else:
        for _ in range(1 + seed % 4):
            damaged[int(draw.integers(4, len(whole) * 3 // 4))] = int(draw.choice([0, 1, 127, 128, 255]))
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged)
    problem = ""
    try:
        for update in load(path).values():
            update.delta()
    except LoratoolsError as error:
        problem = str(error)
    assert "\n" not in problem
    assert problem or seed % 3, "what is cut off must not load"


def test_a_config_beside_it_is_another_files(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 64, "lora_alpha": 1}')
    adapter = load(adapter_file(tmp_path / "a.gguf", PAIR, **{"adapter.lora.alpha": 4.0}))
    assert adapter.format.name == "gguf"
    assert {entry.scale for entry in adapter.entries.values()} == {2.0}


@pytest.mark.parametrize("field", ["tensors", "key-values"])
def test_counts_beyond_the_file_are_refused_at_once(tmp_path: Path, field: str) -> None:
    whole = bytearray(adapter_file(tmp_path / "a.gguf", PAIR).read_bytes())
    place = 8 if field == "tensors" else 16
    whole[place : place + 8] = (2**40).to_bytes(8, "little")
    (tmp_path / "huge.gguf").write_bytes(whole)
    with pytest.raises(InputError, match="no readable GGUF file"):
        load(tmp_path / "huge.gguf")
