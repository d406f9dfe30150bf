"""Training adapters on the task of the shared ones: numbers in words, by SmolLM2-135M."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contestants import ROOT, device

if TYPE_CHECKING:
    from real.smollm2 import RealModel

    from loratools.adapter import Adapter

BATCH = 8
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def reason_missing() -> str | None:
    """Why nothing can run here, or None; prepares the imports."""
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}  # before torch is imported
    sys.path.append(str(ROOT / "tests"))
    from real.smollm2 import missing

    return missing()


def load_real(folder: Path, *, n_rows: int) -> RealModel:
    """The base, on the device that was asked for."""
    from real.smollm2 import load_real_model

    real = load_real_model(folder, n_rows=n_rows)
    real.model.to(device())
    return real


def training_rows(steps: int, skip: int = 0) -> list[dict[str, str]]:
    """Rows for so many steps, past the first `skip` of the shuffled file."""
    from real.smollm2 import ADAPTERS

    with (ADAPTERS / "data" / "numwords_en_train.jsonl").open(encoding="utf-8") as file:
        found = [json.loads(line) for line in file]
    random.Random(0).shuffle(found)
    return found[skip : skip + steps * BATCH]


def train(
    real: RealModel,
    model: Any,
    *,
    steps: int,
    rate: float,
    place: Path,
    skip: int = 0,
    forward: Callable[[Any, int], None] | None = None,
) -> float:
    """Train a PeftModel for `steps` batches of rows that no earlier step has seen, past the first `skip`; seconds."""
    from loratools.training.distil import Train, TrainRow, train_rows
    from loratools.training.peft_model import save_adapter

    rows = [TrainRow(row["prompt"], row["answer"]) for row in training_rows(steps, skip)]
    done = [0]

    def step(tokens: int) -> None:
        done[0] += 1
        if done[0] % 10 == 0:
            print(f"  step {done[0]} of {steps}", file=sys.stderr, flush=True)

    how = Train(learning_rate=rate, batch=BATCH, steps=steps, device=device())
    trained = train_rows(model, real.tokenizer, rows, how, step=step, forward=forward)
    save_adapter(model, place)
    return trained.seconds


def fresh(real: RealModel, rank: int, alpha: float, method: str = "lora") -> Any:
    """The base with a new LoRA on all linear layers."""
    from loratools.training.new_adapter import NewAdapter, new_adapter

    return new_adapter(real.model, NewAdapter(method, rank, alpha, LINEAR), seed=0)


def scores(real: RealModel, adapter: Adapter) -> tuple[float, float]:
    """NLL of an answer token, and the share of exact answers, on the held-out rows."""
    from loratools.training.evaluate import Evaluate, Row, evaluate

    rows = [Row(row["prompt"], row["answer"]) for row in real.rows]
    how = Evaluate(batch=64, max_tokens=44, device=device())
    found = evaluate(real.model, real.tokenizer, rows, adapter, options=how)
    return found.nll, found.exact_match or 0.0
