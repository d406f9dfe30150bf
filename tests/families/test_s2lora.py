"""S2-LoRA: planted shared factors found, sparse coefficients, one pair for each shape, sizes as told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from loratools.adapter import Adapter, entry_of
from loratools.errors import AdapterError, UsageError
from loratools.families import LoRA, S2LoRA
from loratools.families.base import Layout
from loratools.families.fitting import Source
from loratools.families.s2lora import S2LoRAOptions
from loratools.files import load, save
from loratools.formats import Order
from loratools.formats.base import Part
from loratools.formats.peft import Peft
from loratools.linalg.joint_diagonal import jointly_diagonal
from loratools.operators import Dense, LowRank, Operator
from loratools.ops.reparameterize import Reparameterize, reparameterize


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(m: int, n: int, k: int, count: int, seed: int = 0) -> list[LowRank]:
    left, right, s = rand(seed, m, k), rand(seed + 1, k, n), rand(seed + 2, count, k)
    s = s * (torch.rand(count, k, generator=torch.Generator().manual_seed(seed)) < 0.6)
    return [LowRank(left * row, right) for row in s]


def sources(deltas: list[LowRank] | list[Dense]) -> dict[str, Source]:
    return {str(i): Source(d, Layout(shape=d.shape), None, torch.float64, 3) for i, d in enumerate(deltas)}


def loss(given: dict[str, Source], found: dict[str, S2LoRA]) -> float:
    """Relative error over all targets, dense."""
    truth = torch.stack([s.delta.dense().flatten() for s in given.values()])
    made = torch.stack([found[t].operator().dense().flatten() for t in given])
    return float((truth - made).norm() / truth.norm())


@pytest.mark.parametrize(("m", "n", "k", "count"), [(24, 16, 4, 6), (24, 16, 8, 3), (30, 40, 12, 9), (20, 20, 20, 5)])
@pytest.mark.parametrize("dense", [False, True])
def test_planted_factors_are_found(m: int, n: int, k: int, count: int, dense: bool) -> None:
    deltas = planted(m, n, k, count)
    given = sources([Dense(d.dense()) for d in deltas] if dense else deltas)
    assert loss(given, S2LoRA.encode_together(given, S2LoRAOptions(k))) < 1e-6


def test_planted_zeros_are_found() -> None:
    """With a small threshold the places are those of the planted coefficients, column by column."""
    deltas = planted(30, 40, 6, 9)
    given = sources(deltas)
    found = S2LoRA.encode_together(given, S2LoRAOptions(6, 0.001))
    assert loss(given, found) < 1e-6
    ranks = [int((torch.linalg.svdvals(d.dense()) > 1e-8).sum()) for d in deltas]
    assert [len(update.s) for update in found.values()] == ranks
    assert all((u.places is None) == (len(u.s) == 6) for u in found.values())


def test_a_threshold_trades_coefficients_for_loss() -> None:
    given = sources([LowRank(rand(i, 24, 4), rand(i + 20, 4, 16)) for i in range(5)])
    counts, losses = [], []
    for threshold in (0.0, 0.05, 0.2, 0.5):
        found = S2LoRA.encode_together(given, S2LoRAOptions(12, threshold))
        counts.append(sum(len(update.s) for update in found.values()))
        losses.append(loss(given, found))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 60 > counts[-1]
    assert losses == sorted(losses)
    assert losses[-1] < 1


def test_one_target_alone_has_the_best_of_its_rank() -> None:
    given = sources([LowRank(rand(0, 24, 9), rand(1, 9, 16))])
    values = torch.linalg.svdvals(given["0"].delta.dense())
    best = float(values[4:].norm() / values.norm())
    assert loss(given, S2LoRA.encode_together(given, S2LoRAOptions(4))) == pytest.approx(best, rel=1e-6)


def test_as_many_columns_as_all_ranks_together_lose_nothing() -> None:
    given = sources([LowRank(rand(i, 24, 3), rand(i + 20, 3, 16)) for i in range(4)])
    assert loss(given, S2LoRA.encode_together(given, S2LoRAOptions(12))) < 1e-6


def test_no_small_change_brings_it_nearer() -> None:
    deltas = [rand(i, 24, 16) for i in range(4)]
    joint = jointly_diagonal([Dense(d) for d in deltas], 6)
    tensors = [t.clone().requires_grad_() for t in (joint.left, joint.right, joint.coefficients)]
    left, right, s = tensors
    lost = torch.stack([(d - (left * row) @ right).square().sum() for d, row in zip(deltas, s, strict=True)]).sum()
    captured = float(sum(d.square().sum() for d in deltas) - lost.detach())
    for tensor, slope in zip(tensors, torch.autograd.grad(lost, tensors), strict=True):
        assert float(slope.norm() * tensor.detach().norm()) < 0.05 * captured
    torch.testing.assert_close(joint.left.norm(dim=0), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(joint.right.norm(dim=1), torch.ones(6, dtype=torch.float64))


def test_each_shape_has_factors_of_its_own_stored_once(tmp_path: Path) -> None:
    """The file holds k (m + n) numbers for each shape and k for each target, and decodes to what was fitted."""
    shapes = {"a.q": (24, 16), "a.v": (24, 16), "a.o": (10, 12), "b.q": (24, 16)}
    updates = {
        t: LoRA(rand(i, 3, n).float() / 8, rand(i + 9, m, 3).float() / 8, 2.0)
        for i, (t, (m, n)) in enumerate(shapes.items())
    }
    parts = {t: Part(("down", "up"), Layout(), shape, 3, 2.0) for t, shape in shapes.items()}
    adapter = Adapter(Peft.compose(parts, Order()), {t: entry_of(u) for t, u in updates.items()}, {}, {})
    made, report = reparameterize(adapter, "s2lora", Reparameterize({"rank": "7"}, dtype="f32", accept_loss=True))
    assert report.total["numbers"] == 7 * (24 + 16) + 7 * (10 + 12) + 4 * 7
    assert made.nbytes == 4 * report.total["numbers"]
    again = load(save(made, tmp_path / "s2.safetensors").path)
    assert len(again.extras) == 4
    for target, update in made.items():
        torch.testing.assert_close(again[target].delta(), update.delta(), rtol=0, atol=0)
    kept = reparameterize(adapter, "s2lora", Reparameterize({"rank": "9"}, dtype="f32"))[1]
    assert kept.total["relative_error"] is not None
    assert kept.total["relative_error"] < report.total["relative_error"]  # type: ignore[operator]
    budget = 4 * report.total["numbers"]  # type: ignore[operator]
    within = reparameterize(adapter, "s2lora", Reparameterize(budget=int(budget), dtype="f32", accept_loss=True))[0]
    assert within.nbytes == budget


@pytest.mark.parametrize("options", [S2LoRAOptions(0), S2LoRAOptions(4, 1.0), S2LoRAOptions(4, -0.1)])
def test_options_that_make_no_sense_are_refused(options: S2LoRAOptions) -> None:
    with pytest.raises(UsageError, match="has to be"):
        S2LoRA.encode_together(sources(planted(8, 6, 2, 2)), options)


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"s2lora_s": torch.ones(3)}, "3 coefficients are not those of the 4"),
        ({"s2lora_s": torch.ones(2), "s2lora_places": torch.tensor([1, 4])}, "names columns"),
        ({"s2lora_s": torch.ones(5), "s2lora_Q": torch.ones(5, 6)}, "do not chain"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tensors: dict[str, Tensor], problem: str) -> None:
    shared = {"s2lora_P": torch.ones(8, 4), "s2lora_Q": torch.ones(4, 6)}
    with pytest.raises(AdapterError, match=problem):
        S2LoRA.from_parameters({**shared, **tensors}, scale=1.0, layout=Layout())


def test_operators_of_any_structure_will_do() -> None:
    deltas: list[Operator] = [planted(24, 16, 4, 1)[0] + Dense(1e-3 * rand(9, 24, 16))]
    joint = jointly_diagonal(deltas, 4)
    made = (joint.left * joint.coefficients[0]) @ joint.right
    truth = deltas[0].dense()
    assert float((truth - made).norm() / truth.norm()) < 1e-2
