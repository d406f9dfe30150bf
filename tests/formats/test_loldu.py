"""LoLDU's file, decoded with the base that it was trained on and with others."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratools import delta, inspect, load, load_base
from loratools.errors import AdapterError, NeedsBaseError
from loratools.families import LoLDU
from loratools.families.base import Layout
from loratools.families.fitting import Source
from loratools.families.loldu import LoLDUOptions, eliminated
from loratools.linalg.inner import relative_error
from loratools.operators import Dense, LowRank
from loratools.ops.convert import Convert, convert
from loratools.ops.lowering import Lowering
from loratools.ops.reparameterize import Reparameterize, reparameterize

M, N, R = 20, 14, 6
KEY = "layers.0.fc.parametrizations.weight.0.vector_z"


def rand(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def residual(weight: torch.Tensor, z0: torch.Tensor, scale: float) -> torch.Tensor:
    """The weight that the authors' code leaves, by torch's own factorisation."""
    p, lower, upper = torch.linalg.lu(weight)
    unit = upper / torch.diagonal(upper).unsqueeze(-1)
    return weight - scale * p @ lower[:, :R] @ torch.diag(z0) @ unit[:R]


def write(folder: Path, z: torch.Tensor, weight: torch.Tensor) -> Path:
    torch.save({KEY: z}, folder / "z.pt")
    save_file({"layers.0.fc.weight": weight}, folder / "base.safetensors")
    return folder / "z.pt"


def test_the_delta_is_that_of_the_authors_forward_pass(tmp_path: Path) -> None:
    weight, alpha = rand(0, M, N), 3.0
    z0 = torch.diagonal(torch.linalg.lu(weight)[2])[:R].clone()
    z = z0 + 0.1 * rand(1, R)
    tuned = residual(weight, z0, alpha / R) + (weight - residual(weight, z, alpha / R))
    path = write(tmp_path, z, weight)
    base = load_base(tmp_path / "base.safetensors")
    adapter = load(path, alpha=alpha)
    assert adapter.entries["layers.0.fc"].scale == alpha / R
    assert not adapter.warnings
    (name, change), *rest = delta(adapter, base=base)
    assert (name, rest) == ("layers.0.fc.weight", [])
    torch.testing.assert_close(change, tuned - weight, rtol=0, atol=2e-5)
    lora, report = convert(adapter, "peft", Convert(Lowering(exact=True), base=base))
    assert report.targets["layers.0.fc"].rank == R
    torch.testing.assert_close(lora["layers.0.fc"].delta(), change, rtol=0, atol=1e-6)


def test_what_the_file_does_not_state_is_said(tmp_path: Path) -> None:
    adapter = load(write(tmp_path, rand(1, R), rand(0, M, N)))
    assert adapter.entries["layers.0.fc"].scale == 1 / R
    assert any("--alpha" in warning for warning in adapter.warnings)
    with pytest.raises(NeedsBaseError, match=r"layers\.0\.fc.*pass --base"):
        list(delta(adapter))


def test_another_base_is_refused(tmp_path: Path) -> None:
    weight = rand(0, M, N)
    z = torch.diagonal(torch.linalg.lu(weight)[2])[:R].clone() + 0.05
    adapter = load(write(tmp_path, z, weight.flip(0).contiguous().roll(1, 1)), alpha=1.0)
    with pytest.raises(AdapterError, match=r"layers\.0\.fc: .*cosine .*cannot be decoded"):
        inspect(adapter, base=load_base(tmp_path / "base.safetensors"))
    with pytest.raises(AdapterError, match="6 numbers for the 3 pivots"):
        adapter["layers.0.fc"].operator(rand(2, 3, 14))


def test_a_pivot_of_zero_is_refused() -> None:
    weight = torch.zeros(4, 4)
    weight[0, 1] = 1.0
    with pytest.raises(AdapterError, match="pivot 0 of the base is 0"):
        eliminated(weight, 2)


@pytest.mark.parametrize("dense", [False, True])
def test_a_fit_is_the_least_squares_solution(dense: bool) -> None:
    """As the normal equations of the vectorised atoms give it; a generic delta keeps about r / (m n)."""
    weight = rand(3, M, N)
    factors = LowRank(rand(4, M, 3).double(), rand(5, 3, N).double(), 0.5)
    delta = Dense(factors.dense()) if dense else factors
    source = Source(delta, Layout(shape=(M, N)), weight, torch.float64)
    left, pivots, right = eliminated(weight, R)
    atoms = torch.stack([torch.outer(left[:, i], right[i]).flatten() for i in range(R)], dim=1)
    wanted = torch.linalg.lstsq(atoms, factors.dense().flatten().unsqueeze(1)).solution.flatten()
    fitted = LoLDU.encode(source, LoLDUOptions(R))
    torch.testing.assert_close(fitted.z - pivots, wanted, rtol=1e-9, atol=1e-12)
    error = relative_error(delta, fitted.operator(weight))
    assert math.sqrt(1 - error**2) < 0.5  # nearly all is lost
    assert LoLDU.expected_energy(source, LoLDUOptions(R)) == R / (M * N)
    assert sum(t.numel() for t in fitted.parameters().values()) == R


def test_a_member_is_found_and_another_base_noticed(tmp_path: Path) -> None:
    weight = rand(6, M, N)
    left, pivots, right = eliminated(weight, R)
    change = rand(7, R).double()
    source = Source(LowRank(left * change, right), Layout(shape=(M, N)), weight, torch.float64)
    fitted = LoLDU.encode(source, LoLDUOptions(R))
    torch.testing.assert_close(fitted.z - pivots, change, rtol=1e-6, atol=1e-9)
    with pytest.raises(AdapterError, match="is it the right base"):
        fitted.operator(2 * weight)


def test_rounding_never_makes_it_worse_than_nothing() -> None:
    """Pivots that fall to almost nothing make atoms so large that float32 cannot state a change of their numbers."""
    generator = torch.Generator().manual_seed(0)
    lower = torch.randn(N, N, generator=generator).tril(-1) / 4 + torch.eye(N)
    upper = torch.randn(N, N, generator=generator).triu() * torch.logspace(0, -1, N).unsqueeze(1)
    upper[range(N), range(N)] = torch.logspace(0, -6, N)
    for seed in range(6):
        delta = LowRank(rand(seed, N, 2).double(), rand(seed + 50, 2, N).double(), 1e-8)
        source = Source(delta, Layout(shape=(N, N)), lower @ upper, torch.float32)
        assert relative_error(delta, LoLDU.encode(source, LoLDUOptions()).operator(source.base)) <= 1 + 1e-9


def test_reparameterize_says_what_is_lost(tmp_path: Path) -> None:
    weight = rand(0, M, N)
    save_file({"layers.0.fc.lora_A": rand(1, 2, N), "layers.0.fc.lora_B": rand(2, M, 2)}, tmp_path / "a.safetensors")
    save_file({"layers.0.fc.weight": weight}, tmp_path / "b.safetensors")
    how = Reparameterize(base=load_base(tmp_path / "b.safetensors"))
    with pytest.raises(AdapterError, match=r"would lose \d+ % .*lost of a generic delta.*--accept-loss"):
        reparameterize(load(tmp_path / "a.safetensors"), "loldu", how)
