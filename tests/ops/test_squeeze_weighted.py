"""Squeezing by what enters each target, against the dense SVD of delta C^(1/2)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loratools import Budget, Energy, Limits, Squeeze, Statistics, Threshold, load, squeeze, squeeze_file
from loratools.adapter import Adapter
from loratools.base_weights import BaseWeights
from loratools.errors import AdapterError, UsageError
from loratools.ops.spectra import low_rank_part
from loratools.ops.statistics import fingerprint

Samples = Callable[[str], Path]


def inputs(adapter: Adapter) -> dict[str, torch.Tensor]:
    """A made-up C for each target, with directions of very different energies."""
    g = torch.Generator().manual_seed(3)
    found = {}
    for target, update in adapter.items():
        n = update.parameters()["down"].shape[1]
        x = torch.randn(4 * n, n, generator=g, dtype=torch.float64) * torch.logspace(0, -3, n, dtype=torch.float64)
        x = x @ torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]
        found[target] = x.T @ x / len(x)
    return found


def statistics(adapter: Adapter, cs: dict[str, torch.Tensor]) -> Statistics:
    downs = {t: u.parameters()["down"].double() for t, u in adapter.items()}
    return Statistics(
        {t: downs[t] @ c @ downs[t].T for t, c in cs.items()},
        {t: c.diagonal() for t, c in cs.items()},
        4,
        {t: fingerprint(adapter[t]) for t in adapter},
    )


def weighted(delta: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(c)
    return delta.double() @ (vectors * values.clamp(min=0).sqrt())


@pytest.fixture
def adapter(samples: Samples) -> Adapter:
    return load(samples("peft/lora_plain"))


@pytest.mark.parametrize("rank", [1, 2])
def test_a_fixed_rank_reaches_the_weighted_optimum(adapter: Adapter, rank: int) -> None:
    cs = inputs(adapter)
    small, report = squeeze(adapter, rank, options=Squeeze(weights=statistics(adapter, cs)))
    plain, without = squeeze(adapter, rank)
    total = lost = 0.0
    for target, c in cs.items():
        delta = adapter[target].delta()
        values = torch.linalg.svdvals(weighted(delta, c))
        norm, bound = float(values.norm()), float(values[rank:].norm())
        error = float(weighted(small[target].delta() - delta, c).norm())
        change = report.targets[target]
        assert error == pytest.approx(bound, rel=1e-3)
        assert error <= float(weighted(plain[target].delta() - delta, c).norm())
        assert change.weighted_error == pytest.approx(bound / norm, rel=1e-5)
        assert change.energy_kept == pytest.approx(1 - (bound / norm) ** 2, rel=1e-5)
        assert change.relative_error >= without.targets[target].relative_error
        total, lost = total + norm**2, lost + bound**2
        assert without.targets[target].weighted_error is None
    assert report.weighted_error == pytest.approx((lost / total) ** 0.5, rel=1e-5)
    assert without.weighted_error is None


def test_rules_for_ranks_see_the_weighted_spectra(adapter: Adapter) -> None:
    cs = inputs(adapter)
    options = Squeeze(weights=statistics(adapter, cs), allow_unchanged=True)
    by_energy = squeeze(adapter, Energy(0.9), options=options)[0]
    by_threshold = squeeze(adapter, Threshold(0.5), options=options)[0]
    for target, c in cs.items():
        values = torch.linalg.svdvals(weighted(adapter[target].delta(), c))
        shares = values.square().cumsum(0) / values.square().sum()
        assert by_energy.entries[target].rank == int((shares < 0.9).sum()) + 1
        assert by_threshold.entries[target].rank == int((values > 0.5 * values[0]).sum())
    at_most = squeeze(adapter, Energy(0.999), limits=Limits(maximum=1), options=options)[0]
    assert {entry.rank for entry in at_most.entries.values()} == {1}


def test_a_budget_is_met_and_spent_where_the_inputs_are(adapter: Adapter, tmp_path: Path) -> None:
    cs = inputs(adapter)
    first = next(iter(cs))
    cs[first] *= 1e6
    options = Squeeze(weights=statistics(adapter, cs))
    even = squeeze_file(adapter, tmp_path / "even", 2)[0]
    saved, report = squeeze_file(adapter, tmp_path / "budget", Budget(even.nbytes), options=options)
    assert saved.nbytes <= even.nbytes
    kept = report.targets[first].rank_after if first in report.targets else adapter.entries[first].rank
    assert kept == max(load(saved.path).entries[t].rank for t in cs)
    with pytest.raises(UsageError, match="relative to the base"):
        squeeze(adapter, Budget(even.nbytes, relative_to="base"), options=options)


def test_full_rank_changes_nothing_but_the_gauge(adapter: Adapter) -> None:
    target = next(iter(adapter))
    update = adapter[target]
    down, up = update.parameters()["down"], update.parameters()["up"]
    wide = type(update).from_parameters(
        {"down": torch.cat([down, down]), "up": torch.cat([up, up], 1) / 2}, scale=update.scale, layout=update.layout
    )
    doubled = adapter.with_updates({target: wide})
    options = Squeeze(weights=statistics(doubled, inputs(doubled)))
    small, report = squeeze(doubled, len(down), options=options)
    torch.testing.assert_close(small[target].delta(), update.delta(), rtol=1e-4, atol=1e-6)
    assert set(report.targets) == {target}


def test_a_dora_is_weighed_with_its_gains(samples: Samples) -> None:
    folder = samples("peft/dora")
    adapter = load(folder)
    g = torch.Generator().manual_seed(5)
    shapes = {adapter.format.parameter(t): e.base_shape for t, e in adapter.entries.items()}
    weights = {name: torch.randn(*(shape or ()), generator=g) for name, shape in shapes.items()}

    class Held:
        path = Path("base")
        specs = dict.fromkeys(weights)

        def read(self, name: str) -> torch.Tensor:
            return weights[name]

    base = BaseWeights(Held())  # type: ignore[arg-type]
    cs = inputs(adapter)
    _, report = squeeze(adapter, 1, options=Squeeze(weights=statistics(adapter, cs), base=base))
    for target, c in cs.items():
        part = low_rank_part(adapter[target], weights[adapter.format.parameter(target)]).to(torch.float64).dense()
        values = torch.linalg.svdvals(weighted(part, c))
        change = report.targets[target]
        assert change.weighted_error == pytest.approx(float(values[1:].norm() / values.norm()), rel=1e-5)


def test_statistics_of_another_adapter_are_refused(adapter: Adapter) -> None:
    target = list(adapter)[1]
    update = adapter[target]
    other = adapter.with_updates({target: update.with_tensors({"down": update.parameters()["down"] * 2})})
    with pytest.raises(AdapterError, match=rf"^{re.escape(target)}: .*another adapter"):
        squeeze(adapter, 1, options=Squeeze(weights=statistics(other, inputs(other))))


def test_what_cannot_be_weighed_is_refused(adapter: Adapter, samples: Samples) -> None:
    stats = statistics(adapter, inputs(adapter))
    with pytest.raises(UsageError, match="exact singular values"):
        Squeeze(method="rsvd", weights=stats)
    with pytest.raises(AdapterError, match="a convolution"):
        squeeze(load(samples("peft/lora_conv2d")), 1, options=Squeeze(weights=stats))


def test_nan_is_named_or_carried_over(adapter: Adapter) -> None:
    target = list(adapter)[1]
    update = adapter[target]
    broken = adapter.with_updates({target: update.with_tensors({"up": update.parameters()["up"] * torch.nan})})
    stats = statistics(broken, inputs(broken))
    with pytest.raises(AdapterError, match=rf"^{re.escape(target)}: holds NaN"):
        squeeze(broken, 1, options=Squeeze(weights=stats))
    report = squeeze(broken, 1, options=Squeeze(weights=stats, allow_nonfinite=True))[1]
    assert report.unchanged == {target: "holds NaN or infinity"}
