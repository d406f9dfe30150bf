"""The training loop, on tiny models: what it learns, when it stops, and that it goes on where it was killed."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training.tiny import load_tiny_model, save_tiny_model, tiny_llama

from loratools.errors import AdapterError, UsageError
from loratools.training.distil import Teacher, Train, TrainRow, agreement, settled, train_rows
from loratools.training.losses import cross_entropy
from loratools.training.models import load_model
from loratools.training.new_adapter import Method, NewAdapter, new_adapter
from loratools.training.prompts import encoded

ROWS = [TrainRow(f"{a}{b}: ", f"{b}{a}") for a in "abcd" for b in "efgh"]
TASK = Train(steps=24, learning_rate=2e-2, batch=4, every=6, seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "base")


def loaded(folder: Path, method: Method = "lora") -> tuple[Any, Any]:
    model, tokenizer = load_tiny_model(folder)
    return new_adapter(model, NewAdapter(method, rank=4), seed=5), tokenizer


def factors(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_it_learns_and_twice_the_same(folder: Path, method: Method) -> None:
    made = []
    for _ in range(2):
        model, tokenizer = loaded(folder, method)
        before = agreement(model, tokenizer, ROWS[12:], TASK)
        torch.rand(3)  # what else is drawn changes nothing
        trained = train_rows(model, tokenizer, ROWS[:12], TASK, held_out=ROWS[12:])
        after = agreement(model, tokenizer, ROWS[12:], TASK)
        assert after.nll < before.nll - 0.3
        assert trained.losses[-1] < trained.losses[0]
        assert after == max(trained.looks, key=lambda look: look.quality).held_out
        made.append(factors(model))
    assert same(*made)


def test_weights_are_those_of_rows(folder: Path) -> None:
    """The first step's loss is the mean of all tokens' losses, each counted as its row."""
    rows = [TrainRow("ab: ", "abc", 0.5), TrainRow("b: ", "d", 2.0), TrainRow("ccc: ", "efghi", 1.0)]
    model, tokenizer = loaded(folder)
    total = weights = 0.0
    for row in rows:
        ids, start = encoded(tokenizer, row.prompt, row.answer)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].double()
        for i in range(start, len(ids)):
            total -= row.weight * float(torch.log_softmax(logits[i - 1], 0)[ids[i]])
            weights += row.weight
    trained = train_rows(model, tokenizer, rows, Train(steps=1, batch=3))
    assert trained.losses[0] == pytest.approx(total / weights, rel=1e-5)
    dropped, tokenizer = loaded(folder)
    kept, _ = loaded(folder)
    some = [*rows, TrainRow("x", "never", 0.0)]
    train_rows(dropped, tokenizer, some, Train(steps=3, batch=3))
    train_rows(kept, tokenizer, rows, Train(steps=3, batch=3))
    assert same(factors(dropped), factors(kept))


@pytest.mark.parametrize("killed_after", [1, 6, 7, 13, 24])
def test_a_killed_run_goes_on_to_the_same_result(folder: Path, tmp_path: Path, killed_after: int) -> None:
    class KilledError(Exception):
        pass

    whole, tokenizer = loaded(folder)
    expected = train_rows(whole, tokenizer, ROWS[:12], TASK, held_out=ROWS[12:])
    steps = 0

    def count(_: int) -> None:
        nonlocal steps
        steps += 1
        if steps == killed_after:
            raise KilledError

    model, _ = loaded(folder)
    with pytest.raises(KilledError):
        train_rows(model, tokenizer, ROWS[:12], TASK, held_out=ROWS[12:], checkpoint=tmp_path / "state.pt", step=count)
    model, _ = loaded(folder)
    found = train_rows(model, tokenizer, ROWS[:12], TASK, held_out=ROWS[12:], checkpoint=tmp_path / "state.pt")
    assert found.losses == expected.losses
    assert found.looks == expected.looks
    assert (found.best_step, found.tokens) == (expected.best_step, expected.tokens)
    assert same(factors(model), factors(whole))
    other, _ = loaded(folder)
    again = train_rows(other, tokenizer, ROWS[:11], TASK, checkpoint=tmp_path / "state.pt")  # another run's file
    assert len(again.losses) == TASK.steps
    assert again.losses != found.losses


def test_a_checkpoint_of_something_else_is_none(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "state.pt"
    model, tokenizer = loaded(folder)
    expected = train_rows(model, tokenizer, ROWS, replace(TASK, steps=6), checkpoint=place).losses
    larger, tokenizer = load_model(folder)
    tokenizer.eos_token = "~"
    wide = new_adapter(larger, NewAdapter("lora", rank=6), seed=5)
    assert len(train_rows(wide, tokenizer, ROWS, replace(TASK, steps=6), checkpoint=place).losses) == 6
    for junk in (b"", b"junk" * 9, pickle.dumps([1]), pickle.dumps(Path)):
        place.write_bytes(junk)
        model, tokenizer = loaded(folder)
        assert train_rows(model, tokenizer, ROWS, replace(TASK, steps=6), checkpoint=place).losses == expected


def test_it_stops_when_agreement_grows_no_more(folder: Path) -> None:
    model, tokenizer = loaded(folder)
    wrong = [TrainRow(row.prompt, "zzzz") for row in ROWS]
    how = Train(steps=40, learning_rate=2e-2, batch=4, every=2, patience=2)
    before = factors(model)
    trained = train_rows(model, tokenizer, wrong, how, held_out=[TrainRow(r.prompt, "\\\\") for r in ROWS])
    assert trained.stopped_early
    assert len(trained.losses) == trained.best_step + 4
    if trained.best_step == 0:
        assert same(factors(model), before)


def test_a_teacher_of_the_same_vocabulary(folder: Path) -> None:
    """With only the divergence, a student comes nearer to a teacher that says other than the rows do."""
    model, tokenizer = loaded(folder)
    teacher = Teacher(tiny_llama(seed=9), tokenizer)
    how = Train(loss="kl", hard=0.0, steps=30, learning_rate=2e-2, batch=4)
    trained = train_rows(model, tokenizer, ROWS, how, teacher=teacher)
    assert trained.losses[-1] < 0.5 * trained.losses[0]
    with pytest.raises(UsageError, match="teacher="):
        train_rows(model, tokenizer, ROWS, how)


def test_probabilities_are_learnt_unasked_where_answers_are_written_alike(folder: Path) -> None:
    _, tokenizer = loaded(folder)
    _, other = loaded(folder)
    assert settled(Train(), tokenizer, None).loss == "ce"
    assert settled(Train(), tokenizer, other).loss == "kl"
    assert settled(Train("ce"), tokenizer, other).loss == "ce"
    other.eos_token = "z"
    assert settled(Train(), tokenizer, other).loss == "ce"
    _, wider = loaded(folder)
    wider.add_tokens(["new"])
    assert settled(Train(), tokenizer, wider).loss == "ce"


def test_loss_of_two_parts(folder: Path) -> None:
    rows = ROWS[:3]
    model, tokenizer = loaded(folder)
    teacher = Teacher(tiny_llama(seed=9), tokenizer)
    hard, soft = 0.0, 0.0
    tokens = 0
    for row in rows:
        ids, start = encoded(tokenizer, row.prompt, row.answer)
        with torch.no_grad():
            said = model(input_ids=torch.tensor([ids])).logits[0].double()
            meant = teacher.model(input_ids=torch.tensor([ids])).logits[0].double()
        for i in range(start, len(ids)):
            hard -= float(torch.log_softmax(said[i - 1], 0)[ids[i]])
            p, q = torch.softmax(meant[i - 1] / 3, 0), torch.softmax(said[i - 1] / 3, 0)
            soft += 9 * float((p * (p / q).log()).sum())
            tokens += 1
    expected = (0.25 * hard + 0.75 * soft) / tokens
    how = Train(loss="kl", hard=0.25, temperature=3.0, steps=1, batch=3)
    assert train_rows(model, tokenizer, rows, how, teacher=teacher).losses[0] == pytest.approx(expected, rel=1e-4)
    model, _ = loaded(folder)
    found = train_rows(model, tokenizer, rows, Train(loss="uld", steps=1, batch=3), teacher=teacher).losses[0]
    distance = 0.0
    for row in rows:
        ids, start = encoded(tokenizer, row.prompt, row.answer)
        with torch.no_grad():
            said = torch.softmax(model.get_base_model()(input_ids=torch.tensor([ids])).logits[0].double(), -1)
            meant = torch.softmax(teacher.model(input_ids=torch.tensor([ids])).logits[0].double(), -1)
        for i in range(start, len(ids)):
            distance += float((said[i - 1].sort().values - meant[i - 1].sort().values).abs().sum())
    assert found == pytest.approx(0.5 * (hard + distance) / tokens, rel=2e-2)  # the model moved by a step of 5e-5


def test_a_row_may_be_longer_to_the_student_than_the_teacher_has_room_for(folder: Path) -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pairs = Tokenizer(models.WordLevel({"?": 0, "aa": 1, "bb": 2}, unk_token="?"))
    pairs.pre_tokenizer = pre_tokenizers.Split(Regex(".."), "isolated")
    teacher = Teacher(tiny_llama(seed=9), PreTrainedTokenizerFast(tokenizer_object=pairs, unk_token="?"))
    model, tokenizer = loaded(folder)
    rows = [TrainRow("a" * 20, "b" * 10), TrainRow("a" * 2, "b" * 2)]
    for room, told in ((20, ()), (10, ("1 rows are longer than 10 tokens to the teacher and were left out",))):
        teacher.model.config.max_position_embeddings = room
        trained = train_rows(model, tokenizer, rows, Train(loss="uld", steps=1, batch=2), teacher=teacher)
        assert trained.warnings == told


def test_what_cannot_be_trained(folder: Path) -> None:
    model, tokenizer = loaded(folder)
    with pytest.raises(UsageError, match="no rows"):
        train_rows(model, tokenizer, [], TASK)
    with pytest.raises(UsageError, match="at most 3 tokens"):
        train_rows(model, tokenizer, ROWS, Train(max_tokens=3))
    with pytest.raises(AdapterError, match="trainable"):
        train_rows(tiny_llama().requires_grad_(False), tokenizer, ROWS, TASK)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(AdapterError, match="step 1"):
        train_rows(model, tokenizer, ROWS, TASK)
    with pytest.raises(UsageError, match="batch"):
        Train(batch=0)
    with pytest.raises(UsageError, match="rank"):
        NewAdapter(rank=0)
    warned = train_rows(loaded(folder)[0], tokenizer, [*ROWS, TrainRow("p", "a" * 60)], Train(steps=1, max_tokens=20))
    assert "1 rows are longer" in warned.warnings[0]
    assert cross_entropy(torch.zeros(1, 4), torch.tensor([0]), torch.ones(1)) > 0
