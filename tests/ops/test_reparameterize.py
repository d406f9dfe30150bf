"""Deltas in another family: what is carried along, what comes back, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratools.adapter import Adapter
from loratools.base_weights import load_base
from loratools.errors import AdapterError, NeedsBaseError, UsageError
from loratools.files import load, save
from loratools.linalg.inner import relative_error
from loratools.ops.diff import diff
from loratools.ops.reparameterize import Reparameterize, formerly, reparameterize, reparameterize_file

Load = Callable[[str], Adapter]


@pytest.fixture
def sample(samples: Callable[[str], Path]) -> Load:
    return lambda name: load(samples(name))


def errors(one: Adapter, other: Adapter) -> list[float]:
    """Of targets in turn, by the operators themselves."""
    pairs = zip(one.values(), other.values(), strict=True)
    return [relative_error(*(u.operator().to(torch.float64) for u in pair)) for pair in pairs]


@pytest.mark.parametrize("name", ["peft/lora_plain", "peft/rslora", "peft/rank_alpha_pattern"])
def test_there_and_back_is_the_same_adapter(sample: Load, tmp_path: Path, name: str) -> None:
    adapter = sample(name)
    made, report = reparameterize(adapter, "ldu", Reparameterize(dtype="f32"))
    assert set(report.targets) == set(adapter)
    place = reparameterize_file(made, report, tmp_path / "ldu")[0].path
    there = load(place)
    assert max(errors(adapter, there)) < 1e-6
    back, _ = reparameterize(there, "lora")
    again = load(save(formerly(back), tmp_path / "back").path)
    assert again.format.name == "peft"
    assert list(again) == list(adapter)
    assert diff(adapter, again).same
    assert again.config is not None
    assert again.config["base_model_name_or_path"] == adapter.config["base_model_name_or_path"]  # type: ignore[index]


def test_a_file_of_kohya_gets_its_names_back(sample: Load, tmp_path: Path) -> None:
    adapter = sample("kohya/sd15_linear_only/lora.safetensors")
    made, report = reparameterize(adapter, "ldu", Reparameterize(dtype="f32"))
    assert all(target.startswith(("unet.", "text_encoder.")) for target in made)
    there = load(reparameterize_file(made, report, tmp_path / "ldu")[0].path)
    again = load(save(formerly(reparameterize(there, "lora")[0]), tmp_path / "back").path)
    assert again.format.name == "kohya"
    assert set(again) == set(adapter)
    assert diff(adapter, again).same


def test_the_report_says_what_is_true_of_the_file(sample: Load, tmp_path: Path) -> None:
    adapter = sample("peft/lora_plain")
    made, report = reparameterize(adapter, "lora", Reparameterize({"rank": "2"}, dtype="bf16", accept_loss=True))
    saved, told = reparameterize_file(made, report, tmp_path / "out")
    assert told.total["bytes_after"] == saved.nbytes == saved.path.stat().st_size
    found = load(saved.path)
    for target, error in zip(adapter, errors(adapter, found), strict=True):
        assert told.targets[target].relative_error == pytest.approx(error, rel=1e-9)
        assert found.entries[target].rank == told.targets[target].rank == 2
    assert told.options == {"rank": 2}


def test_other_commands_read_it(sample: Load, tmp_path: Path) -> None:
    from loratools import Quantize, inspect, quantize_file, squeeze
    from loratools.ranks import Fixed

    adapter = sample("peft/lora_plain")
    made, report = reparameterize(adapter, "lora", Reparameterize(dtype="f32"))
    there = load(reparameterize_file(made, report, tmp_path / "own")[0].path)
    assert inspect(there).targets.keys() == inspect(adapter).targets.keys()
    smaller, _ = squeeze(there, Fixed(1))
    again = load(save(smaller, tmp_path / "smaller").path)
    assert {e.rank for e in again.entries.values()} == {1}
    packed = load(quantize_file(there, tmp_path / "packed", Quantize(bits=8))[0].path)
    assert max(errors(adapter, packed)) < 0.05


def test_norms_and_biases_are_carried_over(tmp_path: Path) -> None:
    tensors = {"lora_unet_x.lora_down.weight": torch.randn(2, 6), "lora_unet_x.lora_up.weight": torch.randn(5, 2)}
    tensors |= {"lora_unet_x.alpha": torch.tensor(2.0), "lora_unet_norm.w_norm": torch.randn(5)}
    save_file(tensors, tmp_path / "in.safetensors")
    adapter = load(tmp_path / "in.safetensors")
    made, report = reparameterize(adapter, "ldu")
    assert set(report.targets) == {"lora_unet_x"}
    assert "carried over" in report.unchanged["lora_unet_norm"]
    norm = next(u for u in made.values() if u.family == "full")
    assert torch.equal(norm.parameters()["diff"], tensors["lora_unet_norm.w_norm"])


def test_what_cannot_be_is_refused(sample: Load) -> None:
    adapter = sample("peft/lora_plain")
    with pytest.raises(UsageError, match="there are: "):
        reparameterize(adapter, "nonsense")
    with pytest.raises(UsageError, match="is not one that a delta can be written in"):
        reparameterize(adapter, "boft")
    with pytest.raises(UsageError, match="one or the other"):
        Reparameterize({"rank": "2"}, budget=1000)
    with pytest.raises(UsageError, match="too small"):
        reparameterize(adapter, "lora", Reparameterize(budget=10))
    with pytest.raises(AdapterError, match="experts"):
        reparameterize(sample("peft/moe_target_parameters"), "lora", Reparameterize({"rank": "1"}))
    with pytest.raises(NeedsBaseError, match="--base"):
        reparameterize(sample("peft/dora"), "lora", Reparameterize({"rank": "2"}))


def test_a_delta_that_needs_the_base_is_fitted_with_it(sample: Load, tmp_path: Path) -> None:
    adapter = sample("peft/dora")
    shapes = {t: e.base_shape for t, e in adapter.entries.items()}
    weights = {adapter.format.parameter(t): torch.randn(*shapes[t]) for t in adapter}  # type: ignore[misc]
    save_file(weights, tmp_path / "base.safetensors")
    base = load_base(tmp_path / "base.safetensors")
    how = Reparameterize({"rank": "10000"}, base=base, dtype="f32")
    made, _ = reparameterize(adapter, "lora", how)
    for target in adapter:
        weight = base.find(adapter.format.parameter(target), None)
        truth = adapter[target].operator(weight).to(torch.float64)
        assert relative_error(truth, made[target].operator().to(torch.float64)) < 1e-5


def test_nan_is_named(tmp_path: Path) -> None:
    tensors = {"x.lora_A": torch.full((2, 6), float("nan")), "x.lora_B": torch.randn(5, 2)}
    save_file(tensors, tmp_path / "in.safetensors")
    with pytest.raises(AdapterError, match="x: holds NaN"):
        reparameterize(load(tmp_path / "in.safetensors", alpha=2.0), "ldu")
