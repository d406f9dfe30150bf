"""A little training after a squeeze or a rounding: what comes back, and what stays as it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from training.tiny import load_tiny_model, save_tiny_lora, save_tiny_model

from loratools import Quantize, load, quantize_file, save, squeeze
from loratools.adapter import Adapter
from loratools.errors import AdapterError, InputError, OutputError, UsageError
from loratools.ops.squeeze import Squeeze
from loratools.ops.truncate import truncate
from loratools.training.distil import TrainRow
from loratools.training.evaluate import Evaluate, Row, evaluate
from loratools.training.peft_model import load_adapter, save_adapter
from loratools.training.recover import Recover, output_of, read_train_rows, recover, state_of

pytest.importorskip("peft")

ROWS = [TrainRow(f"{a}{b}: ", f"{b}{a}") for a in "abcdefgh" for b in "efghijkl"]
TASK = Recover(steps=20, learning_rate=2e-2, batch=4, held_out=0.2, seed=3)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_lora(tmp_path_factory.mktemp("lora") / "lora", rank=4)


def nll(base: Path, adapter: Adapter) -> float:
    rows = [Row(row.prompt, row.answer) for row in ROWS]
    return evaluate(*load_tiny_model(base), rows, adapter, options=Evaluate(match=False)).nll


def test_after_a_squeeze_the_task_comes_back(base: Path, lora: Path, tmp_path: Path) -> None:
    small, _ = squeeze(load(lora), 2)
    save(small, tmp_path / "small")
    counted: list[int] = []
    saved, report = recover(
        *load_tiny_model(base), load(tmp_path / "small"), ROWS, tmp_path / "better", TASK, step=counted.append
    )
    before, after = nll(base, small), nll(base, load(saved.path))
    assert after < before - 0.3
    assert (len(counted), sum(counted)) == (20, report.tokens)
    assert (report.rows, report.held_out, report.rounding) == (52, 12, "")
    assert report.nll_after is not None
    assert report.nll_before is not None
    assert report.nll_after < report.nll_before
    made = load(saved.path)
    assert {entry.rank for entry in made.entries.values()} == {2}
    assert list(made) == list(small)
    assert json.loads(made.metadata["loratools"])["verb"] == "recover"
    again, _ = recover(*load_tiny_model(base), load(tmp_path / "small"), ROWS, tmp_path / "again", TASK)
    assert again.weights.read_bytes() == saved.weights.read_bytes()
    with pytest.raises(OutputError, match="exists"):
        recover(*load_tiny_model(base), load(tmp_path / "small"), ROWS, tmp_path / "better", TASK)


def test_the_dtype_stays(base: Path, tmp_path: Path, lora: Path) -> None:
    from loratools.ops.convert import Convert, convert

    made, _ = convert(load(lora), "peft", Convert(dtype="bf16"))
    save(made, tmp_path / "half")
    saved, _ = recover(*load_tiny_model(base), load(tmp_path / "half"), ROWS, tmp_path / "better", TASK)
    assert load(saved.path).usual_dtype == "BF16"


@pytest.mark.parametrize(
    "packing",
    [Quantize("sign", 1, scales="component"), Quantize("rtn", 4), Quantize("grid", 4)],
    ids=lambda q: q.method,
)
def test_codes_are_trained_in_and_kept(base: Path, lora: Path, tmp_path: Path, packing: Quantize) -> None:
    place, _ = quantize_file(load(lora), tmp_path / "small.safetensors", packing)
    rate = 0.5 if packing.method == "grid" else 2e-2
    options = Recover(steps=20, learning_rate=rate, batch=4, held_out=0.2, seed=3)
    saved, report = recover(*load_tiny_model(base), load(place.path), ROWS, tmp_path / "better.safetensors", options)
    made = load(saved.path)
    assert made.origin is not None
    assert made.origin.container == "packed"
    assert nll(base, made) < nll(base, load(place.path)) - 0.1
    assert report.rounding == ("exact" if packing.method == "grid" else packing.method)
    if packing.method != "grid":  # whose codes grow
        assert saved.nbytes < 1.02 * place.nbytes
    # What the model was when the rows were looked at is what lies in the file.
    held = [Row(row.prompt, row.answer) for i, row in enumerate(ROWS) if i % 5 == 4][:12]
    found = evaluate(*load_tiny_model(base), held, made, options=Evaluate(match=False)).nll
    assert report.nll_after == pytest.approx(found, rel=0.02)


def test_what_cannot_be_trained_is_said(base: Path, lora: Path, tmp_path: Path) -> None:
    place, _ = quantize_file(load(lora), tmp_path / "small.safetensors", Quantize("balanced", 4))
    with pytest.raises(UsageError, match=r"balanced.*dequantize"):
        recover(*load_tiny_model(base), load(place.path), ROWS, tmp_path / "out", TASK)
    with pytest.raises(UsageError, match="no rows"):
        recover(*load_tiny_model(base), load(lora), [], tmp_path / "out", TASK)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "fields", [{"learning_rate": 0.0}, {"steps": 0}, {"batch": 0}, {"learning_rate": float("nan")}]
)
def test_what_nothing_is_trained_with_is_refused_at_once(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"more than 0|at least 1"):
        Recover(**fields)


def test_rows_are_read_or_named(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "answer": "b"}\n{"text": "c d"}\n')
    assert read_train_rows(file) == [TrainRow("a", "b"), TrainRow("", "c d")]
    file.write_text('{"text": "c"}\n{"prompt": "a"}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl.*2.*neither"):
        read_train_rows(file)


class Interrupting:
    """Notes the tokens of each step, and interrupts the run at one of them."""

    def __init__(self, at: int) -> None:
        self.at, self.tokens = at, list[int]()

    def __call__(self, tokens: int) -> None:
        self.tokens.append(tokens)
        if len(self.tokens) == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("packing", [None, Quantize("rtn", 4)])
def test_a_killed_run_goes_on_to_the_same_result(
    base: Path, lora: Path, tmp_path: Path, packing: Quantize | None
) -> None:
    small = lora if packing is None else quantize_file(load(lora), tmp_path / "small.safetensors", packing)[0].path
    name = "better" if packing is None else "better.safetensors"

    def run(place: Path, **more: Any) -> Path:
        return recover(*load_tiny_model(base), load(small), ROWS, place / name, TASK, **more)[0].weights

    expected = run(tmp_path / "whole").read_bytes()
    state, count = tmp_path / f"{name}.recover.pt", Interrupting(11)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, step=count)
    assert state.is_file()
    assert not (tmp_path / name).exists()
    with pytest.raises(UsageError, match="--resume"):
        run(tmp_path)
    kept = state.read_bytes()
    assert run(tmp_path, resume=True, step=count).read_bytes() == expected
    assert len(count.tokens) == 11 + 12  # of 20 steps, 8 were looked at and kept
    assert not state.exists()
    state.write_bytes(kept)
    assert run(tmp_path, force=True, step=count).read_bytes() == expected
    assert len(count.tokens) == 11 + 12 + 20  # from the beginning


class Turned(set[str]):
    """A set in an order of its own, as another process may have it."""

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(super().__iter__(), reverse=True))


def test_the_order_of_sets_changes_no_byte(base: Path, lora: Path, tmp_path: Path) -> None:
    wrapped = load_adapter(load_tiny_model(base)[0], load(lora))
    config = wrapped.peft_config["default"]
    for order in (set, Turned):
        config.target_modules = order(config.target_modules)
        save_adapter(wrapped, tmp_path / order.__name__)
    first, second = (sorted((tmp_path / order).iterdir()) for order in ("set", "Turned"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    saved, _ = recover(*load_tiny_model(base), load(lora), ROWS, tmp_path / "better", TASK)
    named = json.loads((saved.path / "adapter_config.json").read_text())["target_modules"]
    assert named == sorted(named)


def test_the_state_of_another_adapter_is_none(base: Path, lora: Path, tmp_path: Path) -> None:
    other = save_tiny_lora(tmp_path / "other", rank=4, lora_dropout=0.1)
    state = tmp_path / "better.recover.pt"
    with pytest.raises(KeyboardInterrupt):
        recover(*load_tiny_model(base), load(other), ROWS, tmp_path / "better", TASK, step=Interrupting(6))
    assert state.is_file()
    counted: list[int] = []
    _, report = recover(
        *load_tiny_model(base), load(lora), ROWS, tmp_path / "better", TASK, resume=True, step=counted.append
    )
    assert len(counted) == 20
    assert report.warnings == (f"{state}: was damaged, or of another run; this one began anew",)


def test_the_state_of_other_factors_under_the_same_config_is_none(base: Path, lora: Path, tmp_path: Path) -> None:
    """What was made in memory is told by its numbers, for it names the file that it was made from."""
    one, other = squeeze(load(lora), 2, options=Squeeze(scale="keep"))[0], truncate(load(lora), 2)[0]
    assert one.config == other.config
    with pytest.raises(KeyboardInterrupt):
        recover(*load_tiny_model(base), one, ROWS, tmp_path / "better", TASK, step=Interrupting(6))
    made, _ = recover(*load_tiny_model(base), other, ROWS, tmp_path / "better", TASK, resume=True)
    whole, _ = recover(*load_tiny_model(base), other, ROWS, tmp_path / "whole", TASK)
    assert made.weights.read_bytes() == whole.weights.read_bytes()


@pytest.mark.filterwarnings("error::FutureWarning")
def test_nothing_is_said_of_what_peft_will_have_to_change(base: Path, lora: Path) -> None:
    load_adapter(load_tiny_model(base)[0], lora, is_trainable=True)


def test_a_run_that_cannot_go_on_leaves_nothing(base: Path, lora: Path, tmp_path: Path) -> None:
    wild = Recover(steps=4, learning_rate=1e30, batch=4)
    seen: list[bool] = []
    with pytest.raises(AdapterError, match="lower learning rate"):
        recover(
            *load_tiny_model(base), load(lora), ROWS, tmp_path / "better", wild,
            step=lambda tokens: seen.append((tmp_path / "better.recover.pt").exists()),
        )  # fmt: skip
    assert seen  # it went some way
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", range(1, 40))
def test_no_run_ends_for_want_of_patience(steps: int) -> None:
    how = Recover(steps=steps).training(1.0)
    assert how.every is not None
    looks = sum(step % how.every == 0 or step == steps for step in range(1, steps + 1))
    assert looks <= 5 < how.patience


def test_a_place_that_nothing_can_be_written_to_is_refused_before_the_training(lora: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OutputError, match="a parent of it is a file"):
        output_of(load(lora), file / "better")
    with pytest.raises(OutputError, match="name is too long"):
        output_of(load(lora), tmp_path / ("x" * 300))
    (tmp_path / "better.recover.pt").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        output_of(load(lora), tmp_path / "better", resume=True)
    output_of(load(lora), tmp_path / "new" / "better")
    assert not (tmp_path / "new").exists()


def test_a_state_has_a_name_whatever_the_output_is_called(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "in" / "here")
    assert output_of(load(lora), ".", force=True) == Path()
    assert state_of(Path()) == tmp_path / "in" / "here.recover.pt"
    assert state_of(Path("..")) == tmp_path / "in.recover.pt"
    assert len(state_of(output_of(load(lora), "x" * 250)).name) < 255
