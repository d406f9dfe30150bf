"""Hubs on web servers and in memory, and that no secret of a URL is ever shown."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hub.conftest import contents, write_kohya, write_peft
from hub.web import web
from safetensors.torch import save_file

from loratools.errors import InputError, OutputError, UsageError
from loratools.hub.discover import Refused, discover
from loratools.hub.listing import listed, status
from loratools.hub.receipts import FOLDER, UPLOADS, place_of, read_receipts, upload_mark
from loratools.hub.recipe import parse_steps
from loratools.hub.remote import Held, adapters_in, discover_remote
from loratools.hub.run import Run, run
from loratools.storage.places import parse_place, shown_url
from loratools.storage.remote import Entry, Remote

fsspec = pytest.importorskip("fsspec", reason="needs fsspec: pip install 'loratools[hub]'")
pytest.importorskip("aiohttp", reason="needs aiohttp: pip install 'loratools[hub]'")

Make = Callable[[int], Path]
RECIPE = parse_steps(["squeeze rank=2"])
SECRETS = ("hunter2", "S3CR3T", "topsecretsig")


def here() -> Executor:
    return ThreadPoolExecutor(1)


HERE = Run(executor=here)


def remote(text: str) -> Remote:
    place = parse_place(text)
    assert isinstance(place, Remote)
    return place


def upload(files: Any, folder: Path, to: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            files.pipe_file(f"{to}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def downloaded(files: Any, top: str) -> dict[str, bytes]:
    found = {name.removeprefix(f"{top}/"): files.cat_file(name) for name in files.find(top)}
    return {name: data for name, data in found.items() if not name.startswith(f"{FOLDER}/")}


def test_a_listing_finds_what_a_walk_finds(make_hub: Make, tmp_path: Path) -> None:
    hub = make_hub(2)
    write_peft(hub / "a0" / "second", 5)
    write_kohya(hub / ".hidden" / "z.safetensors", 4)
    (hub / "a0" / "training.pt").write_bytes(b"beside an adapter")
    write_kohya(hub / "[x]*?" / "y#.bin", 3)
    with web(hub) as server:
        _, found = discover_remote(remote(f"http://{server.address}"))
    assert [each.name for each in found] == [each.name for each in discover(hub)]
    assert all(isinstance(each, Held) for each in found)


def test_names_that_climb_out_are_refused() -> None:
    bad = ["../../etc/x.safetensors", "a/../b.safetensors", "a//b.safetensors", "/x.safetensors", "./x.bin", "n\0.pt"]
    found = list(adapters_in({**{name: Entry(1) for name in bad}, "good.safetensors": Entry(1), "../note": Entry(1)}))
    assert {each.name for each in found if isinstance(each, Refused)} == set(bad)
    assert [each.name for each in found if isinstance(each, Held)] == ["good.safetensors"]


def test_only_headers_are_read_to_list(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    write_peft(hub / "big", 0, rank=512, layers=40)
    whole = (hub / "big" / "adapter_model.safetensors").stat().st_size
    header = 8 + int.from_bytes((hub / "big" / "adapter_model.safetensors").read_bytes()[:8], "little")
    assert whole > 4_000_000
    with web(hub) as server:
        (row,) = listed(remote(f"http://{server.address}/")).adapters
        assert (row.rank, row.targets, row.dialect, row.bytes, row.base_model) == (512, 40, "peft", whole, "tiny")
        assert server.sent["adapter_model.safetensors"] <= 4096 + header
    with web(hub, ranges=False) as server:  # which sends on until it is told to stop
        assert listed(remote(f"http://{server.address}/")).adapters == (row,)


def test_what_has_no_header_at_its_start_is_fetched_only_when_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "hub"
    hub.mkdir()
    torch.save({"x.lora_A.weight": torch.zeros(2, 4), "x.lora_B.weight": torch.zeros(4, 2)}, hub / "p.bin")
    with web(hub) as server:
        monkeypatch.setattr("loratools.hub.remote._WHOLE", 100)
        (row,) = listed(remote(f"http://{server.address}")).adapters
        assert "above 100 B" in row.reason
        assert not server.sent
        monkeypatch.undo()
        (row,) = listed(remote(f"http://{server.address}")).adapters
        assert server.sent["p.bin"] == (hub / "p.bin").stat().st_size
        there = f"http://{server.address}"
    assert row.reason == next(iter(listed(hub).adapters)).reason.replace(str(hub), there)


def test_a_packed_hub_is_listed_from_headers_and_indices(make_hub: Make, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    run(parse_steps(["quantize bits=4"]), make_hub(1), out, HERE)
    with web(out) as server:
        assert listed(remote(f"http://{server.address}")).adapters == listed(out).adapters


def test_a_claim_of_ten_gigabytes_allocates_nothing(tmp_path: Path) -> None:
    header = json.dumps(
        {"x": {"dtype": "F32", "shape": [50_000, 50_000], "data_offsets": [0, 10_000_000_000]}}
    ).encode()
    (tmp_path / "claims.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (tmp_path / "long.safetensors").write_bytes((10_000_000_000).to_bytes(8, "little") + b"{")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    with web(tmp_path) as server:
        reasons = {row.name: row.reason for row in listed(remote(f"http://{server.address}")).adapters}
        report = run(RECIPE, remote(f"http://{server.address}"), tmp_path / "out", HERE)
    assert set(reasons) == {"claims.safetensors", "empty.safetensors", "long.safetensors"}
    assert all(reasons.values())
    assert report.counts == {"failed": 3}
    assert not contents(tmp_path / "out")


def test_from_the_web_to_memory_and_resumed(make_hub: Make, tmp_path: Path, memory: Any) -> None:
    hub, calm = make_hub(3), tmp_path / "calm"
    run(RECIPE, hub, calm, HERE)
    out = remote("memory://results/small")
    with web(hub) as server:
        source = remote(f"http://{server.address}")
        assert run(RECIPE, source, out).counts == {"done": 4}
        assert downloaded(memory, "/results/small") == contents(calm)
        with pytest.raises(UsageError, match="--resume"):
            run(RECIPE, source, out)
        assert status(out).counts == {"done": 4}
        assert not status(out).missing
        # no etags here: what lies on the web is compared by its hash
        memory.pipe_file("/results/small/a0/adapter_model.safetensors", b"damaged")
        memory.rm_file("/results/small/a1/adapter_config.json")
        write_kohya(tmp_path / "other.safetensors", 5)
        (tmp_path / "other.safetensors").replace(hub / "deep" / "er" / "k.safetensors")
        os.utime(hub / "a2" / "adapter_config.json")
        again = run(RECIPE, source, out, Run(resume=True))
        assert {row.name: row.status for row in again.adapters} == {
            "a0": "done", "a1": "done", "a2": "kept", "deep/er/k.safetensors": "done",
        }  # fmt: skip
        assert run(RECIPE, source, out, Run(resume=True)).counts == {"kept": 4}
    run(RECIPE, hub, calm, Run(force=True, executor=here))
    assert downloaded(memory, "/results/small") == contents(calm)
    late = status(out)
    assert late.counts == {"done": 4}
    assert "not known" in late.warnings[0]


def test_results_beside_the_hub_are_no_part_of_it(make_hub: Make, memory: Any) -> None:
    upload(memory, make_hub(2), "/hub")
    hub = remote("memory://hub")
    assert run(RECIPE, hub, hub / "out").counts == {"done": 3}
    assert run(RECIPE, hub, hub / "out", Run(resume=True)).counts == {"kept": 3}
    assert len(status(hub / "out").adapters) == 3
    with pytest.raises(UsageError, match="the hub itself"):
        run(RECIPE, hub, remote("memory://hub/"))


def test_what_an_interrupted_upload_left_is_removed_and_vouched_for_by_nothing(
    make_hub: Make, tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, out = make_hub(1), remote("memory://out")
    kind = type(memory)
    original = kind.put_file

    def cut(self: Any, lpath: str, rpath: str, **more: Any) -> None:
        if lpath.endswith(".safetensors"):
            self.pipe_file(rpath, Path(lpath).read_bytes()[:100])
            raise ConnectionResetError("http://user:hunter2@host went away")
        original(self, lpath, rpath, **more)

    monkeypatch.setattr(kind, "put_file", cut)
    monkeypatch.setattr(kind, "rm_file", lambda self, path: None)  # as though it were killed there
    report = run(RECIPE, hub, out)
    assert report.counts == {"failed": 2}
    assert all("cannot be reached" in row.reason and "hunter2" not in row.reason for row in report.adapters)
    assert [n for n in memory.find("/out") if UPLOADS in n and upload_mark("a0") in n]
    receipts = list(read_receipts(out, ["a0", "deep/er/k"]))
    assert [r.status for r in receipts if r is not None] == ["failed", "failed"]
    assert "/out/a0/adapter_model.safetensors" not in memory.find("/out")
    monkeypatch.undo()
    assert run(RECIPE, hub, out, Run(resume=True)).counts == {"done": 2}
    run(RECIPE, hub, tmp_path / "calm", HERE)
    assert downloaded(memory, "/out") == contents(tmp_path / "calm")
    left = [n for n in memory.find("/out") if UPLOADS in n]
    assert not [n for n in left if any(upload_mark(stem) in n for stem in ("a0", "deep/er/k"))]


def test_a_source_that_vanishes_or_lies_is_a_row(make_hub: Make, tmp_path: Path) -> None:
    hub = make_hub(3)

    def steps(total: int, what: str) -> Callable[[], None]:
        shutil.rmtree(hub / "a1")
        return lambda: None

    with web(hub) as server:
        report = run(RECIPE, remote(f"http://{server.address}"), tmp_path / "out", HERE, steps=steps)
    assert report.counts == {"done": 3, "failed": 1}
    (reason,) = (row.reason for row in report.adapters if row.status == "failed")
    assert "is gone" in reason


def test_more_than_was_told_is_not_fetched(tmp_path: Path, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe_file("/hub/x.safetensors", b"x" * 1000)
    with pytest.raises(InputError, match="more than the 10 bytes"):
        (remote("memory://hub") / "x.safetensors").fetch(tmp_path / "x", Entry(10))
    place = remote("memory://hub") / "x.safetensors"
    assert place.fetch(tmp_path / "x", Entry(2000)).size == 1000  # a listing may be old
    info = type(memory).info
    monkeypatch.setattr(type(memory), "info", lambda *given, **more: info(*given, **more) | {"size": 2000})
    with pytest.raises(InputError, match="shorter"):
        place.fetch(tmp_path / "x", None)


def test_one_file_by_its_signed_url(tmp_path: Path) -> None:
    write_kohya(tmp_path / "hub" / "k.safetensors", 1)
    with web(tmp_path / "hub", token="S3CR3T") as server:
        place = remote(f"http://{server.address}/k.safetensors?token=S3CR3T")
        (row,) = listed(place).adapters
        assert (row.name, row.dialect) == ("k.safetensors", "kohya")
        assert run(RECIPE, place, tmp_path / "out", HERE).counts == {"done": 1}
        (tree,) = listed(remote(f"http://{server.address}/?token=S3CR3T")).adapters
        assert tree == row
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or b"S3CR3T" not in path.read_bytes()


def test_what_is_shown_of_a_url() -> None:
    bad = "https://user:hunter2@host:81/a/b?X-Amz-Signature=topsecretsig&token=S3CR3T#hunter2"
    assert shown_url(bad) == "https://host:81/a/b"
    assert str(parse_place(bad)) == "https://host:81/a/b"
    assert "hunter2" not in repr(parse_place(bad))
    assert str(remote(bad) / "c d.bin") == "https://host:81/a/b/c%20d.bin"
    assert shown_url("s3://bucket/x@y/z") == "s3://bucket/x@y/z"
    assert parse_place("file:///tmp/a%20b") == Path("/tmp/a b")
    assert parse_place("a/b") == Path("a/b")
    for wrong in (
        "s3://KEY:hunter2@bucket/x",
        "s3://KEY:hun/hunter2@bucket/x",
        "https://user:hun/hunter2@host/x",
        "sftp://user:hunter2#x@host/x",
        "simplecache::s3://hunter2/b",
        "s3:///x",
        "https://[hunter2/x",
        "nonsense://hunter2@x/y",
    ):
        with pytest.raises(UsageError) as caught:
            listed(parse_place(wrong))
        assert not any(secret in str(caught.value) for secret in SECRETS)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    from loratools.errors import MissingExtraError

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "hf", raising=False)
    with pytest.raises(MissingExtraError, match="pip install huggingface_hub"):
        listed(parse_place("hf://owner/repo"))
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(MissingExtraError, match=r"loratools\[hub\]"):
        listed(parse_place("memory://hub"))
    with pytest.raises(UsageError, match="only read here"):
        run(RECIPE, tmp_path, parse_place("hf://owner/repo"))


@pytest.mark.parametrize("debug", [False, True])
def test_no_secret_is_shown_even_where_it_fails(
    run_program: Callable[..., Any], make_hub: Make, tmp_path: Path, debug: bool
) -> None:
    hub, out = make_hub(1), tmp_path / "out"
    more = {"LORATOOLS_DEBUG": "1"} if debug else {}
    step = ("--step", "squeeze rank=2")
    with web(hub, user="user:hunter2", token="S3CR3T") as server:
        good = f"http://user:hunter2@{server.address}/?token=S3CR3T"
        told = [
            run_program("hub", "ls", good, env=more),
            run_program("hub", "ls", good, "--json", env=more),
            run_program("hub", "run", good, out, *step, env=more),
            run_program("hub", "run", good, out, *step, "--resume", "--json", env=more),
            run_program("hub", "status", out, env=more),
        ]
        assert [each.returncode for each in told] == [0] * 5
        assert "2 kept" in told[3].stdout or '"kept": 2' in told[3].stdout
        assert "not known" in told[4].stderr  # the server asks for what is not kept
        wrong = [
            run_program("hub", "ls", f"http://user:hunter2@{server.address}/?token=topsecretsig", env=more),
            run_program("hub", "run", hub, good, *step, env=more),
            run_program("hub", "status", good, env=more),
        ]
        assert [each.returncode for each in wrong] == [3, 2, 3]
    wrong.append(run_program("hub", "ls", "https://user:hunter2@127.0.0.1:9/x/?token=S3CR3T", env=more))
    wrong.append(run_program("hub", "run", "https://user:hunter2@127.0.0.1:9/x/?token=S3CR3T", out, *step, env=more))
    assert "permission denied (HTTP 403)" in wrong[0].stderr
    for each in told + wrong:
        assert not any(secret in each.stdout + each.stderr for secret in SECRETS)
    if not debug:
        assert all(len(each.stderr.strip().splitlines()) == 1 for each in wrong)
    for path in out.rglob("*"):
        assert path.is_dir() or not any(secret.encode() in path.read_bytes() for secret in SECRETS)
    assert json.loads((out / FOLDER / "run.json").read_text())["hub"] == f"http://{server.address}"
    assert place_of(out, "a0").is_file()


def test_servers_that_refuse_are_errors_of_input(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for code, says in ((401, "HTTP 401"), (403, "HTTP 403"), (404, "nothing"), (500, "HTTP 500")):
        with web(tmp_path, status=code) as server:
            for url in (f"http://{server.address}/x", f"http://{server.address}/x/y.safetensors"):
                with pytest.raises(InputError, match=says):
                    listed(remote(url))


def test_a_place_that_cannot_be_written_is_an_error_of_output(make_hub: Make, memory: Any) -> None:
    memory.pipe_file("/out", b"a file where the folder should be")
    with pytest.raises(OutputError):
        run(RECIPE, make_hub(1), remote("memory://out"))


def test_the_sharded(tmp_path: Path, memory: Any) -> None:
    hub = tmp_path / "hub"
    write_peft(hub / "s", 1)
    from safetensors.torch import load_file

    tensors = load_file(hub / "s" / "adapter_model.safetensors")
    (hub / "s" / "adapter_model.safetensors").unlink()
    names = sorted(tensors)
    home = {}
    for i, part in enumerate((names[:2], names[2:])):
        save_file({name: tensors[name] for name in part}, hub / "s" / f"part-{i}.safetensors")
        home |= dict.fromkeys(part, f"part-{i}.safetensors")
    (hub / "s" / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": home}))
    upload(memory, hub, "/hub")
    assert listed(remote("memory://hub")).adapters == listed(hub).adapters
    run(RECIPE, hub, tmp_path / "calm", HERE)
    assert run(RECIPE, remote("memory://hub"), tmp_path / "out").counts == {"done": 1}
    assert contents(tmp_path / "out") == contents(tmp_path / "calm")
    assert contents(tmp_path / "out")
