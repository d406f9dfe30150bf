"""Families side by side: what takes part, that budgets hold, and that numbers are those of the files themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from loratools.adapter import Adapter
from loratools.errors import AdapterError, UsageError
from loratools.files import load, save
from loratools.ops.bakeoff import Bakeoff, bakeoff
from loratools.ops.reparameterize import Reparameterize, reparameterize

SIDES = ((40, 24), (24, 24), (24, 48), (40, 24))


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i, (m, n) in enumerate(SIDES):
        tensors[f"layers.{i}.q.lora_A"] = torch.randn(6, n, generator=generator) * 0.5 ** torch.arange(6)[:, None]
        tensors[f"layers.{i}.q.lora_B"] = torch.randn(m, 6, generator=generator)
    save_file(tensors, tmp_path / "in.safetensors")
    return load(tmp_path / "in.safetensors", alpha=6.0)


def test_every_number_is_that_of_the_file(adapter: Adapter, tmp_path: Path) -> None:
    report = bakeoff(adapter, Bakeoff(("lora", "ldu"), (6000, 4000), dtype="f32"))
    assert report.targets == tuple(adapter)
    assert [(e.budget, e.best) for e in report.entrants] == [(6000, True), (6000, False), (4000, True), (4000, False)]
    for i, entrant in enumerate(report.entrants):
        budget = int(entrant.command.split("--budget ")[1].split("B ")[0])
        how = Reparameterize(budget=budget, dtype="f32", accept_loss=True)
        made = load(save(reparameterize(adapter, entrant.family, how)[0], tmp_path / f"{i}").path)
        assert made.file_nbytes == entrant.bytes <= entrant.budget
        truth = [adapter[t].delta().double().numpy() for t in adapter]
        found = [made[t].delta().double().numpy() for t in made]
        lost = math.sqrt(sum(np.linalg.norm(a - b) ** 2 for a, b in zip(truth, found, strict=True)))
        error = lost / math.sqrt(sum(np.linalg.norm(a) ** 2 for a in truth))
        assert entrant.relative_error == pytest.approx(error, rel=1e-5)
        assert entrant.energy_kept == pytest.approx(1 - error**2, rel=1e-5)
        ranks = [np.linalg.matrix_rank(f, tol=1e-6 * np.linalg.norm(f, 2)) for f in found]
        assert entrant.rank == pytest.approx(np.mean(ranks))


def test_the_reference_is_the_best_that_low_ranks_can_do(adapter: Adapter) -> None:
    """Brute force: the components of all targets by what they give for their bytes, from dense SVDs."""
    report = bakeoff(adapter, Bakeoff(("lora",), (6000,), dtype="f32"))
    gains = []
    for (m, n), update in zip(SIDES, adapter.values(), strict=True):
        values = np.linalg.svd(update.delta().double().numpy(), compute_uv=False)
        gains += [(float(v) ** 2 / (m + n), float(v) ** 2, 4 * (m + n)) for v in values]
    gains.sort(reverse=True)
    whole, kept, size, curve = sum(g[1] for g in gains), 0.0, 0, []
    for _, square, cost in gains[: len(report.reference)]:
        kept, size = kept + square, size + cost
        curve.append((size, math.sqrt(max(0.0, 1 - kept / whole))))
    header = report.reference[0][0] - curve[0][0]
    assert 0 < header < 1500
    for (size, error), (stated, least) in zip(curve[:20], report.reference[:20], strict=True):
        assert stated == size + header
        assert least == pytest.approx(error, abs=1e-6)
    lora = report.entrants[0]
    assert min(error for size, error in report.reference if size <= lora.budget) <= lora.relative_error


def test_a_sample_is_spread_and_a_pattern_is_taken_whole(adapter: Adapter) -> None:
    assert bakeoff(adapter, Bakeoff(("lora",), (5000,), sample=2)).targets == ("layers.0.q", "layers.3.q")
    assert bakeoff(adapter, Bakeoff(("lora",), (5000,), sample=1)).targets == ("layers.0.q",)
    assert bakeoff(adapter, Bakeoff(("lora",), (9000,), sample=0)).targets == tuple(adapter)
    assert bakeoff(adapter, Bakeoff(("lora",), (5000,), "layers.2.*", 1)).targets == ("layers.2.q",)


def test_who_cannot_take_part_is_named(adapter: Adapter) -> None:
    report = bakeoff(adapter, Bakeoff(("lora", "ldu"), (100_000, 10)))
    assert {e.budget for e in report.entrants} == {100_000}
    assert set(report.left_out) == {"lora", "ldu"}
    assert "no file of 10" in report.left_out["lora"]
    with pytest.raises(AdapterError, match="no family could be fitted"):
        bakeoff(adapter, Bakeoff(("lora",), (10,)))
    with pytest.raises(UsageError, match="there are: "):
        bakeoff(adapter, Bakeoff(("nonsense",)))
    with pytest.raises(UsageError, match="above 0"):
        Bakeoff(budgets=(0,))


def test_steps_are_counted_to_the_end(adapter: Adapter) -> None:
    counted: list[int] = []

    def steps(total: int, what: str) -> Callable[[], None]:
        assert (total, what) == (4, "fits")
        return lambda: counted.append(1)

    bakeoff(adapter, Bakeoff(("lora", "ldu"), (6000, 10)), steps=steps)
    assert len(counted) == 4


def test_all_families_take_part_and_the_outcome_is_the_same_again(adapter: Adapter) -> None:
    from loratools.families import FITTABLE

    how = Bakeoff(budgets=(12_000,), sample=2, dtype="f32")
    report = bakeoff(adapter, how)
    took = {e.family for e in report.entrants} | set(report.left_out)
    assert took == set(FITTABLE)
    assert all(e.bytes <= e.budget for e in report.entrants)
    assert bakeoff(adapter, how) == report
