"""Quantising what the real libraries wrote: small budgets, dialects with rules of their own, errors that are told."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from test_samples import FOLDER

import loratools
from loratools.errors import UsageError
from loratools.ops.quantize import Quantize, quantize, quantize_file

GGUF = sorted(folder.name for folder in (FOLDER / "gguf").iterdir())


@pytest.mark.parametrize("name", GGUF)
@pytest.mark.parametrize("options", [Quantize("grid", 4), Quantize("balanced", 4)], ids=["grid", "balanced"])
def test_llama_cpp_adapters_keep_their_deltas(name: str, options: Quantize, tmp_path: Path) -> None:
    """Its file has one alpha, so that scales follow ranks, and of the factors of an embedding it transposes one."""
    adapter = loratools.load(FOLDER / "gguf" / name / "adapter.gguf")
    saved, report = quantize_file(adapter, tmp_path / "out", options)
    again = loratools.load(saved.path)
    distance = norm = 0.0
    for target, update in adapter.items():
        before, after = (u.operator().dense().double() for u in (update, again[target]))
        distance, norm = distance + float((before - after).norm()) ** 2, norm + float(before.norm()) ** 2
    error = math.sqrt(distance / norm)
    assert error < 0.4  # of tables of codes for so few numbers, hardly 3 bits to a number are left
    assert report.total["relative_error"] == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("name", ["lycoris/locon/adapter.safetensors", "gguf/qwen3/peft"])
@pytest.mark.parametrize("share", [0.5, 0.4, 0.25, 0.1])
def test_a_budget_of_little_more_than_names_is_met_or_cannot_be(name: str, share: float, tmp_path: Path) -> None:
    """Of such files names take the most; a refusal states what a file of zeros takes, to the byte."""
    adapter = loratools.load(FOLDER / name)
    budget = int(adapter.file_nbytes * share)
    with pytest.raises(UsageError, match="remain where nothing") as refused:
        quantize(adapter, Quantize(budget=1))
    least = int(str(refused.value).split(": ")[1].split()[0])
    if budget < least:
        with pytest.raises(UsageError, match=f": {least} bytes "):
            quantize_file(adapter, tmp_path / "out", Quantize(budget=budget))
        return
    saved, report = quantize_file(adapter, tmp_path / "out", Quantize(budget=budget))
    assert 0.9 * budget < saved.path.stat().st_size == saved.nbytes <= budget
    assert report.total["relative_error"] < 1  # type: ignore[operator]
    quantize_file(adapter, tmp_path / "least", Quantize(budget=least))


@pytest.mark.parametrize("bits", [1.5, 1.0])
def test_a_file_of_one_rank_keeps_it(bits: float, tmp_path: Path) -> None:
    """MLX-LM states one rank for all targets: components that vanish stay as zeros."""
    adapter = loratools.load(FOLDER / "mlx/llama_lora")
    saved, report = quantize_file(adapter, tmp_path / "out", Quantize(bits=bits))
    again = loratools.load(saved.path)
    assert {entry.rank for entry in again.entries.values()} == {entry.rank for entry in adapter.entries.values()}
    dropped = [(again[t].parameters()["down"].norm(dim=1) == 0).any() for t in again.entries]
    assert any(dropped)
    assert 0 < report.total["relative_error"] < 0.95  # type: ignore[operator]


@pytest.mark.parametrize("method", ["rtn", "grid"])
def test_the_error_of_all_counts_what_was_carried_over(method: str, tmp_path: Path) -> None:
    """Tensors too small for codes lose nothing, but are a part of the whole."""
    name = {"rtn": "diffusers/sd_conv/pytorch_lora_weights.safetensors", "grid": "lycoris/full/adapter.safetensors"}
    adapter = loratools.load(FOLDER / name[method])
    saved, report = quantize_file(adapter, tmp_path / "out", Quantize(method, 4))  # type: ignore[arg-type]
    assert report.unchanged
    again = loratools.load(saved.path)
    distance = norm = 0.0
    for target, update in adapter.items():
        before, after = (u.operator().dense().double() for u in (update, again[target]))
        distance, norm = distance + float((before - after).norm()) ** 2, norm + float(before.norm()) ** 2
    assert report.total["relative_error"] == pytest.approx(math.sqrt(distance / norm), rel=1e-4)


def test_an_error_that_needs_the_base_is_not_said_to_be_zero() -> None:
    _, report = quantize(loratools.load(FOLDER / "lycoris/glora/adapter.safetensors"), Quantize("rtn", 2))
    assert report.targets
    assert {coded.relative_error for coded in report.targets.values()} == {report.total["relative_error"]} == {None}


def test_bits_that_nothing_fits_are_what_the_error_speaks_of() -> None:
    with pytest.raises(UsageError, match=r"a size of 0\.01 bits to a number, 1 bytes of codes, is too small: 28 bytes"):
        quantize(loratools.load(FOLDER / "peft/lora_plain"), Quantize(bits=0.01))
