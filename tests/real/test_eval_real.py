"""`loratools eval` on a real model, against other code that evaluates, and what that wrote down of all rows."""

from __future__ import annotations

import pytest
from real.smollm2 import ADAPTERS, RealModel, load_real_model, missing, recorded

from loratools import load, squeeze
from loratools.training.evaluate import Evaluate
from loratools.training.task import Candidate, Measuring, read_task, run_task

N_ROWS = 32
MAX_TOKENS = 44  # as the other code has it

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> RealModel:
    if reason := missing():
        pytest.skip(reason)
    return load_real_model(tmp_path_factory.mktemp("base"), n_rows=N_ROWS)


def test_it_agrees_with_other_code_and_with_what_was_recorded(real: RealModel) -> None:
    adapter = load(ADAPTERS / "en_lora_r8")
    task = read_task(ADAPTERS / "data" / "numwords_en_eval.jsonl", limit=N_ROWS)
    report = run_task(
        real.model,
        real.tokenizer,
        task,
        [Candidate("whole", lambda: adapter), Candidate("rank 1", lambda: squeeze(adapter, 1)[0])],
        options=Evaluate(max_tokens=MAX_TOKENS),
        measuring=Measuring(calibration=True, bins=5),
    )
    whole, low = report.runs
    print({name: (e.value, e.low, e.high) for name, e in whole.measures.items()})
    assert whole.measures["nll"].value == pytest.approx(real.nll(adapter), rel=1e-4)
    assert whole.measures["exact_match"].value == real.exact_match(adapter)
    match = whole.measures["exact_match"]
    margin = (match.high - match.low) / 4  # with it three standard errors to either side
    of_all = recorded("metrics.json")["trained"]["en_lora_r8"]["eval"]["exact_match"]  # of 256 rows
    assert match.low - margin <= of_all <= match.high + margin
    assert whole.measures["confidence"].value > 0.3
    assert low.differences["nll"].low > 0  # surely worse: in pairs the few rows are enough


def test_the_likelihood_is_what_was_recorded(real: RealModel) -> None:
    adapter = load(ADAPTERS / "en_lora_r8")
    task = read_task(ADAPTERS / "data" / "numwords_en_eval.jsonl", "nll", 96)
    report = run_task(real.model, real.tokenizer, task, [Candidate("whole", lambda: adapter)])
    assert report.runs[0].measures["nll"].value == pytest.approx(
        recorded("measure_squeeze.json")["r8_trained"]["nll"], abs=0.002
    )
