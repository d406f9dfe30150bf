"""Fused projections of loralib and LitGPT: which parts, which rows, and what the user must say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from formats.made import assert_close, f64, rand, write
from safetensors.torch import load_file, save_file

import loratools
from loratools.base_weights import load_base
from loratools.errors import AdapterError, UnmappedModuleError
from loratools.files import load, save
from loratools.ops.convert import convert

QKV = "transformer.h.0.attn.qkv"


def loralib(folder: Path, updated: int = 2) -> dict[str, torch.Tensor]:
    tensors = {"qkv.lora_A": rand(0, 3 * updated, 16), "qkv.lora_B": rand(1, 8 * updated, 3)}
    write(folder, "lora.pt", tensors)
    return tensors


class TestLoralib:
    def test_parts_have_factors_of_their_own(self, tmp_path: Path) -> None:
        tensors = loralib(tmp_path)
        a, b = f64(tensors["qkv.lora_A"]), f64(tensors["qkv.lora_B"])
        truth = 2.0 * np.concatenate([np.zeros((8, 16)), b[:8] @ a[:3], b[8:] @ a[3:]])
        adapter = load(tmp_path / "lora.pt", alpha=6, enable_lora=(False, True, True))
        assert_close(adapter["qkv"].delta(), truth)
        assert adapter.entries["qkv"].rank == 3

    def test_a_base_tells_what_is_transposed(self, tmp_path: Path) -> None:
        tensors = loralib(tmp_path)
        tensors |= {"fc.lora_A": rand(2, 3, 16), "fc.lora_B": rand(3, 5, 3)}
        write(tmp_path, "lora.pt", tensors)
        save_file({"qkv.weight": rand(4, 16, 24), "fc.weight": rand(5, 16, 5)}, tmp_path / "base.safetensors")
        base = load_base(tmp_path / "base.safetensors")
        adapter = load(tmp_path / "lora.pt", alpha=3, enable_lora=(True, True, False), base=base)
        assert adapter["qkv"].delta().shape == (16, 24)
        assert_close(adapter["fc"].delta(), (f64(tensors["fc.lora_B"]) @ f64(tensors["fc.lora_A"])).T)

    def test_which_parts_is_never_guessed(self, tmp_path: Path) -> None:
        loralib(tmp_path)
        with pytest.raises(AdapterError, match=r"updates 2 of some fused projections.*--enable-lora"):
            load(tmp_path / "lora.pt")
        with pytest.raises(AdapterError, match="--enable-lora names 1"):
            load(tmp_path / "lora.pt", enable_lora=(True, False, False))

    def test_written_as_they_were(self, tmp_path: Path) -> None:
        tensors = loralib(tmp_path)
        adapter = load(tmp_path / "lora.pt", enable_lora=(True, False, True))
        saved = load_file(save(adapter, tmp_path / "out.safetensors").path)
        assert {key: torch.equal(saved[key], t) for key, t in tensors.items()} == dict.fromkeys(tensors, True)

    def test_as_a_lora_of_the_whole_parameter(self, tmp_path: Path) -> None:
        loralib(tmp_path)
        adapter = load(tmp_path / "lora.pt", alpha=6, enable_lora=(True, False, True))
        made, _ = convert(adapter, "peft")
        assert (made.entries["qkv"].rank, made.entries["qkv"].scale) == (6, 2.0)
        assert torch.equal(made["qkv"].delta(), adapter["qkv"].delta())

    def test_matryoshka_files_are_still_told_apart(self, tmp_path: Path) -> None:
        write(tmp_path, "lora.pt", {"q.lora_A": rand(0, 12, 4), "q.lora_B": rand(1, 4, 6)})
        assert load(tmp_path / "lora.pt").entries["q"].rank == 4


def litgpt(folder: Path, flags: str, rows: int, count: int, *, model: str = "") -> dict[str, torch.Tensor]:
    tensors = {f"{QKV}.lora_A": rand(0, 3 * count, 32), f"{QKV}.lora_B": rand(1, rows, 3)}
    tensors |= {"transformer.h.0.mlp.fc_1.lora_A": rand(2, 3, 32), "transformer.h.0.mlp.fc_1.lora_B": rand(3, 48, 3)}
    folder.mkdir(exist_ok=True)
    torch.save({"model": tensors}, folder / "lit_model.pth.lora")
    on = "".join(
        f"lora_{p}: {'true' if f == '1' else 'false'}\n" for p, f in zip(("query", "key", "value"), flags, strict=True)
    )
    (folder / "hyperparameters.yaml").write_text(
        f"checkpoint_dir: some/where\nlora_r: 3\nlora_alpha: 6  # twice the rank\n{on}data:\n  class_path: x\n"
    )
    if model:
        (folder / "model_config.yaml").write_text(model)
    return tensors


GQA = "n_head: 4\nn_query_groups: 2\nhead_size: 8\nn_embd: 32\nmlp_class_name: LLaMAMLP\n"


class TestLitGPT:
    def test_queries_keys_and_values_come_apart(self, tmp_path: Path) -> None:
        """Grouped queries: 32 rows, and 16 each for keys and values."""
        tensors = litgpt(tmp_path, "101", 48, 2, model=GQA)
        a, b = f64(tensors[f"{QKV}.lora_A"]), f64(tensors[f"{QKV}.lora_B"])
        queries, values = 2.0 * b[:32] @ a[:3], 2.0 * b[32:] @ a[3:]
        adapter = load(tmp_path)
        assert_close(adapter[QKV].delta(), np.concatenate([queries, np.zeros((16, 32)), values]))
        made, _ = convert(adapter, "peft")
        stem = "model.layers.0.self_attn"
        assert set(made) == {f"{stem}.q_proj", f"{stem}.v_proj", "model.layers.0.mlp.gate_proj"}
        assert_close(made[f"{stem}.q_proj"].delta(), queries)
        assert_close(made[f"{stem}.v_proj"].delta(), values)
        assert {(e.rank, e.scale) for e in made.entries.values()} == {(3, 2.0)}

    def test_the_delta_under_the_names_of_a_base_that_has_the_parts(self, tmp_path: Path) -> None:
        tensors = litgpt(tmp_path, "111", 64, 3, model=GQA)
        a, b = f64(tensors[f"{QKV}.lora_A"]), f64(tensors[f"{QKV}.lora_B"])
        stem = "model.layers.0.self_attn"
        base = {f"{stem}.{p}_proj.weight": rand(9, 32 if p == "q" else 16, 32) for p in "qkv"}
        save_file(base | {"model.layers.0.mlp.gate_proj.weight": rand(8, 48, 32)}, tmp_path / "base.safetensors")
        found = dict(loratools.delta(load(tmp_path), base=load_base(tmp_path / "base.safetensors"), target=QKV))
        assert list(found) == list(base)
        assert_close(found[f"{stem}.k_proj.weight"], 2.0 * b[32:48] @ a[3:6])

    @pytest.mark.parametrize(
        ("flags", "rows", "count"), [("111", 64, 3), ("110", 48, 2), ("011", 32, 2), ("010", 16, 1)]
    )
    def test_sizes_are_not_guessed(self, tmp_path: Path, flags: str, rows: int, count: int) -> None:
        litgpt(tmp_path, flags, rows, count)
        with pytest.raises(AdapterError, match=r"how many rows are queries.*model_config\.yaml"):
            load(tmp_path)

    @pytest.mark.parametrize(("flags", "rows", "count"), [("110", 48, 2), ("011", 32, 2), ("100", 32, 1)])
    def test_sizes_follow_from_the_base(self, tmp_path: Path, flags: str, rows: int, count: int) -> None:
        litgpt(tmp_path, flags, rows, count)
        save_file({f"{QKV}.weight": rand(7, 64, 32)}, tmp_path / "base.safetensors")
        adapter = load(tmp_path / "lit_model.pth.lora", base=load_base(tmp_path / "base.safetensors"))
        assert [size for size, _ in adapter.entries[QKV].layout.blocks] == [32, 16, 16]

    def test_what_the_settings_lack_must_be_said(self, tmp_path: Path) -> None:
        litgpt(tmp_path, "101", 48, 2, model=GQA)
        (tmp_path / "hyperparameters.yaml").unlink()
        with pytest.raises(AdapterError, match="--enable-lora, such as 1,0,1"):
            load(tmp_path)
        adapter = load(tmp_path, enable_lora=(True, False, True))
        assert "state it with --alpha" in adapter.warnings[0]
        assert load(tmp_path, enable_lora=(True, False, True), alpha=6).entries[QKV].scale == 2.0

    def test_the_interleaved_layout_of_old_versions_is_refused(self, tmp_path: Path) -> None:
        tensors = {
            "transformer.h.0.attn.attn.lora_A": rand(0, 9, 32),
            "transformer.h.0.attn.attn.lora_B": rand(1, 96, 3),
        }
        write(tmp_path, "lit_model.pth.lora", tensors)
        with pytest.raises(AdapterError, match="rows are interleaved by group"):
            load(tmp_path)

    def test_models_that_transformers_names_otherwise_are_not_mapped(self, tmp_path: Path) -> None:
        litgpt(tmp_path, "101", 48, 2, model=GQA.replace("LLaMAMLP", "GptNeoxMLP"))
        with pytest.raises(UnmappedModuleError, match="no model is known"):
            convert(load(tmp_path), "peft")
