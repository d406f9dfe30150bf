"""PEFT's add_weighted_adapter, where it merges deltas: `cat`, `svd` and `ties_svd`.

Its `linear`, `ties` and `dare_linear` merge the factors A and B, which is another thing: the last test shows it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

if not os.environ.get("CI"):  # where it must be installed, its absence is an error
    pytest.importorskip("peft", reason="compares with PEFT: pip install 'loratools[oracle]'")

import peft

from loratools import Merge, load, merge, save

WEIGHTS = (0.7, 0.3)
EQUAL = (0.5, 0.5)  # for ties: PEFT elects signs before it weighs, as it must not where a weight is negative
TARGETS = {"linear": ["first", "second"], "conv": ["kernel"]}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 20)
        self.second = nn.Linear(20, 9)
        self.kernel = nn.Conv2d(5, 8, 3)


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def trained(folder: Path, seed: int, rank: int, modules: list[str]) -> Path:
    model = peft.get_peft_model(fresh(), peft.LoraConfig(r=rank, lora_alpha=6, target_modules=modules))
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> Callable[[str, int], list[Path]]:
    def make(kind: str, second_rank: int) -> list[Path]:
        return [trained(tmp_path / "a", 1, 4, TARGETS[kind]), trained(tmp_path / "b", 2, second_rank, TARGETS[kind])]

    return make


def theirs(folders: list[Path], weights: tuple[float, float] = WEIGHTS, **how: Any) -> dict[str, Tensor]:
    model = peft.PeftModel.from_pretrained(fresh(), folders[0], adapter_name="a")
    model.load_adapter(folders[1], adapter_name="b")
    model.base_model.add_weighted_adapter(["a", "b"], list(weights), "merged", **how)
    return {
        key.removeprefix("base_model.model."): module.get_delta_weight("merged").detach()
        for key, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def ours(
    folders: list[Path], rank: int | None, options: Merge | None = None, weights: tuple[float, float] = WEIGHTS
) -> dict[str, Tensor]:
    weighted = [(load(folder), weight) for folder, weight in zip(folders, weights, strict=True)]
    merged, _ = merge(weighted, rank, options=options or Merge())
    return {target: update.delta() for target, update in merged.items()}


def distances(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[float]:
    assert found.keys() == wanted.keys()
    return [float((found[t] - wanted[t]).norm() / wanted[t].norm()) for t in wanted]


def test_an_exact_sum_is_cat(pair: Callable[[str, int], list[Path]]) -> None:
    folders = pair("linear", 3)
    assert max(distances(ours(folders, None), theirs(folders, combination_type="cat"))) < 1e-5


@pytest.mark.parametrize("kind", TARGETS)
def test_a_sum_of_lower_rank_is_svd(pair: Callable[[str, int], list[Path]], kind: str) -> None:
    folders = pair(kind, 3)
    assert max(distances(ours(folders, 3), theirs(folders, combination_type="svd", svd_rank=3))) < 1e-5


@pytest.mark.parametrize("density", [0.2, 0.5])
def test_ties_is_ties_svd(pair: Callable[[str, int], list[Path]], density: float) -> None:
    folders = pair("linear", 3)
    wanted = theirs(folders, EQUAL, combination_type="ties_svd", svd_rank=5, density=density)
    assert max(distances(ours(folders, 5, Merge("ties", density), EQUAL), wanted)) < 1e-5


def test_peft_loads_a_merge_and_sees_the_same_delta(pair: Callable[[str, int], list[Path]], tmp_path: Path) -> None:
    folders = pair("linear", 3)
    only_first = trained(tmp_path / "c", 3, 2, ["first"])
    merged, _ = merge([(load(only_first), 0.7), (load(folders[1]), 0.3)])
    save(merged, tmp_path / "out")
    model = peft.PeftModel.from_pretrained(fresh(), tmp_path / "out")
    found = {
        key.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for key, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert max(distances(found, {t: u.delta() for t, u in merged.items()})) < 1e-5


def test_linear_and_ties_of_factors_are_not_merges_of_deltas(pair: Callable[[str, int], list[Path]]) -> None:
    folders = pair("linear", 4)
    assert min(distances(theirs(folders, combination_type="linear"), ours(folders, None))) > 0.3
    of_factors = theirs(folders, EQUAL, combination_type="ties", density=0.5)
    assert min(distances(of_factors, ours(folders, None, Merge("ties", 0.5), EQUAL))) > 0.3
