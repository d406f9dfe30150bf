"""Statistics: saved, loaded, and refused where they are of something else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratools import load
from loratools.adapter import Adapter
from loratools.errors import AdapterError, InputError, OutputError
from loratools.ops.statistics import Statistics, fingerprint, load_statistics

KEY = "loratools.statistics"


@pytest.fixture
def adapter(samples: Callable[[str], Path]) -> Adapter:
    return load(samples("peft/lora_plain"))


def made_up(adapter: Adapter) -> Statistics:
    downs = {t: u.parameters()["down"].double() for t, u in adapter.items()}
    means = {t: torch.rand(d.shape[1], dtype=torch.float64) for t, d in downs.items()}
    moments = {t: (d * means[t]) @ d.T for t, d in downs.items()}
    return Statistics(moments, means, 7, {t: fingerprint(u) for t, u in adapter.items()})


def test_what_was_saved_is_loaded(adapter: Adapter, tmp_path: Path) -> None:
    made = made_up(adapter)
    found = load_statistics(made.save(tmp_path / "stats.safetensors"), adapter)
    assert found.tokens == 7
    for target in adapter:
        assert torch.equal(found.moment(target), made.moment(target))
        assert torch.equal(found.channels(target), made.channels(target))
    with pytest.raises(OutputError):
        made.save(tmp_path / "stats.safetensors")
    made.save(tmp_path / "stats.safetensors", force=True)


def test_another_adapter_is_refused_by_the_target_that_differs(adapter: Adapter, tmp_path: Path) -> None:
    target = list(adapter)[-1]
    update = adapter[target]
    down = update.parameters()["down"].clone()
    down[0, 0] += 1
    other = adapter.with_updates({target: update.with_tensors({"down": down})})
    path = made_up(other).save(tmp_path / "stats.safetensors")
    with pytest.raises(AdapterError, match=rf"^{re.escape(target)}: .*another adapter.*loratools calibrate"):
        load_statistics(path, adapter)


def test_a_target_without_statistics_is_named(adapter: Adapter, tmp_path: Path) -> None:
    first, *rest = list(adapter)
    made = made_up(adapter)
    fewer = Statistics(*({t: m[t] for t in rest} for m in (made.moments, made.means)), 7, dict.fromkeys(rest, ""))  # type: ignore[arg-type, misc]
    with pytest.raises(AdapterError, match=rf"^{re.escape(first)}: the statistics have no such target"):
        fewer.moment(first)


@pytest.mark.parametrize(
    ("stated", "tensors", "message"),
    [
        (None, {}, "holds no statistics"),
        ("[]", {}, "holds no statistics"),
        ('{"version": "1"}', {}, "holds no statistics"),
        ("{", {}, "holds no statistics"),
        (json.dumps({"version": "9", "tokens": 1, "fingerprints": {}}), {}, "version '9'"),
        (json.dumps({"version": "1", "tokens": 1, "fingerprints": {"a": ""}}), {}, "lacks the statistics of a"),
        (
            json.dumps({"version": "1", "tokens": 1, "fingerprints": {"a": ""}}),
            {"a.moment": torch.zeros(2, 3), "a.channels": torch.zeros(3)},
            "wrong shape or dtype",
        ),
        (
            json.dumps({"version": "1", "tokens": 1, "fingerprints": {"a": ""}}),
            {"a.moment": torch.full((2, 2), torch.nan).double(), "a.channels": torch.zeros(3).double()},
            "NaN",
        ),
    ],
)
def test_a_file_that_is_none_is_refused(
    adapter: Adapter, tmp_path: Path, stated: str | None, tensors: dict[str, torch.Tensor], message: str
) -> None:
    path = tmp_path / "stats.safetensors"
    save_file(tensors or {"x": torch.zeros(1)}, path, {} if stated is None else {KEY: stated})
    with pytest.raises(InputError, match=message):
        load_statistics(path, adapter)
