"""The data-free bound behind the norms of several models, against the formula row by row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ops import compared as naive

import loratools
from loratools.base_weights import load_base
from loratools.reports.compare import CompareReport


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_growth_grows_with_the_update_and_is_warned_of(tmp_path: Path, scale: float) -> None:
    base = load_base(naive.write_model(tmp_path / "base", naive.base_tensors()))
    adapter = loratools.load(naive.write_peft(tmp_path / "a", naive.factors(3, 1), scale=scale))
    report = loratools.compare(base, {"a": adapter})
    greatest = max(u.logit_growth or 0.0 for t in report.targets.values() for u in t.updates.values())
    assert (greatest > 1.5) == any("grows by more than 1.5" in w for w in report.warnings) == (scale == 20.0)


def growth(tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], None], **config: Any) -> CompareReport:
    tensors = naive.base_tensors()
    edit(tensors)
    base = load_base(naive.write_model(tmp_path / "base", tensors, **config))
    return loratools.compare(base, {"a": loratools.load(naive.write_peft(tmp_path / "a", naive.factors(3, 1)))})


def bounds(report: CompareReport, module: str) -> float | None:
    return report.targets[f"model.layers.0.self_attn.{module}.weight"].updates["a"].logit_growth


def naive_growth(scaled: Callable[[naive.Array], naive.Array]) -> float:
    name = "model.layers.0.self_attn.q_proj.weight"
    weight, delta = naive.numpy_of(naive.base_tensors()[name]), naive.lora_deltas(naive.factors(3, 1))[name]
    before, after = (np.linalg.norm(scaled(rows), axis=1).max() for rows in (weight, weight + delta))
    return float(after / before)


NORM = "model.layers.0.input_layernorm"


def test_the_gain_of_gemma_is_one_more(tmp_path: Path) -> None:
    gain = naive.numpy_of(naive.base_tensors()[f"{NORM}.weight"])
    report = growth(tmp_path, lambda tensors: None, model_type="gemma2")
    assert bounds(report, "q_proj") == pytest.approx(naive_growth(lambda rows: rows * (1 + gain)), rel=1e-6)


def test_a_norm_that_centres(tmp_path: Path) -> None:
    gain = naive.numpy_of(naive.base_tensors()[f"{NORM}.weight"])
    centre = np.eye(12) - np.full((12, 12), 1 / 12)
    report = growth(tmp_path, lambda tensors: tensors.update({f"{NORM}.bias": torch.zeros(12)}))
    assert bounds(report, "q_proj") == pytest.approx(naive_growth(lambda rows: (rows * gain) @ centre), rel=1e-6)


def test_no_known_norm_has_gain_one(tmp_path: Path) -> None:
    report = growth(tmp_path, lambda tensors: tensors.pop(f"{NORM}.weight"))  # type: ignore[arg-type, return-value]
    assert bounds(report, "q_proj") == pytest.approx(naive_growth(lambda rows: rows), rel=1e-6)


def test_queries_that_are_normalised_do_not_grow(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_norm.weight"
    report = growth(tmp_path, lambda tensors: tensors.update({name: torch.ones(4)}))
    assert bounds(report, "q_proj") is None
    assert bounds(report, "k_proj") is not None
    (warning,) = [w for w in report.warnings if "norms of queries and keys" in w]
    assert "1 projections" in warning
