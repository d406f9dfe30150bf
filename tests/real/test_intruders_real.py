"""Intruder dimensions of adapters that were really trained, against counts made by dense SVDs elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from real.smollm2 import ADAPTERS, RealModel, load_real_model, missing, recorded

import loratools

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> RealModel:
    if reason := missing():
        pytest.skip(reason)
    return load_real_model(tmp_path_factory.mktemp("base"), n_rows=1)


@pytest.mark.parametrize(("name", "least"), [("en_lora_r8", 0), ("en_lora_r8_hot", 100)])
def test_the_counts_are_those_of_dense_svds(real: RealModel, name: str, least: int) -> None:
    report = loratools.intruders(loratools.load(ADAPTERS / name), real.weights, sweep=True)
    assert report.total["targets"] == 210
    assert report.total["left"] >= least
    known = recorded("measure_intruder.json")[name]
    for side in ("left", "right"):
        for epsilon, count in known[side].items():
            if epsilon in report.sweep:
                assert report.sweep[epsilon][side] == pytest.approx(count, abs=max(1, 0.01 * count)), (side, epsilon)


def test_bounds_agree_with_whole_bases(real: RealModel, tmp_path: Path) -> None:
    """Both sides of 210 matrices: 4200 singular vectors."""
    adapter = loratools.load(ADAPTERS / "en_lora_r8_hot")
    cache = loratools.Cache(tmp_path)
    dense = loratools.intruders(adapter, real.weights, search=loratools.Search("dense", cache))
    certified = loratools.intruders(adapter, real.weights, search=loratools.Search("certified"))
    assert certified.total["certified"] > 100
    for name, found in certified.targets.items():
        for mine, true in ((found.left, dense.targets[name].left), (found.right, dense.targets[name].right)):
            assert mine.indices == true.indices, name
            for least, most, cosine in zip(mine.min_cosine, mine.max_cosine, true.max_cosine, strict=True):
                assert least - 1e-3 <= cosine <= most + 1e-3, name
    assert len(cache.entries()) == 210
    again = loratools.intruders(adapter, real.weights, search=loratools.Search(cache=cache))
    assert {n: t.left.indices for n, t in again.targets.items()} == {
        n: t.left.indices for n, t in dense.targets.items()
    }
