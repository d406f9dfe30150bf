"""QWHA's encoder: AdaAlloc, top coefficients, and values refined by least squares, against explicit matrices."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import loratools
from loratools.errors import AdapterError, InputError, UsageError
from loratools.families import QWHA
from loratools.families.base import Layout
from loratools.families.fitting import Source
from loratools.families.places import places_nbytes, unpack_places
from loratools.families.qwha import QWHAOptions
from loratools.families.qwha_fit import DAMPING, allocated
from loratools.linalg.hadamard import hadamard
from loratools.linalg.inner import relative_error
from loratools.operators import Dense, LowRank, Operator
from loratools.ops.reparameterize import Reparameterize, reparameterize

each_kind = pytest.mark.parametrize("kind", ["factors", "dense"])
shapes = pytest.mark.parametrize("shape", [(10, 16), (7, 24), (9, 12)])


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def source(kind: str, shape: tuple[int, int], squares: Tensor | None = None) -> Source:
    low = LowRank(rand(1, shape[0], 3), rand(2, 3, shape[1]), -0.5)
    delta: Operator = low if kind == "factors" else Dense(low.dense())
    return Source(delta, Layout(shape=shape), None, torch.float64, squares=squares)


def test_adaalloc_by_hand() -> None:
    """40, 30, 20 and 10 %: floors of 4.4, 3.3, 2.2, 1.1 leave 1, which goes to the row that has the fewest."""
    assert allocated(torch.tensor([4.0, 3.0, 2.0, 1.0]), 11, 8, 1.0).tolist() == [4, 3, 2, 2]
    # capped at 5: 20 * (.85, .05, .05, .05) = 17, 1, 1, 1; the 12 left go to the others, 4 to each
    assert allocated(torch.tensor([17.0, 1.0, 1.0, 1.0]), 20, 5, 1.0).tolist() == [5, 5, 5, 5]
    assert allocated(torch.tensor([17.0, 1.0, 1.0, 1.0]), 16, 5, 1.0).tolist() == [5, 4, 4, 3]
    assert allocated(torch.zeros(3), 7, 4, 1.0).tolist() == [3, 2, 2]
    assert allocated(torch.tensor([9.0, 1.0]), 10, 10, 0.0).tolist() == [5, 5]
    assert allocated(torch.tensor([9.0, 4.0]), 10, 10, 0.5).tolist() == [6, 4]


@pytest.mark.parametrize("total", [1, 5, 64, 200, 319, 320])
def test_adaalloc_spends_all_and_caps(total: int) -> None:
    counts = allocated(rand(0, 20).abs(), total, 16, 1.0)
    assert int(counts.sum()) == total
    assert int(counts.max()) <= 16
    assert int(counts.min()) >= 0


@each_kind
@shapes
@pytest.mark.parametrize("count", [5, 40])
def test_the_largest_coefficients_of_each_row(kind: str, shape: tuple[int, int], count: int) -> None:
    given = source(kind, shape)
    m, n = shape
    truth = (given.delta.dense() @ hadamard(n).T).numpy()
    update = QWHA.encode(given, QWHAOptions(count=count))
    counts = allocated(torch.from_numpy(np.linalg.norm(truth, axis=1)), count, n, 1.0)
    wanted = np.zeros(shape)
    for i in range(m):
        top = np.argsort(-np.abs(truth[i]), kind="stable")[: int(counts[i])]
        wanted[i, top] = truth[i, top]
    np.testing.assert_allclose(update.operator().dense().numpy(), wanted @ hadamard(n).numpy() / n, atol=1e-12)
    error = ((truth - wanted) ** 2).sum() / n  # dropped energy
    assert relative_error(given.delta, update.operator()) ** 2 == pytest.approx(
        error / (given.delta.dense() ** 2).sum().item()
    )
    assert sum(t.nbytes for t in update.parameters().values()) == 8 * count + places_nbytes(count, m * n)


@each_kind
def test_by_energy_the_largest_of_all(kind: str) -> None:
    given = source(kind, (10, 16))
    truth = (given.delta.dense() @ hadamard(16).T).abs().reshape(-1).sort(descending=True).values
    update = QWHA.encode(given, QWHAOptions(count=30, allocation="energy"))
    torch.testing.assert_close(update.values.abs().sort(descending=True).values, truth[:30])


@each_kind
@shapes
@pytest.mark.parametrize("count", [12, 60])
def test_values_are_refined_by_least_squares(kind: str, shape: tuple[int, int], count: int) -> None:
    """Against R = diag(sqrt(d)) and N = R H^T / n of the authors, one row after the other."""
    m, n = shape
    squares = rand(5, n).square() + 0.01
    given = source(kind, shape, squares)
    update = QWHA.encode(given, QWHAOptions(count=count))
    plain = QWHA.encode(source(kind, shape), QWHAOptions(count=count))
    assert torch.equal(update.places, plain.places)
    places = unpack_places(update.places, count, m * n).numpy()
    root = np.diag(np.sqrt((squares + DAMPING * squares.mean()).numpy()))
    basis, dense = root @ hadamard(n).numpy().T / n, given.delta.dense().numpy()
    wanted = np.zeros(m * n)
    for i in range(m):
        mine = places[places // n == i]
        if len(mine):
            wanted[mine] = np.linalg.lstsq(basis[:, mine % n], root @ dense[i], rcond=None)[0]
    np.testing.assert_allclose(update.values.numpy(), wanted[places], rtol=1e-8, atol=1e-9)

    def weighted(u: QWHA) -> float:
        return float(((given.delta.dense() - u.operator().dense()).square() * squares).sum())

    assert weighted(update) < weighted(plain)


@each_kind
def test_equal_squares_refine_nothing(kind: str) -> None:
    flat = QWHA.encode(source(kind, (10, 16), torch.ones(16)), QWHAOptions(count=40))
    torch.testing.assert_close(flat.values, QWHA.encode(source(kind, (10, 16)), QWHAOptions(count=40)).values)


def test_rank_counts_as_a_lora_of_that_rank() -> None:
    assert len(QWHA.encode(source("factors", (10, 16)), QWHAOptions(rank=2)).values) == 2 * 26
    assert len(QWHA.encode(source("factors", (10, 16)), QWHAOptions()).values) == 160


def test_what_has_no_matrix_or_no_sense_is_refused() -> None:
    with pytest.raises(AdapterError, match="no Hadamard matrix of 11 rows"):
        QWHA.encode(source("factors", (8, 11)), QWHAOptions())
    for options, problem in (
        ({"allocation": "best"}, "adaptive and energy"),
        ({"count": 0}, "count"),
        ({"power": -1.0}, "power"),
    ):
        with pytest.raises(UsageError, match=problem):
            QWHAOptions(**options)


def authors_file(folder: Path, name: str = "default") -> Path:
    """As the fork of PEFT saves it: buffers with the name of the adapter in theirs."""
    indices = torch.tensor([[0, 5, 3, 0], [2, 7, 1, 0]], dtype=torch.int32)
    stem = "base_model.model.model.layers.0.q_proj"
    tensors = {
        f"{stem}.qhft_spectrum": rand(0, 4).float(),
        f"{stem}.qhft_indices_{name}": indices,
        f"{stem}.qhft_scaling_{name}": torch.tensor(0.25),
        f"{stem}.qhft_n_frequency_{name}": torch.tensor(4),
        f"{stem}.qhft_random_loc_seed_{name}": torch.tensor(777),
    }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "QHFT",
        "n_frequency": 4,
        "scaling": 0.25,
        "random_loc_seed": 777,
        "target_modules": ["q_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["default", "mine"])
def test_the_authors_files_are_read_and_repacked(tmp_path: Path, name: str) -> None:
    folder = authors_file(tmp_path / "a", name)
    save_file({"model.layers.0.q_proj.weight": rand(3, 6, 8).float()}, tmp_path / "base.safetensors")
    base = loratools.load_base(tmp_path / "base.safetensors")
    adapter = loratools.load(folder)
    assert set(adapter) == {"model.layers.0.q_proj"}
    assert not adapter.extras
    assert any("quantised base" in warning for warning in adapter.warnings)
    sparse = np.zeros((6, 8))
    sparse[[0, 5, 3, 0], [2, 7, 1, 0]] = rand(0, 4).float().double().numpy()
    wanted = 0.25 * (sparse @ hadamard(8).numpy() / 8) / np.sqrt(6)
    found = dict(loratools.delta(adapter, base=base))["model.layers.0.q_proj.weight"]
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-7)
    made, report = reparameterize(adapter, "qwha", Reparameterize({"count": "4", "allocation": "energy"}, base=base))
    assert report.total["relative_error"] < 1e-6
    assert sum(t.nbytes for u in made.values() for t in u.parameters().values()) < 4 * 12


def test_two_adapters_in_one_file(tmp_path: Path) -> None:
    folder = authors_file(tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    from safetensors.torch import load_file

    tensors = load_file(weights)
    key = next(k for k in tensors if "qhft_scaling" in k)
    save_file({**tensors, key.replace("default", "other"): torch.tensor(1.0)}, weights)
    with pytest.raises(InputError, match="two adapters"):
        loratools.load(folder)
