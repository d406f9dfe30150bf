"""Files of Whisper in both namings, and of DUSt3R-style models, whose own names are the only ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from formats.made import assert_close, f64, rand, write
from safetensors.torch import save_file
from torch import Tensor

import loratools
from loratools.base_weights import load_base
from loratools.files import load
from loratools.formats.peft import PREFIX
from loratools.ops.convert import convert

# OpenAI's names and those of transformers.
WHISPER = {
    "encoder.blocks.0.attn.query": "model.encoder.layers.0.self_attn.q_proj",
    "encoder.blocks.11.attn.out": "model.encoder.layers.11.self_attn.out_proj",
    "decoder.blocks.1.attn.key": "model.decoder.layers.1.self_attn.k_proj",
    "decoder.blocks.1.cross_attn.value": "model.decoder.layers.1.encoder_attn.v_proj",
    "decoder.blocks.1.mlp.0": "model.decoder.layers.1.fc1",
    "encoder.blocks.0.mlp.2": "model.encoder.layers.0.fc2",
}
DUST3R = (
    "enc_blocks.0.attn.qkv", "enc_blocks.0.mlp.fc1", "dec_blocks.1.cross_attn.projq", "dec_blocks2.1.cross_attn.projk",
)  # fmt: skip
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": None}  # as old as has no patterns


def factors(name: str) -> tuple[Tensor, Tensor]:
    return rand(len(name), 2, 6), rand(len(name) + 1, 9, 2)


def peft(folder: Path, names: list[str], prefix: str = PREFIX, file: str = "adapter_model.safetensors") -> Path:
    tensors = {
        f"{prefix}{name}.lora_{side}.weight": t for name in names for side, t in zip("AB", factors(name), strict=True)
    }
    return write(folder, file, tensors, CONFIG).parent


def bare(folder: Path, names: list[str]) -> Path:
    return write(
        folder,
        "lora.pt",
        {f"{name}.lora_{side}": t for name in names for side, t in zip("AB", factors(name), strict=True)},
    )


@pytest.mark.parametrize("kind", ["peft", "bin", "twice wrapped", "bare"])
@pytest.mark.parametrize("naming", ["openai", "transformers"])
def test_whisper_in_both_namings(tmp_path: Path, kind: str, naming: str) -> None:
    names = list(WHISPER) if naming == "openai" else list(WHISPER.values())
    path = {
        "peft": lambda: peft(tmp_path, names),
        "bin": lambda: peft(tmp_path, names, file="adapter_model.bin"),
        "twice wrapped": lambda: peft(tmp_path, names, prefix=PREFIX * 2),
        "bare": lambda: bare(tmp_path, names),
    }[kind]()
    adapter = load(path, alpha=4 if kind == "bare" else None)
    assert set(adapter) == set(names)
    made, _ = convert(adapter, "peft")
    assert set(made) == set(WHISPER.values())
    for name, wanted in zip(names, WHISPER.values(), strict=True):
        a, b = factors(name)
        assert_close(made[wanted].delta(), 2.0 * f64(b) @ f64(a))


def test_convolutions_and_embeddings_of_whisper(tmp_path: Path) -> None:
    """Of one dimension: dW[o, c, t] = s sum_r B[o, r, 0] A[r, c, t]; positions are an embedding table."""
    a, b = rand(0, 2, 8, 3), rand(1, 6, 2, 1)
    table = rand(2, 2, 15), rand(3, 6, 2)
    tensors = {"conv1.lora_A.weight": a, "conv1.lora_B.weight": b}
    tensors |= {"embed_positions.lora_embedding_A": table[0], "embed_positions.lora_embedding_B": table[1]}
    write(tmp_path, "adapter_model.safetensors", {f"{PREFIX}model.encoder.{k}": t for k, t in tensors.items()}, CONFIG)
    adapter = load(tmp_path)
    truth = 2.0 * (f64(b)[:, :, 0] @ f64(a).reshape(2, 24)).reshape(6, 8, 3)
    assert_close(adapter["model.encoder.conv1"].delta(), truth)
    assert_close(adapter["model.encoder.embed_positions"].delta(), 2.0 * (f64(table[1]) @ f64(table[0])).T)


def test_the_delta_of_openais_names_fits_either_base(tmp_path: Path) -> None:
    path = bare(tmp_path, list(WHISPER))
    for names in (WHISPER, WHISPER.values()):
        save_file({f"{name}.weight": rand(0, 9, 6) for name in names}, tmp_path / "base.safetensors")
        base = load_base(tmp_path / "base.safetensors")
        found = dict(loratools.delta(load(path, alpha=4), base=base))
        assert set(found) == {f"{name}.weight" for name in names}


@pytest.mark.parametrize("kind", ["peft", "bare"])
def test_dust3r_keeps_its_names(tmp_path: Path, kind: str) -> None:
    path = peft(tmp_path, list(DUST3R)) if kind == "peft" else bare(tmp_path, list(DUST3R))
    adapter = load(path, alpha=4 if kind == "bare" else None)
    assert adapter.format.name == {"peft": "peft", "bare": "loralib"}[kind]
    made, _ = convert(adapter, "peft")
    assert set(made) == set(DUST3R)
    for name in DUST3R:
        a, b = factors(name)
        assert_close(made[name].delta(), 2.0 * f64(b) @ f64(a))
