"""Evaluations of a tiny model, against loops over single rows and single tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training.tiny import save_tiny_lora, save_tiny_model

from loratools import load, load_base
from loratools.adapter import Adapter
from loratools.errors import AdapterError, InputError, UsageError
from loratools.ops.delta import delta
from loratools.training.applied import applied
from loratools.training.evaluate import Evaluate, Row, answer_nll, evaluate, exact_match, n_steps, read_rows
from loratools.training.models import load_model

ROWS = [Row("one", " two"), Row("three", " four five"), Row("abc", "d"), Row("six seven", " eight"), Row("q: x", "y")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return load(save_tiny_lora(tmp_path_factory.mktemp("lora") / "adapter"))


@pytest.fixture
def loaded(folder: Path) -> tuple[Any, Any]:
    model, tokenizer = load_model(folder)
    tokenizer.eos_token = "~"
    return model, tokenizer


def naive_nll(model: Any, tokenizer: Any, rows: list[Row]) -> tuple[float, int]:
    losses = []
    for row in rows:
        prompt = tokenizer(row.prompt).input_ids if row.prompt else []
        ids = prompt + tokenizer(row.answer).input_ids + ([tokenizer.eos_token_id] if prompt else [])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0].double()
        wanted = range(max(len(prompt), 1), len(ids))
        losses += [-float(torch.log_softmax(logits[i - 1], 0)[ids[i]]) for i in wanted]
    return sum(losses) / len(losses), len(losses)


def greedy(model: Any, tokenizer: Any, prompt: str, most: int) -> str:
    ids = list(tokenizer(prompt).input_ids)
    start = len(ids)
    while len(ids) - start < most:
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True))


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_the_likelihood_is_that_of_a_loop_over_rows(loaded: tuple[Any, Any], batch: int) -> None:
    model, tokenizer = loaded
    rows = [*ROWS, Row("", "no prompt")]
    expected, count = naive_nll(model, tokenizer, rows)
    found, tokens = answer_nll(model, tokenizer, rows, options=Evaluate(batch=batch))
    assert tokens == count
    assert found == pytest.approx(expected, rel=1e-5)


def test_answers_are_those_of_a_greedy_loop(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    said = [Row(row.prompt, greedy(model, tokenizer, row.prompt, 6)) for row in ROWS]
    how = Evaluate(max_tokens=6, batch=2)
    assert exact_match(model, tokenizer, said, options=how) == 1.0
    wrong = [Row(row.prompt, row.answer + "!") for row in said[:2]] + said[2:]
    assert exact_match(model, tokenizer, wrong, options=how) == pytest.approx(3 / 5)
    assert exact_match(model, tokenizer, [Row("", "text")], options=how) is None


def test_the_adapter_is_there_meanwhile_and_gone_afterwards(
    loaded: tuple[Any, Any], folder: Path, adapter: Adapter
) -> None:
    model, tokenizer = loaded
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    bare = evaluate(model, tokenizer, ROWS, options=Evaluate(max_tokens=2))
    model.train()
    found = evaluate(model, tokenizer, ROWS, adapter, options=Evaluate(max_tokens=2))
    assert model.training
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    tuned = load_model(folder)[0]
    with torch.no_grad():
        for name, change in delta(adapter, base=load_base(folder)):
            dict(tuned.named_parameters())[name].add_(change)
    assert found.nll == pytest.approx(naive_nll(tuned, tokenizer, ROWS)[0], rel=1e-4)
    assert abs(found.nll - bare.nll) > 1e-3
    assert (found.rows, found.tokens) == (5, bare.tokens)


def test_weights_come_back_even_after_an_error(loaded: tuple[Any, Any], adapter: Adapter) -> None:
    model, _ = loaded
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    name = "model.layers.0.mlp.up_proj.weight"
    changed = []

    def fail() -> None:
        with applied(model, adapter):
            changed.append(not torch.equal(before[name], model.get_parameter(name)))
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert changed == [True]
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    del model.model.layers[1]
    with pytest.raises(AdapterError, match=r"^model\.layers\.1\.\S+: "), applied(model, adapter):
        pass


def test_steps_are_counted_beforehand(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    for how in (Evaluate(batch=2, max_tokens=1), Evaluate(max_rows=3, match=False), Evaluate(batch=1, max_tokens=1)):
        steps: list[int] = []
        found = evaluate(model, tokenizer, ROWS, options=how, step=steps.append)
        assert min(steps) > 0
        assert len(steps) == n_steps(tokenizer, ROWS, how)
        assert (found.exact_match is None) != how.match


def test_a_chat_template_goes_around_the_prompt(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    how = Evaluate(chat=True)
    with pytest.raises(UsageError, match="no chat template"):
        answer_nll(model, tokenizer, ROWS, options=how)
    tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    framed = [Row(f"<{row.prompt}>", row.answer) for row in ROWS]
    assert answer_nll(model, tokenizer, ROWS, options=how) == answer_nll(model, tokenizer, framed)


def test_rows_are_read(tmp_path: Path) -> None:
    place = tmp_path / "rows.jsonl"
    place.write_text('{"prompt": "a", "answer": "b"}\n\n{"prompt": "", "answer": "c"}\n')
    assert read_rows(place) == [Row("a", "b"), Row("", "c")]
    assert read_rows(place, 1) == [Row("a", "b")]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "holds no rows"), ("{", "line 1: is not JSON"), ('{"prompt": "a"}', "line 1: has no prompt and answer"),
     ('{"prompt": "a", "answer": ""}', "line 1: has no prompt and answer")],
)  # fmt: skip
def test_what_are_no_rows_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        read_rows(tmp_path / "rows.jsonl")
    with pytest.raises(InputError, match="cannot be read"):
        read_rows(tmp_path)


def test_options_are_checked(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(UsageError, match="batch must be at least 1, not 0"):
        Evaluate(batch=0)
    with pytest.raises(UsageError, match="no rows to evaluate"):
        evaluate(*loaded, [])
    with pytest.raises(UsageError, match="no token that could be foretold"):
        evaluate(*loaded, [Row("", "a")])
