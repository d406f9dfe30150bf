"""Families side by side: what takes part, that budgets hold, and that numbers are those of the files themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from loratools.adapter import Adapter
from loratools.base_weights import load_base
from loratools.errors import AdapterError, UsageError
from loratools.families import LoRA
from loratools.families.base import Update
from loratools.families.fitting import Source
from loratools.files import load, save
from loratools.ops.bakeoff import Bakeoff, bakeoff
from loratools.ops.extract import differences
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


def test_a_file_is_made_again_by_its_command(adapter: Adapter, tmp_path: Path) -> None:
    """To the byte, for families of every kind, from what the command line would ask for."""
    weights = {f"layers.{i}.q.weight": torch.randn(m, n) for i, (m, n) in enumerate(SIDES)}
    save_file(weights, tmp_path / "base.safetensors")
    base = load_base(tmp_path / "base.safetensors")
    families = ("lora", "hydra", "unilora", "sparse", "tera", "lora-xs")
    report = bakeoff(adapter, Bakeoff(families, (9000, 6000), base=base, dtype="f32", seed=3))
    assert {e.family for e in report.entrants} == set(families)
    for i, entrant in enumerate(report.entrants):
        words = entrant.command.split()
        asked = {word: words[k + 1] for k, word in enumerate(words[:-1]) if word.startswith("--")}
        assert ("--base" in asked) == (entrant.family in ("hydra", "lora-xs"))
        assert ("--accept-loss" in words) == (entrant.relative_error > 0.5)
        budget, seed = int(asked["--budget"].removesuffix("B")), int(asked["--seed"])
        how = Reparameterize(budget=budget, base=base, dtype=asked["--dtype"], seed=seed, accept_loss=True)
        made, told = reparameterize(adapter, entrant.family, how)
        assert save(made, tmp_path / f"{i}").nbytes == entrant.bytes
        assert told.total["relative_error"] == pytest.approx(entrant.relative_error, rel=1e-9)


def test_families_that_need_the_base_say_so_alike(adapter: Adapter) -> None:
    report = bakeoff(adapter, Bakeoff(("lora", "hydra", "salt"), (9000,)))
    assert report.left_out["hydra"] == report.left_out["salt"]
    assert "base" in report.left_out["salt"]


def test_no_fit_is_made_in_vain(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """None for a budget that is too small, one for all in which the options are the same, one more for the header."""
    made: list[int] = []
    true_encode = LoRA.encode_together.__func__  # type: ignore[attr-defined]

    def counted(cls: type[LoRA], sources: dict[str, Source], options: object) -> dict[str, LoRA]:
        made.append(1)
        found: dict[str, LoRA] = true_encode(cls, sources, options)
        return found

    monkeypatch.setattr(LoRA, "encode_together", classmethod(counted))
    report = bakeoff(adapter, Bakeoff(("lora",), (10, 100, 90_000, 100_000, 110_000), dtype="f32"))
    assert [e.budget for e in report.entrants] == [110_000, 100_000, 90_000]
    assert len(made) == 1
    assert len({e.bytes for e in report.entrants}) == 1
    made.clear()
    bakeoff(adapter, Bakeoff(("lora",), (4000, 6000, 8000), dtype="f32"))
    groups = 2  # a target that gets what the others left over may have a rank of its own
    assert 3 <= len(made) <= 4 * groups


def test_deltas_are_read_once(adapter: Adapter) -> None:
    reads: list[str] = []

    def counted(target: str, read: Callable[[], Update]) -> Callable[[], Update]:
        def once() -> Update:
            reads.append(target)
            return read()

        return once

    entries = {t: replace(e, read=counted(t, e.read)) for t, e in adapter.entries.items()}
    bakeoff(replace(adapter, entries=entries), Bakeoff(("lora", "ldu", "sparse"), (6000, 9000)))
    assert sorted(reads) == sorted(adapter.entries)


def test_full_differences_take_part(tmp_path: Path) -> None:
    """Dense deltas, whose best approximation of each rank numpy knows."""
    draw = torch.Generator().manual_seed(1)
    before = {f"layers.{i}.q.weight": torch.randn(40, 24, generator=draw) for i in range(2)}
    after = {name: w + 0.01 * torch.randn(40, 24, generator=draw) for name, w in before.items()}
    for name, weights in (("before", before), ("after", after)):
        save_file(weights, tmp_path / f"{name}.safetensors")
    found = differences(load_base(tmp_path / "before.safetensors"), load_base(tmp_path / "after.safetensors"))
    report = bakeoff(found.adapter, Bakeoff(("lora", "sparse"), (4500,), dtype="f32"))
    entrant = next(e for e in report.entrants if e.family == "lora")
    assert entrant.rank is not None
    changes = [(after[name].double() - before[name].double()).numpy() for name in before]
    rank = round(entrant.rank)
    lost = sum(float((np.linalg.svd(c, compute_uv=False)[rank:] ** 2).sum()) for c in changes)
    assert entrant.relative_error == pytest.approx(
        math.sqrt(lost / sum(float((c**2).sum()) for c in changes)), rel=1e-4
    )
