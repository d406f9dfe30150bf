"""Outputs of an earlier recipe: never taken for current ones, on this machine and elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hub.conftest import contents

from loratools.hub import work
from loratools.hub.cataloguing import Catalog, catalog
from loratools.hub.listing import status
from loratools.hub.only import Only
from loratools.hub.receipts import FOLDER, RUN, read_one
from loratools.hub.recipe import parse_steps
from loratools.hub.run import Run, run
from loratools.hub.work import Job, process
from loratools.storage.places import Place, parse_place

Make = Callable[[int], Path]
FOLDERS, FILES = parse_steps(["squeeze rank=2"]), parse_steps(["quantize bits=4"])  # a0/..., then a0.safetensors
ALL = ("a0", "a1", "a2", "deep/er/k")


def here() -> Executor:
    return ThreadPoolExecutor(1)


HERE = Run(executor=here)
AGAIN = Run(resume=True, executor=here)


class Killed(BaseException):
    """What no work can catch."""


@pytest.fixture(params=["here", "elsewhere"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "here":
        return tmp_path / "out"
    request.getfixturevalue("memory")
    return parse_place("memory://out")


def held(out: Place) -> dict[str, bytes]:
    """What lies there, but for receipts."""
    if isinstance(out, Path):
        return contents(out)
    found = {name: (out / name).read(1 << 20) for name in out.listing()}
    return {name: data for name, data in found.items() if not name.startswith(f"{FOLDER}/")}


def put(out: Place, name: str, data: bytes) -> None:
    if isinstance(out, Path):
        (out / name).write_bytes(data)
    else:
        (out / name).put_bytes(data, out / "via")


def told(out: Place) -> dict[str, str]:
    return {row.name.removesuffix(".safetensors"): row.status for row in status(out).adapters}


def fresh(recipe: Any, hub: Path, to: Path) -> dict[str, bytes]:
    run(recipe, hub, to, HERE)
    return contents(to)


def spoil(hub: Path) -> None:
    (hub / "a0" / "adapter_model.safetensors").write_bytes(b"")


def test_another_recipe_leaves_nothing_of_the_first(make_hub: Make, out: Place, tmp_path: Path) -> None:
    hub = make_hub(3)
    run(FOLDERS, hub, out, HERE)
    put(out, "a1/notes.md", b"mine")
    put(out, "a2/adapter_config.json", b"{}")  # changed by somebody
    assert run(FILES, hub, out, AGAIN).counts == {"done": 4}
    mine = {"a1/notes.md": b"mine", "a2/adapter_config.json": b"{}"}
    assert held(out) == fresh(FILES, hub, tmp_path / "fresh") | mine
    assert told(out) == dict.fromkeys(ALL, "done")


def test_a_failure_keeps_nothing_of_another_recipe(make_hub: Make, out: Place, tmp_path: Path) -> None:
    hub = make_hub(3)
    run(FOLDERS, hub, out, HERE)
    spoil(hub)
    assert run(FILES, hub, out, AGAIN).counts == {"done": 3, "failed": 1}
    assert held(out) == fresh(FILES, hub, tmp_path / "fresh")
    assert told(out) == dict.fromkeys(ALL, "done") | {"a0": "failed"}


def test_a_failure_keeps_what_its_own_recipe_made_until_another_one(make_hub: Make, out: Place, tmp_path: Path) -> None:
    hub = make_hub(3)
    run(FOLDERS, hub, out, HERE)
    before = held(out)
    spoil(hub)
    assert run(FOLDERS, hub, out, AGAIN).counts == {"kept": 3, "failed": 1}
    assert held(out) == before
    assert told(out) == dict.fromkeys(ALL, "done") | {"a0": "failed"}
    assert run(FILES, hub, out, AGAIN).counts == {"done": 3, "failed": 1}
    assert held(out) == fresh(FILES, hub, tmp_path / "fresh")


def test_what_was_killed_is_stale_and_tidied_by_the_next(
    make_hub: Make, out: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = make_hub(3)
    run(FOLDERS, hub, out, HERE)

    def killed(*args: Any) -> Any:
        raise Killed

    monkeypatch.setattr(work, "_written", killed)
    with pytest.raises(Killed):
        process(Job("a0", "a0", hub, out, FOLDERS))
    monkeypatch.undo()
    assert told(out) == dict.fromkeys(ALL, "done") | {"a0": "stale"}
    if isinstance(out, Path):
        pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'loratools[hub]'")
        report = catalog(out, tmp_path / "c.parquet", Catalog(executor=here))
        assert (report.counts, report.missing) == ({"done": 3}, 1)
    assert run(FILES, hub, out, AGAIN).counts == {"done": 4}
    assert held(out) == fresh(FILES, hub, tmp_path / "fresh")


def test_a_worker_that_died_leaves_nothing_of_another_recipe(make_hub: Make, out: Place) -> None:
    hub = make_hub(1)
    run(FOLDERS, hub, out, HERE)
    receipt = work.failed(Job("a0", "a0", hub, out, FILES), "its worker died")
    assert (receipt.status, receipt.outputs) == ("failed", {})
    assert not [name for name in held(out) if name.startswith("a0")]


def test_what_cannot_be_removed_is_still_named(make_hub: Make, out: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = make_hub(1)
    run(FOLDERS, hub, out, HERE)
    before = read_one(out, "a0")

    def refused(*args: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(work, "_retire", refused)
    receipt = work.failed(Job("a0", "a0", hub, out, FILES), "why")
    assert before is not None
    assert (receipt.reason, receipt.outputs) == ("why", before.outputs)


def test_status_calls_done_what_the_recipe_of_each_adapter_made(make_hub: Make, out: Place) -> None:
    hub = make_hub(3)
    run(FOLDERS, hub, out, HERE)
    run(FILES, hub, out, Run(resume=True, executor=here, only=Only(names=("a0",))))
    assert told(out) == dict.fromkeys(ALL, "done")  # recipes for different adapters share an output
    assert run(FILES, hub, out, Run(resume=True, executor=here, shard=(1, 2))).counts.keys() <= {"done", "kept"}
    others = {name for name, is_told in told(out).items() if is_told == "stale"}
    assert others
    assert "a0" not in others
    assert others == {name for name in ALL if (one := read_one(out, name)) and one.recipe == FOLDERS.digest}
    run(FILES, hub, out, Run(resume=True, executor=here, shard=(2, 2)))
    assert told(out) == dict.fromkeys(ALL, "done")


def test_a_version_counts_as_a_recipe_does(make_hub: Make, out: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = make_hub(3)
    run(FOLDERS, hub, out, HERE)
    for module in ("work", "run"):
        monkeypatch.setattr(f"loratools.hub.{module}.__version__", "99")
    run(FOLDERS, hub, out, Run(resume=True, executor=here, only=Only(names=("a0",))))
    assert told(out) == dict.fromkeys(ALL, "done")
    run(FOLDERS, hub, out, Run(resume=True, executor=here, shard=(1, 2)))
    assert set(told(out).values()) == {"done", "stale"}


@pytest.mark.parametrize("parts", [None, 5, [], {"x": 5}])
def test_a_statement_that_somebody_spoilt_is_none(make_hub: Make, tmp_path: Path, parts: Any) -> None:
    hub, out = make_hub(1), tmp_path / "out"
    run(FOLDERS, hub, out, HERE)
    stated = json.loads((out / RUN).read_text())
    (out / RUN).write_text(json.dumps(stated | {"parts": parts}))
    report = run(FOLDERS, hub, out, Run(resume=True, executor=here, only=Only(names=("a0",))))
    assert report.counts == {"kept": 1}
    assert status(out).missing == ()
