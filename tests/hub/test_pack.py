"""A pack: its error is what it says, its bytes are within the budget, and no single method does better."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub.conftest import write_kohya
from hub.pack_hubs import Kind, dense, factors, folder_size, squared_error, write_hub
from safetensors.torch import load_file, save_file

from loratools.errors import InputError, OutputError, UsageError
from loratools.files import load
from loratools.hub.pack import Packing, add, open_pack, pack, unpack
from loratools.hub.pack.plan import CHOICES
from loratools.operators import LowRank

SINGLE = [m for m in CHOICES if m != "auto"]


@pytest.mark.parametrize(
    ("kind", "budget"),
    [("shared", "35%"), ("unrelated", "70%"), ("mixed", "35%"), ("mixed", "70%"), ("clusters", "50%")],
)
def test_auto_does_at_least_as_well_as_each_method_and_tells_its_error(tmp_path: Path, kind: Kind, budget: str) -> None:
    hub = write_hub(tmp_path / "hub", kind)
    found = {}
    for method in CHOICES:
        out = tmp_path / method
        report = pack(hub, out, Packing(budget, method))
        assert report.bytes_after == folder_size(out) <= report.budget
        assert report.budget == math.floor(float(budget[:-1]) / 100 * report.bytes_before)
        true = 0.0
        with open_pack(out) as packed:
            for row in report.adapters:
                after = {t: u.operator().to(torch.float64).dense() for t, u in packed[row.name].items()}
                error = squared_error(dense(hub / row.name), after)
                assert row.relative_error == pytest.approx(math.sqrt(error), rel=1e-4, abs=1e-6)
                true += error
        assert report.to_dict()["relative_error"]["sum_of_squares"] == pytest.approx(true, rel=1e-4, abs=1e-9)
        assert report.expected[method] == pytest.approx(true, rel=1e-3, abs=1e-6)  # float32: hardly any rounding
        found[method] = true
    for method in SINGLE:
        assert found["auto"] <= found[method] * (1 + 1e-4) + 1e-9, method


def test_shared_structure_is_found_and_none_is_made_up(tmp_path: Path) -> None:
    shared = pack(write_hub(tmp_path / "s", "shared", 12), tmp_path / "sp", Packing("60%"))
    assert max(shared.errors) < 1e-5
    assert "own" not in shared.methods
    unrelated = pack(write_hub(tmp_path / "u", "unrelated", 12), tmp_path / "up", Packing("60%"))
    assert dict(unrelated.methods) == {"own": 2}
    mixed = pack(write_hub(tmp_path / "m", "mixed", 12), tmp_path / "mp", Packing("60%"))
    assert {t.sharing for t in mixed.targets} == {8}  # those that share, and no others


def test_own_components_are_the_best_of_their_number(tmp_path: Path) -> None:
    """One adapter of one rank: the error is that of the truncated singular value decomposition."""
    hub = write_hub(tmp_path / "hub", "unrelated", 1, layers=1)
    report = pack(hub, tmp_path / "pack", Packing("90%", "own"))
    (target,) = report.targets
    (delta,) = dense(hub / "a00").values()
    s = torch.linalg.svdvals(delta)
    assert 0 < target.components < 4
    assert report.errors[0] == pytest.approx(float(s[target.components :].norm() / s.norm()), rel=1e-5)


def test_global_budget_goes_where_it_lowers_the_error_most(tmp_path: Path) -> None:
    """Against every division of the same number of components among all adapters and targets."""
    hub = write_hub(tmp_path / "hub", "unrelated", 3)
    report = pack(hub, tmp_path / "pack", Packing("60%", "own"))
    count = sum(t.components for t in report.targets)
    gains = []
    for row in report.adapters:
        spectra = [torch.linalg.svdvals(d).square() for d in dense(hub / row.name).values()]
        total = sum(float(s.sum()) for s in spectra)
        gains += [float(v) / total for s in spectra for v in s]
    best = 3 - sum(sorted(gains, reverse=True)[:count])
    assert sum(e * e for e in report.errors) == pytest.approx(best, rel=1e-5)


def test_results_do_not_depend_on_the_factors(tmp_path: Path) -> None:
    reports = [
        pack(write_hub(tmp_path / str(gauge), "mixed", gauge=gauge), tmp_path / f"p{gauge}", Packing("50%"))
        for gauge in (False, True)
    ]
    assert reports[0].methods == reports[1].methods
    for a, b in zip(reports[0].adapters, reports[1].adapters, strict=True):
        assert a.relative_error == pytest.approx(b.relative_error, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_codes(tmp_path: Path, bits: int) -> None:
    hub = write_hub(tmp_path / "hub", "shared", 12, dtype=torch.bfloat16)
    plain = pack(hub, tmp_path / "plain", Packing("30%"))
    report = pack(hub, tmp_path / "pack", Packing("30%", bits=bits))
    assert report.bytes_after == folder_size(tmp_path / "pack") <= report.budget
    assert sum(e * e for e in report.errors) < sum(e * e for e in plain.errors)
    with open_pack(tmp_path / "pack") as packed:
        for row in report.adapters:
            after = {t: u.operator().to(torch.float64).dense() for t, u in packed[row.name].items()}
            error = math.sqrt(squared_error(dense(hub / row.name), after))
            assert row.relative_error == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("name", ["a00", "a04"])  # PEFT and MLX
def test_unpacked_adapters_are_ordinary(tmp_path: Path, name: str) -> None:
    hub = write_hub(tmp_path / "hub", "shared")
    extra = hub / "a00" / "adapter_model.safetensors"
    save_file({**load_file(extra), "base_model.model.head.weight": torch.ones(3, 2)}, extra, metadata={"a": "b"})
    report = pack(hub, tmp_path / "pack", Packing("80%"))
    unpack(tmp_path / "pack", name, tmp_path / "out")
    error = math.sqrt(squared_error(dense(hub / name), dense(tmp_path / "out")))
    row = next(r for r in report.adapters if r.name == name)
    assert error == pytest.approx(row.relative_error, rel=1e-4, abs=1e-6)
    with load(hub / name) as before, load(tmp_path / "out") as after:
        assert before.format.name == after.format.name
        assert {e.specs["up"].dtype for e in after.entries.values()} == {"F32"}
        assert set(before.config or {}) <= set(after.config or {})
    if name == "a00":
        assert torch.equal(load_file(tmp_path / "out" / "adapter_model.safetensors")["base_model.model.head.weight"],
                           torch.ones(3, 2))  # fmt: skip
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["note"] == 0
        assert after.metadata["a"] == "b"
    with pytest.raises(OutputError, match="exists already"):
        unpack(tmp_path / "pack", name, tmp_path / "out")


def test_updates_are_low_rank_and_read_when_asked_for(tmp_path: Path) -> None:
    hub = write_hub(tmp_path / "hub", "shared")
    pack(hub, tmp_path / "pack", Packing("60%"))
    with open_pack(tmp_path / "pack") as packed:
        assert list(packed) == [f"a{i:02}" for i in range(9)]
        adapter = packed["a01"]
        (tmp_path / "pack" / "bases").rename(tmp_path / "bases")  # not needed until a target is
        ranks = [e.rank for e in adapter.entries.values()]
        (tmp_path / "bases").rename(tmp_path / "pack" / "bases")
        operators = [u.operator() for u in adapter.values()]
        assert [o.rank for o in operators if isinstance(o, LowRank)] == ranks
        with pytest.raises(KeyError):
            packed["none"]


def test_bytes_are_the_same_each_time(tmp_path: Path) -> None:
    hub = write_hub(tmp_path / "hub", "clusters")
    for name in ("one", "two"):
        pack(hub, tmp_path / name, Packing("50%"))
    files = [p.relative_to(tmp_path / "one") for p in sorted((tmp_path / "one").rglob("*")) if p.is_file()]
    assert len(files) > 10
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_what_has_no_factors_is_stored_as_it_is(tmp_path: Path) -> None:
    hub = write_hub(tmp_path / "hub", "shared", 3)
    file = hub / "a01" / "adapter_model.safetensors"
    magnitude = {"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.rand(48) + 1}
    save_file(load_file(file) | magnitude, file)
    config = json.loads((hub / "a01" / "adapter_config.json").read_text()) | {"use_dora": True}
    (hub / "a01" / "adapter_config.json").write_text(json.dumps(config))
    report = pack(hub, tmp_path / "pack", Packing("90%"))
    row = report.adapters[1]
    assert (row.factored, row.as_they_are) == (1, 1)
    assert "dora" in row.first_as_it_is
    assert any("stored as they are" in text for text in report.warnings)
    unpack(tmp_path / "pack", "a01", tmp_path / "out")
    before, after = load_file(file), load_file(tmp_path / "out" / "adapter_model.safetensors")
    for key in (k for k in before if "layers.0" in k):
        assert torch.equal(before[key], after[key])


def test_flat_files_of_kohya(tmp_path: Path) -> None:
    for i in range(4):
        write_kohya(tmp_path / "hub" / "deep" / f"k{i}.safetensors", i)
    report = pack(tmp_path / "hub", tmp_path / "pack", Packing("120%"))
    assert max(report.errors) < 1e-6
    unpack(tmp_path / "pack", "deep/k2", tmp_path / "k2.safetensors")
    assert squared_error(dense(tmp_path / "hub/deep/k2.safetensors"), dense(tmp_path / "k2.safetensors")) < 1e-10


def test_a_bad_adapter_is_a_row(tmp_path: Path) -> None:
    hub = write_hub(tmp_path / "hub", "shared", 5)
    (hub / "broken.safetensors").write_bytes(b"no adapter")
    file = hub / "a02" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = math.nan
    save_file(tensors, file)
    report = pack(hub, tmp_path / "pack", Packing("90%"))
    reasons = {row.name: row.reason for row in report.failed}
    assert set(reasons) == {"a02", "broken"}
    assert "NaN" in reasons["a02"]
    with open_pack(tmp_path / "pack") as packed:
        assert list(packed) == ["a00", "a01", "a03", "a04"]


def test_adapters_of_zeros(tmp_path: Path) -> None:
    hub = write_hub(tmp_path / "hub", "shared", 3)
    file = hub / "a01" / "adapter_model.safetensors"
    save_file({k: torch.zeros_like(t) if "lora_B" in k else t for k, t in load_file(file).items()}, file)
    report = pack(hub, tmp_path / "pack", Packing("90%"))
    assert report.adapters[1].relative_error == 0
    unpack(tmp_path / "pack", "a01", tmp_path / "out")
    assert all(float(d.abs().max()) == 0 for d in dense(tmp_path / "out").values())


@pytest.mark.parametrize(("budget", "message"), [("0.1%", "too small"), ("x%", "no share"), ("12", "too small")])
def test_impossible_budgets(tmp_path: Path, budget: str, message: str) -> None:
    hub = write_hub(tmp_path / "hub", "shared", 2)
    with pytest.raises(UsageError, match=message):
        pack(hub, tmp_path / "pack", Packing(budget))
    assert [p.name for p in tmp_path.iterdir()] == ["hub"]


def test_nothing_is_replaced_unasked_and_nothing_but_packs_at_all(tmp_path: Path) -> None:
    hub = write_hub(tmp_path / "hub", "shared", 3)
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "thesis.txt").write_text("years of work")
    for force, message in ((False, "exists already"), (True, "other files")):
        with pytest.raises(OutputError, match=message):
            pack(hub, tmp_path / "pack", Packing("90%"), force=force)
    pack(hub, tmp_path / "other", Packing("90%"))
    pack(write_hub(tmp_path / "hub2", "shared", 2), tmp_path / "other", Packing("90%"), force=True)
    assert len(open_pack(tmp_path / "other")) == 2
    assert len(list((tmp_path / "other" / "adapters").iterdir())) == 2


@pytest.mark.parametrize("after", [1, 4])
def test_an_interruption_leaves_nothing(tmp_path: Path, after: int) -> None:
    hub = write_hub(tmp_path / "hub", "shared", 4)
    calls = 0

    def steps(total: int, what: str) -> Callable[[], None]:
        def step() -> None:
            nonlocal calls
            calls += 1
            if calls > after:
                raise KeyboardInterrupt

        return step

    with pytest.raises(KeyboardInterrupt):
        pack(hub, tmp_path / "pack", Packing("90%"), steps=steps)
    assert [p.name for p in tmp_path.iterdir()] == ["hub"]


def test_an_adapter_joins(tmp_path: Path) -> None:
    hub = write_hub(tmp_path / "hub", "shared", 12)
    pack(hub, tmp_path / "pack", Packing("60%"))
    for kind in ("shared", "unrelated"):
        new = write_hub(tmp_path / kind, kind, 15) / "a13"  # which the pack has not seen
        before = folder_size(tmp_path / "pack")
        report = add(tmp_path / "pack", new, name=kind)
        assert report.bytes_before == before
        assert report.bytes_after == folder_size(tmp_path / "pack")
        with open_pack(tmp_path / "pack") as packed:
            after = {t: u.operator().to(torch.float64).dense() for t, u in packed[kind].items()}
        error = math.sqrt(squared_error(dense(new), after))
        assert report.adapter.relative_error == pytest.approx(error, rel=1e-4, abs=1e-6)
        if kind == "shared":
            assert error < 1e-5
            assert report.adapter.sharing == 2
        else:
            best = [torch.linalg.svdvals(d).square() for d in dense(new).values()]
            assert error <= math.sqrt(1 - sum(float(s[0]) for s in best) / sum(float(s.sum()) for s in best)) + 1e-5
    with pytest.raises(OutputError, match="holds 'shared' already"):
        add(tmp_path / "pack", new, name="shared")
    add(tmp_path / "pack", new, name="shared", force=True)
    assert len(open_pack(tmp_path / "pack")) == 14
    assert len(list((tmp_path / "pack" / "adapters").iterdir())) == 14


def test_an_adapter_joins_with_targets_that_the_pack_has_not(tmp_path: Path) -> None:
    pack(write_hub(tmp_path / "hub", "unrelated", 6, layers=1), tmp_path / "pack", Packing("60%"))
    new = write_hub(tmp_path / "new", "unrelated", 4, layers=3) / "a03"
    report = add(tmp_path / "pack", new, name="tall")
    assert (report.adapter.factored, report.adapter.sharing) == (3, 0)
    with open_pack(tmp_path / "pack") as packed:
        assert (len(packed["tall"]), len(packed["a03"])) == (3, 1)


def test_an_interrupted_joining_leaves_the_pack_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = write_hub(tmp_path / "hub", "shared", 4)
    pack(hub, tmp_path / "pack", Packing("90%"))
    before = {p: p.read_bytes() for p in (tmp_path / "pack").rglob("*") if p.is_file()}

    def stopped(place: Path, data: bytes) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr("loratools.hub.pack.join.write_whole", stopped)
    with pytest.raises(KeyboardInterrupt):
        add(tmp_path / "pack", hub / "a01", name="new")
    assert {p: p.read_bytes() for p in (tmp_path / "pack").rglob("*") if p.is_file()} == before


def test_no_pack(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no pack"):
        open_pack(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no adapter in it"):
        pack(tmp_path / "empty", tmp_path / "pack")


def test_shapes_that_differ_are_targets_of_their_own(tmp_path: Path) -> None:
    hub = write_hub(tmp_path / "hub", "shared", 3)
    write_hub(hub / "wide", "shared", 3, m=56)
    report = pack(hub, tmp_path / "pack", Packing("90%"))
    assert sorted(t.shape for t in report.targets) == [(48, 40), (48, 40), (56, 40), (56, 40)]
    assert factors("shared", 0, 0, 4, 48, 40)[0].shape == (48, 4)
