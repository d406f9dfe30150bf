"""Train a hub of small adapters of one base, SmolLM2-135M: several tasks, ranks, seeds and lengths.

    python benchmarks/train_hub.py            # all of them, a minute or so each on two cores
    python benchmarks/train_hub.py --only 1 --steps 3

They go to the cache of the benchmarks, `hub` in LORATOOLS_BENCH_CACHE; one that exists is complete and is left alone.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from contestants import CACHE, ROOT
from train_runs import BATCH, Run, load_model, schedule, with_adapter

HUB = CACHE / "hub"


@dataclass(frozen=True)
class Member:
    """One adapter of the hub."""

    task: str
    rank: int
    seed: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.task}_r{self.rank}_s{self.seed}_{self.steps}"


MEMBERS = (
    *(Member(f"numwords_{language}", rank, 0, 40) for language in ("en", "de", "es") for rank in (8, 16)),
    *(Member(f"numwords_{language}", 8, 1, 40) for language in ("en", "de", "es")),
    Member("numwords_en", 8, 2, 20),
    Member("numwords_en", 8, 2, 60),
    *(Member("pydoc", rank, 0, 25) for rank in (8, 16)),
    Member("pydoc", 8, 1, 25),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, help="so many of them, from the first")
    parser.add_argument("--steps", type=int, help="for all of them, to look whether it works")
    parser.add_argument("--folder", type=Path, default=HUB, help="where they go (default: %(default)s)")
    options = parser.parse_args()
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}  # before torch is imported
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from real.smollm2 import SHARED, missing

    if reason := missing():
        parser.exit(1, f"{parser.prog}: {reason}\n")
    sys.path.append(str(SHARED / "tools"))
    for member in MEMBERS[: options.only]:
        place = options.folder / member.name
        if place.exists():
            print(f"{member.name}: complete")
            continue
        began = time.perf_counter()
        loss = train(member, options.steps or member.steps, place)
        print(f"{member.name}: loss {loss:.4f}, {time.perf_counter() - began:.0f} s", flush=True)


def train(member: Member, steps: int, place: Path) -> float:
    """Train one adapter and save it whole, in bfloat16; the loss of the last step."""
    import torch
    from evaluate import answer_loss, collate, encode, read_rows
    from real.smollm2 import ADAPTERS

    model, tokenizer = load_model()
    torch.manual_seed(member.seed)
    model = with_adapter(model, Run(1e-3, rank=member.rank, alpha=2 * member.rank))
    rows = read_rows(ADAPTERS / "data" / f"{member.task}_train.jsonl")
    random.Random(member.seed).shuffle(rows)
    encoded = [encode(tokenizer, row) for row in rows[: steps * BATCH]]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, weight_decay=0.0)
    last = float("nan")
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * schedule(step, steps)
        loss, _ = answer_loss(model, *collate(tokenizer, encoded[step * BATCH : (step + 1) * BATCH]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        last = loss.item()
    partial = place.with_name(f".{place.name}.partial")
    model.to(torch.bfloat16).save_pretrained(partial, save_embedding_layers=False)
    partial.rename(place)
    return last


if __name__ == "__main__":
    main()
