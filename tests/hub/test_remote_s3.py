"""Hubs in a bucket, against a server that speaks S3 on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hub.conftest import contents, write_kohya, write_peft
from hub.web import web

from loratools.errors import InputError, OutputError
from loratools.hub.listing import listed, status
from loratools.hub.receipts import FOLDER
from loratools.hub.recipe import parse_steps
from loratools.hub.run import Run, run
from loratools.hub.scratch import scratch, sweep
from loratools.storage.places import parse_place

moto = pytest.importorskip("moto.server", reason="needs moto[server], which is among the dev dependencies")
s3fs = pytest.importorskip("s3fs", reason="needs s3fs: pip install 'loratools[hub]'")

Make = Callable[[int], Path]
RECIPE = parse_steps(["squeeze rank=2"])
SECRETS = ("S3CR3TKEYID", "S3CR3Tvalue")
STEP = ("--step", "squeeze rank=2")


def here() -> Executor:
    return ThreadPoolExecutor(1)


HERE = Run(executor=here)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Says where S3 is, to this process and those that it starts."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", SECRETS[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRETS[1])
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)

    def at(address: str) -> None:
        s3fs.S3FileSystem.clear_instance_cache()
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)

    yield at
    s3fs.S3FileSystem.clear_instance_cache()


class Bucket:
    """A bucket of its own for each test."""

    def __init__(self, client: Any, name: str) -> None:
        self.client, self.name = client, name
        client.create_bucket(Bucket=name)

    def upload(self, folder: Path, to: str) -> None:
        for path in folder.rglob("*"):
            if path.is_file():
                self.client.upload_file(str(path), self.name, f"{to}/{path.relative_to(folder).as_posix()}")

    def keys(self, prefix: str) -> list[str]:
        return [o["Key"] for o in self.client.list_objects_v2(Bucket=self.name, Prefix=prefix).get("Contents", [])]

    def read(self, key: str) -> bytes:
        return bytes(self.client.get_object(Bucket=self.name, Key=key)["Body"].read())

    def outputs(self, top: str) -> dict[str, bytes]:
        names = [key.removeprefix(f"{top}/") for key in self.keys(f"{top}/")]
        return {name: self.read(f"{top}/{name}") for name in names if not name.startswith(f"{FOLDER}/")}


@pytest.fixture
def bucket(server: str, environment: Callable[[str], None], request: pytest.FixtureRequest) -> Bucket:
    import boto3

    environment(server)
    client = boto3.client("s3")
    return Bucket(client, f"b{abs(hash(request.node.name)):x}"[:40])


def test_listed_from_headers_alone(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tmp_path / "hub"
    for i in range(3):
        write_peft(hub / f"a{i}", i, rank=512, layers=40)
    write_kohya(hub / "deep" / "k.safetensors", 9)
    bucket.upload(hub, "hub")
    got = []
    call = s3fs.S3FileSystem._call_s3

    async def counted(self: Any, method: str, *given: Any, **more: Any) -> Any:
        answer = await call(self, method, *given, **more)
        if method == "get_object":
            got.append(answer["ContentLength"])
        return answer

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", counted)
    assert listed(parse_place(f"s3://{bucket.name}/hub")).adapters == listed(hub).adapters
    path = hub / "a0" / "adapter_model.safetensors"
    header, config = int.from_bytes(path.read_bytes()[:8], "little") + 8, 200
    assert path.stat().st_size > 4_000_000
    assert sum(got) <= 4 * (4096 + header + config)


def test_run_resume_status_and_the_same_bytes_as_here(bucket: Bucket, make_hub: Make, tmp_path: Path) -> None:
    hub, calm = make_hub(3), tmp_path / "calm"
    write_peft(hub / "odd::name[1]", 4)
    run(RECIPE, hub, calm, HERE)
    bucket.upload(hub, "hub")
    bucket.client.put_object(Bucket=bucket.name, Key="hub/../../up.safetensors", Body=b"x")
    source, out = parse_place(f"s3://{bucket.name}/hub"), parse_place(f"s3://{bucket.name}/out")
    report = run(RECIPE, source, out, Run(workers=2))
    assert report.counts == {"done": 5} | ({"failed": 1} if "hub/../../up.safetensors" in bucket.keys("hub/") else {})
    assert bucket.outputs("out") == contents(calm)
    told = status(out)
    assert (told.counts, told.missing, told.warnings) == (report.counts, (), ())
    for key in bucket.keys("out"):
        assert not any(secret.encode() in bucket.read(key) for secret in SECRETS)
    # what is missing, damaged, changed; and what has another tag, and the same content
    bucket.client.delete_object(Bucket=bucket.name, Key="out/a0/adapter_config.json")
    bucket.client.put_object(Bucket=bucket.name, Key="out/a1/adapter_model.safetensors", Body=b"damaged")
    write_kohya(tmp_path / "new" / "deep" / "er" / "k.safetensors", 5)
    bucket.upload(tmp_path / "new", "hub")
    key = "hub/a2/adapter_model.safetensors"
    begun = bucket.client.create_multipart_upload(Bucket=bucket.name, Key=key)["UploadId"]
    part = bucket.client.upload_part(
        Bucket=bucket.name, Key=key, UploadId=begun, PartNumber=1, Body=(hub / key[4:]).read_bytes()
    )
    tag = bucket.client.complete_multipart_upload(
        Bucket=bucket.name, Key=key, UploadId=begun,
        MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]},
    )["ETag"]  # fmt: skip
    assert tag != part["ETag"]
    again = run(RECIPE, source, out, Run(resume=True, executor=here))
    assert {row.name: row.status for row in again.adapters if row.status != "failed"} == {
        "a0": "done", "a1": "done", "a2": "kept", "deep/er/k.safetensors": "done", "odd::name[1]": "kept",
    }  # fmt: skip
    # the same receipts are good for the same hub elsewhere
    (tmp_path / "new" / "deep" / "er" / "k.safetensors").replace(hub / "deep" / "er" / "k.safetensors")
    assert run(RECIPE, hub, out, Run(resume=True, executor=here)).counts == {"kept": 5}
    run(RECIPE, hub, calm, Run(force=True, executor=here))
    assert bucket.outputs("out") == contents(calm)


def test_killed_and_resumed_it_ends_with_the_same_bytes(bucket: Bucket, make_hub: Make, tmp_path: Path) -> None:
    hub, calm, private = make_hub(10), tmp_path / "calm", tmp_path / "private"
    private.mkdir()
    run(RECIPE, hub, calm, HERE)
    bucket.upload(hub, "hub")
    source, out = f"s3://{bucket.name}/hub", f"s3://{bucket.name}/out"
    command = [sys.executable, "-m", "loratools_cli", "hub", "run", source, out, *STEP, "--workers", "2", "--resume"]
    for wanted in (1, 5):
        started = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | {"TMPDIR": str(private)},
        )
        until = time.monotonic() + 90
        while len(bucket.keys("out/.loratools/receipts/")) < wanted and started.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.02)
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
    done = len(bucket.keys("out/.loratools/receipts/"))
    assert done >= 5
    for left in private.iterdir():
        os.utime(left, (0, 0))
    ended = subprocess.run(
        command, env=os.environ | {"TMPDIR": str(private)}, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert bucket.outputs("out") == contents(calm)
    assert not [left for left in private.iterdir() if left.name.startswith("loratools")]
    assert status(parse_place(out)).counts == {"done": 11}


def test_uploads_that_were_begun_by_a_killed_run_are_forgotten(bucket: Bucket, make_hub: Make) -> None:
    keys = ("out/a0/adapter_model.safetensors", "out/deep/er/k.safetensors", "out/a0/other/x", "out/a00/y")
    for key in keys:
        bucket.client.create_multipart_upload(Bucket=bucket.name, Key=key)
    run(RECIPE, make_hub(1), parse_place(f"s3://{bucket.name}/out"), HERE)
    left = bucket.client.list_multipart_uploads(Bucket=bucket.name).get("Uploads", [])
    assert sorted(upload["Key"] for upload in left) == sorted(keys[2:])  # which are not of these adapters


def test_a_source_that_vanishes_is_a_row(bucket: Bucket, make_hub: Make, tmp_path: Path) -> None:
    bucket.upload(make_hub(2), "hub")

    def steps(total: int, what: str) -> Callable[[], None]:
        bucket.client.delete_object(Bucket=bucket.name, Key="hub/a1/adapter_model.safetensors")
        return lambda: None

    report = run(RECIPE, parse_place(f"s3://{bucket.name}/hub"), tmp_path / "out", HERE, steps=steps)
    assert report.counts == {"done": 2, "failed": 1}
    (reason,) = (row.reason for row in report.adapters if row.status == "failed")
    assert reason.startswith(f"s3://{bucket.name}/hub/a1/adapter_model.safetensors: there is nothing")


def test_what_is_not_there(bucket: Bucket, make_hub: Make) -> None:
    for url in ("s3://no-such-bucket/x", f"s3://{bucket.name}/nothing"):
        with pytest.raises(InputError, match="nothing"):
            listed(parse_place(url))
    with pytest.raises(InputError, match="no run"):
        status(parse_place(f"s3://{bucket.name}/nothing"))
    with pytest.raises(OutputError, match="no such bucket"):
        run(RECIPE, make_hub(1), parse_place("s3://no-such-bucket/out"), HERE)


@pytest.mark.parametrize("debug", [False, True])
def test_refusals_are_one_line_without_secrets(
    run_program: Callable[..., Any], environment: Callable[[str], None], make_hub: Make, tmp_path: Path, debug: bool
) -> None:
    hub, more = make_hub(1), {"LORATOOLS_DEBUG": "1"} if debug else {}
    with web(tmp_path, status=403) as refusing:
        environment(f"http://{refusing.address}")
        told = [
            (3, run_program("hub", "ls", "s3://bucket/hub", env=more)),
            (3, run_program("hub", "run", "s3://bucket/hub", tmp_path / "out", *STEP, env=more)),
            (5, run_program("hub", "run", hub, "s3://bucket/out", *STEP, "--resume", env=more)),
            (3, run_program("hub", "status", "s3://bucket/out", env=more)),
        ]
    assert all("permission denied (HTTP 403)" in each.stderr for _, each in told)
    told.append((3, run_program("hub", "ls", "s3://bucket/hub", env={"AWS_ENDPOINT_URL": "http://127.0.0.1:9"} | more)))
    assert "cannot be reached" in told[-1][1].stderr
    for code, each in told:
        assert each.returncode == code
        assert not any(secret in each.stdout + each.stderr for secret in SECRETS)
        assert debug or len(each.stderr.strip().splitlines()) == 1


def test_an_output_that_becomes_read_only_fails_each_row(
    bucket: Bucket, make_hub: Make, tmp_path: Path, environment: Callable[[str], None]
) -> None:
    hub = make_hub(1)
    with web(tmp_path, status=403) as refusing:
        # the run has stated itself when the work begins
        original, stated = run.__globals__["_state"], []

        def state(*given: Any) -> None:
            original(*given)
            stated.append(True)
            environment(f"http://{refusing.address}")

        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(run.__globals__, "_state", state)
            report = run(RECIPE, hub, parse_place(f"s3://{bucket.name}/out"), HERE)
    assert stated
    assert report.counts == {"failed": 2}
    assert all("permission denied" in row.reason for row in report.adapters)
    assert bucket.keys("out") == ["out/.loratools/run.json"]


def test_private_folders_of_the_living_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead = tmp_path / "loratools-hub-dead"
    (dead / "hub").mkdir(parents=True)
    young = tmp_path / "loratools-hub-young"
    young.mkdir()
    (tmp_path / "loratools-hub-link").symlink_to(tmp_path)
    os.utime(dead, (0, 0))
    with scratch() as living:
        assert living.stat().st_mode & 0o77 == 0
        os.utime(living, (0, 0))
        sweep()
        assert living.is_dir()
        assert not dead.exists()
        assert young.is_dir()
    assert not living.exists()
