"""Logits at answers alone are those of the whole texts, whether or not a model can be told where to run its head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from training.tiny import tiny_llama

from loratools.training.agreement import agreement_of, answer_logits

ROWS = [([5, 9, 2, 7, 11], 2), ([3, 4], 1), ([8, 1, 6, 10, 12, 13, 2], 5)]  # ids, and how many are the prompt's


@pytest.mark.parametrize("told", [True, False])
def test_logits_of_answers(told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    places: list[int] = []
    model.lm_head.register_forward_hook(lambda _, args, out: places.append(out.shape[:-1].numel()))
    if not told:
        monkeypatch.setattr("loratools.training.agreement._runs_head_at", lambda _: False)
    logits, wanted, row = answer_logits(model, ROWS, "cpu")

    assert places == [6 if told else 3 * 7]
    assert wanted.tolist() == [2, 7, 11, 4, 13, 2]
    assert row.tolist() == [0, 0, 0, 1, 2, 2]
    torch.testing.assert_close(logits, torch.cat([_alone(model, ids)[start - 1 : -1] for ids, start in ROWS]))


def test_agreement_is_that_of_single_tokens() -> None:
    """One row is made of what the model itself would say, so that something agrees."""
    model = tiny_llama()
    own = [5, 9]
    for _ in range(3):
        own.append(int(_alone(model, own)[-1].argmax()))
    rows = [*ROWS, (own, 2), ([*own[:3], (own[3] + 1) % 256], 2)]
    nll, right, whole = [], [], []
    with torch.no_grad():
        for ids, start in rows:
            logs = _alone(model, ids).double().log_softmax(-1)
            nll += [-float(logs[i - 1, ids[i]]) for i in range(start, len(ids))]
            hits = [int(logs[i - 1].argmax()) == ids[i] for i in range(start, len(ids))]
            right, whole = right + hits, [*whole, all(hits)]
    found = agreement_of(model, rows, batch=2, device="cpu")
    assert found.nll == pytest.approx(sum(nll) / len(nll), rel=1e-5)
    assert found.tokens == sum(right) / len(right) > 0
    assert found.answers == sum(whole) / len(whole) == 1 / 5


def _alone(model: Any, ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return logits
