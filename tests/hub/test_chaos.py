"""What machines do to a run: full disks, files in the way, sources that vanish; and what strangers put into a hub."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from hub.conftest import contents, write_kohya, write_peft

from loratools.errors import OutputError, UsageError
from loratools.hub.receipts import FOLDER, place_of, read_receipt
from loratools.hub.recipe import parse_steps
from loratools.hub.run import Run, run
from loratools.hub.work import Job, process
from loratools.storage.atomic import temporary_beside

Make = Callable[[int], Path]
RECIPE = parse_steps(["squeeze rank=2"])


def here() -> Executor:
    return ThreadPoolExecutor(1)


HERE = Run(executor=here)


def leftovers(out: Path) -> list[Path]:
    return [p for p in out.rglob("*") if p.name.endswith((".tmp", ".old"))]


def test_a_file_size_limit_stops_what_is_too_large_and_nothing_else(tmp_path: Path) -> None:
    """A limit of the system itself, in the workers of a real run."""
    hub, out, calm = tmp_path / "hub", tmp_path / "out", tmp_path / "calm"
    write_peft(hub / "large", 0, rank=64, layers=12)
    write_peft(hub / "small", 1)
    step = "squeeze rank=16"
    limit = 24_000  # bytes: below the large output, above receipts and the small one
    done = subprocess.run(
        [
            sys.executable,
            "-B",
            "-m",
            "loratools_cli",
            "hub",
            "run",
            hub,
            out,
            "--step",
            step,
            "--workers",
            "2",
            "--json",
        ],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)["adapters"]}
    assert rows["small"]["status"] == "done"
    assert rows["large"]["status"] == "failed"
    assert "size limit" in rows["large"]["reason"]
    assert not (out / "large").exists()
    assert not leftovers(out)
    assert run(parse_steps([step]), hub, out, Run(resume=True, executor=here)).counts == {"done": 1, "kept": 1}
    run(parse_steps([step]), hub, calm, HERE)
    assert contents(out) == contents(calm)
    assert (out / "large" / "adapter_model.safetensors").stat().st_size > limit


def test_a_disk_that_fills_up_meanwhile(make_hub: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, out = make_hub(3), tmp_path / "out"
    fsync, calls = os.fsync, [0]

    def full(fd: int) -> None:
        calls[0] += 1
        if calls[0] in (4, 5, 6):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", full)
    report = run(RECIPE, hub, out, HERE)
    monkeypatch.undo()
    failed = [row for row in report.adapters if row.status == "failed"]
    assert failed
    assert all("disk is full" in row.reason for row in failed)
    for row in report.adapters:
        receipt = read_receipt(place_of(out, row.name.removesuffix(".safetensors")))
        if row.status == "failed":
            assert receipt is None or receipt.status == "failed"
    assert not leftovers(out)
    assert run(RECIPE, hub, out, Run(resume=True, executor=here)).counts.get("failed", 0) == 0
    run(RECIPE, hub, tmp_path / "calm", HERE)
    assert contents(out) == contents(tmp_path / "calm")


def test_a_full_disk_at_the_start_is_an_error(make_hub: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: object, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="disk is full"):
        run(RECIPE, make_hub(1), tmp_path / "out", HERE)
    assert not (tmp_path / "out").exists()


def test_a_source_that_vanishes_between_discovery_and_work_is_a_row(make_hub: Make, tmp_path: Path) -> None:
    hub = make_hub(3)

    def steps(total: int, what: str) -> Callable[[], None]:
        shutil.rmtree(hub / "a1")
        (hub / "deep" / "er" / "k.safetensors").unlink()
        (hub / "a2" / "adapter_model.safetensors").write_bytes(b"cut")
        return lambda: None

    report = run(RECIPE, hub, tmp_path / "out", HERE, steps=steps)
    assert {row.name: row.status for row in report.adapters} == {
        "a0": "done", "a1": "failed", "a2": "failed", "deep/er/k.safetensors": "failed",
    }  # fmt: skip
    assert set(contents(tmp_path / "out")) == {"a0/adapter_config.json", "a0/adapter_model.safetensors"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into folders that are read-only")
def test_a_folder_that_is_read_only(make_hub: Make, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o555)
    with pytest.raises(OutputError, match="permission denied"):
        run(RECIPE, make_hub(1), tmp_path / "out", HERE)


def test_files_where_folders_should_be(make_hub: Make, tmp_path: Path) -> None:
    hub = make_hub(2)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="a parent of it is a file"):
        run(RECIPE, hub, tmp_path / "file" / "out", HERE)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / FOLDER).write_text("x")
    with pytest.raises(UsageError):
        run(RECIPE, hub, tmp_path / "out", HERE)
    with pytest.raises(OutputError, match="a parent of it is a file"):
        run(RECIPE, hub, tmp_path / "out", Run(resume=True, executor=here))
    assert (tmp_path / "out" / FOLDER).read_text() == "x"
    assert not contents(tmp_path / "out")


def test_a_file_where_one_output_or_its_receipt_should_be_costs_only_that(make_hub: Make, tmp_path: Path) -> None:
    hub, out = make_hub(3), tmp_path / "out"
    out.mkdir()
    (out / "a0").write_text("in the way")
    (out / FOLDER / "receipts" / "a1.json").mkdir(parents=True)
    report = run(RECIPE, hub, out, Run(resume=True, executor=here))
    rows = {row.name: row for row in report.adapters}
    assert {name for name, row in rows.items() if row.status == "failed"} == {"a0", "a1"}
    assert all(rows[name].reason and "\n" not in rows[name].reason for name in ("a0", "a1"))
    assert (out / "a0").read_text() == "in the way"
    assert not leftovers(out)


def test_adapters_in_the_folders_of_others_do_not_disturb_them(tmp_path: Path) -> None:
    """As trainers leave their checkpoints. Each is done again and again while the others are."""
    hub, out, calm = tmp_path / "hub", tmp_path / "out", tmp_path / "calm"
    names = ["a", "a/checkpoint-1", "a/checkpoint-2", "a/checkpoint-2/deep"]
    for i, name in enumerate(names):
        write_peft(hub / name, i)
    run(RECIPE, hub, calm, HERE)
    jobs = [Job(name, name, hub, out, RECIPE) for name in names]
    with ThreadPoolExecutor(4) as pool:
        reasons = pool.map(lambda job: {process(job).reason for _ in range(25)}, jobs)
    assert list(reasons) == [{""}] * 4
    assert contents(out) == contents(calm)
    assert not leftovers(out)


def test_an_output_leaves_what_others_put_beside_it(make_hub: Make, tmp_path: Path) -> None:
    hub, out = make_hub(1), tmp_path / "out"
    elsewhere = write_peft(tmp_path / "elsewhere", 5)
    before = contents(elsewhere)
    (out / "a0" / "notes").mkdir(parents=True)
    (out / "a0" / "notes" / "text.md").write_text("mine")
    assert run(RECIPE, hub, out, HERE).counts == {"done": 2}
    assert (out / "a0" / "notes" / "text.md").read_text() == "mine"
    shutil.rmtree(out / "a0")
    (out / "a0").symlink_to(elsewhere)
    assert run(RECIPE, hub, out, Run(resume=True, executor=here)).counts == {"done": 1, "kept": 1}
    assert not (out / "a0").is_symlink()
    assert contents(elsewhere) == before


def test_an_output_is_durable_before_its_receipt_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, out = tmp_path / "hub", tmp_path / "out"
    write_peft(hub / "a0", 0)
    events: list[str] = []

    def name(path: object) -> str:
        return re.sub(r"\.[0-9a-f]{8}\.tmp", ".tmp", os.path.relpath(os.fspath(path), out))  # type: ignore[call-overload]

    fsync, replace, rename = os.fsync, os.replace, os.rename

    def fsynced(fd: int) -> None:
        events.append(f"fsync {name(os.readlink(f'/proc/self/fd/{fd}'))}")
        fsync(fd)

    def moved(real: Callable[..., None], source: object, place: object) -> None:
        real(source, place)
        events.append(f"to {name(place)}")

    monkeypatch.setattr(os, "fsync", fsynced)
    monkeypatch.setattr(os, "replace", partial(moved, replace))
    monkeypatch.setattr(os, "rename", partial(moved, rename))
    receipt = f"to {FOLDER}/receipts/a0.json"
    for how in (HERE, Run(force=True, executor=here)):
        events.clear()
        assert run(RECIPE, hub, out, how).counts == {"done": 1}
        weights, config = (f"a0/{file}" for file in ("adapter_model.safetensors", "adapter_config.json"))
        begun = [event for event in events if event.startswith(("fsync .a0.tmp/", "to .a0.tmp/"))]
        assert begun == [
            f"fsync .a0.tmp/.{weights[3:]}.tmp", f"to .a0.tmp/{weights[3:]}", f"fsync .a0.tmp/{config[3:]}",
        ]  # fmt: skip
        after = events[events.index(begun[-1]) + 1 :]
        if how == HERE:  # whole, where nothing was
            assert after == ["fsync .a0.tmp", "to a0", "fsync .", receipt]
        else:  # file by file, where something was
            assert after == ["fsync .a0.tmp", f"to {config}", f"to {weights}", "fsync a0", "fsync .", receipt]


def test_what_killed_processes_left_is_removed_and_nothing_of_others(make_hub: Make, tmp_path: Path) -> None:
    hub, out = make_hub(2), tmp_path / "out"
    long = "x" * 70
    write_peft(hub / long, 8)
    run(RECIPE, hub, out, HERE)
    receipts = out / FOLDER / "receipts"
    folders = [out / ".a0.0123abcd.tmp", out / ".a1.0123abcd.old", temporary_beside(out / long)]
    files = [
        out / ".a0.safetensors.0123abcd.tmp",
        out / "deep" / "er" / ".k.safetensors.ffffffff.tmp",
        receipts / ".a0.json.0123abcd.tmp",
        receipts / "deep" / "er" / ".k.json.0123abcd.tmp",
        temporary_beside(receipts / f"{long}.json"),
    ]
    others = [
        out / ".b.0123abcd.tmp",
        temporary_beside(out / f"{long}y"),
        out / ".a0.notes.tmp",
        out / "a0.0123abcd.tmp",
    ]
    for folder in [*folders, *others]:
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"half")
    for file in files:
        file.write_bytes(b"half")
    assert run(RECIPE, hub, out, Run(resume=True, executor=here)).counts == {"kept": 4}
    assert [path for path in [*folders, *files] if path.exists()] == []
    assert all((other / "adapter_model.safetensors").exists() for other in others)


def test_the_output_is_not_looked_through_for_each_adapter(
    make_hub: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the work of a large hub would grow with its square."""
    hub, out, seen = make_hub(8), tmp_path / "out", Counter[str]()
    for name in ("scandir", "listdir"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda path=".", real=real: (seen.update([str(path)]), real(path))[1])
    assert run(RECIPE, hub, out, HERE).counts == {"done": 9}
    assert run(RECIPE, hub, out, Run(force=True, executor=here)).counts == {"done": 9}
    shared = (out, out / FOLDER / "receipts", out / "deep" / "er", hub)
    assert 0 < max(seen[str(folder)] for folder in shared) <= 6


def test_hostile_inputs_are_rows_and_touch_nothing_else(tmp_path: Path) -> None:
    hub, out = tmp_path / "hub", tmp_path / "out"
    write_peft(hub / "good", 0)
    outside = write_kohya(tmp_path / "outside.safetensors", 1)
    before = outside.read_bytes()

    def raw(name: str, header: bytes, length: int | None = None) -> None:
        size = len(header) if length is None else length
        (hub / name).write_bytes(size.to_bytes(8, "little") + header)

    raw("deep.safetensors", b'{"x":' * 100_000)
    raw("cut.safetensors", b'{"x"', 1 << 40)
    raw("junk.safetensors", os.urandom(4096))
    raw("twice.safetensors", b'{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"x":{}}')
    raw(
        "tens.safetensors",
        json.dumps({"x": {"dtype": "F32", "shape": [10**6, 2500], "data_offsets": [0, 10**10]}}).encode(),
    )
    index = {"weight_map": {"x.lora_A.weight": "../../outside.safetensors"}}
    (hub / "climbs.safetensors.index.json").write_text(json.dumps(index))
    (hub / "round").symlink_to(hub / "about")
    (hub / "about").symlink_to(hub / "round")
    (hub / "self.safetensors").symlink_to("self.safetensors")
    write_kohya(hub / "TWIN.safetensors", 2)
    write_kohya(hub / "twin.safetensors", 3)
    report = run(RECIPE, hub, out, HERE)
    rows = {row.name: row for row in report.adapters}
    assert [name for name, row in rows.items() if row.status == "done"] == ["TWIN.safetensors", "good"]
    assert all(row.reason and "\n" not in row.reason for row in rows.values() if row.status == "failed")
    assert "rename one" in rows["twin.safetensors"].reason
    assert "no plain file name" in rows["climbs.safetensors.index.json"].reason
    assert outside.read_bytes() == before
    assert set(contents(out)) == {"TWIN.safetensors", "good/adapter_config.json", "good/adapter_model.safetensors"}
