"""A few steps of nested training of a real model: every cut is an adapter of its own, and knows the task better."""

from __future__ import annotations

from pathlib import Path

import pytest
from real.smollm2 import ADAPTERS, load_real_model, missing

from loratools import load, truncate
from loratools.training.distil import Train, TrainRow, train_rows
from loratools.training.evaluate import read_rows
from loratools.training.nested import nested
from loratools.training.new_adapter import NewAdapter, new_adapter

STEPS, RANK, RANKS, N_ROWS = 8, 8, (1, 2, 8), 48

pytestmark = pytest.mark.real


def test_every_cut_answers_by_itself(tmp_path: Path) -> None:
    if reason := missing():
        pytest.skip(reason)
    real = load_real_model(tmp_path, n_rows=N_ROWS)
    alone = real.nll()
    model = new_adapter(real.model, NewAdapter("lora", RANK, RANK), seed=0)
    rows = [TrainRow(row.prompt, row.answer) for row in read_rows(ADAPTERS / "data" / "numwords_en_train.jsonl", 64)]
    with nested(model, "matryoshka", RANKS, seed=0) as begin_step:
        how = Train(learning_rate=1e-3, batch=8, steps=STEPS)
        train_rows(model, real.tokenizer, rows, how, forward=lambda *_: begin_step())
    model.save_pretrained(tmp_path / "nested", save_embedding_layers=False)
    model.unload()
    assert real.nll() == pytest.approx(alone, rel=1e-6)  # nothing is left of it in the base
    whole = load(tmp_path / "nested")
    losses = {rank: real.nll(whole if rank == RANK else truncate(whole, rank)[0]) for rank in RANKS}
    print(f"alone {alone:.3f}; by rank {losses}")
    assert losses[1] < alone - 0.3
    assert losses[2] < losses[1] - 0.1  # each more of the cuts is another adapter, and a better one
    assert losses[8] < losses[2] - 0.1
