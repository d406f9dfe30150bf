"""Opening and saving: what is found, what is refused, and what survives."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools.errors import AdapterError, InputError, OutputError

DOWN, UP = "base_model.model.layers.0.q.lora_A.weight", "base_model.model.layers.0.q.lora_B.weight"


def tensors(r: int = 4, n: int = 12, m: int = 10) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    return {DOWN: torch.randn(r, n, generator=gen), UP: torch.randn(m, r, generator=gen)}


def peft(folder: Path, weights: dict[str, torch.Tensor] | None = None, **config: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | config))
    save_file(weights or tensors(), folder / "adapter_model.safetensors")
    return folder


def test_a_folder_and_its_weights_file_are_one_adapter(tmp_path: Path) -> None:
    folder = peft(tmp_path / "a")
    by_folder, by_file = loratools.load(folder), loratools.load(folder / "adapter_model.safetensors")
    assert by_folder.entries["layers.0.q"].scale == by_file.entries["layers.0.q"].scale == 2.0
    with by_folder:
        by_folder["layers.0.q"]
    with pytest.raises(InputError, match="closed"):
        by_folder["layers.0.q"]


def test_a_file_without_config_says_that_alpha_is_unknown(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "lone.safetensors")
    assert any("alpha is unknown" in w for w in loratools.load(tmp_path / "lone.safetensors").warnings)
    stated = loratools.load(tmp_path / "lone.safetensors", alpha=6)
    assert stated.entries["layers.0.q"].scale == 1.5
    assert not stated.warnings


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({DOWN: torch.ones(4, 12)}, r"layers\.0\.q: not a complete lora update: up missing"),
        ({UP: torch.ones(10, 4)}, r"layers\.0\.q: not a complete lora update: down missing"),
        (
            {DOWN: torch.ones(4, 12), UP: torch.ones(10, 3)},
            r"layers\.0\.q: up \(10, 3\) and down \(4, 12\) do not chain",
        ),
        ({DOWN: torch.ones(0, 12), UP: torch.ones(10, 0)}, r"layers\.0\.q: .*hold no rank"),
        ({DOWN: torch.ones(4, 12, dtype=torch.int8), UP: torch.ones(10, 4)}, "floating-point"),
        (tensors() | {"base_model.model.layers.0.q.lora_latent_mapping.weight": torch.ones(4, 4)}, "variant of LoRA"),
    ],
)
def test_incomplete_or_mismatched_updates_name_the_target(
    tmp_path: Path, broken: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(AdapterError, match=message):
        loratools.load(peft(tmp_path / "a", broken))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "no JSON object"),
        ("\ud800".encode("utf-8", "surrogatepass"), "cannot be read as JSON"),
    ],
)
def test_damaged_config(tmp_path: Path, config: str | bytes, message: str) -> None:
    folder = peft(tmp_path / "a")
    (folder / "adapter_config.json").write_bytes(config if isinstance(config, bytes) else config.encode())
    with pytest.raises(InputError, match=message):
        loratools.load(folder)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"peft_type": "LOHA"}, InputError, "no adapter weights"),
        ({"peft_type": "OTHER"}, AdapterError, "'OTHER' is not supported"),
        ({"lora_alpha": "8"}, InputError, "not a number"),
        ({"alpha_pattern": {"(": 2}}, InputError, "not a regular expression"),
        ({"rank_pattern": [1]}, InputError, "rank_pattern"),
        ({"use_qalora": True}, AdapterError, "use_qalora"),
    ],
)
def test_configs_that_change_the_meaning_are_refused(
    tmp_path: Path, fields: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        loratools.load(peft(tmp_path / "a", **fields))


def test_folders_without_a_choice(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no adapter weights"):
        loratools.load(tmp_path)
    save_file(tensors(), tmp_path / "one.safetensors")
    save_file(tensors(), tmp_path / "two.safetensors")
    with pytest.raises(InputError, match=r"several weights files; name one of one\.safetensors, two\.safetensors"):
        loratools.load(tmp_path)
    peft(tmp_path / "sub" / "first")
    with pytest.raises(InputError, match="adapters lie in first"):
        loratools.load(tmp_path / "sub")
    with pytest.raises(InputError, match="no such file"):
        loratools.load(tmp_path / "missing.safetensors")


def test_files_of_no_known_dialect_show_their_keys(tmp_path: Path) -> None:
    save_file({"model.weight\x1b[31m": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"no known adapter dialect; `loratools formats` .*model\.weight\\x1b\[31m"):
        loratools.load(tmp_path / "model.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(InputError, match="no tensors"):
        loratools.load(tmp_path / "empty.safetensors")


def test_modules_of_kohya_files_may_be_of_any_family(tmp_path: Path) -> None:
    pair = {"lora_unet_a.lora_down.weight": torch.ones(2, 4), "lora_unet_a.lora_up.weight": torch.ones(4, 2)}
    mixed = pair | {
        "lora_unet_a.diff_b": torch.ones(4),
        **{f"lora_unet_b.hada_w{i}_a": torch.ones(4, 2) for i in (1, 2)},
        **{f"lora_unet_b.hada_w{i}_b": torch.ones(2, 5) for i in (1, 2)},
        "lora_unet_b.dora_scale": torch.ones(1, 5),
        "lora_unet_c.oft_blocks": torch.ones(2, 3, 3),
        "lora_unet_d.oft_blocks": torch.ones(2, 4, 4, 4),
        "lora_unet_d.rescale": torch.ones(16, 1),
        "lora_unet_e.weight": torch.ones(4),
        "lora_unet_e.on_input": torch.tensor(1),
        "lora_unet_f.w_norm": torch.ones(3),
        **{f"lora_unet_g.{name}.weight": torch.ones(4, 4) for name in ("a1", "a2", "b1", "b2")},
        "lora_unet_h.lokr_w1": torch.ones(2, 2),
        "lora_unet_h.lokr_w2": torch.ones(2, 3),
        "lora_unet_h.dora_scale": torch.ones(4, 1),
        "lora_unet_i.q_layer.weight": torch.ones(2, 4),
        "lora_unet_i.p_layer.weight": torch.ones(4, 2),
        "lora_unet_i.lambda_layer": torch.ones(1, 2),
        "lora_unet_i.alpha": torch.tensor(1.0),
        "head.weight": torch.ones(3),
    }
    save_file(mixed, tmp_path / "mixed.safetensors")
    adapter = loratools.load(tmp_path / "mixed.safetensors")
    assert {t.removeprefix("lora_unet_"): e.family.family for t, e in adapter.entries.items()} == {
        "a": "lora", "a.bias": "full", "b": "doha", "c": "oft_lycoris", "d": "boft_lycoris", "e": "ia3_lycoris",
        "f": "full", "g": "glora", "h": "dokr",
    }  # fmt: skip
    assert [adapter.entries[f"lora_unet_{t}"].layout.magnitude_axis for t in "bh"] == [1, 0]
    assert set(adapter.unsupported) == {"lora_unet_i"}
    assert set(adapter.extras) == {key for key in mixed if key.startswith(("lora_unet_i", "head"))}
    saved = loratools.save(adapter, tmp_path / "again.safetensors")
    again = load_file(saved.weights)
    assert set(again) == set(mixed)
    assert all(torch.equal(again[key], tensor) for key, tensor in mixed.items())


def test_plain_weights_make_no_kohya_file(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(3), "b.rescale": torch.ones(2), "c.a1.weight": torch.ones(2, 2)}, tmp_path / "m")
    (tmp_path / "m").rename(tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="no known adapter dialect"):
        loratools.load(tmp_path / "m.safetensors")


def test_numbers_that_are_no_scale(tmp_path: Path) -> None:
    """An OFT alpha is a constraint and a LoKr of whole factors has none: neither scales, both are written back."""
    stored = {
        "lora_unet_a.oft_blocks": torch.ones(2, 3, 3),
        "lora_unet_a.alpha": torch.tensor(0),
        "lora_unet_b.lokr_w1": torch.ones(2, 2),
        "lora_unet_b.lokr_w2": torch.ones(2, 3),
        "lora_unet_b.alpha": torch.tensor(5.0, dtype=torch.bfloat16),
        "lora_unet_c.lora_down.weight": torch.ones(2, 4),
        "lora_unet_c.lora_up.weight": torch.ones(4, 2),
        "lora_unet_c.alpha": torch.tensor(1.0),
    }
    save_file(stored, tmp_path / "a.safetensors", {"ss_network_dim": "2", "ss_network_alpha": "1.0"})
    adapter = loratools.load(tmp_path / "a.safetensors")
    assert not adapter.warnings
    assert [e.scale for e in adapter.entries.values()] == [1.0, 1.0, 0.5]
    declared = adapter.format.declare(adapter.written(), adapter.metadata)
    assert declared.metadata == {"ss_network_dim": "2", "ss_network_alpha": "1.0"}
    assert {key: value for key, (value, _) in declared.scalars.items()} == {
        "lora_unet_a.alpha": 0.0, "lora_unet_b.alpha": 5.0, "lora_unet_c.alpha": 1.0
    }  # fmt: skip
    assert [declared.scalars[f"lora_unet_{t}.alpha"][1].dtype for t in "ab"] == ["I64", "BF16"]


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"diff": torch.ones(3), "w_norm": torch.ones(3)}, "two tensors for diff"),
        ({"oft_blocks": torch.ones(2, 3, 3), "alpha": torch.tensor(float("nan"))}, "its alpha"),
        ({"oft_blocks": torch.ones(2, 3, 2)}, "no square blocks"),
        ({"oft_blocks": torch.ones(2, 3, 3), "rescale": torch.ones(5, 1)}, "rescale holds 5 numbers where 6"),
        ({"oft_blocks": torch.ones(4, 4, 4, 4)}, "make no butterfly"),
        ({"oft_blocks": torch.ones(1, 4, 3, 3)}, "make no butterfly"),
        ({"oft_blocks": torch.ones(6, 6)}, "no square blocks"),
        ({"on_input": torch.tensor(1)}, "ia3_weight missing"),
        ({"weight": torch.ones(2, 2), "on_input": torch.tensor(1)}, "no gain for each channel"),
        ({"weight": torch.ones(2), "on_input": torch.ones(2)}, "on_input holds 2"),
        ({f"{n}.weight": torch.ones(4, 2) for n in ("a1", "a2", "b1", "b2")}, "do not chain"),
        ({"a1.weight": torch.ones(4, 2), "a2.weight": torch.ones(2, 4)}, "glora_b1, glora_b2 missing"),
        ({"diff": torch.tensor(1.0)}, "changes nothing"),
        (
            {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(2, 3), "dora_scale": torch.ones(5, 1)},
            "the magnitude holds 5 numbers where 4",
        ),
    ],
)
def test_modules_that_do_not_fit_together(tmp_path: Path, tensors: dict[str, torch.Tensor], problem: str) -> None:
    save_file({f"lora_unet_x.{suffix}": t for suffix, t in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(AdapterError, match=rf"x\.safetensors: .*{problem}"):
        loratools.load(tmp_path / "x.safetensors")


def test_alpha_tensors_of_zero_and_nan(tmp_path: Path) -> None:
    pair = {"lora_unet_a.lora_down.weight": torch.ones(2, 4), "lora_unet_a.lora_up.weight": torch.ones(4, 2)}
    save_file(pair | {"lora_unet_a.alpha": torch.tensor(0.0)}, tmp_path / "zero.safetensors")
    zero = loratools.load(tmp_path / "zero.safetensors")
    assert zero.entries["lora_unet_a"].scale == 1.0
    assert any("alpha is 0" in w for w in zero.warnings)
    save_file(pair | {"lora_unet_a.alpha": torch.tensor(float("nan"))}, tmp_path / "nan.safetensors")
    with pytest.raises(AdapterError, match=r"lora_unet_a: its alpha"):
        loratools.load(tmp_path / "nan.safetensors")


def test_save_refuses_to_overwrite_and_keeps_what_lies_beside(tmp_path: Path) -> None:
    adapter = loratools.load(peft(tmp_path / "a"))
    small, _ = loratools.squeeze(adapter, 2)
    out = peft(tmp_path / "b")
    (out / "README.md").write_text("mine")
    (out / "notes").mkdir()
    (out / "notes" / "x.txt").write_text("kept")
    before = (out / "adapter_model.safetensors").read_bytes()
    with pytest.raises(OutputError, match="--force"):
        loratools.save(small, out)
    assert (out / "adapter_model.safetensors").read_bytes() == before
    saved = loratools.save(small, out, force=True)
    assert (out / "README.md").read_text() == "mine"
    assert (out / "notes" / "x.txt").read_text() == "kept"
    assert load_file(saved.weights)[DOWN].shape == (2, 12)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_peft_adapter_cannot_become_a_lone_file(tmp_path: Path) -> None:
    adapter = loratools.load(peft(tmp_path / "a"))
    with pytest.raises(OutputError, match="name a folder"):
        loratools.save(adapter, tmp_path / "x.safetensors")
    saved = loratools.save(adapter, tmp_path / "new" / "adapter_model.safetensors")
    assert saved.path == tmp_path / "new"


def test_input_may_be_output_with_force(tmp_path: Path) -> None:
    folder = peft(tmp_path / "a")
    wanted, _ = loratools.squeeze(loratools.load(folder), 2)
    loratools.squeeze_file(loratools.load(folder), folder, 2, force=True)
    assert torch.equal(loratools.load(folder)["layers.0.q"].delta(), wanted["layers.0.q"].delta())


def test_failing_writes_leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = peft(tmp_path / "a"), tmp_path / "deep" / "out"
    adapter = loratools.load(folder)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="disk is full"):
        loratools.squeeze_file(adapter, out, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_an_exception_between_the_renames_restores_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = peft(tmp_path / "a"), peft(tmp_path / "b")
    before = (out / "adapter_model.safetensors").read_bytes()
    real, calls = Path.rename, []

    def rename(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        loratools.squeeze_file(loratools.load(folder), out, 2, force=True)
    assert (out / "adapter_model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_metadata_of_changed_updates_is_true_without_a_record(tmp_path: Path) -> None:
    stem = "lora_unet_a.lora_"
    pair = {f"{stem}down.weight": torch.ones(4, 9), f"{stem}up.weight": torch.ones(7, 4)}
    stated = {"ss_network_dim": "4", "ss_network_alpha": "2", "sshs_model_hash": "0x12", "ss_note": "mine"}
    save_file(pair | {"lora_unet_a.alpha": torch.tensor(2.0)}, tmp_path / "a.safetensors", stated)
    adapter = loratools.load(tmp_path / "a.safetensors")
    assert adapter.with_updates({}) is adapter
    cut = adapter.map(lambda _, update: update.prefix(1, delta_scale=0.5, scale=0.5))  # type: ignore[attr-defined]
    saved = loratools.save(cut, tmp_path / "b.safetensors")
    wanted = {"ss_network_dim": "1", "ss_network_alpha": "0.5", "ss_note": "mine"}
    assert loratools.load(saved.path).metadata == wanted
    doubled = loratools.subtract_initial(adapter, loratools.load(tmp_path / "a.safetensors"))
    saved = loratools.save(doubled, tmp_path / "c.safetensors")
    assert loratools.load(saved.path).metadata == {"ss_network_dim": "8", "ss_network_alpha": "4", "ss_note": "mine"}


def test_a_link_to_a_folder_is_replaced_and_leaves_no_trace(tmp_path: Path) -> None:
    folder, real = peft(tmp_path / "a"), peft(tmp_path / "real")
    (tmp_path / "link").symlink_to(real)
    before = (real / "adapter_model.safetensors").read_bytes()
    loratools.squeeze_file(loratools.load(folder), tmp_path / "link", 2, force=True)
    assert (real / "adapter_model.safetensors").read_bytes() == before
    assert not (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "link", "real"]


@pytest.mark.parametrize(
    ("alpha", "rank", "dtype"),
    [
        (torch.tensor(1e60, dtype=torch.float64), 150, torch.float64),
        (torch.tensor(100, dtype=torch.int8), 150, torch.float32),
        (torch.tensor(100, dtype=torch.int8), 100, torch.int8),
        (torch.tensor(100, dtype=torch.uint8), 150, torch.uint8),
    ],
)
def test_alphas_at_the_ends_of_their_dtypes(tmp_path: Path, alpha: torch.Tensor, rank: int, dtype: torch.dtype) -> None:
    gen = torch.Generator().manual_seed(0)
    down, up = torch.randn(160, 170, generator=gen), torch.randn(180, 160, generator=gen)
    stem = "lora_unet_a."
    tensors = {f"{stem}lora_down.weight": down, f"{stem}lora_up.weight": up, f"{stem}alpha": alpha}
    save_file(tensors, tmp_path / "a.safetensors", {"ss_network_alpha": "1"})
    adapter = loratools.load(tmp_path / "a.safetensors")
    assert loratools.info(adapter).to_dict()
    saved, _ = loratools.squeeze_file(adapter, tmp_path / "b.safetensors", rank)
    stored = load_file(saved.weights)[f"{stem}alpha"]
    assert (stored.dtype, float(stored)) == (dtype, rank)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files where the kernel lists them")
def test_adapters_that_are_dropped_leave_no_file_open(samples: Callable[[str], Path]) -> None:
    """A script over a hub of thousands may forget to close them."""
    path = samples("peft/lora_plain")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        next(iter(loratools.load(path).values()))
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_the_config_of_a_packed_file_is_not_looked_for_in_another(tmp_path: Path) -> None:
    tensors = {"lora_unet_a.lora_down.weight": torch.ones(2, 4), "lora_unet_a.lora_up.weight": torch.ones(4, 2)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"loratools.config": "{"})
    adapter = loratools.load(tmp_path / "a.safetensors")
    assert adapter.metadata["loratools.config"] == "{"
