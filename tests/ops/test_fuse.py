"""Base plus adapter, against float64 sums and the references of the real libraries."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratools
from loratools.errors import AdapterError, InputError, MutatedBaseError, OutputError, TiedEmbeddingError
from loratools.storage.sharded import ShardedSource

Samples = Callable[[str], Path]
PREFIX = "base_model.model."
NAMES = [f"model.layers.{i}.{m}.weight" for i in range(3) for m in ("q_proj", "up_proj", "norm")]


def shape_of(name: str) -> tuple[int, ...]:
    return {"q_proj": (8, 8), "up_proj": (12, 8), "norm": (8,)}[name.split(".")[-2]]


def base_model(folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> dict[str, Tensor]:
    """Two shards, an index, a config, a tokenizer, and a file of weights in another container."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape_of(name), generator=generator).to(dtype) for name in NAMES}
    home = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(NAMES)}
    for shard in sorted(set(home.values())):
        save_file({n: t for n, t in tensors.items() if home[n] == shard}, folder / shard, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": home}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (folder / "tokenizer.json").write_text('{"kept": true}')
    (folder / "consolidated.pth").write_bytes(b"other weights")
    return tensors


def adapter(folder: Path, targets: list[str], scale: float = 2.0, **config: Any) -> tuple[Path, dict[str, Tensor]]:
    """A PEFT LoRA and its true deltas in float64."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors, deltas = {}, {}
    for target in targets:
        m, n = shape_of(f"{target}.weight")
        a, b = torch.randn(2, n, generator=generator), torch.randn(m, 2, generator=generator)
        tensors |= {f"{PREFIX}{target}.lora_A.weight": a, f"{PREFIX}{target}.lora_B.weight": b}
        deltas[f"{target}.weight"] = scale * b.double() @ a.double()
    save_file(tensors, folder / "adapter_model.safetensors")
    stated = {"peft_type": "LORA", "r": 2, "lora_alpha": 2 * scale, "target_modules": ["q_proj", "up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(stated | config))
    return folder, deltas


def read_all(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        found |= load_file(shard)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_parameter_is_the_sum_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    before = base_model(tmp_path / "base", dtype)
    path, deltas = adapter(tmp_path / "adapter", ["model.layers.0.q_proj", "model.layers.2.up_proj"])
    report = loratools.fuse(loratools.load(path), loratools.load_base(tmp_path / "base"), tmp_path / "out")
    after = read_all(tmp_path / "out")
    assert set(after) == set(before)
    for name, weight in before.items():
        assert after[name].dtype == dtype
        exact = weight.double() + deltas[name] if name in deltas else weight.double()
        if name not in deltas:
            assert torch.equal(after[name], weight)
        else:
            assert (after[name].double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
            change = float((deltas[name]).norm() / weight.double().norm())
            lost = float((after[name].double() - exact).norm() / deltas[name].norm())
            assert report.parameters[name].relative_change == pytest.approx(change, rel=1e-5)
            assert report.parameters[name].lost == pytest.approx(lost, rel=1e-2, abs=1e-6)
    assert set(report.parameters) == set(deltas)
    assert report.parameters["model.layers.0.q_proj.weight"].sources == ("model.layers.0.q_proj",)


def test_the_folder_is_the_bases(tmp_path: Path) -> None:
    base_model(tmp_path / "base")
    path, _ = adapter(tmp_path / "adapter", ["model.layers.0.q_proj"])
    report = loratools.fuse(loratools.load(path), loratools.load_base(tmp_path / "base"), tmp_path / "out")
    names = {file.name for file in (tmp_path / "base").iterdir()}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names - {"consolidated.pth"}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"kept": true}'
    old, new = (json.loads((tmp_path / f / "model.safetensors.index.json").read_text()) for f in ("base", "out"))
    assert new["weight_map"] == old["weight_map"]
    for shard in set(new["weight_map"].values()):
        assert set(load_file(tmp_path / "out" / shard)) == {n for n, s in new["weight_map"].items() if s == shard}
    assert set(report.files) == names - {"consolidated.pth", "model.safetensors.index.json"}
    again = loratools.load_base(tmp_path / "out")
    assert set(again.source.specs) == set(NAMES)


CASES = [
    "peft/lora_plain", "peft/rslora", "peft/dora", "peft/bias_lora_only", "peft/lora_bias_true", "peft/modules_to_save",
    "peft/lora_embedding", "peft/lora_conv2d", "peft/moe_target_parameters", "peft/loha", "peft/lokr", "peft/ia3",
    "peft/oft", "peft/vera", "peft/road", "peft/trainable_tokens", "peft/ln_tuning",
    "lycoris/locon_dora", "lycoris/locon_tucker", "lycoris/full",
]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_family_adds_its_reference_delta(samples: Samples, tmp_path: Path, name: str) -> None:
    folder = samples(name)
    file = folder / "adapter.safetensors"
    base = loratools.load_base(folder / "base.safetensors")
    loratools.fuse(loratools.load(file if file.exists() else folder, base=base), base, tmp_path / "out")
    before, after = load_file(folder / "base.safetensors"), read_all(tmp_path / "out")
    truth = load_file(folder / "reference_dW.safetensors")
    assert set(after) == set(before)
    for key, weight in before.items():
        wanted = weight.double() + truth[key].double() if key in truth else weight.double()
        assert (after[key].double() - wanted).norm() <= 2e-6 * wanted.norm() + 1e-7, key


def test_targets_that_the_base_lacks_are_named(tmp_path: Path) -> None:
    base_model(tmp_path / "base", tie_word_embeddings=True)
    path, _ = adapter(tmp_path / "adapter", ["model.layers.0.q_proj", "model.layers.7.q_proj"])
    base = loratools.load_base(tmp_path / "base")
    with pytest.raises(AdapterError, match=r"no parameters for 1 of 2 targets: model\.layers\.7\.q_proj; is it"):
        loratools.fuse(loratools.load(path), base, tmp_path / "out")
    save_file(
        {f"{PREFIX}lm_head.lora_A.weight": torch.ones(1, 8), f"{PREFIX}lm_head.lora_B.weight": torch.ones(9, 1)},
        path / "adapter_model.safetensors",
    )
    with pytest.raises(TiedEmbeddingError, match="ties its output"):
        loratools.fuse(loratools.load(path), base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_fused_is_refused(tmp_path: Path) -> None:
    base_model(tmp_path / "base")
    base = loratools.load_base(tmp_path / "base")
    target = ["model.layers.0.q_proj"]
    pissa, _ = adapter(tmp_path / "pissa", target, init_lora_weights="pissa")
    with pytest.raises(MutatedBaseError, match="--initial-adapter"):
        loratools.fuse(loratools.load(pissa), base, tmp_path / "out")
    activated, _ = adapter(tmp_path / "alora", target, alora_invocation_tokens=[1, 2])
    with pytest.raises(AdapterError, match="activated"):
        loratools.fuse(loratools.load(activated), base, tmp_path / "out")
    plain, _ = adapter(tmp_path / "plain", target)
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="--force"):
        loratools.fuse(loratools.load(plain), base, tmp_path / "there")
    with pytest.raises(OutputError, match="is the base model"):
        loratools.fuse(loratools.load(plain), base, tmp_path / "base", force=True)
    huge, _ = adapter(tmp_path / "huge", target, lora_alpha=1e30)
    wide = base_model(tmp_path / "half", torch.float16)
    assert wide
    with pytest.raises(AdapterError, match=r"too large for torch\.float16"):
        loratools.fuse(loratools.load(huge), loratools.load_base(tmp_path / "half"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


def test_a_base_of_other_shapes_is_refused(tmp_path: Path) -> None:
    base_model(tmp_path / "base")
    path, _ = adapter(tmp_path / "adapter", ["model.layers.0.q_proj"])
    save_file(
        {
            f"{PREFIX}model.layers.0.q_proj.lora_A.weight": torch.ones(1, 9),
            f"{PREFIX}model.layers.0.q_proj.lora_B.weight": torch.ones(9, 1),
        },
        path / "adapter_model.safetensors",
    )
    with pytest.raises(AdapterError, match="is it the right base"):
        loratools.fuse(loratools.load(path), loratools.load_base(tmp_path / "base"), tmp_path / "out")


def test_a_gguf_base_is_refused(samples: Samples, tmp_path: Path) -> None:
    path, _ = adapter(tmp_path / "adapter", ["model.layers.0.q_proj"])
    base = loratools.load_base(samples("gguf/llama_f32/base-f32.gguf"))
    with pytest.raises(InputError, match="GGUF model"):
        loratools.fuse(loratools.load(path), base, tmp_path / "out")


def test_fused_base_less_base_is_the_adapter(tmp_path: Path) -> None:
    """The way back: the difference of two checkpoints has the adapter's rank."""
    before = base_model(tmp_path / "base")
    path, deltas = adapter(tmp_path / "adapter", ["model.layers.1.up_proj"])
    loratools.fuse(loratools.load(path), loratools.load_base(tmp_path / "base"), tmp_path / "out")
    name = "model.layers.1.up_proj.weight"
    difference = read_all(tmp_path / "out")[name].double() - before[name].double()
    assert (difference - deltas[name]).norm() <= 1e-6 * before[name].double().norm()
    assert torch.linalg.svdvals(difference)[2] <= 1e-5 * before[name].double().norm()


def test_one_parameter_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that was read is gone before the next but one is: it is not kept until its shard is full."""
    base_model(tmp_path / "base")
    path, _ = adapter(tmp_path / "adapter", [f"model.layers.{i}.q_proj" for i in range(3)])
    base = loratools.load_base(tmp_path / "base")
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    read = ShardedSource.read

    def counted(self: ShardedSource, name: str) -> Tensor:
        nonlocal most
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(ShardedSource, "read", counted)
    loratools.fuse(loratools.load(path), base, tmp_path / "out")
    assert len(alive) >= len(NAMES)
    assert most <= 2
