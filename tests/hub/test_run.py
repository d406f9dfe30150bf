"""Whole hubs: nothing is lost, nothing is half-written, and the same comes out however often it is interrupted."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from hub.conftest import contents, write_kohya, write_peft
from safetensors.torch import load_file, save_file

from loratools.errors import InputError, UsageError
from loratools.files import load
from loratools.hub.engines import local_executor, outcomes
from loratools.hub.listing import listed, status
from loratools.hub.receipts import place_of, read_receipt, stamp_of
from loratools.hub.recipe import parse_steps
from loratools.hub.run import Run, run
from loratools.pipeline import usable_cores

Make = Callable[[int], Path]
R = TypeVar("R")
RECIPE = parse_steps(["squeeze rank=2"])


def here() -> Executor:
    """The work in a thread of this process, where no process of its own is what a test is about."""
    return ThreadPoolExecutor(1)


HERE = Run(executor=here)


def test_every_adapter_has_its_output_and_its_receipt(make_hub: Make, tmp_path: Path) -> None:
    hub, out = make_hub(3), tmp_path / "out"
    report = run(RECIPE, hub, out, Run(workers=2))
    assert [(row.name, row.status) for row in report.adapters] == [
        ("a0", "done"), ("a1", "done"), ("a2", "done"), ("deep/er/k.safetensors", "done"),
    ]  # fmt: skip
    for row in report.adapters:
        stem = row.name.removesuffix(".safetensors")
        receipt = read_receipt(place_of(out, stem))
        assert receipt is not None
        assert (receipt.status, receipt.recipe) == ("done", RECIPE.digest)
        assert sum((out / name).stat().st_size for name in receipt.outputs) == receipt.bytes_after == row.bytes_after
        made = load(out / (stem if row.name[0] == "a" else row.name))
        assert {entry.rank for entry in made.entries.values()} == {2}
    assert report.counts == {"done": 4}
    assert [row.name for row in status(out).adapters] == [row.name for row in report.adapters]
    assert json.dumps(report.to_dict())


@pytest.mark.parametrize(
    "steps",
    [
        ["squeeze rank=2"],
        ["squeeze rank=3", "squeeze rank=1"],
        ["squeeze rank=2", "quantize bits=3"],
        ["squeeze rank=3", "convert to=peft dtype=bf16"],
        ["convert to=peft dtype=bf16"],
    ],
    ids=["one step", "two steps", "packed", "rounded", "rounded alone"],
)
def test_the_error_is_that_of_what_was_written(make_hub: Make, tmp_path: Path, steps: list[str]) -> None:
    import numpy as np

    hub, out = make_hub(1), tmp_path / "out"
    if "to=peft" in steps[-1]:
        (hub / "deep" / "er" / "k.safetensors").unlink()  # whose target has another name in PEFT
    report = run(parse_steps(steps), hub, out, HERE)
    for row in report.adapters:
        receipt = read_receipt(place_of(out, row.name.removesuffix(".safetensors")))
        assert receipt is not None
        before, after = load(hub / row.name), load(out / min(receipt.outputs, key=lambda name: "config" in name))
        pairs = [[a[t].delta().double().numpy() for a in (before, after)] for t in before]
        lost = sum(np.linalg.norm(x - y) ** 2 for x, y in pairs) / sum(np.linalg.norm(x) ** 2 for x, _ in pairs)
        assert row.relative_error == pytest.approx(np.sqrt(lost), rel=1e-5)


def test_an_output_says_which_file_it_is_of(make_hub: Make, tmp_path: Path) -> None:
    hub, out = make_hub(1), tmp_path / "out"
    folder = write_peft(hub / "shards", 3, layers=1)
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    home = {key: f"adapter_model-0000{i}-of-00002.safetensors" for i, key in enumerate(sorted(tensors), 1)}
    for key, name in home.items():
        save_file({key: tensors[key]}, folder / name)
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": home}))
    files = {
        "a0/adapter_model.safetensors": [hub / "a0" / "adapter_model.safetensors"],
        "deep/er/k.safetensors": [hub / "deep" / "er" / "k.safetensors"],
        "shards/adapter_model.safetensors": [folder / name for name in sorted(home.values())],
    }
    assert run(RECIPE, hub, out, HERE).counts == {"done": 3}
    for name, sources in files.items():
        record = load(out / name).metadata["loratools"]
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
        assert json.loads(record)["source_sha256"] == digest


def test_a_receipt_that_is_lost_or_torn_only_has_the_work_done_again(make_hub: Make, tmp_path: Path) -> None:
    """As a machine that fails may leave them: receipts are not fsynced."""
    hub, out = make_hub(3), tmp_path / "out"
    run(RECIPE, hub, out, HERE)
    before = contents(out)
    place_of(out, "a0").write_bytes(b"")
    place_of(out, "a1").write_bytes(place_of(out, "a1").read_bytes()[:99])
    place_of(out, "a2").unlink()
    assert run(RECIPE, hub, out, Run(resume=True, executor=here)).counts == {"done": 3, "kept": 1}
    assert contents(out) == before


def test_another_recipe_leaves_nothing_of_the_first(make_hub: Make, tmp_path: Path) -> None:
    """A folder may become a file; what is not as the first one wrote it is somebody's own, and stays."""
    hub, out, fresh = make_hub(3), tmp_path / "out", tmp_path / "fresh"
    packing = parse_steps(["quantize bits=4"])
    run(RECIPE, hub, out, HERE)
    (out / "a1" / "notes.md").write_text("mine")
    (out / "a2" / "adapter_config.json").write_text("{}")
    assert run(packing, hub, out, Run(resume=True, executor=here)).counts == {"done": 4}
    run(packing, hub, fresh, HERE)
    mine = {"a1/notes.md": b"mine", "a2/adapter_config.json": b"{}"}
    assert contents(out) == contents(fresh) | mine
    assert not (out / "a0").exists()
    run(RECIPE, hub, out, Run(resume=True, executor=here))
    assert not list(out.glob("*.safetensors"))


def test_a_receipt_names_no_file_of_others_for_removal(make_hub: Make, tmp_path: Path) -> None:
    hub, out = make_hub(2), tmp_path / "out"
    run(RECIPE, hub, out, HERE)
    place = place_of(out, "a0")
    fields = json.loads(place.read_text())
    outside = write_kohya(tmp_path / "outside.safetensors", 3)
    for path, name in (
        (outside, "../outside.safetensors"),
        (out / "a1" / "adapter_config.json", "a1/adapter_config.json"),
    ):
        fields["outputs"][name] = asdict(stamp_of(path))
    place.write_text(json.dumps(fields))
    run(RECIPE, hub, out, Run(force=True, executor=here))
    assert outside.exists()
    assert (out / "a1" / "adapter_config.json").exists()


def test_resuming_redoes_what_is_missing_changed_or_stale(make_hub: Make, tmp_path: Path) -> None:
    hub, out = make_hub(4), tmp_path / "out"
    run(RECIPE, hub, out, HERE)
    with pytest.raises(UsageError, match="--resume"):
        run(RECIPE, hub, out, HERE)
    (out / "a0" / "adapter_model.safetensors").unlink()  # missing
    write_kohya(tmp_path / "other.safetensors", 5)
    (tmp_path / "other.safetensors").replace(hub / "deep" / "er" / "k.safetensors")  # changed
    damaged = out / "a1" / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")  # not what the receipt says
    os.utime(hub / "a2" / "adapter_config.json")  # touched, but the same
    again = run(RECIPE, hub, out, Run(resume=True, executor=here))
    assert {row.name: row.status for row in again.adapters} == {
        "a0": "done", "a1": "done", "a2": "kept", "a3": "kept", "deep/er/k.safetensors": "done",
    }  # fmt: skip
    fresh = tmp_path / "fresh"
    run(RECIPE, hub, fresh, HERE)
    assert contents(out) == contents(fresh)
    assert run(parse_steps(["squeeze rank=1"]), hub, out, Run(resume=True, executor=here)).counts == {"done": 5}
    assert run(RECIPE, hub, out, Run(force=True, executor=here)).counts == {"done": 5}


def test_shards_share_the_work_and_make_the_same(make_hub: Make, tmp_path: Path) -> None:
    hub, out, whole = make_hub(6), tmp_path / "out", tmp_path / "whole"
    parts = [run(RECIPE, hub, out, Run(shard=(i, 3), resume=True, executor=here)) for i in (1, 2, 3)]
    names = [row.name for part in parts for row in part.adapters]
    assert sorted(names) == [row.name for row in run(RECIPE, hub, whole, HERE).adapters]
    assert contents(out) == contents(whole)
    assert not status(out).missing


def test_poison_is_contained(make_hub: Make, tmp_path: Path) -> None:
    hub, out = make_hub(1), tmp_path / "out"
    (hub / "empty.safetensors").write_bytes(b"")
    header = json.dumps(
        {"x": {"dtype": "F32", "shape": [50_000, 50_000], "data_offsets": [0, 10_000_000_000]}}
    ).encode()
    (hub / "claims.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (hub / "pickle.pt").write_bytes(b"cos\nsystem\n(S'echo hacked > /tmp/hacked'\ntR.")
    write_peft(hub / "twin", 7)
    write_kohya(hub / "twin.safetensors", 8)
    write_peft(hub / "broken", 9)
    (hub / "broken" / "adapter_config.json").write_text("{")
    os.symlink(hub, hub / "loop")
    report = run(RECIPE, hub, out, HERE)
    failed = {row.name: row.reason for row in report.adapters if row.status == "failed"}
    assert set(failed) == {"broken", "claims.safetensors", "empty.safetensors", "loop", "pickle.pt", "twin.safetensors"}
    assert "rename one" in failed["twin.safetensors"]
    assert all("\n" not in reason and reason for reason in failed.values())
    assert report.counts["done"] == 3
    assert set(contents(out)) == {
        f"{name}/{file}" for name in ("a0", "twin") for file in ("adapter_config.json", "adapter_model.safetensors")
    } | {"deep/er/k.safetensors"}


def test_a_vanished_source_and_a_recipe_that_cannot_be_are_rows(make_hub: Make, tmp_path: Path) -> None:
    hub = make_hub(2)
    report = run(parse_steps(["convert to=diffusers"]), hub, tmp_path / "out", HERE)
    assert report.counts == {"done": 1, "failed": 2}
    run(RECIPE, hub, tmp_path / "out2", HERE)
    (hub / "a0" / "adapter_model.safetensors").unlink()
    (hub / "a0" / "adapter_config.json").unlink()
    assert run(RECIPE, hub, tmp_path / "out2", Run(resume=True)).counts == {"kept": 2}
    assert (tmp_path / "out2" / "a0" / "adapter_model.safetensors").is_file()


def test_wrong_places_are_refused(make_hub: Make, tmp_path: Path) -> None:
    hub = make_hub(1)
    with pytest.raises(UsageError, match="the hub itself"):
        run(RECIPE, hub, hub, HERE)
    with pytest.raises(InputError):
        run(RECIPE, tmp_path / "nowhere", tmp_path / "out", HERE)
    with pytest.raises(UsageError):
        Run(shard=(4, 3))
    with pytest.raises(UsageError):
        Run(workers=0)
    with pytest.raises(InputError, match="no run"):
        status(tmp_path)
    assert run(RECIPE, hub, hub / "out", HERE).counts == {"done": 2}
    assert [row.name for row in status(hub / "out").adapters] == ["a0", "deep/er/k.safetensors"]


def test_listing_tells_headers_and_reasons(make_hub: Make) -> None:
    hub = make_hub(1)
    (hub / "bad.safetensors").write_bytes(b"x")
    rows = {row.name: row for row in listed(hub).adapters}
    assert (rows["a0"].dialect, rows["a0"].rank, rows["a0"].targets, rows["a0"].base_model) == ("peft", 4, 2, "tiny")
    assert rows["deep/er/k.safetensors"].dialect == "kohya"
    assert rows["bad.safetensors"].reason


def _dies_at(name: str) -> str:
    if name == "poison":
        os.kill(os.getpid(), signal.SIGKILL)
    return f"{name} done"


def _hopeless(name: str, reason: str) -> str:
    return f"{name} given up: {reason}"


def test_a_worker_that_dies_takes_nothing_with_it() -> None:
    from loratools.hub.engines import local_executor

    jobs = ["a", "poison", "b"]
    made = sorted(outcomes(lambda: local_executor(2), _dies_at, jobs, workers=2, given_up=_hopeless))
    assert [text.split()[0] for text in made] == sorted(jobs)
    assert [text for text in made if "given up" in text] == [text for text in made if text.startswith("poison")]


class _BreaksUnseen(Executor):
    """A pool that takes so many jobs, and has lost its worker when the next one comes."""

    def __init__(self, takes: int) -> None:
        self._takes = takes

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> Future[R]:
        if not self._takes:
            raise BrokenProcessPool("a worker died")
        self._takes -= 1
        done: Future[R] = Future()
        done.set_result(fn(*args))
        return done


def test_a_pool_that_breaks_between_two_looks_loses_no_job() -> None:
    takes = iter((2, 1, 0, 1, 3))
    made = outcomes(lambda: _BreaksUnseen(next(takes, 9)), str.upper, "abcdefghij", workers=1, given_up=_hopeless)
    assert sorted(made) == list("ABCDEFGHIJ")
    (hopeless,) = outcomes(lambda: _BreaksUnseen(0), str.upper, "a", workers=1, given_up=_hopeless)
    assert hopeless.startswith("a given up: the worker died")


def test_killed_at_any_moment_and_resumed_it_ends_with_the_same_bytes(make_hub: Make, tmp_path: Path) -> None:
    """The whole process group dies by SIGKILL at random moments, several times over; the last run is left alone."""
    hub, out, calm = make_hub(8), tmp_path / "out", tmp_path / "calm"
    run(RECIPE, hub, calm, HERE)
    command = [sys.executable, "-m", "loratools_cli", "hub", "run", hub, out, "--step", "squeeze rank=2", "--resume"]
    moments = random.Random(4)
    kills = 0
    for _ in range(4):
        started = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            started.wait(moments.uniform(0.5, 5.0))
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            started.wait()
            kills += 1
    assert kills
    assert run(RECIPE, hub, out, Run(resume=True, executor=here)).counts.get("failed", 0) == 0
    assert contents(out) == contents(calm)
    assert not [p for p in out.rglob("*") if p.name.endswith((".tmp", ".old"))]


def test_a_dask_cluster_loses_nothing_when_a_worker_is_killed(make_hub: Make, tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed")
    from loratools.hub.engines import dask_executor

    hub, out, calm = make_hub(10), tmp_path / "out", tmp_path / "calm"
    run(RECIPE, hub, calm, HERE)
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1"
    ) as cluster:
        killed: list[int] = []

        def steps(total: int, what: str) -> Callable[[], None]:
            def step() -> None:
                if not killed:
                    nanny = next(iter(cluster.workers.values()))
                    killed.append(nanny.process.pid)
                    os.kill(nanny.process.pid, signal.SIGKILL)

            return step

        how = Run(workers=2, executor=lambda: dask_executor(cluster.scheduler_address))
        report = run(RECIPE, hub, out, how, steps=steps)
    assert killed
    assert report.counts == {"done": 11}
    assert contents(out) == contents(calm)


def test_an_absent_scheduler_is_an_error_soon() -> None:
    pytest.importorskip("distributed")
    from loratools.hub.engines import dask_executor

    began = time.monotonic()
    with pytest.raises(UsageError, match="no Dask scheduler"):
        dask_executor("tcp://127.0.0.1:9")
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(("stated", "found"), [(None, str(max(1, usable_cores() // 2))), ("3", "3")])
def test_workers_share_the_cores_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, stated: str | None, found: str
) -> None:
    monkeypatch.delenv("LORATOOLS_THREADS", raising=False)
    if stated:
        monkeypatch.setenv("LORATOOLS_THREADS", stated)
    with local_executor(2) as executor:
        assert executor.submit(os.getenv, "LORATOOLS_THREADS").result() == found
        assert executor.submit(torch.get_num_threads).result() == 1  # targets side by side, each on one core
