"""What a run is said to take."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training.tiny import save_tiny_model, tiny_llama

from loratools.errors import InputError
from loratools.training.cost import Cost, Machine, if_known, n_weights
from loratools.training.distil import Train, TrainRow
from loratools.training.evaluate import Evaluate, Row
from loratools.training.recover import Recover, cost
from loratools.training.task import Task
from loratools.training.transfer.cost import estimated
from loratools.training.transfer.settings import Transfer

ROWS = [TrainRow("abcd" * 5, "efgh" * 3) for _ in range(40)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model") / "base"))


@pytest.fixture
def even(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of one operation a second, whatever it multiplies."""
    monkeypatch.setattr(Machine, "_speed", lambda self, rows: 1.0)


def test_weights_are_counted(base: str) -> None:
    assert n_weights(base) == sum(p.numel() for p in tiny_llama().parameters())
    with pytest.raises(FileNotFoundError):
        n_weights("no/such")


def test_a_config_alone_has_no_cost(base: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((Path(base) / "config.json").read_bytes())
    assert cost(tmp_path, ROWS, Recover()) is None


def test_the_dtype_is_the_one_that_models_have(monkeypatch: pytest.MonkeyPatch) -> None:
    met = []

    def ones(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
        met.append(dtype)
        return torch.ones(*shape, dtype=dtype)

    named = SimpleNamespace(ones=ones, float32=torch.float32, bfloat16=torch.bfloat16)
    monkeypatch.setattr("loratools.training.cost.torch", named)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    wide, half = Machine("cpu"), Machine("cuda")
    assert wide.reading(10, 10) > 0
    assert half.reading(10, 10) > 0
    assert met == [torch.float32] * 2 + [torch.bfloat16] * 2
    assert wide.memory(100, 100, 10) == 2 * half.memory(100, 100, 10)


def test_the_speed_is_that_of_products() -> None:
    one, many = Machine("cpu")._speed(1), Machine("cpu")._speed(512)
    assert 0 < one < many < math.inf
    assert torch.get_num_threads() * 1e12 > many


@pytest.mark.usefixtures("even")
def test_a_recovery(base: str) -> None:
    n, found = n_weights(base), cost(base, ROWS, Recover(steps=10, batch=4, held_out=0.1))
    assert found is not None
    # 10 steps of 4 rows of 8 tokens, twice there and back; 6 looks at 4 rows
    assert found.seconds == pytest.approx(4 * n * 10 * 4 * 8 + 2 * n * 6 * 4 * 8)
    assert cost("no/such", ROWS, Recover()) is None


@pytest.mark.usefixtures("even")
def test_an_evaluation(base: str) -> None:
    task, n = Task("exact", answers=[Row(row.prompt, row.answer) for row in ROWS]), n_weights(base)
    found, twice = (task.cost(base, runs, Evaluate(batch=4)) for runs in (1, 2))
    assert found is not None
    assert twice is not None
    assert found.seconds == pytest.approx(2 * n * 40 * (8 + 3))
    assert (twice.seconds, twice.nbytes) == (pytest.approx(2 * found.seconds), found.nbytes)
    read = replace(task, metric="nll").cost(base, 1, Evaluate())
    assert read is not None
    assert read.seconds == pytest.approx(2 * n * 40 * 8)


@pytest.mark.usefixtures("even")
def test_a_transfer_counts_its_generator_and_the_reader_of_a_kit(base: str, tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    wide.mkdir()
    from safetensors.torch import save_file

    save_file({"model.embed_tokens.weight": torch.zeros(4000, 100)}, wide / "model.safetensors")
    (wide / "config.json").write_text('{"model_type": "llama"}')
    how = Transfer(samples=10, train=Train("ce", steps=5), max_input_tokens=20, max_answer_tokens=20)
    alone = estimated(base, base, how)
    by_wide, with_kit = (estimated(base, base, how, generator=str(wide), with_kit=kit) for kit in (False, True))
    taught = estimated(str(wide), base, replace(how, train=Train(steps=5, loss="uld")))
    assert alone is not None
    assert by_wide is not None
    assert with_kit is not None
    assert taught is not None
    n, made = n_weights(base), 2 * 10 * 7
    assert alone.seconds == pytest.approx(2 * n * made + 2 * n * 10 * 7 + 4 * n * 5 * 8 * 14)
    assert by_wide.seconds - alone.seconds == pytest.approx(2 * (400_000 - n) * made)
    assert with_kit.seconds - by_wide.seconds == pytest.approx(2 * n * made)
    assert with_kit.nbytes - by_wide.nbytes == pytest.approx(1.3 * 4 * n, abs=2)
    assert taught.nbytes - alone.nbytes == pytest.approx(1.3 * 4 * 400_000, abs=2)
    assert estimated(base, base, replace(how, train=Train(steps=5))) == estimated(
        base, base, replace(how, train=Train("kl", steps=5))
    )  # one vocabulary
    assert estimated(base, "no/such", how) is None


def test_what_cannot_be_read_is_not_known() -> None:
    @if_known
    def broken() -> Cost:
        raise InputError("broken")

    assert broken() is None


def test_it_is_told_in_words() -> None:
    assert "about 30 seconds" in Cost(10**9, 30.0).sentence
    assert "about 4 minutes" in Cost(10**9, 250.0).sentence
    assert "about 2.0 hours" in Cost(10**9, 7200.0).sentence
