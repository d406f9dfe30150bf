"""What a squeeze takes from a trained adapter, a few steps bring back in part."""

from __future__ import annotations

from pathlib import Path

import pytest
from real.smollm2 import ADAPTERS, load_real_model, missing

from loratools import load, squeeze
from loratools.training.recover import Recover, read_train_rows, recover

STEPS, N_ROWS = 10, 48

pytestmark = pytest.mark.real


def test_a_few_steps_lower_the_loss_of_a_squeezed_adapter(tmp_path: Path) -> None:
    if reason := missing():
        pytest.skip(reason)
    real = load_real_model(tmp_path, n_rows=N_ROWS)
    whole = load(ADAPTERS / "en_lora_r64")
    small, _ = squeeze(whole, 2)
    before, full = real.nll(small), real.nll(whole)
    rows = read_train_rows(ADAPTERS / "data" / "numwords_en_train.jsonl", STEPS * 8)
    how = Recover(steps=STEPS, learning_rate=1e-3, held_out=0)
    recover(real.model, real.tokenizer, small, rows, tmp_path / "recovered", how)
    found = load(tmp_path / "recovered")
    after = load_real_model(tmp_path, n_rows=N_ROWS).nll(found)  # in a base without what was trained in the other
    print(f"whole {full:.4f}, squeezed {before:.4f}, after {STEPS} steps {after:.4f}")
    assert full < before
    assert after < before - 0.1 * (before - full)
    assert found.keys() == small.keys()
    assert max(entry.rank for entry in found.entries.values()) == 2
