"""Tasks on a tiny model, against loops over single rows, and against each other."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training.tiny import save_tiny_lora, save_tiny_model

from loratools import aurac, load, squeeze, truncate
from loratools.adapter import Adapter
from loratools.errors import AdapterError, InputError, UsageError
from loratools.training.applied import applied
from loratools.training.choices import ChoiceRow, choice_scores, read_choices, shared_classes
from loratools.training.cut import at_ranks
from loratools.training.evaluate import Evaluate, Row, evaluate, replies
from loratools.training.models import load_model
from loratools.training.task import Candidate, Measuring, Task, read_task, run_task

ROWS = [
    Row("one", " two"),
    Row("three", " four five"),
    Row("abc", "d"),
    Row("six seven", " eight"),
    Row("", "no prompt"),
]
QUIZ = [
    ChoiceRow("a plus b", (" c", " dd", " eee"), 1),
    ChoiceRow("what", (" so", " not"), 0),
    ChoiceRow("x", ("yes", "no", "maybe"), 2),
    ChoiceRow("long prompt here", (" 1", " 22"), 1),
]
FAST = Measuring(resamples=50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return load(save_tiny_lora(tmp_path_factory.mktemp("lora") / "adapter", rank=8))


@pytest.fixture
def loaded(folder: Path) -> tuple[Any, Any]:
    model, tokenizer = load_model(folder)
    tokenizer.eos_token = "~"
    return model, tokenizer


def naive_score(model: Any, tokenizer: Any, prompt: str, choice: str) -> tuple[float, int]:
    asked, ids = tokenizer(prompt).input_ids, tokenizer(choice).input_ids
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([asked + ids])).logits[0].double()
    each = [float(torch.log_softmax(logits[len(asked) + i - 1], 0)[token]) for i, token in enumerate(ids)]
    return sum(each), len(ids)


@pytest.mark.parametrize("normalise", ["none", "tokens", "bytes"])
def test_scores_of_choices_are_those_of_a_loop(loaded: tuple[Any, Any], normalise: Any) -> None:
    scores, tokens = choice_scores(*loaded, QUIZ, options=Evaluate(batch=3), normalise=normalise)
    assert scores.shape == (4, 3)
    count = 0
    for i, row in enumerate(QUIZ):
        for j, choice in enumerate(row.choices):
            total, n = naive_score(*loaded, row.prompt, choice)
            count += n
            expected = total / {"none": 1, "tokens": n, "bytes": len(choice.encode())}[normalise]
            assert scores[i, j] == pytest.approx(expected, rel=1e-4)
        assert all(np.isneginf(scores[i, len(row.choices) :]))
    assert tokens == count


def test_choices_are_judged(loaded: tuple[Any, Any]) -> None:
    report = run_task(*loaded, Task("choice", choices=QUIZ), [Candidate("none", lambda: None)], measuring=FAST)
    (run,) = report.runs
    scores = [[naive_score(*loaded, row.prompt, c)[0] for c in row.choices] for row in QUIZ]
    right = [max(range(len(s)), key=s.__getitem__) == row.answer for s, row in zip(scores, QUIZ, strict=True)]
    assert run.measures["accuracy"].value == sum(right) / 4
    losses = [math.log(sum(map(math.exp, s))) - s[row.answer] for s, row in zip(scores, QUIZ, strict=True)]
    assert run.measures["nll"].value == pytest.approx(sum(losses) / 4, rel=1e-4)
    assert run.differences == {}
    assert any("4 rows are few" in warning for warning in report.warnings)


def quiz(n: int, *, shared: bool) -> list[ChoiceRow]:
    own = (" up", " down", " left")
    return [ChoiceRow(f"turn {i}", own if shared or i else (" in", *own[1:]), i * 7 % 3) for i in range(n)]


def test_calibration_of_choices(loaded: tuple[Any, Any], adapter: Adapter) -> None:
    how = replace(FAST, calibration=True)
    both = [Candidate("none", lambda: None), Candidate("it", lambda: adapter)]
    report = run_task(*loaded, Task("choice", choices=quiz(20, shared=True)), both, measuring=how)
    names = ["accuracy", "nll", "ece", "mce", "classwise_ece", "ace_top", "ace_class", "tace", "brier"]
    for run in report.runs:
        assert list(run.measures) == list(run.scaled) == names
        assert all(e.low <= e.high for e in run.measures.values())
        assert run.temperature is not None
        assert (run.temperature.how, run.temperature.rows, len(run.temperature.values)) == ("crossfit", 20, 5)
        assert sum(b.count for b in run.bins) == 20
    base, other = report.runs
    for name in names:
        assert other.differences[name].value == pytest.approx(other.measures[name].value - base.measures[name].value)
    split = run_task(
        *loaded, Task("choice", choices=quiz(20, shared=False)), both[:1], measuring=replace(how, temperature="split")
    )
    assert split.runs[0].temperature is not None
    assert split.runs[0].temperature.rows == 10
    assert "classwise_ece" not in split.runs[0].measures
    assert any("classwise_ece and ace_class" in warning for warning in split.warnings)
    bare = run_task(
        *loaded, Task("choice", choices=quiz(20, shared=True)), both[:1], measuring=replace(how, temperature="none")
    )
    assert bare.runs[0].temperature is None
    assert bare.runs[0].scaled == {}


def test_answers_agree_with_evaluate_and_the_confidence_is_that_of_a_loop(
    loaded: tuple[Any, Any], adapter: Adapter
) -> None:
    model, tokenizer = loaded
    how = Evaluate(max_tokens=4, batch=2)
    said = [reply for reply in replies(model, tokenizer, ROWS, options=how) if reply is not None]
    assert len(said) == 4
    for row, reply in zip(ROWS, said, strict=False):
        ids = list(tokenizer(row.prompt).input_ids)
        product = 1.0
        for _ in range(4):
            with torch.no_grad():
                p = model(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(0)
            product *= float(p.max())
            ids.append(int(p.argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert reply.confidence == pytest.approx(product, rel=1e-4)
    right = [replace(row, answer=reply.text) for row, reply in zip(ROWS, said, strict=False)]
    rows = [right[0], *ROWS[1:]]
    report = run_task(
        model, tokenizer, Task("exact", rows), [Candidate("it", lambda: adapter), Candidate("none", lambda: None)],
        options=how, measuring=replace(FAST, calibration=True, bins=1),
    )  # fmt: skip
    for run, held in zip(report.runs, (adapter, None), strict=True):
        expected = evaluate(model, tokenizer, rows, held, options=how)
        assert run.measures["nll"].value == pytest.approx(expected.nll, rel=1e-12)
        assert run.measures["perplexity"].value == pytest.approx(math.exp(expected.nll))
        assert run.measures["exact_match"].value == expected.exact_match
        assert report.tokens == expected.tokens
    sure = [reply.confidence for reply in said]
    assert report.runs[1].measures["confidence"].value == pytest.approx(sum(sure) / 4)
    assert report.runs[1].measures["ece"].value == pytest.approx(abs(sum(sure) / 4 - 1 / 4))


def test_likelihood_alone_needs_no_answers(loaded: tuple[Any, Any]) -> None:
    steps: list[int] = []
    task = Task("nll", ROWS)
    report = run_task(
        *loaded, task, [Candidate("none", lambda: None)], options=Evaluate(batch=2), measuring=FAST, step=steps.append
    )
    assert list(report.runs[0].measures) == ["nll", "perplexity"]
    assert len(steps) == task.n_batches(loaded[1], Evaluate(batch=2)) == 3
    with pytest.raises(UsageError, match="no right and wrong"):
        run_task(*loaded, task, [Candidate("none", lambda: None)], measuring=Measuring(calibration=True))


@pytest.mark.parametrize("nested", [None, "keep", "dylora"])
def test_ranks_are_cut_and_averaged(loaded: tuple[Any, Any], adapter: Adapter, nested: Any) -> None:
    cuts, warnings = at_ranks(adapter, [1, 2, 4, 16], name="it", nested=nested)
    assert warnings == ["rank 16 is the adapter as it is: no target has more than 8"]
    whole = Candidate("it", lambda: adapter)
    report = run_task(*loaded, Task("nll", ROWS), [whole, *cuts], measuring=FAST)
    assert [run.rank for run in report.runs] == [None, 1, 2, 4, 16]
    expected = []
    for rank in (1, 2, 4):
        cut = squeeze(adapter, rank)[0] if nested is None else truncate(adapter, rank, nested=nested)[0]
        expected.append(evaluate(*loaded, ROWS, cut, options=Evaluate(match=False)).nll)
    expected.append(evaluate(*loaded, ROWS, adapter, options=Evaluate(match=False)).nll)
    assert [run.measures["nll"].value for run in report.runs[1:]] == pytest.approx(expected, rel=1e-9)
    assert report.aurac is not None
    assert report.aurac.measure == "nll"
    assert report.aurac.v1.value == pytest.approx(aurac([1, 2, 4, 16], expected, "linear"))
    assert report.aurac.v2.value == pytest.approx(aurac([1, 2, 4, 16], expected))
    assert report.aurac.v2.low <= report.aurac.v2.value <= report.aurac.v2.high
    assert report.runs[-1].differences["nll"] == replace(report.runs[-1].differences["nll"], value=0, low=0, high=0)


def test_shares_are_averaged_over_ranks_in_percent(loaded: tuple[Any, Any], adapter: Adapter) -> None:
    cuts, _ = at_ranks(adapter, [2, 4], name="it")
    report = run_task(*loaded, Task("choice", choices=QUIZ), cuts, measuring=FAST)
    scores = [run.measures["accuracy"].value for run in report.runs]
    assert report.aurac is not None
    assert report.aurac.v2.value == pytest.approx(50 * sum(scores))


@pytest.mark.parametrize("ranks", [[], [0, 2], [2, 2]])
def test_ranks_are_checked(adapter: Adapter, ranks: list[int]) -> None:
    with pytest.raises(UsageError, match="give different ranks of at least 1"):
        at_ranks(adapter, ranks, name="it")


@pytest.mark.parametrize("nested", [None, "keep"])
def test_at_its_own_rank_an_adapter_is_itself(adapter: Adapter, nested: Any) -> None:
    (cut,), warnings = at_ranks(adapter, [8], name="it", nested=nested)
    assert cut.make() is adapter
    assert len(warnings) == 1


def test_a_slice_without_its_scaling_is_refused_before_any_model_runs(adapter: Adapter) -> None:
    with pytest.raises(UsageError, match="pass --scaling none, rank or sqrt"):
        at_ranks(adapter, [1, 2], name="it", nested="matryoshka")
    assert len(at_ranks(adapter, [1, 2], name="it", nested="matryoshka", scaling="sqrt")[0]) == 2


def test_draws_without_a_prompt_have_no_match(loaded: tuple[Any, Any], adapter: Adapter) -> None:
    """Of four rows with one prompt every third draw or so has none."""
    rows = (Row("abc", "d"), Row("", "six"), Row("", "seven"), Row("", "eight"))
    cuts, _ = at_ranks(adapter, [1, 2], name="x")
    how = Measuring(calibration=True, resamples=30)
    report = run_task(*loaded, Task("exact", rows), cuts, options=Evaluate(max_tokens=3), measuring=how)
    assert report.aurac is not None
    for run in report.runs:
        assert run.measures["exact_match"].value == 0
        assert 0 <= run.measures["ece"].low <= run.measures["ece"].high <= 1
    assert (report.aurac.v2.value, report.aurac.v2.low, report.aurac.v2.high) == (0, 0, 0)


@pytest.mark.parametrize(
    "task", [Task("nll", (Row("abc", "d"),)), Task("choice", (), (ChoiceRow("q", ("a", "b"), 0),))]
)
def test_a_model_that_gives_no_numbers_is_not_measured(loaded: tuple[Any, Any], task: Task) -> None:
    """The likeliest of nothing would be the first choice."""
    model, tokenizer = loaded
    weight = model.model.norm.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(math.nan)
        with pytest.raises(AdapterError, match=r"row 1: the model gives no number \(NaN\) in torch.float32"):
            run_task(model, tokenizer, task, [Candidate("none", lambda: None)])
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_a_pipe_is_not_read_twice(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match=r"pipe is read once.*--metric"):
        read_task(tmp_path / "pipe")


def test_the_model_is_as_it_was(loaded: tuple[Any, Any], adapter: Adapter) -> None:
    model, tokenizer = loaded
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run_task(model, tokenizer, Task("nll", ROWS), [Candidate("it", lambda: adapter)], measuring=FAST)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    with applied(model, adapter):
        inside = run_task(model, tokenizer, Task("nll", ROWS), [Candidate("none", lambda: None)], measuring=FAST)
    again = run_task(model, tokenizer, Task("nll", ROWS), [Candidate("it", lambda: adapter)], measuring=FAST)
    assert inside.runs[0].measures == again.runs[0].measures


def test_tasks_are_read(tmp_path: Path) -> None:
    place = tmp_path / "rows.jsonl"
    place.write_text(
        '{"prompt": "a", "choices": ["x", "y"], "answer": "y"}\n'
        '{"prompt": "b", "choices": ["p", "q", "r"], "answer": 0}\n'
    )
    task = read_task(place)
    assert task == Task("choice", choices=[ChoiceRow("a", ("x", "y"), 1), ChoiceRow("b", ("p", "q", "r"), 0)])
    assert shared_classes(task.choices) is None
    place.write_text('{"prompt": "a", "answer": "b"}\n')
    assert read_task(place) == Task("exact", [Row("a", "b")])
    assert read_task(place, "nll").metric == "nll"
    place.write_text('{"prompt": "", "answer": "b"}\n')
    assert read_task(place).metric == "nll"


BAD = [
    ('{"choices": ["a", "b"], "answer": 0}', "has no prompt"),
    ('{"prompt": "", "choices": ["a", "b"], "answer": 0}', "has no prompt"),
    ('{"prompt": "p", "choices": ["a"], "answer": 0}', "has no two or more choices"),
    ('{"prompt": "p", "choices": ["a", 3], "answer": 0}', "has no two or more choices"),
    ('{"prompt": "p", "choices": ["a", "a"], "answer": 0}', "has the same choice twice"),
    ('{"prompt": "p", "choices": ["a", "b"], "answer": 2}', "none of its 2 choices"),
    ('{"prompt": "p", "choices": ["a", "b"], "answer": -1}', "none of its 2 choices"),
    ('{"prompt": "p", "choices": ["a", "b"], "answer": true}', "none of its 2 choices"),
    ('{"prompt": "p", "choices": ["a", "b"], "answer": "c"}', "none of its 2 choices"),
    ("[1]", "has no prompt"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_what_are_no_choices_is_refused(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(line)
    with pytest.raises(InputError, match=rf"rows\.jsonl, line 1: .*{message}.*; give rows such as"):
        read_choices(tmp_path / "rows.jsonl")


def test_every_wrong_line_is_named_up_to_a_few(tmp_path: Path) -> None:
    good = json.dumps({"prompt": "p", "choices": ["a", "b"], "answer": 0})
    place = tmp_path / "rows.jsonl"
    place.write_text("\n".join([good, BAD[0][0], good, "{", BAD[2][0]]))
    with pytest.raises(InputError) as raised:
        read_choices(place)
    found = str(raised.value)
    assert "line 2: has no prompt; line 4: is not JSON; line 5: has no two or more" in found
    assert found.count("give rows") == 1
    assert "and so on" not in found
    assert len(read_choices(place, 1)) == 1
    place.write_text("\n".join(["{"] * 1000))
    with pytest.raises(InputError, match=r"line 5: is not JSON; and so on; give rows"):
        read_choices(place)


def test_a_choice_without_tokens_is_refused(loaded: tuple[Any, Any]) -> None:
    class Deaf:
        eos_token_id = None

        def __call__(self, text: str, **settings: Any) -> Any:
            return loaded[1]("" if text == "mute" else text)

    with pytest.raises(UsageError, match="row 1: the tokenizer makes nothing of 'mute'"):
        choice_scores(loaded[0], Deaf(), [ChoiceRow("p", ("a", "mute"), 0)])


def test_options_are_checked() -> None:
    for name, value in (("bins", 0), ("resamples", 0), ("folds", 1), ("min_count", 0), ("seed", -1)):
        with pytest.raises(UsageError, match=f"{name} must be at least"):
            Measuring(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="threshold must lie between 0 and 1"):
        Measuring(threshold=1.0)
