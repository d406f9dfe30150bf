"""PaCA and S2FT: the best columns or rows, exactly a LoRA, and S2FT's own permuted checkpoints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import loratools
from loratools.errors import AdapterError, NeedsBaseError, UsageError
from loratools.families import S2FT, PaCA
from loratools.families.base import Layout
from loratools.families.fitting import Source
from loratools.families.paca import PaCAOptions
from loratools.families.s2ft import S2FTOptions
from loratools.linalg.inner import relative_error
from loratools.linalg.lines import columns_of, energies
from loratools.operators import Dense, Diagonal, LowRank, Operator, Sparse
from loratools.ops.convert import Convert, convert_file
from loratools.ops.lowering import Lowering
from loratools.ops.reparameterize import Reparameterize, reparameterize


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def source(delta: Operator, dtype: torch.dtype = torch.float64) -> Source:
    return Source(delta, Layout(shape=delta.shape), rand(9, *delta.shape), dtype)


@pytest.mark.parametrize(
    "op",
    [
        Dense(rand(0, 9, 7)),
        LowRank(rand(1, 9, 2), rand(2, 2, 7), -0.5),
        Sparse(torch.tensor([3, 20, 60]), rand(3, 3), (9, 7)),
        Diagonal(rand(4, 6), (9, 7)),
    ],
    ids=lambda op: type(op).__name__,
)
def test_lines_are_those_of_the_matrix(op: Operator) -> None:
    matrix, which = op.dense().numpy(), torch.tensor([6, 0, 3])
    np.testing.assert_allclose(columns_of(op, which).numpy(), matrix[:, [6, 0, 3]], rtol=1e-12, atol=1e-14)
    weights = rand(5, 7).abs()
    for w in (None, weights):
        counted = matrix if w is None else matrix * w.numpy()
        rows, columns = energies(op, w)
        np.testing.assert_allclose(rows.numpy(), (counted**2).sum(1), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(columns.numpy(), (counted**2).sum(0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("count", [1, 5, 20, 99])
def test_the_columns_that_hold_most_are_kept(count: int, weighted: bool) -> None:
    delta = LowRank(rand(0, 30, 3), rand(1, 3, 20), 0.7)
    matrix, weights = delta.dense().numpy(), rand(2, 20).abs() + 0.1 if weighted else torch.ones(20)
    best = np.argsort(-np.linalg.norm(matrix * weights.numpy(), axis=0))[:count]
    wanted = np.zeros_like(matrix)
    wanted[:, best] = matrix[:, best]
    given = replace(source(delta), squares=weights.square() if weighted else None)
    paca = PaCA.encode(given, PaCAOptions(count))
    np.testing.assert_allclose(paca.operator(given.base).dense().numpy(), wanted, atol=1e-14)
    s2ft = S2FT.encode(given, S2FTOptions(rank=count, axis="columns"))
    np.testing.assert_allclose(s2ft.operator().dense().numpy(), wanted, rtol=1e-12)
    count = min(count, 20)
    assert [t.nbytes for t in paca.parameters().values()] == [30 * count * 8, 8 * count]
    assert [t.nbytes for t in s2ft.parameters().values()] == [30 * count * 8, 4 * count]


def test_rows_are_kept_likewise() -> None:
    matrix = rand(0, 12, 8)
    best = matrix.norm(dim=1).argsort(descending=True)[:3]
    wanted = torch.zeros_like(matrix)
    wanted[best] = matrix[best]
    made = S2FT.encode(source(Dense(matrix)), S2FTOptions(rank=3, axis="rows"))
    assert torch.equal(made.operator().dense(), wanted)
    assert [t.nbytes for t in made.parameters().values()] == [3 * 8 * 8, 4 * 3]


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_planted_lines_are_found_again(axis: str, dtype: torch.dtype) -> None:
    planted = torch.zeros(40, 40, dtype=torch.float64)
    lines = planted if axis == "rows" else planted.T
    lines[[3, 17, 20]] = rand(0, 3, 40)
    for options in (S2FTOptions(rank=3), S2FTOptions(energy=1.0), S2FTOptions(share=0.075)):
        made = S2FT.encode(source(Dense(planted), dtype), options)
        assert made.axis == axis
        assert made.places.tolist() == [3, 17, 20]
        assert relative_error(Dense(planted), made.operator()) < 1e-6
    if axis == "columns":
        given = source(Dense(planted), dtype)
        assert relative_error(Dense(planted), PaCA.encode(given, PaCAOptions(3)).operator(given.base)) < 1e-6


def test_an_energy_takes_the_fewest_lines() -> None:
    matrix = torch.diag(torch.tensor([3.0, 1.0, 2.0, 0.5], dtype=torch.float64))
    for energy, kept in ((0.5, [0]), (0.64, [0, 2]), (0.95, [0, 1, 2]), (1.0, [0, 1, 2, 3])):
        assert S2FT.encode(source(Dense(matrix)), S2FTOptions(energy=energy)).places.tolist() == kept


def test_the_better_axis_is_chosen_in_a_budget() -> None:
    matrix = 0.01 * rand(0, 30, 20)
    matrix[4] += rand(1, 20)
    given = source(Dense(matrix), torch.float32)
    options = S2FT.within(given, 200)
    assert options == S2FTOptions(rank=2, axis="rows")
    matrix[:, 4] += rand(2, 30)
    matrix[:, 5] += rand(3, 30)
    assert S2FT.within(source(Dense(matrix), torch.float32), 250) == S2FTOptions(rank=2, axis="columns")
    assert S2FT.within(given, 100) == S2FTOptions(rank=1, axis="rows")  # no column fits
    assert PaCA.within(given, 400) == PaCAOptions(400 // (30 * 4 + 8))


def test_options_are_minded() -> None:
    for wrong, problem in (
        ({"axis": "diagonals"}, "axis is 'diagonals'"),
        ({"rank": 0}, "rank is 0"),
        ({"share": 2.0}, "share is 2"),
        ({"energy": 0.0}, "energy is 0"),
    ):
        with pytest.raises(UsageError, match=problem):
            S2FTOptions(**wrong)
    with pytest.raises(UsageError, match="rank is 0"):
        PaCAOptions(0)
    with pytest.raises(NeedsBaseError, match="needs the base weight"):
        PaCA.encode(replace(source(Dense(rand(0, 3, 3))), base=None), PaCAOptions(1))


def test_other_bases_are_refused() -> None:
    paca = PaCA(rand(0, 5, 2), torch.tensor([3, 1]))
    rows = S2FT(rand(0, 2, 6), torch.tensor([3, 1]), "rows")
    for update, base, problem in (
        (paca, rand(1, 4, 6), "holds no columns"),
        (paca, rand(1, 5, 3), "not different columns"),
        (replace(paca, indices=torch.tensor([1, 1])), rand(1, 5, 6), "not different columns"),
        (rows, rand(1, 5, 7), "hold no rows"),
        (rows, rand(1, 3, 6), "not different rows"),
        (replace(rows, places=torch.tensor([-1, 0])), rand(1, 5, 6), "not different rows"),
    ):
        with pytest.raises(AdapterError, match=problem):
            update.operator(base)


def paca_folder(place: Path, **config: object) -> tuple[Path, Tensor, Tensor]:
    """A file as the authors' fork saves it, with the base and the delta it stands for."""
    base, columns, which = rand(0, 6, 9).float(), rand(1, 6, 3).float(), [7, 0, 2]
    place.mkdir()
    tensors = {"base_model.model.m.q.paca_w": columns, "base_model.model.m.q.paca_indices": torch.tensor(which)}
    save_file(tensors, place / "adapter_model.safetensors")
    (place / "adapter_config.json").write_text(json.dumps({"peft_type": "PACA", "target_modules": ["q"], **config}))
    save_file({"m.q.weight": base}, place.parent / "base.safetensors")
    delta = torch.zeros_like(base)
    for i, at in enumerate(which):
        delta[:, at] = float(config.get("paca_alpha", 8)) / float(config.get("r", 8)) * columns[:, i] - base[:, at]
    return place, base, delta


@pytest.mark.parametrize("config", [{}, {"r": 3, "paca_alpha": 6, "bias": "none"}])
def test_files_of_the_fork_are_read(tmp_path: Path, config: dict[str, object]) -> None:
    folder, _, delta = paca_folder(tmp_path / "paca", **config)
    base = loratools.load_base(tmp_path / "base.safetensors")
    adapter = loratools.load(folder)
    found = dict(loratools.delta(adapter, base=base))
    torch.testing.assert_close(found["m.q.weight"], delta)
    with pytest.raises(NeedsBaseError, match=r"m.q: .*depends on the base"):
        dict(loratools.delta(adapter))
    exact = convert_file(adapter, tmp_path / "lora", "peft", Convert(Lowering(exact=True), base=base))[0]
    lora = loratools.load(exact.path)
    assert lora.entries["m.q"].rank == 3
    torch.testing.assert_close(lora["m.q"].delta(), delta)
    again, report = reparameterize(adapter, "paca", Reparameterize({"rank": "3"}, base=base))
    assert report.total["relative_error"] < 1e-6
    assert sorted(again["m.q"].indices.tolist()) == [0, 2, 7]
    columns, report = reparameterize(adapter, "s2ft", Reparameterize({"energy": "1"}, base=base))
    assert (columns["m.q"].axis, columns["m.q"].places.tolist()) == ("columns", [0, 2, 7])
    assert report.total["relative_error"] < 1e-6


def swiglu(seed: int, hidden: int, inner: int) -> dict[str, Tensor]:
    return {
        "model.layers.0.mlp.gate_proj.weight": rand(seed, inner, hidden).float(),
        "model.layers.0.mlp.up_proj.weight": rand(seed + 1, inner, hidden).float(),
        "model.layers.0.mlp.down_proj.weight": rand(seed + 2, hidden, inner).float(),
    }


def test_permuted_checkpoints_give_back_their_lines(tmp_path: Path) -> None:
    """As S2FT leaves them: trained channels first, in all three matrices, with the frozen gate to tell the order."""
    base = swiglu(0, 24, 64)
    gate, up, down = base
    ups, downs = [5, 40], [5, 33, 60]
    rows, columns = 0.1 * rand(4, 2, 24).float(), 0.1 * rand(5, 24, 3).float()
    tuned = {name: t.clone() for name, t in base.items()}
    tuned[up][ups] += rows
    tuned[down][:, downs] += columns
    chosen = sorted({*ups, *downs})
    order = torch.tensor(chosen + [i for i in range(64) if i not in chosen])
    save_file(base, tmp_path / "base.safetensors")
    save_file(
        {gate: tuned[gate][order], up: tuned[up][order], down: tuned[down][:, order].contiguous()},
        tmp_path / "tuned.safetensors",
    )
    found = loratools.differences(
        loratools.load_base(tmp_path / "base.safetensors"), loratools.load_base(tmp_path / "tuned.safetensors")
    )
    made, report = reparameterize(found.adapter, "s2ft", Reparameterize({"energy": "1"}, dtype="f32"))
    assert report.total["relative_error"] < 1e-6
    one, two = made["model.layers.0.mlp.up_proj"], made["model.layers.0.mlp.down_proj"]
    assert (one.axis, one.places.tolist()) == ("rows", ups)
    assert (two.axis, two.places.tolist()) == ("columns", downs)
    torch.testing.assert_close(one.values, rows, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(two.values, columns, atol=1e-6, rtol=1e-5)
