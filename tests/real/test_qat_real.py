"""A trained adapter does not survive one bit; a few dozen steps of training while it is rounded bring it back."""

from __future__ import annotations

import random
import time
from functools import partial
from typing import Any

import pytest
import torch
from real.smollm2 import ADAPTERS, RealModel, load_real_model, missing

from loratools.quant.petl import fake_quantise
from loratools.training.qat import Quantiser, quantization_aware, quantization_aware_steps, rounding

STEPS, BATCH, N_ROWS = 36, 8, 64

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> RealModel:
    if reason := missing():
        pytest.skip(reason)
    return load_real_model(tmp_path_factory.mktemp("base"), n_rows=N_ROWS)


def trained_batches(real: RealModel) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    import evaluate

    rows = evaluate.read_rows(ADAPTERS / "data" / "numwords_en_train.jsonl")
    random.Random(1).shuffle(rows)
    encoded = [evaluate.encode(real.tokenizer, row) for row in rows[: STEPS * BATCH]]
    return [evaluate.collate(real.tokenizer, encoded[i : i + BATCH]) for i in range(0, len(encoded), BATCH)]


def answer_loss(model: Any, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    import evaluate

    found: torch.Tensor = evaluate.answer_loss(model, *batch)[0]
    return found


@pytest.mark.parametrize("quantise", [rounding("sign", 1), partial(fake_quantise, bits=1)], ids=["sign", "petl"])
def test_one_bit_is_brought_back_by_training(real: RealModel, quantise: Quantiser) -> None:
    import evaluate
    import peft

    model = peft.PeftModel.from_pretrained(real.model, ADAPTERS / "en_lora_r8", is_trainable=True)
    try:
        state = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

        def nll() -> float:
            return float(evaluate.eval_nll(model, real.tokenizer, real.rows))

        full = nll()
        with quantization_aware(model, quantise):
            pass
        rounded = nll()
        model.load_state_dict(state, strict=False)
        began = time.perf_counter()
        report = quantization_aware_steps(
            model, trained_batches(real), quantise, steps=STEPS, learning_rate=1e-3, loss=answer_loss
        )
        seconds, after = time.perf_counter() - began, nll()
        print(f"full {full:.4f}, rounded {rounded:.4f}, trained {after:.4f}; {STEPS} steps in {seconds:.0f} s")
        assert len(report.factors) == 2 * 7 * 30
        assert full < 0.1
        assert rounded > full + 0.05
        assert after < full + 0.3 * (rounded - full)
        for name in report.factors:
            weight = model.get_parameter(name)
            rows = weight.T if "lora_B" in name else weight
            assert all(len(row.unique()) <= 2 for row in rows), name
    finally:
        model.unload()
