"""Cores as factors: the best of their rank on bases as they are stored, chosen where they take less, read with care."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub import pack_hubs
from hub.pack_hubs import dense, folder_size, squared_error, write_hub
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools.errors import InputError
from loratools.hub.pack import Packing, add, open_pack, pack, unpack
from loratools.hub.pack.coding import Pair, decoded, encoded
from loratools.hub.pack.layout import METHODS, NORM, Numbers, PackTarget, Part, Shared
from loratools.hub.pack.members import Delta
from loratools.hub.pack.spend import kept_all, kept_tried
from loratools.linalg.shared_bases import Bases, core_squares

WIDTH = 24  # of what adapters share: a core has 576 numbers, the factors of one of rank 4 or 8 have 192 or 384


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pack_hubs, "INNER", WIDTH)
    return write_hub(tmp_path / "hub", "shared", 12)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bent(width: int, size: int, seed: int) -> Tensor:
    """Rows that are nearly orthonormal, as rounding leaves them."""
    rows = torch.linalg.qr(random(size, width, seed=seed))[0].T
    return (rows + 0.05 * random(width, size, seed=seed + 1)).float().double()


def projector(rows: Tensor) -> Tensor:
    return torch.linalg.pinv(rows) @ rows


def best(matrix: Tensor, rank: int) -> Tensor:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


@pytest.mark.parametrize("method", ["joint", "cluster"])
@pytest.mark.parametrize("kept", [0, 1, 3, 5])  # 0: the whole core
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("repeated", [False, True])
def test_factors_are_the_best_core_of_their_rank(method: str, kept: int, rank: int, repeated: bool) -> None:
    m, n, width = 30, 26, 12
    pair = Pair(bent(width, m, 0), bent(width, n, 5))
    if repeated:
        pair.left[3] = pair.left[0]
    delta = random(m, 6, seed=11) @ random(6, n, seed=12)
    norm = float(delta.norm())
    u, s, vt = torch.linalg.svd(delta / norm, full_matrices=False)
    target = PackTarget("t", (m, n), Shared(method, width, 2))  # type: ignore[arg-type]
    part = Part(1, rank, kept)
    data = encoded(Delta(norm, u[:, :6], s[:6], vt[:6]), target, part, pair, Numbers(), 0.0)
    core = 2 * kept * width if kept else width**2
    assert len(data) == part.size((m, n), target.shared, Numbers()) == NORM + 4 * (core + rank * (m + n))
    low = decoded(data, target, part, pair, Numbers())
    assert low.rank == part.width(target.shared) == (kept or width) + rank
    known = best(projector(pair.left) @ delta @ projector(pair.right), kept or width)
    wanted = known + best(delta - known, rank)
    assert float((low.dense() - wanted).norm()) < 2e-6 * norm


def test_a_core_of_lower_rank_than_its_factors_is_padded() -> None:
    pair, target = Pair(bent(7, 20, 0), bent(7, 22, 3)), PackTarget("t", (20, 22), Shared("joint", 7))
    for s in (torch.ones(1, dtype=torch.float64), torch.ones(0, dtype=torch.float64)):
        vector = torch.eye(20, 1, dtype=torch.float64)[:, : len(s)], torch.eye(1, 22, dtype=torch.float64)[: len(s)]
        data = encoded(Delta(2.0, vector[0], s, vector[1]), target, Part(0, 0, 3), pair, Numbers(), 0.0)
        wanted = 2 * projector(pair.left) @ (vector[0] * s) @ vector[1] @ projector(pair.right)
        assert torch.allclose(decoded(data, target, Part(0, 0, 3), pair, Numbers()).dense(), wanted, atol=1e-6)


@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize("width", [3, 4, 5, 24, 31, 128])
def test_factors_are_smaller_up_to_half_the_width(bits: int, width: int) -> None:
    shared, numbers = Shared("joint", width), Numbers("BF16", bits)
    whole, most = shared.core_size(numbers), shared.most_factors
    assert shared.core_size(numbers, most) < whole
    assert 2 * (most + 1) * width >= width * width
    # what a plan counts for each component is no less than what is written
    assert shared.core_size(numbers, most) <= most * shared.core_size(numbers, 1)
    assert {Shared(m, width).most_factors for m in METHODS if m not in ("joint", "cluster")} == {0}  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [3, 9])  # below the width and above
def test_squares_of_cores(rank: int) -> None:
    x, y = random(4, 15, rank, seed=0), random(4, 13, rank, seed=1)
    bases = Bases(torch.linalg.qr(random(15, 6, seed=2))[0], torch.linalg.qr(random(13, 6, seed=3))[0])
    found = core_squares(x, y, bases)
    for i in range(4):
        s = torch.linalg.svdvals(bases.u.T @ x[i] @ y[i].T @ bases.v)[: min(rank, 6)]
        assert torch.allclose(found[i], s.square(), rtol=1e-9, atol=1e-9)


def parts(place: Path, name: str) -> list[Part]:
    with open_pack(place) as found:
        return [part for _, part, _ in found.parts(name)]


def ranks(index: int) -> int:
    return 8 if index % 2 else 4


def test_all_of_a_core_is_stored_as_factors_where_they_are_smaller(hub: Path, tmp_path: Path) -> None:
    """All adapters, exactly, in bytes that their whole cores would not fit in."""
    report = pack(hub, tmp_path / "pack", Packing("95%", "joint"))
    assert max(report.errors) < 1e-6
    assert report.bytes_after == folder_size(tmp_path / "pack") <= report.budget
    assert {t.width for t in report.targets} == {WIDTH}
    for i in range(12):
        assert parts(tmp_path / "pack", f"a{i:02}") == [Part(0, 0, ranks(i))] * 2
    spared = sum(2 * 4 * (WIDTH**2 - 2 * WIDTH * ranks(i)) for i in range(12))
    assert report.bytes_after + spared > report.budget
    unpack(tmp_path / "pack", "a01", tmp_path / "out")
    assert squared_error(dense(hub / "a01"), dense(tmp_path / "out")) < 1e-12
    assert {t.shape[0] for k, t in load_file(tmp_path / "out/adapter_model.safetensors").items() if "_A" in k} == {8}


def test_parts_of_cores_go_where_they_lower_the_error_most(hub: Path, tmp_path: Path) -> None:
    """Against every division of the same number of components, by singular values of the deltas."""
    report = pack(hub, tmp_path / "pack", Packing("80%", "joint"))
    assert report.bytes_after == folder_size(tmp_path / "pack") <= report.budget
    assert report.budget - report.bytes_after < 2 * 4 * WIDTH + 100
    bought, gains = 0, []
    for row in report.adapters:
        kept = [part.kept if part.group >= 0 else 0 for part in parts(tmp_path / "pack", row.name)]
        spectra = [torch.linalg.svdvals(d).square() for d in dense(hub / row.name).values()]
        total = sum(float(s.sum()) for s in spectra)
        lost = sum(float(s[k:].sum()) for s, k in zip(spectra, kept, strict=True)) / total
        assert row.relative_error == pytest.approx(math.sqrt(lost), rel=1e-4, abs=1e-6)
        gains += [float(v) / total for s in spectra for v in s]
        bought += sum(kept)
    assert 0 < bought < 144
    least = 12 - sum(sorted(gains, reverse=True)[:bought])
    assert sum(e * e for e in report.errors) == pytest.approx(least, rel=1e-4)
    assert report.expected["joint"] == pytest.approx(least, rel=1e-4)


@pytest.mark.parametrize(("bits", "budget"), [(0, "80%"), (8, "30%"), (4, "20%")])
def test_no_plan_expects_less_than_it_loses_and_none_less_than_auto(
    hub: Path, tmp_path: Path, bits: int, budget: str
) -> None:
    reports = {m: pack(hub, tmp_path / m, Packing(budget, m, bits=bits)) for m in ("auto", "joint")}
    for method, report in reports.items():
        assert report.bytes_after == folder_size(tmp_path / method) <= report.budget
        assert sum(e * e for e in report.errors) <= report.expected[method] * 1.001 + 1e-6
    expected = reports["auto"].expected
    assert expected["auto"] == min(expected.values())
    assert expected["joint"] == pytest.approx(reports["joint"].expected["joint"], rel=1e-9)
    assert {part.kept for i in range(12) for part in parts(tmp_path / "joint", f"a{i:02}")} - {0}


def test_bytes_are_the_same_each_time(hub: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        pack(hub, tmp_path / name, Packing("80%", "joint"))
    for file in (p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file()):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_joining_adapter_gets_as_much_of_its_core_as_fits(hub: Path, tmp_path: Path) -> None:
    pack(hub, tmp_path / "pack", Packing("95%", "joint"))
    new = write_hub(tmp_path / "new", "shared", 14) / "a13"  # of rank 8
    report = add(tmp_path / "pack", new, name="default")
    assert report.adapter.relative_error is not None
    assert report.adapter.relative_error < 1e-6
    assert parts(tmp_path / "pack", "default") == [Part(0, 0, 8)] * 2
    spectra = [torch.linalg.svdvals(d).square() for d in dense(new).values()]
    all_ = sum(float(s.sum()) for s in spectra)
    seen = set()
    for budget in ("25%", "35%", "45%", "60%"):
        report = add(tmp_path / "pack", new, name=budget, budget=budget)
        assert report.budget is not None
        assert report.adapter.bytes_after <= report.budget
        kept = [part.kept for part in parts(tmp_path / "pack", budget)]
        assert [part.rank for part in parts(tmp_path / "pack", budget)] == [0, 0]
        seen.update(kept)
        assert sum(kept) == 16 or report.budget - report.adapter.bytes_after < 2 * 4 * WIDTH
        fewest = [
            sum(float(s[k:].sum()) for s, k in zip(spectra, (first, sum(kept) - first), strict=True))
            for first in range(sum(kept) + 1)
        ]
        assert report.adapter.relative_error == pytest.approx(math.sqrt(min(fewest) / all_), rel=1e-4, abs=1e-6)
    assert len(seen) > 2


def test_ranks_that_a_joining_adapter_tries() -> None:
    assert kept_tried(Shared("joint", 24), 8) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert kept_tried(Shared("cluster", 128, 2), 100) == [0, 8, 16, 24, 32, 40, 48, 56, 63]
    assert kept_tried(Shared("joint", 2), 8) == kept_tried(Shared("diag", 24), 8) == [0]
    assert kept_tried(Shared("sparse", 24), 8) == [12]
    assert (kept_all(Shared("joint", 24), 11), kept_all(Shared("joint", 24), 12)) == (11, 0)
    assert kept_all(Shared("joint", 24), 0) == 1


def changed(row: list[int]) -> Callable[[Path], None]:
    """Another first row of the layout of an adapter."""

    def apply(path: Path) -> None:
        file = path / "adapters" / "00001.safetensors"
        tensors = load_file(file)
        tensors["layout"][0] = torch.tensor(row, dtype=torch.int16)
        save_file(tensors, file)

    return apply


@pytest.mark.parametrize(
    "row", [[0, 0, 7], [0, 0, 0], [0, 0, WIDTH + 1], [0, 0, -8], [-1, 0, 8], [-1, 0, 0], [1, 0, 8], [0, 0, 32767]]
)
def test_a_layout_that_does_not_fit_is_an_error(hub: Path, tmp_path: Path, row: list[int]) -> None:
    pack(hub, tmp_path / "pack", Packing("95%", "joint"))
    assert parts(tmp_path / "pack", "a01")[0] == Part(0, 0, 8)
    changed(row)(tmp_path / "pack")
    with pytest.raises(InputError, match="damaged"), open_pack(tmp_path / "pack") as found:
        found["a01"]


def test_coefficients_that_a_method_does_not_have_are_an_error(hub: Path, tmp_path: Path) -> None:
    """Sizes that fit by chance must not be enough."""
    pack(hub, tmp_path / "pack", Packing("60%", "diag"))
    row = parts(tmp_path / "pack", "a01")[0]
    changed([row.group, row.rank, 1])(tmp_path / "pack")
    with pytest.raises(InputError, match="impossible part"), open_pack(tmp_path / "pack") as found:
        found["a01"]
