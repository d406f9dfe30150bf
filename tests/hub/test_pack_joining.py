"""A joining adapter within a budget, names that lead out of folders, and packs among the folders of a hub."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import pytest
import torch
from hub.conftest import write_peft
from hub.pack_hubs import Kind, dense, squared_error, write_hub

from loratools.errors import InputError, UsageError
from loratools.hub.discover import Found, Refused, discover
from loratools.hub.listing import listed
from loratools.hub.pack import Packing, add, open_pack, pack
from loratools.hub.pack.layout import Part
from loratools.hub.pack.spend import Point, _hull, spend


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    pack(write_hub(folder / "hub", "shared", 8), folder / "pack", Packing("40%", "joint"))
    return folder / "pack"


def error_in(place: Path, name: str, adapter: Path) -> float:
    with open_pack(place) as found:
        after = {t: u.operator().to(torch.float64).dense() for t, u in found[name].items()}
    return math.sqrt(squared_error(dense(adapter), after))


@pytest.mark.parametrize("kind", ["shared", "unrelated"])
def test_a_budget_bounds_the_file_and_more_of_it_errs_less(packed: Path, tmp_path: Path, kind: Kind) -> None:
    new = write_hub(tmp_path / kind, kind, 15) / "a13"
    errors = []
    for budget in ("9%", "20%", "50%", "110%"):
        report = add(packed, new, name=f"{kind}-{budget}", budget=budget)
        assert report.budget is not None
        assert report.adapter.bytes_after <= report.budget
        errors.append(error_in(packed, f"{kind}-{budget}", new))
        assert report.adapter.relative_error == pytest.approx(errors[-1], rel=1e-4, abs=1e-6)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5
    if kind == "shared":
        assert errors[1] < 1e-5  # coefficients alone say it all
    else:
        assert 0.1 < errors[2] < errors[0]
        assert report.components == 16


def test_components_go_where_they_are_worth_most(packed: Path, tmp_path: Path) -> None:
    """Against the best of all ranks, by the singular values of both targets."""
    new = write_hub(tmp_path / "new", "unrelated", 15) / "a13"
    report = add(packed, new, name="some", budget="60%")
    spectra = [torch.linalg.svdvals(d).square().tolist() for d in dense(new).values()]
    bytes_of_one = 4 * (48 + 40)
    with open_pack(packed) as found:
        parts = [part for _, part, _ in found.parts("some")]
    bought = sum(part.rank for part in parts)
    assert report.budget is not None
    assert report.budget - report.adapter.bytes_after < bytes_of_one
    if all(part.group < 0 for part in parts):
        best = min(
            sum(sum(s[r:]) for s, r in zip(spectra, ranks, strict=True))
            for ranks in product(range(9), repeat=2)
            if sum(ranks) <= bought
        )
        assert report.adapter.relative_error == pytest.approx(math.sqrt(best / sum(map(sum, spectra))), rel=1e-4)


def test_spending_finds_what_trying_all_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        ways = {}
        for i in range(3):
            left, points = 1.0, []
            for rank in range(5):
                points.append(Point(10 * rank, left, Part(-1, rank)))
                left *= float(torch.rand(1, generator=generator))
            ways[(f"t{i}", (1, 1))] = _hull(points)
        cost = {(key, point.part): point for key, points in ways.items() for point in points}
        chosen = spend(ways, 60, lambda parts: sum(cost[k, p].bytes for k, p in parts.items()))  # noqa: B023
        combinations = [c for c in product(*ways.values()) if sum(p.bytes for p in c) <= 60]
        best = min(sum(p.error for p in c) for c in combinations)
        assert sum(cost[k, p].error for k, p in chosen.items()) == pytest.approx(best)


@pytest.mark.parametrize(("budget", "says"), [("3B", "too small"), ("0%", "no share"), ("x", "not a size")])
def test_a_budget_that_holds_nothing_is_refused(packed: Path, tmp_path: Path, budget: str, says: str) -> None:
    before = sorted(packed.rglob("*"))
    with pytest.raises(UsageError, match=says):
        add(packed, write_hub(tmp_path / "new", "shared", 1) / "a00", name="small", budget=budget)
    assert sorted(packed.rglob("*")) == before


@pytest.mark.parametrize("name", ["", "../out", "/root", "a//b", "a/./b", "line\nbreak", "bad\udcff"])
def test_no_name_leads_out_of_a_folder(packed: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="--name"):
        add(packed, write_hub(tmp_path / "new", "shared", 1) / "a00", name=name)


def test_a_pack_in_a_hub_is_one_place(tmp_path: Path) -> None:
    hub = write_hub(tmp_path / "hub", "shared", 3)
    pack(hub, hub / "packed", Packing("60%", "joint"))
    found = list(discover(hub))
    assert [(type(f), f.name) for f in found] == [(Found, f"a0{i}") for i in range(3)] + [(Refused, "packed")]
    with pytest.raises(InputError, match="is a pack"):
        list(discover(hub / "packed"))
    rows = listed(hub / "packed").adapters
    assert [(row.name, row.dialect, row.targets, row.reason) for row in rows] == [
        (f"a0{i}", "peft", 2, "") for i in range(3)
    ]
    next((hub / "packed" / "adapters").glob("*")).write_bytes(b"")
    assert sum(bool(row.reason) for row in listed(hub / "packed").adapters) == 1


def test_a_name_that_no_index_can_hold_is_a_row(tmp_path: Path) -> None:
    write_peft(tmp_path / "hub" / "bad\udcff", 1)
    write_peft(tmp_path / "hub" / "good", 2)
    report = pack(tmp_path / "hub", tmp_path / "pack", Packing("90%", "own"))
    assert [(row.name, row.status) for row in report.adapters] == [("bad\udcff", "failed"), ("good", "done")]
    assert "rename" in report.failed[0].reason


def test_an_unknown_name_is_told_those_like_it(packed: Path) -> None:
    with open_pack(packed) as found, pytest.raises(UsageError, match=r"'a0[0-7]'.*, \.\.\."):
        found.listing("a0")
