"""PEFT's methods other than LoRA: what their configs decide, and what is refused, by file and target."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratools
from loratools.adapter import Adapter
from loratools.errors import AdapterError, InputError, NeedsBaseError
from loratools.files import load, save
from loratools.ops.convert import Convert, convert_file
from loratools.ops.lowering import Lowering

PREFIX = "base_model.model."


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write(folder: Path, kind: str, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({f"{PREFIX}{key}": tensor for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind, **config}))
    return folder


def base_of(folder: Path, **tensors: Tensor) -> loratools.BaseWeights:
    save_file({name.replace("__", "."): t for name, t in tensors.items()}, folder / "base.safetensors")
    return loratools.load_base(folder / "base.safetensors")


VERA = {"m.vera_lambda_b": rand(0, 4), "m.vera_lambda_d": rand(1, 2)}
TRIANGLE = {"m.oft_R.weight": rand(2, 2, 1)}
ADALORA = {"m.lora_A": rand(3, 2, 4), "m.lora_B": rand(4, 3, 2), "m.lora_E": rand(5, 2, 1)}
TOKENS = {"emb.trainable_tokens_delta": rand(6, 2, 4)}
SCALING = {"m.ia3_l": rand(7, 4, 1)}
OFT = {"use_cayley_neumann": True}


@pytest.mark.parametrize(
    ("kind", "tensors", "config", "message"),
    [
        ("OFT", TRIANGLE, {}, "states no use_cayley_neumann"),
        ("OFT", TRIANGLE, {"use_cayley_neumann": "no"}, "use_cayley_neumann is 'no'"),
        ("OFT", TRIANGLE, OFT | {"num_cayley_neumann_terms": 10**9}, "num_cayley_neumann_terms"),
        ("OFT", TRIANGLE, OFT | {"num_cayley_neumann_terms": "5"}, "num_cayley_neumann_terms"),
        ("OFT", TRIANGLE, OFT | {"coft": True, "eps": "small"}, "eps is 'small'"),
        ("OFT", TRIANGLE, OFT | {"coft": True, "eps": -1}, "eps"),
        ("OFT", TRIANGLE, OFT | {"block_share": 3}, "block_share is 3"),
        ("HRA", {"m.hra_u": rand(8, 4, 2)}, {"apply_GS": "yes"}, "apply_GS is 'yes'"),
        ("VERA", VERA, {"save_projection": False, "projection_prng_key": "0"}, "projection_prng_key is '0'"),
        ("VERA", VERA, {"save_projection": False, "projection_prng_key": 2**70}, "projection_prng_key"),
        ("VERA", VERA, {"save_projection": False, "projection_prng_key": True}, "projection_prng_key"),
        ("VERA", VERA, {"save_projection": 0}, "save_projection is 0"),
        ("ADALORA", ADALORA, {"init_r": "12"}, "init_r is '12'"),
        ("ADALORA", ADALORA, {"init_r": -1}, "init_r"),
        ("ADALORA", ADALORA, {"lora_alpha": []}, r"lora_alpha is \[\]"),
        ("ADALORA", ADALORA, {"lora_alpha": 0, "rank_pattern": {"m.lora_E": 3}}, "rank_pattern is 3"),
        ("ADALORA", ADALORA, {"rank_pattern": 3}, "rank_pattern"),
        ("IA3", SCALING, {"feedforward_modules": "("}, "not a regular expression"),
        ("IA3", SCALING, {"feedforward_modules": [1]}, "not a list of names"),
        ("IA3", SCALING, {"feedforward_modules": {"m": 1}}, "not a list of names"),
        ("TRAINABLE_TOKENS", TOKENS, {}, "token_indices is None"),
        ("TRAINABLE_TOKENS", TOKENS, {"token_indices": [1, "2"]}, "not a list of different token numbers"),
        ("TRAINABLE_TOKENS", TOKENS, {"token_indices": [1, 1]}, "not a list of different token numbers"),
        ("TRAINABLE_TOKENS", TOKENS, {"token_indices": [1, -1]}, "not a list of different token numbers"),
        ("TRAINABLE_TOKENS", TOKENS, {"token_indices": [1, 2**64]}, "not a list of different token numbers"),
    ],
)
def test_hostile_configs_are_refused(
    tmp_path: Path, kind: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(write(tmp_path, kind, tensors, **config))
    assert "adapter_config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "tensors", "config", "message"),
    [
        ("TRAINABLE_TOKENS", TOKENS, {"token_indices": [1, 2, 3]}, "2 rows for the 3 tokens"),
        ("TRAINABLE_TOKENS", TOKENS, {"token_indices": [1, 6]}, "rows up to 6"),
        ("SHIRA", {"m.shira_weight": rand(0, 1), "m.shira_indices": torch.tensor([[6], [0]])}, {}, "places outside"),
        ("SHIRA", {"m.shira_weight": rand(0, 1), "m.shira_indices": torch.tensor([[0], [-1]])}, {}, "places outside"),
        ("SHIRA", {"m.shira_weight": rand(0, 1), "m.shira_indices": torch.tensor([[0.5], [0]])}, {}, "places outside"),
        ("IA3", {"m.ia3_l": rand(0, 5, 1)}, {}, "5 numbers for its outputs"),
        ("IA3", {"m.ia3_l": rand(0, 1, 5)}, {}, "5 numbers for its inputs"),
        ("IA3", {"m.ia3_l": rand(0, 1, 8)}, {}, "8 numbers for its inputs"),
        ("OFT", {"m.oft_R.weight": rand(0, 3, 1)}, OFT, "3 blocks of 2"),
        ("OFT", {"m.oft_R.weight": rand(0, 1, 1)}, OFT, "1 blocks of 2"),
        ("OFT", {"m.oft_R.weight": rand(0, 1, 3)}, OFT | {"block_share": True}, "1 blocks of 3"),
        ("BOFT", {"m.boft_R": rand(0, 1, 2, 3, 3), "m.boft_s": rand(1, 6, 1)}, {}, r"\(6, 6\)"),
        ("HRA", {"m.hra_u": rand(0, 5, 2)}, {}, "5 inputs"),
        ("HRA", {"m.hra_u": torch.zeros(4, 2)}, {}, "column 0 of hra_u"),
        ("HRA", {"m.hra_u": torch.ones(4, 2)}, {"apply_GS": True}, "column 1 of hra_u"),
        ("VERA", {"m.vera_lambda_b": rand(0, 5), "m.vera_lambda_d": rand(1, 2)}, {"save_projection": False}, "outputs"),
    ],
)
def test_what_does_not_fit_the_base_is_refused_by_target(
    tmp_path: Path, kind: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], message: str
) -> None:
    base = base_of(tmp_path, m__weight=rand(9, 6, 4), emb__weight=rand(9, 6, 4))
    adapter = load(write(tmp_path / "adapter", kind, tensors, **config), base=base)
    with pytest.raises(AdapterError, match=message) as caught:
        dict(loratools.delta(adapter, base=base))
    assert next(iter(adapter)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_shapes_that_do_not_chain_are_refused_by_target(tmp_path: Path) -> None:
    three = {"m.boft_R": rand(0, 3, 2, 2, 2), "m.boft_s": rand(1, 3, 1)}
    with pytest.raises(AdapterError, match=r"m: 2 blocks of 2 have no 3 butterfly factors"):
        load(write(tmp_path, "BOFT", three))
    with pytest.raises(AdapterError, match=r"m: oft_R \(2, 2\) holds no triangles"):
        load(write(tmp_path, "OFT", {"m.oft_R.weight": rand(0, 2, 2)}, **OFT))
    with pytest.raises(AdapterError, match=r"m: .*not two halves"):
        load(
            write(
                tmp_path,
                "PVERA",
                {"m.pvera_lambda_b": rand(0, 4), "m.pvera_lambda_d": rand(1, 3)},
                save_projection=False,
            )
        )


def test_projections_must_fit_the_rank_and_the_base(tmp_path: Path) -> None:
    base = base_of(tmp_path, m__weight=rand(9, 4, 6))
    for shared, message in (
        ((rand(0, 3, 6), rand(1, 4, 3)), "m: .*do not fit a rank of 2"),
        ((rand(0, 2, 5), rand(1, 4, 2)), "m: .*wider than the projections"),
    ):
        folder = write(tmp_path / "adapter", "VERA", VERA)
        tensors = load_file(folder / "adapter_model.safetensors")
        tensors |= dict(zip(("base_model.vera_A", "base_model.vera_B"), shared, strict=True))
        save_file(tensors, folder / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match=message):
            dict(loratools.delta(load(folder), base=base))
    with pytest.raises(
        AdapterError, match=r"m: the tensors that its targets share are not in the file: vera_A, vera_B"
    ):
        load(write(tmp_path / "adapter", "VERA", VERA, save_projection=True))


def test_projections_that_were_not_saved(tmp_path: Path) -> None:
    """Drawn at the largest sizes of all targets, one after the other, from the seed of the config."""
    b1, b2, d1, d2 = rand(0, 4), rand(1, 7), rand(2, 2), rand(3, 2)
    tensors = {"m.vera_lambda_b": b1, "m.vera_lambda_d": d1, "k.vera_lambda_b": b2, "k.vera_lambda_d": d2}
    folder = write(tmp_path / "adapter", "VERA", tensors, save_projection=False, projection_prng_key=-5)
    base = base_of(tmp_path, m__weight=rand(8, 4, 9), k__weight=rand(9, 7, 3))
    generator = torch.Generator().manual_seed(-5)
    a = torch.empty(2, 9).uniform_(-((6 / 9) ** 0.5), (6 / 9) ** 0.5, generator=generator).double()
    b = torch.empty(7, 2).uniform_(-(3**0.5), 3**0.5, generator=generator).double()
    found = dict(loratools.delta(load(folder, base=base), base=base))
    for name, lb, ld, (m, n) in (("m", b1, d1, (4, 9)), ("k", b2, d2, (7, 3))):
        wanted = (lb.double()[:, None] * b[:m]) @ (ld.double()[:, None] * a[:, :n])
        torch.testing.assert_close(found[f"{name}.weight"].double(), wanted, rtol=1e-6, atol=1e-7)
    with pytest.raises(NeedsBaseError, match="--base"):
        dict(loratools.delta(load(folder), base=base))
    with pytest.raises(AdapterError, match=r"the base has no matrix k\.weight"):
        load(folder, base=base_of(tmp_path, m__weight=rand(8, 4, 9)))


def test_spectra_of_targets_that_only_the_base_tells_apart(tmp_path: Path) -> None:
    """Equal tensors, other base shapes: they cannot be stacked."""
    u = rand(0, 4, 2)
    adapter = load(write(tmp_path / "adapter", "HRA", {"m.hra_u": u, "k.hra_u": u.clone()}))
    base = base_of(tmp_path, m__weight=rand(1, 3, 4), k__weight=rand(2, 5, 4))
    report = loratools.inspect(adapter, base=base)
    deltas = dict(loratools.delta(adapter, base=base))
    for name in ("m", "k"):
        assert report.targets[name].norm == pytest.approx(float(deltas[f"{name}.weight"].norm()), rel=1e-6)


def test_noise_at_inference_is_told(tmp_path: Path) -> None:
    tensors = {"m.pvera_lambda_b": rand(0, 4), "m.pvera_lambda_d": rand(1, 4)}
    adapter = load(write(tmp_path, "PVERA", tensors, save_projection=False, sample_at_inference=True))
    assert any("mean" in warning for warning in adapter.warnings)


def test_a_fully_pruned_target_changes_nothing(tmp_path: Path) -> None:
    tensors = {"m.lora_A": torch.zeros(0, 4), "m.lora_B": torch.zeros(3, 0), "m.lora_E": torch.zeros(0, 1)}
    adapter = load(write(tmp_path, "ADALORA", tensors, init_r=2))
    (change,) = dict(loratools.delta(adapter)).values()
    assert torch.equal(change, torch.zeros(3, 4))


def lora_with_tokens(folder: Path, listed: object) -> Adapter:
    tensors = {
        "m.lora_A.weight": rand(0, 2, 4),
        "m.lora_B.weight": rand(1, 3, 2),
        "emb.token_adapter.trainable_tokens_delta": rand(2, 2, 4),
    }
    return load(write(folder, "LORA", tensors, r=2, lora_alpha=4, trainable_token_indices=listed))


def test_a_lora_with_trained_rows_keeps_its_config(tmp_path: Path) -> None:
    adapter = lora_with_tokens(tmp_path / "in", [5, 0])
    saved = save(adapter, tmp_path / "out")
    names = ("adapter_config.json", "adapter_model.safetensors")
    before, after = ([(folder / name).read_bytes() for name in names] for folder in (tmp_path / "in", saved.path))
    assert json.loads(before[0]) == json.loads(after[0])
    stored = [load_file(folder / names[1]) for folder in (tmp_path / "in", saved.path)]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(stored[0][key], stored[1][key]) for key in stored[0])


@pytest.mark.parametrize(
    ("listed", "tokens"),
    [
        ([5, 0], (5, 0)),
        ({"mb": [1, 2]}, (1, 2)),
        ({"b": [3, 4], "emb": [1, 2]}, (1, 2)),
        ({"m": [3], "b": [4, 1]}, (4, 1)),
    ],
)
def test_tokens_of_a_lora(tmp_path: Path, listed: object, tokens: tuple[int, ...]) -> None:
    adapter = lora_with_tokens(tmp_path / "adapter", listed)
    base = base_of(tmp_path, m__weight=rand(3, 3, 4), emb__weight=rand(4, 6, 4))
    found = dict(loratools.delta(adapter, base=base))
    wanted = torch.zeros(6, 4)
    for row, token in zip(rand(2, 2, 4), tokens, strict=True):
        wanted[token] = row - rand(4, 6, 4)[token]
    torch.testing.assert_close(found["emb.weight"], wanted)
    torch.testing.assert_close(found["m.weight"], 2.0 * rand(1, 3, 2) @ rand(0, 2, 4))
    with pytest.raises(NeedsBaseError, match="emb"):
        dict(loratools.delta(adapter))


@pytest.mark.parametrize("listed", [{"b": [3, 4], "mb": [1, 2]}, {"other": [1, 2]}, None])
def test_tokens_that_the_config_does_not_tell(tmp_path: Path, listed: object) -> None:
    with pytest.raises(InputError, match="trainable_token_indices"):
        lora_with_tokens(tmp_path / "adapter", listed)


def test_whole_norm_layers_replace_those_of_the_base(tmp_path: Path) -> None:
    weight, bias = rand(0, 4), rand(1, 4)
    tensors = {"n.ln_tuning_layers.weight": weight, "n.ln_tuning_layers.default.bias": bias}
    adapter = load(write(tmp_path / "adapter", "LN_TUNING", tensors))
    assert len(adapter) == 0
    base = base_of(tmp_path, n__weight=rand(2, 4), n__bias=rand(3, 4))
    found = dict(loratools.delta(adapter, base=base))
    assert found.keys() == {"n.weight", "n.bias"}
    torch.testing.assert_close(found["n.weight"], weight - rand(2, 4))
    torch.testing.assert_close(found["n.bias"], bias - rand(3, 4))


@pytest.mark.parametrize("name", ["adalora", "vera", "pvera", "trainable_tokens"])
def test_what_is_low_rank_converts_to_lora_exactly(samples: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    folder = samples(f"peft/{name}")
    base = loratools.load_base(folder / "base.safetensors")
    saved, _ = convert_file(load(folder), tmp_path / "lora", "peft", Convert(lowering=Lowering(exact=True), base=base))
    made = load(saved.path)
    assert {entry.family.family for entry in made.entries.values()} == {"lora"}
    found, wanted = dict(loratools.delta(made, base=base)), dict(loratools.delta(load(folder), base=base))
    assert found.keys() == wanted.keys()
    for key, delta in wanted.items():
        assert float((found[key] - delta).norm()) <= 1e-6 * float(delta.norm()), key
