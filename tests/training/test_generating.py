"""What ends an answer and what a model's own files may not change, against loops over single tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training.tiny import load_tiny_model, save_tiny_model
from transformers import BloomConfig, BloomForCausalLM, GenerationConfig

from loratools.errors import UsageError
from loratools.training.agreement import agreement_of
from loratools.training.choices import ChoiceRow, choice_scores
from loratools.training.distil import Train, TrainRow, train_rows
from loratools.training.evaluate import Evaluate, Row, answer_nll, replies
from loratools.training.generating import end_ids
from loratools.training.new_adapter import NewAdapter, new_adapter
from loratools.training.prompts import encoded
from loratools.training.transfer.label import _confidences
from loratools.training.transfer.sampling import Sampling, said

PROMPT, MOST = "ab: ", 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "base")


def greedy(model: Any, ids: list[int]) -> tuple[list[int], list[float]]:
    found, logs = list(ids), []
    for _ in range(MOST):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([found])).logits[0, -1].double()
        found.append(int(logits.argmax()))
        logs.append(float(torch.log_softmax(logits, 0).max()))
    return found[len(ids) :], logs


def test_penalties_of_the_models_own_change_no_answer(folder: Path) -> None:
    model, tokenizer = load_tiny_model(folder)
    expected, logs = greedy(model, tokenizer(PROMPT).input_ids)
    assert len(set(expected)) < MOST  # what repeats could be penalised
    own = GenerationConfig(repetition_penalty=5.0, no_repeat_ngram_size=1)
    model.generation_config = own
    (reply,) = replies(model, tokenizer, [Row(PROMPT, "x")], options=Evaluate(max_tokens=MOST))
    assert reply is not None
    assert reply.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert reply.confidence == pytest.approx(float(torch.tensor(logs).sum().exp()), rel=1e-4)
    assert model.generation_config is own


def test_an_answer_ends_with_any_of_the_models_ends(folder: Path) -> None:
    model, tokenizer = load_tiny_model(folder)
    ids = tokenizer(PROMPT).input_ids
    expected, logs = greedy(model, ids)
    place = next(i for i in range(1, MOST) if expected[i] not in expected[:i])
    end = expected[place]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end]
    assert end_ids(model, tokenizer) == [tokenizer.eos_token_id, end]
    (answer,) = said(model, tokenizer, [ids], Sampling(temperature=0.0), max_tokens=MOST, device="cpu")
    assert (list(answer.ids), answer.ended, answer.end) == (expected[:place], True, end)
    (sure,) = _confidences(model, [ids], [answer], "cpu")
    assert sure == pytest.approx(float(torch.tensor(logs[: place + 1]).mean().exp()), rel=1e-4)
    (reply,) = replies(model, tokenizer, [Row(PROMPT, "x")], options=Evaluate(max_tokens=MOST))
    assert reply is not None
    assert reply.text.startswith(tokenizer.decode(expected[:place], skip_special_tokens=True))
    assert len(reply.text) <= place + 1
    assert reply.confidence == pytest.approx(float(torch.tensor(logs[: place + 1]).sum().exp()), rel=1e-4)


def test_answers_end_where_the_model_has_no_more_room(folder: Path) -> None:
    model, tokenizer = load_tiny_model(folder)  # of 64 positions
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    taken: list[object] = []
    replies(
        model,
        tokenizer,
        [Row("a" * 60, "b"), Row("a" * 10, "b")],
        options=Evaluate(max_tokens=MOST),
        step=taken.append,
    )
    assert taken == [10 + MOST, 64]
    with pytest.raises(UsageError, match="a prompt of 64 tokens leaves no room"):
        replies(model, tokenizer, [Row("a" * 64, "b")])
    with pytest.raises(UsageError, match="65 tokens is too long: the model has room for 64"):
        agreement_of(model, [encoded(tokenizer, "a" * 60, "b" * 5)], batch=1, device="cpu")
    taken.clear()
    with pytest.raises(UsageError, match=r"row 2: is too long, 65 tokens: the model has room for 64; shorten"):
        answer_nll(
            model, tokenizer, [Row("a", "b"), Row("a" * 60, "b" * 5)], options=Evaluate(batch=1), step=taken.append
        )
    quiz = [ChoiceRow("a", ("b", "c"), 0), ChoiceRow("a" * 60, ("b", "b" * 5), 0)]
    with pytest.raises(UsageError, match=r"row 2: is too long, 65 tokens"):
        choice_scores(model, tokenizer, quiz, options=Evaluate(batch=1), step=taken.append)
    assert not taken  # it is said before the others are read
    assert answer_nll(model, tokenizer, [Row("a" * 60, "b" * 4)])[1] == 4


def test_training_leaves_out_what_there_is_no_room_for(folder: Path) -> None:
    model, tokenizer = load_tiny_model(folder)
    adapted = new_adapter(model.requires_grad_(False), NewAdapter(rank=2))
    rows = [TrainRow("a" * n, "b" * 4) for n in (10, 59, 60)]  # with an end token
    trained = train_rows(adapted, tokenizer, rows, Train(steps=1, batch=3), held_out=rows[2:])
    assert trained.warnings == (
        "1 rows are longer than 64 tokens and were left out",
        "1 held-out rows are longer than 64 tokens and were left out",
    )
    trained = train_rows(adapted, tokenizer, [*rows[:2], TrainRow("", "a"), TrainRow("a", "b", 0.0)], Train(steps=1))
    assert trained.warnings == ("1 rows have no token that could be foretold and were left out",)


def test_a_config_that_states_no_room_sets_no_limit(folder: Path) -> None:
    """Bloom knows places by their distance."""
    _, tokenizer = load_tiny_model(folder)
    model = BloomForCausalLM(BloomConfig(vocab_size=256, hidden_size=16, n_layer=1, n_head=2)).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    taken: list[object] = []
    replies(model, tokenizer, [Row("a" * 70, "b")], options=Evaluate(max_tokens=MOST), step=taken.append)
    assert taken == [70 + MOST]
    assert answer_nll(model, tokenizer, [Row("a" * 70, "b")])[1] == 1
