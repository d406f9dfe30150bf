"""What a path holds, told from headers alone, and what fine-tunes are called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ops import compared as naive
from safetensors.torch import load_file, save_file

import loratools
from loratools.base_weights import BaseWeights, load_base
from loratools.errors import AdapterError, InputError, LoratoolsError, UnchangedError, UsageError
from loratools.ops.fine_tunes import fine_tune_of, names_of


@pytest.fixture
def base(tmp_path: Path) -> BaseWeights:
    return load_base(naive.write_model(tmp_path / "base", naive.base_tensors(), shards=2))


def tuned() -> dict[str, torch.Tensor]:
    return {name: t + naive.normal(*t.shape, seed=7, spread=0.1) for name, t in naive.base_tensors().items()}


@pytest.mark.parametrize("shards", [1, 3])
def test_a_whole_model_is_its_differences(tmp_path: Path, base: BaseWeights, shards: int) -> None:
    calls: list[tuple[int, str]] = []
    steps: list[int] = []

    def begin(total: int, what: str):  # type: ignore[no-untyped-def]
        calls.append((total, what))
        return lambda: steps.append(1)

    path = naive.write_model(tmp_path / "full", tuned(), shards=shards)
    found = loratools.open_fine_tune(path, base, steps=begin)
    assert (found.kind, found.path) == ("full", path)
    assert set(found.adapter) == set(naive.SHAPES)
    target = "model.layers.1.mlp.up_proj"
    change = naive.numpy_of(tuned()[f"{target}.weight"]) - naive.numpy_of(naive.base_tensors()[f"{target}.weight"])
    np.testing.assert_allclose(naive.numpy_of(found.adapter[target].delta()), change, atol=1e-7)
    table = "model.embed_tokens.weight"
    before, after = (naive.numpy_of(t[table]) for t in (naive.base_tensors(), tuned()))
    assert found.left_out[table] == pytest.approx(np.linalg.norm(after - before) / np.linalg.norm(before), rel=1e-6)
    assert calls == [(len(tuned()), "parameters compared")]
    assert len(steps) == len(tuned())


def test_a_file_whose_names_begin_otherwise_is_a_whole_model(tmp_path: Path, base: BaseWeights) -> None:
    path = tmp_path / "full.safetensors"
    save_file({name.removeprefix("model."): t for name, t in tuned().items()}, path)
    assert loratools.open_fine_tune(path, base).kind == "full"


@pytest.mark.parametrize("dialect", ["peft", "peft file", "kohya"])
def test_an_adapter_is_an_adapter(tmp_path: Path, base: BaseWeights, dialect: str) -> None:
    if dialect == "kohya":
        path = naive.write_kohya(tmp_path / "k.safetensors", naive.factors(3, 1))
    else:
        path = naive.write_peft(tmp_path / "lora", naive.factors(3, 1))
    path = path / "adapter_model.safetensors" if dialect == "peft file" else path
    found = loratools.open_fine_tune(path, base)
    assert (found.kind, found.path, len(found.adapter), found.left_out) == ("adapter", path, 6, {})
    assert fine_tune_of(found.adapter).kind == "adapter"


def test_an_adapter_of_many_whole_tensors_is_an_adapter(tmp_path: Path, base: BaseWeights) -> None:
    folder = naive.write_peft(tmp_path / "lora", naive.factors(3, 1, targets={"model.layers.0.mlp.up_proj": (20, 12)}))
    saved = {f"base_model.model.{name}": t for name, t in tuned().items()}
    factors = {
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(3, 12),
        "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight": torch.ones(20, 3),
    }
    save_file(saved | factors, folder / "adapter_model.safetensors")
    for path in (folder, folder / "adapter_model.safetensors"):
        assert loratools.open_fine_tune(path, base).kind == "adapter"


def test_a_file_without_a_config_is_what_most_of_its_names_say(tmp_path: Path, base: BaseWeights) -> None:
    written = naive.write_peft(tmp_path / "lora", naive.factors(3, 1)) / "adapter_model.safetensors"
    path = tmp_path / "alone.safetensors"
    save_file(load_file(written) | {"model.embed_tokens.weight": torch.ones(30, 12)}, path)
    found = loratools.open_fine_tune(path, base, alpha=6.0)
    assert (found.kind, len(found.adapter)) == ("adapter", 6)
    np.testing.assert_allclose(
        naive.numpy_of(found.adapter["model.layers.0.mlp.up_proj"].delta()),
        naive.lora_deltas(naive.factors(3, 1))["model.layers.0.mlp.up_proj.weight"],
        atol=1e-6,
    )


def test_whole_layers_of_mlx_are_a_whole_model(samples: Callable[[str], Path]) -> None:
    folder = samples("mlx/llama_full")
    whole = load_base(folder / "base.safetensors")
    report = loratools.compare(whole, {"x": loratools.open_fine_tune(folder, whole)})
    assert report.fine_tunes["x"].kind == "full"
    reference = {name: t for name, t in load_file(folder / "reference_dW.safetensors").items() if t.ndim == 2}
    assert set(report.targets) == set(reference)
    for name, change in reference.items():
        assert report.targets[name].updates["x"].norm == pytest.approx(float(change.double().norm()), rel=1e-5)
    with pytest.raises(UsageError, match="is a whole model"):
        loratools.open_fine_tune(folder, whole, initial=folder)


def test_initial_factors_are_subtracted(tmp_path: Path, base: BaseWeights) -> None:
    before, after = naive.factors(3, 1), naive.factors(3, 2)
    initial = naive.write_peft(tmp_path / "initial", before)
    path = naive.write_peft(tmp_path / "trained", after, init_lora_weights="pissa")
    found = loratools.open_fine_tune(path, base, initial=initial)
    for target, update in found.adapter.items():
        wanted = naive.lora_deltas(after)[f"{target}.weight"] - naive.lora_deltas(before)[f"{target}.weight"]
        np.testing.assert_allclose(naive.numpy_of(update.delta()), wanted, atol=1e-5)
    whole = naive.write_model(tmp_path / "full", tuned())
    with pytest.raises(UsageError, match="full: is a whole model, which has no initial factors"):
        loratools.open_fine_tune(whole, base, initial=initial)


def test_what_is_no_fine_tune_is_named(tmp_path: Path, base: BaseWeights) -> None:
    stranger = naive.write_model(tmp_path / "stranger", {"encoder.a.weight": torch.ones(3, 3)})
    with pytest.raises(InputError, match=r"stranger.*no known adapter dialect.*; no fine-tune of .*base.* either"):
        loratools.open_fine_tune(stranger, base)
    same = naive.write_model(tmp_path / "same", naive.base_tensors())
    with pytest.raises(UnchangedError, match=r"same: no matrix differs from .*base"):
        loratools.open_fine_tune(same, base)
    wider = tuned() | {"model.layers.0.mlp.up_proj.weight": torch.ones(21, 12)}
    with pytest.raises(AdapterError, match=r"wider.*up_proj\.weight is \(21, 12\), \(20, 12\) in the base"):
        loratools.open_fine_tune(naive.write_model(tmp_path / "wider", wider), base)
    with pytest.raises((LoratoolsError, OSError), match="nowhere"):
        loratools.open_fine_tune(tmp_path / "nowhere", base)


def test_names_tell_fine_tunes_apart(tmp_path: Path) -> None:
    for name in ("run1/lora", "run2/lora", "other"):
        (tmp_path / name).mkdir(parents=True)
    paths = [
        tmp_path / "run1" / "lora",
        tmp_path / "run2" / "lora" / "adapter_model.safetensors",
        tmp_path / "other",
        tmp_path / "k.v1.safetensors",
        tmp_path / "big" / "model.safetensors.index.json",
    ]
    assert names_of(paths) == ("run1/lora", "run2/lora", "other", "k.v1", "big")
    beside = [tmp_path / "run1" / "lora", tmp_path / "run1" / "lora" / "adapter_model.safetensors"]
    assert len(set(names_of(beside))) == 2


def test_one_path_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    with pytest.raises(UsageError, match="lora: is given twice"):
        names_of([tmp_path / "lora", tmp_path / "." / "x" / ".." / "lora"])
