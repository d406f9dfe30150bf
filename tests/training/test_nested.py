"""Objectives of nested training: what the layers compute, and that cutting gives the model that was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training.tiny import tiny_llama

from loratools import load
from loratools.errors import UsageError
from loratools.ops.truncate import truncate
from loratools.training.anneal import lora_layers
from loratools.training.applied import applied
from loratools.training.nested import Objective, Scaling, diagonal, keep_diagonal, nested

peft = pytest.importorskip("peft")

RANK = 8
IDS = torch.randint(256, (2, 10), generator=torch.Generator().manual_seed(5))


def tuned(**config: Any) -> Any:
    torch.manual_seed(2)
    settings = peft.LoraConfig(r=RANK, target_modules=["q_proj", "up_proj"], **{"lora_alpha": 8, **config})
    model = peft.get_peft_model(tiny_llama(), settings)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B["default"].weight.normal_(std=0.3)
    return model.eval()


def with_deltas(model: Any, weights: torch.Tensor) -> torch.Tensor:
    """Logits of the plain model with scale B diag(weights) A added to its matrices, by the naive product."""
    plain = tiny_llama()
    with torch.no_grad():
        for name, layer in lora_layers(model):
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            target = plain.get_submodule(name.removeprefix("base_model.model."))
            target.weight += layer.scaling["default"] * (B * weights) @ A
        return plain(IDS).logits


@pytest.mark.parametrize("scaling", ["keep", "rank", "sqrt"])
def test_the_layers_compute_the_objective(scaling: Scaling) -> None:
    model = tuned()
    ranks = (1, 2, 4, 8)
    factor = {"keep": lambda r: 1.0, "rank": lambda r: RANK / r, "sqrt": lambda r: (RANK / r) ** 0.5}[scaling]
    cut = {r: factor(r) * (torch.arange(RANK) < r) for r in ranks}
    with torch.no_grad():
        untouched = model(IDS).logits
        with nested(model, "matryoshka", scaling=scaling) as begin:
            begin()
            torch.testing.assert_close(model(IDS).logits, with_deltas(model, sum(cut.values())))  # type: ignore[arg-type]
        with nested(model, "lora", scaling=scaling) as begin:
            begin()
            torch.testing.assert_close(model(IDS).logits, untouched)
        met = set()
        with nested(model, "dylora", scaling=scaling, seed=1) as begin:
            for _ in range(24):
                begin()
                logits = model(IDS).logits
                (drawn,) = [r for r in ranks if torch.allclose(logits, with_deltas(model, cut[r]), atol=1e-5)]
                met.add(drawn)
        assert met == set(ranks)
        assert torch.equal(model(IDS).logits, untouched)


@pytest.mark.parametrize("scaling", ["keep", "sqrt"])
def test_with_its_diagonal_the_whole_rank_is_what_was_trained(tmp_path: Path, scaling: Scaling) -> None:
    model, ranks = tuned(), (2, 4, 8)
    with torch.no_grad():
        with nested(model, "matryoshka", ranks, scaling=scaling):
            trained = model(IDS).logits
        before = with_deltas(model, torch.tensor(diagonal(RANK, ranks, scaling)) * (torch.arange(RANK) < 4))
        keep_diagonal(model, ranks, scaling=scaling)
        torch.testing.assert_close(model(IDS).logits, trained)
    model.save_pretrained(tmp_path / "saved")
    small, _ = truncate(load(tmp_path / "saved"), 4, nested="keep")
    plain = tiny_llama()
    with applied(plain, small), torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, before)
    with pytest.raises(UsageError, match="between 1 and 8"):
        keep_diagonal(model, (16,))


def test_the_diagonal_is_the_published_one() -> None:
    """R = 8, ranks 1, 2, 4, 8, s_r = 1 / sqrt(r)."""
    published = [2.5607, 1.5607, 0.8536, 0.8536, 0.3536, 0.3536, 0.3536, 0.3536]
    assert [p / 8**0.5 for p in diagonal(8, (1, 2, 4, 8), "sqrt")] == pytest.approx(published, abs=1e-4)
    assert diagonal(8, (2,)) == [1, 1, 0, 0, 0, 0, 0, 0]  # places past the largest rank are dead


@pytest.mark.parametrize(
    ("scaling", "config", "cut"),
    [
        ("keep", {}, {"nested": "keep"}),
        ("rank", {}, {"nested": "dylora"}),
        ("sqrt", {"lora_alpha": 1, "use_rslora": True}, {"nested": "matryoshka", "scaling": "sqrt"}),
    ],
)
def test_cutting_gives_the_model_that_was_trained(
    tmp_path: Path, scaling: Scaling, config: dict[str, Any], cut: dict[str, Any]
) -> None:
    model = tuned(**config)
    model.save_pretrained(tmp_path / "saved")
    for r in (1, 3, 8):
        made = load(tmp_path / "saved")
        if r < RANK:
            made, _ = truncate(made, r, **cut)
        plain = tiny_llama()
        with torch.no_grad(), applied(plain, made), nested(model, "dylora", [r], scaling=scaling) as begin:
            begin()
            torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", ["lora", "dylora", "matryoshka"])
def test_steps_are_the_same_for_the_same_seed(objective: Objective) -> None:
    made = []
    for _ in range(2):
        model = tuned()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        with nested(model, objective, seed=4) as begin:
            for _ in range(3):
                begin()
                model(input_ids=IDS, labels=IDS).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        made.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(x, y) for x, y in zip(*made, strict=True))


def test_what_cannot_be_nested_is_said() -> None:
    for ranks in ([], [0], [9]):
        with pytest.raises(UsageError, match="between 1 and 8"), nested(tuned(), "dylora", ranks):
            pass
    with pytest.raises(UsageError, match="one rank"), nested(tuned(rank_pattern={"q_proj": 2}), "dylora"):
        pass
    with pytest.raises(UsageError, match="no LoRA called"), nested(tiny_llama(), "dylora"):
        pass
    attention = peft.get_peft_model(Layers(), peft.LoraConfig(r=4, target_modules=["attention"]))
    with pytest.raises(UsageError, match="MultiheadAttention"), nested(attention, "dylora"):
        pass


class Layers(torch.nn.Module):
    """Of several layers, each by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(6, 6)
        self.one, self.two = torch.nn.Conv1d(6, 6, 3), torch.nn.Conv2d(6, 6, 3)
        self.three = torch.nn.Conv3d(6, 6, 3)
        self.attention = torch.nn.MultiheadAttention(6, 2)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("linear", (6,)), ("linear", (2, 4, 4, 6)), ("one", (2, 6, 6)), ("two", (2, 6, 6, 6)), ("three", (2, 6, 5, 6, 6))],
)
def test_a_rank_is_cut_along_the_channels_of_any_layer(name: str, shape: tuple[int, ...]) -> None:
    """Sizes are such that an axis beside the channels has as many places as there are ranks."""
    torch.manual_seed(3)
    model = peft.get_peft_model(Layers(), peft.LoraConfig(r=4, target_modules=[name])).eval()
    ((_, layer),) = lora_layers(model)
    inputs = torch.randn(shape)
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
        with nested(model, "dylora", [1]) as begin:
            begin()
            found = layer(inputs)
        layer.lora_B["default"].weight[:, 1:] = 0
        torch.testing.assert_close(found, layer(inputs))
