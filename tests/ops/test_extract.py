"""A LoRA of tuned - base, against dense float64 SVDs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratools
from loratools import Budget, Energy, Limits
from loratools.errors import AdapterError, UnchangedError

SHAPES = {
    "model.embed_tokens.weight": (40, 16),
    "model.layers.0.q_proj.weight": (16, 16),
    "model.layers.0.up_proj.weight": (24, 16),
    "model.layers.0.up_proj.bias": (24,),
    "model.layers.0.norm.weight": (16,),
    "lm_head.weight": (40, 16),
}


def weights(seed: int, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: (spread * torch.randn(shape, generator=generator)).to(dtype) for name, shape in SHAPES.items()}


def model(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """In two shards."""
    folder.mkdir()
    names = sorted(tensors)
    home = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in sorted(set(home.values())):
        save_file({n: tensors[n].contiguous() for n in names if home[n] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": home}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return folder


def found(base: Path, tuned: Path) -> loratools.ops.extract.Differences:  # type: ignore[name-defined]
    return loratools.differences(loratools.load_base(base), loratools.load_base(tuned))


def two(tmp_path: Path, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    before, change = weights(0, dtype), weights(1, spread=0.1)
    after = {name: (t.float() + change[name]).to(dtype) for name, t in before.items()}
    model(tmp_path / "base", before)
    model(tmp_path / "tuned", after)
    return before, after


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_each_matrix_is_the_best_of_its_rank(tmp_path: Path, rank: int) -> None:
    before, after = two(tmp_path)
    adapter, report = loratools.extract(found(tmp_path / "base", tmp_path / "tuned"), rank)
    targets = ("model.layers.0.q_proj", "model.layers.0.up_proj", "lm_head")
    assert set(adapter) == set(report.targets) == set(targets)
    for target in targets:
        d = after[f"{target}.weight"].double().numpy() - before[f"{target}.weight"].double().numpy()
        u, s, vt = np.linalg.svd(d, full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        np.testing.assert_allclose(adapter[target].delta().double().numpy(), best, atol=1e-6)
        error = math.sqrt(float((s[rank:] ** 2).sum() / (s**2).sum()))
        assert report.targets[target].relative_error == pytest.approx(error, rel=1e-4, abs=1e-6)
        assert report.targets[target].rank == min(rank, 16)
        norm = np.linalg.norm(before[f"{target}.weight"].double().numpy())
        assert report.targets[target].relative_change == pytest.approx(np.linalg.norm(d) / norm, rel=1e-9)
    assert set(report.left_out) == set(SHAPES) - {f"{target}.weight" for target in targets}
    assert any("stay out of the LoRA" in warning for warning in report.warnings)


def test_the_rules_for_ranks_apply(tmp_path: Path) -> None:
    before, after = two(tmp_path)
    apart = found(tmp_path / "base", tmp_path / "tuned")
    adapter, _ = loratools.extract(apart, Energy(0.8))
    for target, update in adapter.items():
        s = np.linalg.svd((after[f"{target}.weight"] - before[f"{target}.weight"]).double().numpy(), compute_uv=False)
        kept = np.cumsum(s**2) / (s**2).sum()
        assert adapter.entries[target].rank == int(np.argmax(kept >= 0.8)) + 1
        assert update.delta().shape == SHAPES[f"{target}.weight"]
    small, _ = loratools.extract(apart, Budget(4096))
    saved = loratools.save(small, tmp_path / "small")
    assert saved.nbytes <= 4096
    uniform, _ = loratools.extract(apart, Energy(0.8), limits=Limits(uniform=True))
    assert len({entry.rank for entry in uniform.entries.values()}) == 1


def test_extracting_what_was_fused_gives_the_adapter_back(tmp_path: Path) -> None:
    model(tmp_path / "base", weights(0))
    generator = torch.Generator().manual_seed(5)
    stem = "base_model.model.model.layers.0.up_proj"
    factors = {
        f"{stem}.lora_A.weight": torch.randn(3, 16, generator=generator),
        f"{stem}.lora_B.weight": torch.randn(24, 3, generator=generator),
    }
    (tmp_path / "lora").mkdir()
    save_file(factors, tmp_path / "lora" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["up_proj"]}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    lora = loratools.load(tmp_path / "lora")
    loratools.fuse(lora, loratools.load_base(tmp_path / "base"), tmp_path / "tuned")
    apart = found(tmp_path / "base", tmp_path / "tuned")
    assert apart.unchanged == len(SHAPES) - 1
    adapter, report = loratools.extract(apart, 3)
    assert list(adapter) == ["model.layers.0.up_proj"]
    wanted = lora["model.layers.0.up_proj"].delta().double()
    assert (adapter["model.layers.0.up_proj"].delta().double() - wanted).norm() <= 1e-6 * wanted.norm()
    assert report.targets["model.layers.0.up_proj"].relative_error < 1e-6
    again = loratools.load(loratools.save(adapter, tmp_path / "again").path)
    assert again.config is not None
    assert again.config["r"] == 3
    assert torch.equal(again["model.layers.0.up_proj"].delta(), adapter["model.layers.0.up_proj"].delta())


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11), (torch.float32, 24)])
def test_the_noise_is_that_of_rounding(tmp_path: Path, dtype: torch.dtype, bits: int) -> None:
    """Measured on exact weights that are rounded, as training in float32 and saving in 16 bits does."""
    generator = torch.Generator().manual_seed(2)
    exact = torch.randn(256, 256, generator=generator, dtype=torch.float64)
    rounded = exact.to(dtype)
    rounding = float((rounded.double() - exact).norm())
    name = "a.weight"
    model(tmp_path / "base", {name: (exact + 0.3 * exact.flip(0)).to(dtype)})
    model(tmp_path / "tuned", {name: rounded})
    change = found(tmp_path / "base", tmp_path / "tuned").changes["a"]
    assert change.noise == pytest.approx(rounding, rel=0.03)
    assert change.noise < 2.0**-bits * float(exact.norm())


def test_changes_lost_in_rounding_are_warned_of(tmp_path: Path) -> None:
    before = weights(0, torch.bfloat16)
    after = {name: t.clone() for name, t in before.items()}
    name = "model.layers.0.q_proj.weight"
    after[name][0, 0] *= 1 + 2**-7
    model(tmp_path / "base", before)
    model(tmp_path / "tuned", after)
    _, report = loratools.extract(found(tmp_path / "base", tmp_path / "tuned"), 1)
    assert report.targets["model.layers.0.q_proj"].noise > 0.5
    assert any("hardly above the rounding" in warning for warning in report.warnings)


def test_matrices_of_gpt2_are_transposed(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"h.0.attn.c_attn.weight": torch.randn(6, 18, generator=generator)}
    tuned = {k: t + 0.1 * torch.randn(t.shape, generator=generator) for k, t in base.items()}
    model(tmp_path / "base", base, model_type="gpt2")
    model(tmp_path / "tuned", tuned, model_type="gpt2")
    adapter, _ = loratools.extract(found(tmp_path / "base", tmp_path / "tuned"), 6)
    saved = loratools.save(adapter, tmp_path / "out")
    stored = load_file(saved.weights)
    assert stored["base_model.model.h.0.attn.c_attn.lora_A.weight"].shape == (6, 6)
    assert stored["base_model.model.h.0.attn.c_attn.lora_B.weight"].shape == (18, 6)
    delta = loratools.load(saved.path)["h.0.attn.c_attn"].delta()
    torch.testing.assert_close(delta, tuned["h.0.attn.c_attn.weight"] - base["h.0.attn.c_attn.weight"])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: weights(7), "nothing in common"),
        (lambda t: t | {"model.embed_tokens.weight": torch.ones(41, 16)}, "the vocabularies differ"),
        (lambda t: t | {"model.layers.0.q_proj.weight": torch.ones(16, 8)}, "is it the right base"),
        (lambda t: t | {"model.layers.0.norm.weight": torch.full((16,), math.nan)}, "NaN or infinity"),
        (lambda t: t | {"model.layers.0.extra.weight": torch.ones(4, 4)}, "extra.weight: is not in"),
        (lambda t: {f"another.{i}": x for i, x in enumerate(t.values())}, "6 of 6 parameters are not in"),
        (lambda t: t | {"model.layers.0.q_proj.weight": torch.ones(16, 16, dtype=torch.int8)}, "is held as I8"),
    ],
)
def test_what_is_no_pair_of_checkpoints_is_refused(tmp_path: Path, change: Any, problem: str) -> None:
    model(tmp_path / "base", weights(0))
    model(tmp_path / "tuned", change(weights(0)))
    with pytest.raises(AdapterError, match=problem) as caught:
        found(tmp_path / "base", tmp_path / "tuned")
    assert "\n" not in str(caught.value)


def test_nothing_changed_is_an_error(tmp_path: Path) -> None:
    model(tmp_path / "base", weights(0))
    model(tmp_path / "tuned", weights(0))
    with pytest.raises(UnchangedError, match="no matrix differs"):
        loratools.extract(found(tmp_path / "base", tmp_path / "tuned"), 4)


def test_an_untied_output_is_no_other_model(tmp_path: Path) -> None:
    base, tuned = weights(0), weights(0)
    del base["lm_head.weight"]
    tuned["model.layers.0.q_proj.weight"] += 0.01
    model(tmp_path / "base", base)
    model(tmp_path / "tuned", tuned)
    assert list(found(tmp_path / "base", tmp_path / "tuned").changes) == ["model.layers.0.q_proj"]


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    two(tmp_path, torch.bfloat16)
    made = []
    for i in range(2):
        adapter, _ = loratools.extract(found(tmp_path / "base", tmp_path / "tuned"), 2)
        made.append(loratools.save(adapter, tmp_path / f"out{i}").weights.read_bytes())
    assert made[0] == made[1]
    assert {t.dtype for t in load_file(tmp_path / "out0" / "adapter_model.safetensors").values()} == {torch.bfloat16}


def s2ft(folder: Path, *, bias: bool, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A base and what S2FT makes of it: trained rows of up and v, columns of down and o, all channels in another order.

    Also the true deltas, in the order of the base.
    """
    generator = torch.Generator().manual_seed(11)
    block, heads, size, hidden, width = "model.layers.0", 4, 6, 40, 24

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    attention = {f"{block}.self_attn.{n}_proj.weight": rand(width, width) for n in "qkvo"}
    feed = {f"{block}.mlp.{n}_proj.weight": rand(hidden, width) for n in ("gate", "up")}
    base = attention | feed | {f"{block}.mlp.down_proj.weight": rand(width, hidden)}
    if bias:
        base[f"{block}.self_attn.q_proj.bias"] = rand(width)
    channels = torch.tensor([7, 19, 33] + [i for i in range(hidden) if i not in (7, 19, 33)])
    order = torch.tensor([2, 0, 1, 3])
    by_head = (order[:, None] * size + torch.arange(size)).reshape(-1)
    assert len(by_head) == heads * size
    trained = {name: t.clone() for name, t in base.items()}
    trained[f"{block}.mlp.up_proj.weight"][channels[:3]] += 0.3 * rand(3, width)
    trained[f"{block}.mlp.down_proj.weight"][:, channels[:3]] += 0.3 * rand(width, 3)
    trained[f"{block}.self_attn.o_proj.weight"][:, by_head[:size]] += 0.3 * rand(width, size)
    deltas = {n: trained[n].double() - base[n].double() for n in base if not torch.equal(trained[n], base[n])}
    after = dict(trained)
    for n in "qkv":
        after[f"{block}.self_attn.{n}_proj.weight"] = trained[f"{block}.self_attn.{n}_proj.weight"][by_head]
    if bias:
        after[f"{block}.self_attn.q_proj.bias"] = trained[f"{block}.self_attn.q_proj.bias"][by_head]
    after[f"{block}.self_attn.o_proj.weight"] = trained[f"{block}.self_attn.o_proj.weight"][:, by_head]
    for n in ("gate", "up"):
        after[f"{block}.mlp.{n}_proj.weight"] = trained[f"{block}.mlp.{n}_proj.weight"][channels]
    after[f"{block}.mlp.down_proj.weight"] = trained[f"{block}.mlp.down_proj.weight"][:, channels]
    model(folder / "base", base)
    model(folder / "tuned", {n: t.contiguous() for n, t in after.items()})
    return base, deltas


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_channels_that_s2ft_moved_are_put_back(tmp_path: Path, bias: bool, dtype: torch.dtype) -> None:
    _, deltas = s2ft(tmp_path, bias=bias, dtype=dtype)
    apart = found(tmp_path / "base", tmp_path / "tuned")
    assert {f"{t}.weight" for t in apart.adapter} == set(deltas)
    assert apart.left_out == {}
    for name, delta in deltas.items():
        assert torch.equal(apart.adapter[name.removesuffix(".weight")].delta().double(), delta.float().double()), name
    adapter, report = loratools.extract(apart, 6)
    for name, delta in deltas.items():  # of ranks 3, 3 and 6
        got = adapter[name.removesuffix(".weight")].delta().double()
        assert (got - delta).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * delta.norm()
    assert any("S2FT" in warning for warning in report.warnings)
    assert len(apart.reordered) == 7 + bias


def test_another_model_is_not_taken_for_another_order(tmp_path: Path) -> None:
    model(tmp_path / "base", weights(0))
    model(tmp_path / "tuned", weights(9))
    with pytest.raises(AdapterError, match="is it the right base"):
        found(tmp_path / "base", tmp_path / "tuned")


def test_every_parameter_counts_as_a_step(tmp_path: Path) -> None:
    two(tmp_path)
    steps: list[None] = []
    bases = (loratools.load_base(tmp_path / name) for name in ("base", "tuned"))
    loratools.differences(*bases, step=lambda: steps.append(None))
    assert len(steps) == len(SHAPES)
