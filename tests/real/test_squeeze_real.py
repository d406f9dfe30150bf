"""Squeezing a trained adapter keeps what it learned: measured with the model it was trained on."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from real.smollm2 import ADAPTERS, RealModel, load_real_model, missing, recorded

from loratools import Budget, Squeeze, load, squeeze, squeeze_file, truncate

RANKS = (1, 2, 4, 8, 16, 32)
N_ROWS = 96  # as in measure_squeeze.json, so that the numbers can be compared; a standard error of exact match is 0.045
NOISE = 0.002  # nats: what bf16 factors and another order of summation may change

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> RealModel:
    if reason := missing():
        pytest.skip(reason)
    return load_real_model(tmp_path_factory.mktemp("base"), n_rows=N_ROWS)


@pytest.fixture(scope="module")
def full(real: RealModel) -> float:
    return real.nll(load(ADAPTERS / "en_lora_r64"))


@pytest.fixture(scope="module")
def squeezed(real: RealModel) -> dict[int, float]:
    adapter = load(ADAPTERS / "en_lora_r64")
    return {rank: real.nll(squeeze(adapter, rank)[0]) for rank in RANKS}


def test_the_adapter_as_trained_does_what_was_recorded(real: RealModel, full: float) -> None:
    assert real.nll() > 2.5  # the base alone cannot do the task
    assert full == pytest.approx(recorded("measure_squeeze.json")["r64_full"]["nll"], abs=NOISE)


def test_more_rank_is_never_worse(full: float, squeezed: dict[int, float]) -> None:
    losses = [squeezed[rank] for rank in RANKS] + [full]
    assert all(higher <= lower + NOISE for lower, higher in pairwise(losses)), losses
    assert squeezed[1] > full + 0.05  # the test would notice if nothing had been squeezed


@pytest.mark.parametrize("rank", RANKS)
def test_every_rank_is_as_good_as_an_independent_svd(squeezed: dict[int, float], rank: int) -> None:
    assert squeezed[rank] == pytest.approx(recorded("measure_squeeze.json")[f"svd_r{rank}"]["nll"], abs=NOISE)


def test_rank_8_keeps_the_task(real: RealModel, full: float, squeezed: dict[int, float]) -> None:
    """Recorded: 0.0648 at rank 64, 0.0706 squeezed to 8, 0.0734 trained at 8, 1.183 with the first 8 components."""
    prefix = real.nll(truncate(load(ADAPTERS / "en_lora_r64"), 8)[0])
    direct = real.nll(load(ADAPTERS / "en_lora_r8"))
    assert squeezed[8] < full + 0.01
    assert squeezed[8] < direct + 0.005
    assert squeezed[8] < prefix / 10


def test_rank_8_answers_word_for_word(real: RealModel) -> None:
    """Recorded: 0.76 squeezed, 0.74 trained at rank 8, 0.81 at rank 64, none for the first 8 components."""
    adapter = load(ADAPTERS / "en_lora_r64")
    assert real.exact_match(squeeze(adapter, 8)[0]) > 0.65
    assert real.exact_match(truncate(adapter, 8)[0]) < 0.05


def test_a_budget_is_no_worse_than_the_same_bytes_spent_evenly(
    real: RealModel, squeezed: dict[int, float], tmp_path: Path
) -> None:
    adapter = load(ADAPTERS / "en_lora_r64")
    uniform, _ = squeeze_file(adapter, tmp_path / "uniform", 4)
    saved, _ = squeeze_file(adapter, tmp_path / "budget", Budget(uniform.nbytes))
    assert saved.nbytes <= uniform.nbytes
    assert real.nll(load(saved.path)) < squeezed[4] + 0.02  # less error in the weights promises nothing for the task


def test_peft_runs_the_squeezed_file(real: RealModel, squeezed: dict[int, float], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    saved, _ = squeeze_file(load(ADAPTERS / "en_lora_r64"), tmp_path / "r8", 8)
    wrapped = peft.PeftModel.from_pretrained(real.model, saved.path)
    try:
        import evaluate

        assert evaluate.eval_nll(wrapped, real.tokenizer, real.rows) == pytest.approx(squeezed[8], abs=NOISE)
    finally:
        wrapped.unload()


def test_dora_keeps_the_task_at_half_its_rank(real: RealModel) -> None:
    adapter = load(ADAPTERS / "en_dora_r16")
    before = real.nll(adapter)
    assert before == pytest.approx(recorded("metrics.json")["trained"]["en_dora_r16"]["eval"]["nll"], abs=NOISE)
    half, report = squeeze(adapter, 8, options=Squeeze(base=real.weights))
    assert report.total["changed"] == len(adapter)
    assert real.nll(half) < before + 0.01
