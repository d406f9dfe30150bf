"""Intruder dimensions of adapters that were really trained, against counts made by dense SVDs elsewhere."""

from __future__ import annotations

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
    report = loratools.intruders(loratools.load(ADAPTERS / name), real.weights)
    assert report.total["targets"] == 210
    assert report.total["left"] >= least
    known = recorded("measure_intruder.json")[name]
    for side in ("left", "right"):
        for epsilon, count in known[side].items():
            if epsilon in report.sweep:
                assert report.sweep[epsilon][side] == pytest.approx(count, abs=max(1, 0.01 * count)), (side, epsilon)
