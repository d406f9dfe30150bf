"""Train the models that "What fine-tuning did" compares: SmolLM2-135M, tuned in several ways on the same rows.

    python benchmarks/train_runs.py ../runs                    # everything: some 40 minutes on two cores
    python benchmarks/train_runs.py ../runs base full lora_r8  # these, in this order

The recipe is that of the adapters in ../shared: batches of 8 rows in one shuffled order, the loss on the answer and its
end token, AdamW, gradients clipped to norm 1, 10 steps of warm-up and a cosine to zero. A run whose folder
exists is complete and is left alone. Metrics of all of them go to metrics.json in the folder of the runs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from contestants import ROOT

BATCH = 8
WARM_UP = 10  # steps
SEED = 0
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HELD_OUT = {"numwords_en": "numwords_en_eval.jsonl", "pydoc": "pydoc_eval.jsonl"}


@dataclass(frozen=True)
class Run:
    """How one model is trained: whole where `rank` is 0, or with an adapter on all linear layers."""

    learning_rate: float
    rank: int = 0
    alpha: int = 0
    rslora: bool = False
    dora: bool = False


BASE = "base"  # is not trained
RUNS = {
    "full": Run(5e-5),
    "rslora_r64": Run(1e-4, rank=64, alpha=64, rslora=True),
    "lora_r8": Run(1e-3, rank=8, alpha=16),
    "lora_r1": Run(2e-3, rank=1, alpha=2),
    "lora_r64": Run(3e-4, rank=64, alpha=128),
    "dora_r16": Run(6e-4, rank=16, alpha=32, dora=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the runs go")
    names = (BASE, *RUNS)
    parser.add_argument("names", nargs="*", metavar="run", help=f"any of {', '.join(names)}; all by default")
    parser.add_argument("--steps", type=int, default=140, help="the same for every run (default: %(default)s)")
    options = parser.parse_args()
    if unknown := set(options.names) - set(names):
        parser.error(f"no run {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}  # before torch is imported
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from real.smollm2 import SHARED, missing

    if reason := missing():
        parser.exit(1, f"{parser.prog}: {reason}\n")
    sys.path.append(str(SHARED / "tools"))
    for name in options.names or names:
        place = options.folder / name
        if place.exists():
            print(f"{name}: complete")
            continue
        partial = place.with_name(f"{name}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        metrics = _base(partial) if name == BASE else _trained(RUNS[name], options.steps, partial)
        _record(options.folder / "metrics.json", name, metrics)
        partial.rename(place)
        print(f"{name}: {json.dumps(metrics)}", flush=True)


def _base(place: Path) -> dict[str, Any]:
    model, tokenizer = load_model()
    _save_whole(model, place)
    return {"eval": _evaluated(model, tokenizer)}


def _trained(run: Run, steps: int, place: Path) -> dict[str, Any]:
    """Train, save to `place` and evaluate."""
    import torch
    from evaluate import answer_loss, collate, encode, read_rows
    from real.smollm2 import ADAPTERS

    model, tokenizer = load_model()
    torch.manual_seed(SEED)
    if run.rank:
        model = with_adapter(model, run)
    rows = read_rows(ADAPTERS / "data" / "numwords_en_train.jsonl")
    random.Random(SEED).shuffle(rows)
    encoded = [encode(tokenizer, row) for row in rows[: steps * BATCH]]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, weight_decay=0.0)
    losses = []
    began = time.perf_counter()
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate * schedule(step, steps)
        loss, _ = answer_loss(model, *collate(tokenizer, encoded[step * BATCH : (step + 1) * BATCH]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"  step {step}: loss {losses[-1]:.4f}, {time.perf_counter() - began:.0f} s", flush=True)
    seconds = time.perf_counter() - began
    if run.rank:
        model.save_pretrained(place, save_embedding_layers=False)
    else:
        _save_whole(model, place)
    return {
        **asdict(run),
        "steps": steps,
        "batch": BATCH,
        "seed": SEED,
        "trainable": sum(parameter.numel() for parameter in trainable),
        "seconds_per_step": round(seconds / steps, 2),
        "losses": [round(loss, 4) for loss in losses],
        "eval": _evaluated(model, tokenizer),
    }


def schedule(step: int, steps: int) -> float:
    """The share of the learning rate: a linear warm-up, then a cosine."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / (steps - WARM_UP)))


def load_model() -> tuple[Any, Any]:
    import real_models
    import torch

    torch.set_num_threads(2)
    model, tokenizer = real_models.load_smollm2()
    del model.config.quantization_config  # the weights are dequantised
    model.config.architectures = [type(model).__name__]
    return model, tokenizer


def with_adapter(model: Any, run: Run) -> Any:
    from peft import LoraConfig, get_peft_model

    model.name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the GGUF was made from
    config = LoraConfig(
        r=run.rank,
        lora_alpha=run.alpha,
        use_rslora=run.rslora,
        use_dora=run.dora,
        target_modules=LINEAR,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _save_whole(model: Any, place: Path) -> None:
    """All parameters under their own names; the head is the embedding, stored once."""
    from safetensors.torch import save_file

    tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    model.config.to_json_file(place / "config.json")


def _evaluated(model: Any, tokenizer: Any) -> dict[str, float]:
    """Mean negative log-likelihood of a token: of the task's answers, and of text that has nothing to do with it."""
    from evaluate import eval_nll, read_rows
    from real.smollm2 import ADAPTERS

    found = {}
    for name, file in HELD_OUT.items():
        found[name] = round(eval_nll(model, tokenizer, read_rows(ADAPTERS / "data" / file)), 4)
    return found


def _record(place: Path, name: str, metrics: dict[str, Any]) -> None:
    known = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}
    place.write_text(json.dumps(known | {name: metrics}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
