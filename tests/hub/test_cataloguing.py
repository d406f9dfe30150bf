"""The catalog of a hub says what its files hold, whoever wrote them, and is the same however it was made."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub.conftest import write_kohya, write_peft
from safetensors.torch import load_file, save_file

from loratools.errors import InputError, OutputError
from loratools.files import load
from loratools.hub import cataloguing, discover, measuring
from loratools.hub.catalog import CatalogRow, catalog_rows, write_catalog
from loratools.hub.cataloguing import Catalog, catalog
from loratools.hub.engines import in_order
from loratools.hub.listing import status
from loratools.hub.receipts import place_of
from loratools.hub.recipe import parse_steps
from loratools.hub.run import Run, run
from loratools.hub.sketches import SEED, sketch
from loratools.ops.inspect import inspect

pytest.importorskip("pyarrow")

Make = Callable[[int], Path]


def here() -> Executor:
    return ThreadPoolExecutor(1)


def nowhere() -> Executor:
    raise AssertionError("something was measured")


HERE = Catalog(executor=here)


def rows_of(path: Path) -> dict[str, CatalogRow]:
    return {row.name: row for row in catalog_rows(path)}


def expected(folder: Path) -> list[np.ndarray]:
    """Singular values of the products themselves; CONFIG says alpha 8."""
    tensors = {name: t.double().numpy() for name, t in load_file(folder / "adapter_model.safetensors").items()}
    stated = json.loads((folder / "adapter_config.json").read_text())
    ups = {name: up for name, up in tensors.items() if ".lora_B." in name}
    downs = {name: tensors[name.replace("lora_B", "lora_A")] for name in ups}
    scale = stated["lora_alpha"] / stated["r"]
    deltas = [scale * ups[name] @ downs[name] for name in sorted(ups)]
    return [np.linalg.svd(np.nan_to_num(delta), compute_uv=False)[: stated["r"]] for delta in deltas]


def test_a_hub_without_receipts(make_hub: Make, tmp_path: Path) -> None:
    hub, path = make_hub(3), tmp_path / "c.parquet"
    (hub / "bad.safetensors").write_bytes(b"xx")
    (hub / "out").symlink_to(tmp_path.parent)
    report = catalog(hub, path, HERE)
    rows = rows_of(path)
    assert list(rows) == ["a0", "a1", "a2", "bad.safetensors", "deep/er/k.safetensors", "out"]
    assert [row.status for row in rows.values()] == ["found", "found", "found", "failed", "found", "failed"]
    assert "too few" in rows["bad.safetensors"].reason
    assert "link" in rows["out"].reason
    assert report.counts == {"found": 4, "failed": 2}
    assert dict(report.failures) == {name: rows[name].reason for name in ("bad.safetensors", "out")}
    for name in ("a0", "a1", "a2"):
        row = rows[name]
        assert (row.dialect, row.families, row.base_model, row.rank) == ("peft", ("lora",), "tiny", 4)
        assert (row.target_rows, row.target_columns, row.target_ranks) == ((32, 32), (24, 24), (4, 4))
        assert row.bytes == (hub / row.path).stat().st_size
        assert row.path == f"{name}/adapter_model.safetensors"
        assert (row.recipe, row.version, row.bytes_before, row.relative_error, row.seconds) == (None,) * 5
        with load(hub / name) as adapter:
            assert row.sketch is not None
            assert row.sketch.tobytes() == sketch(adapter).tobytes()
        assert (row.sketch_targets, row.sketch_seed) == (row.targets, SEED)
        for values, norm, truth in zip(row.singular_values, row.target_norms, expected(hub / name), strict=True):
            assert values == pytest.approx(truth, rel=1e-6)
            assert norm == pytest.approx(np.linalg.norm(truth), rel=1e-12)
    assert report.bytes == sum(row.bytes for row in rows.values())


def test_a_run_and_its_receipts(make_hub: Make, tmp_path: Path) -> None:
    hub, out, path = make_hub(2), tmp_path / "out", tmp_path / "c.parquet"
    (hub / "bad.safetensors").write_bytes(b"xx")
    ran = {row.name: row for row in run(parse_steps(["squeeze rank=2"]), hub, out, Run(executor=here)).adapters}
    write_peft(hub / "late", 5)
    report = catalog(out, path, HERE)
    assert report.missing == 1
    rows = rows_of(path)
    assert list(rows) == ["a0", "a1", "bad.safetensors", "deep/er/k.safetensors"]
    for name, row in rows.items():
        assert (row.status, row.reason) == (ran[name].status, ran[name].reason)
        assert (row.relative_error, row.seconds) == (ran[name].relative_error, ran[name].seconds)
        assert row.recipe == parse_steps(["squeeze rank=2"]).digest
    assert rows["a0"].singular_values[0] == pytest.approx(expected(hub / "a0")[0][:2], rel=1e-5)
    assert rows["a0"].rank == 2
    assert rows["a0"].bytes_before == (hub / "a0" / "adapter_model.safetensors").stat().st_size
    assert report.bytes_before == sum(row.bytes_before or 0 for row in rows.values())


def test_the_numbers_are_those_of_inspect(make_hub: Make, tmp_path: Path) -> None:
    duckdb, pandas = pytest.importorskip("duckdb"), pytest.importorskip("pandas")
    hub, path = make_hub(1), tmp_path / "c.parquet"
    catalog(hub, path, HERE)
    frame = pandas.read_parquet(path).set_index("name")
    with duckdb.connect() as database:
        found = database.execute(
            "select name, targets, target_norms, singular_values from read_parquet(?)", [str(path)]
        )
        by_name = {name: rest for name, *rest in found.fetchall()}
    for name in ("a0", "deep/er/k.safetensors"):
        said = json.loads(json.dumps(inspect(load(hub / name)).to_dict()))["targets"]  # what inspect --json prints
        targets, norms, spectra = by_name[name]
        assert targets == list(said) == list(frame.loc[name, "targets"])
        assert norms == [numbers["norm"] for numbers in said.values()] == list(frame.loc[name, "target_norms"])
        for values, own, numbers in zip(spectra, frame.loc[name, "singular_values"], said.values(), strict=True):
            assert values == own.tolist() == np.array(numbers["spectrum"], np.float32).tolist()


def test_processes_make_the_same_bytes(make_hub: Make, tmp_path: Path) -> None:
    hub = make_hub(5)
    catalog(hub, tmp_path / "a.parquet", HERE)
    catalog(hub, tmp_path / "b.parquet", Catalog(workers=2))
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_resuming_measures_what_has_changed(make_hub: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, out, path = make_hub(3), tmp_path / "out", tmp_path / "c.parquet"
    run(parse_steps(["squeeze rank=2"]), hub, out, Run(executor=here))
    catalog(out, path, HERE)
    first = path.read_bytes()
    with pytest.raises(OutputError, match="--force"):
        catalog(out, path, HERE)
    catalog(out, path, Catalog(resume=True, executor=nowhere))
    assert path.read_bytes() == first
    write_peft(hub / "a1b", 7)
    run(parse_steps(["squeeze rank=2"]), hub, out, Run(resume=True, executor=here))
    changed = out / "a2" / "adapter_config.json"
    stated = json.loads(changed.read_text())
    changed.write_text(json.dumps(stated | {"lora_alpha": 2 * stated["lora_alpha"]}))
    measured = []
    real = measuring.measure
    monkeypatch.setattr(
        measuring, "measure", lambda adapter, *a, **k: measured.append(adapter.origin.path) or real(adapter, *a, **k)
    )
    catalog(out, path, Catalog(resume=True, executor=here))
    assert sorted(p.parent.name for p in measured) == ["a1b", "a2"]
    resumed = path.read_bytes()
    catalog(out, path, Catalog(force=True, executor=here))
    assert path.read_bytes() == resumed
    row = rows_of(path)["a2"]
    assert row.relative_error is None
    assert any("changed since the run" in text for text in row.warnings)
    assert row.singular_values[0] == pytest.approx(expected(out / "a2")[0], rel=1e-6)


def test_resuming_without_receipts_goes_by_hashes(
    make_hub: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, path = make_hub(2), tmp_path / "c.parquet"
    catalog(hub, path, HERE)
    first = path.read_bytes()
    os.utime(hub / "a0" / "adapter_model.safetensors")
    monkeypatch.setattr(measuring, "measure", lambda *a, **k: pytest.fail("measured again"))
    catalog(hub, path, Catalog(resume=True, executor=here))
    assert path.read_bytes() == first


def test_another_version_s_rows_are_not_taken_over(
    make_hub: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, path = make_hub(1), tmp_path / "c.parquet"
    rows = [CatalogRow("a0", "found", rank=99, sources=("x",))]
    write_catalog(rows, path)
    monkeypatch.setattr(cataloguing, "__version__", "another")
    catalog(hub, path, Catalog(resume=True, executor=here))
    assert rows_of(path)["a0"].rank == 4
    path.write_text("mine")
    with pytest.raises(InputError, match="no catalog"):
        catalog(hub, path, Catalog(resume=True, executor=here))
    assert path.read_text() == "mine"


def test_what_cannot_be_measured_has_its_reason(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    folder = write_peft(hub / "dora", 0)
    tensors = load_file(folder / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors[f"{stem}.lora_magnitude_vector"] = torch.ones(32)
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_magnitude_vector"] = torch.ones(32)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text()) | {"use_dora": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    folder = write_peft(hub / "nan", 1)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[f"{stem}.lora_A.weight"][0, 0] = math.nan
    save_file(tensors, folder / "adapter_model.safetensors")
    report = catalog(hub, tmp_path / "c.parquet", HERE)
    assert report.counts == {"found": 2}
    rows = rows_of(tmp_path / "c.parquet")
    assert rows["dora"].singular_values == (None, None)
    assert rows["dora"].target_norms == (None, None)
    assert all("depends on the base weight" in reason for reason in rows["dora"].target_reasons)
    assert rows["nan"].singular_values[0] is None
    assert rows["nan"].target_reasons == ("holds NaN or infinity", "")
    assert rows["nan"].singular_values[1] == pytest.approx(expected(hub / "nan")[1], rel=1e-6)


def test_one_target_that_fails_takes_no_other_with_it(
    make_hub: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loratools.errors import AdapterError

    real = measuring.measure

    def measure(adapter: Any, targets: list[str], **more: Any) -> Any:
        if any("layers.1" in target for target in targets):
            raise AdapterError("too large to be dense")
        return real(adapter, targets, **more)

    monkeypatch.setattr(measuring, "measure", measure)
    catalog(make_hub(1), tmp_path / "c.parquet", HERE)
    row = rows_of(tmp_path / "c.parquet")["a0"]
    assert row.target_reasons == ("", "too large to be dense")
    assert row.singular_values[0] is not None


def test_hostile_receipts_lead_nowhere(make_hub: Make, tmp_path: Path) -> None:
    hub, out, path = make_hub(3), tmp_path / "out", tmp_path / "c.parquet"
    run(parse_steps(["squeeze rank=2"]), hub, out, Run(executor=here))

    def edited(stem: str, **more: Any) -> None:
        place = place_of(out, stem)
        place.write_text(json.dumps(json.loads(place.read_text()) | more))

    stamp = {"size": 1, "mtime_ns": 1, "sha256": "x"}
    edited("a0", outputs={"../hub/a0/adapter_model.safetensors": stamp})
    edited("a1", bytes_before="many")
    edited("a2", outputs={})
    place_of(out, "deep/er/k").write_text("{")
    catalog(out, path, HERE)
    rows = rows_of(path)
    assert {name: row.status for name, row in rows.items()} == {"a0": "failed", "a2": "failed"}
    assert "no weights file within the hub" in rows["a0"].reason
    assert [row.name for row in status(out).adapters] == ["a0", "a2"]


def test_what_vanishes_meanwhile_is_no_failure_of_the_catalog(
    make_hub: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, out = make_hub(3), tmp_path / "out"
    run(parse_steps(["squeeze rank=2"]), hub, out, Run(executor=here))
    real = cataloguing.receipt_stems

    def stems(out: Path) -> list[str]:
        found = list(real(out))
        place_of(out, "a1").unlink()  # its adapter is being done again
        (out / "a2" / "adapter_model.safetensors").unlink()
        return found

    monkeypatch.setattr(cataloguing, "receipt_stems", stems)
    report = catalog(out, tmp_path / "c.parquet", HERE)
    rows = rows_of(tmp_path / "c.parquet")
    assert {name: row.status for name, row in rows.items()} == {
        "a0": "done", "a2": "failed", "deep/er/k.safetensors": "done",
    }  # fmt: skip
    assert report.missing == 1

    scandir = os.scandir

    def scanned(folder: Path) -> Any:
        if str(folder).endswith("deep"):
            raise FileNotFoundError(folder)
        return scandir(folder)

    monkeypatch.setattr(discover.os, "scandir", scanned)
    catalog(hub, tmp_path / "d.parquet", HERE)
    assert list(rows_of(tmp_path / "d.parquet")) == ["a0", "a1", "a2"]


def test_a_catalog_and_the_status_while_a_run_goes_on(make_hub: Make, tmp_path: Path) -> None:
    hub, out = make_hub(12), tmp_path / "out"
    recipe, over = parse_steps(["squeeze rank=2"]), threading.Event()
    failures: list[BaseException] = []

    def again_and_again() -> None:
        try:
            run(recipe, hub, out, Run(force=True, executor=here))
            while not over.is_set():
                run(recipe, hub, out, Run(force=True, executor=here))
        except BaseException as error:  # noqa: BLE001 -- told by the test
            failures.append(error)

    runner = threading.Thread(target=again_and_again)
    runner.start()
    try:
        while not (out / ".loratools" / "run.json").exists():
            time.sleep(0.01)
        for number in range(5):
            assert {row.status for row in status(out).adapters} <= {"done", "stale"}  # the one that is being done again
            report = catalog(out, tmp_path / f"{number}.parquet", HERE)
            assert set(report.counts) <= {"done", "failed"}  # failed: replaced while it was read
            catalog(out, tmp_path / f"{number}.parquet", Catalog(resume=True, executor=here))
    finally:
        over.set()
        runner.join()
    assert failures == []


def test_outcomes_in_order_wait_for_a_slow_one_only_so_far() -> None:
    free = threading.Event()
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        if number == 0:
            assert free.wait(60)
        return -number

    def handed_out() -> Any:
        for number in range(40):
            if number == 20:  # a slow first one holds back those this far behind it
                assert free.is_set()
            yield number

    threading.Timer(0.5, free.set).start()
    pool = lambda: ThreadPoolExecutor(3)  # noqa: E731
    found = list(in_order(pool, work, handed_out(), workers=3, given_up=lambda job, why: 99, ahead=10))
    assert found == [-number for number in range(40)]
    assert set(begun) == set(range(40))


def test_outcomes_that_are_known_need_no_worker() -> None:
    found = in_order(
        nowhere, abs, range(5000), workers=2, given_up=lambda job, why: 0, ready=lambda job: job + 1, ahead=4
    )
    assert list(found) == list(range(1, 5001))

    def broken(job: int) -> int:
        raise RuntimeError(f"no {job}")

    some = in_order(
        here, broken, range(4), workers=1, given_up=lambda job, why: why, ready=lambda job: job if job else None
    )
    assert list(some) == ["no 0", 1, 2, 3]


def test_rows_are_in_the_order_of_names_without_suffix(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    write_kohya(hub / "b.safetensors", 1)
    write_kohya(hub / "b-c.safetensors", 2)
    write_peft(hub / "b" / "x", 3)
    catalog(hub, tmp_path / "c.parquet", HERE)
    assert list(rows_of(tmp_path / "c.parquet")) == ["b.safetensors", "b-c.safetensors", "b/x"]
    first = (tmp_path / "c.parquet").read_bytes()
    catalog(hub, tmp_path / "c.parquet", Catalog(resume=True, executor=here))
    assert (tmp_path / "c.parquet").read_bytes() == first
