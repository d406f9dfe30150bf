"""A few steps after a squeeze, and squeezes while training, against an adapter that was trained at that rank."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contestants import device, of_size, table
from number_words import BATCH, fresh, load_real, reason_missing, scores, train, training_rows

if TYPE_CHECKING:
    from real.smollm2 import RealModel

RANK, STEPS, MORE, ROWS = 4, 140, 50, 256
RATES = {64: 3e-4, 4: 1e-3}  # those of the shared adapters of rank 64 and 8
STAGES = 4


def main(*, quick: bool = False) -> str:
    """The table, as Markdown."""
    title = "# After a squeeze\n\n"
    if reason := reason_missing():
        return f"{title}Skipped: {reason}."
    with tempfile.TemporaryDirectory() as folder:
        steps, more, n_rows = of_size((8, 4, 16), (STEPS, MORE, ROWS), (STEPS, 500, ROWS), quick=quick)
        return title + _measured(Path(folder), steps=steps, more=more, n_rows=n_rows)


def _measured(folder: Path, *, steps: int, more: int, n_rows: int) -> str:
    from real.smollm2 import ADAPTERS

    from loratools import load, save, squeeze
    from loratools.peft import load_adapter
    from loratools.training.anneal import annealed_ranks, annealing_steps

    real = load_real(folder, n_rows=n_rows)
    rows = []

    def told(name: str, rank: int, trained: str, place: Path, seconds: float | None) -> None:
        nll, exact = scores(real, load(place))
        rows.append(
            [name, str(rank), trained, f"{nll:.4f}", f"{exact:.3f}", "" if seconds is None else f"{seconds:.0f}"]
        )
        print(*rows[-1], file=sys.stderr, flush=True)

    whole = ADAPTERS / "en_lora_r64"
    told("as trained", 64, "140", whole, None)
    small = folder / "small"
    save(squeeze(load(whole), RANK)[0], small)
    told("squeezed", RANK, "140", small, None)
    model = load_adapter(real.model, small, is_trainable=True)
    seconds = train(real, model, steps=more, rate=RATES[4], place=folder / "recovered", skip=140 * BATCH)
    model.unload()
    told("squeezed, then trained on", RANK, f"140 + {more}", folder / "recovered", seconds)

    model = fresh(real, RANK, 2 * RANK)
    seconds = train(real, model, steps=steps, rate=RATES[4], place=folder / "direct")
    model.unload()
    told("trained at that rank", RANK, str(steps), folder / "direct", seconds)

    model = fresh(real, 64, 128)
    ranks = annealed_ranks(64, RANK, STAGES)
    plan = dict(zip(annealing_steps(steps, len(ranks)), ranks, strict=True))

    seconds = _annealed(real, model, plan, steps=steps, place=folder / "annealed")
    model.unload()
    told(f"annealed 64 to {RANK} in {len(ranks)} stages", RANK, str(steps), folder / "annealed", seconds)
    text = (
        "SmolLM2-135M-Instruct, number words, LoRA on all 210 linear layers. The first row is the shared adapter "
        "en_lora_r64, 140 steps of 8 rows. It is squeezed to rank "
        f"{RANK}, and trained for {more} steps more on rows that it had not seen, at {RATES[4]:g}. Against it: rank "
        f"{RANK} from the start (alpha {2 * RANK}, {RATES[4]:g}), and rank 64 that is squeezed while it is trained "
        f"(alpha 128, {RATES[64]:g}, the optimizer's state projected). Exact: share of {n_rows} held-out greedy "
        f"answers that are right word for word (standard error at most {0.5 / n_rows**0.5:.3f}); NLL: of an answer "
        f"token. One "
        "seed."
    )
    return f"{text}\n\n" + table(["", "rank", "steps", "NLL", "exact", "seconds"], rows)


def _annealed(real: RealModel, model: Any, plan: dict[int, int], *, steps: int, place: Path) -> float:
    """Train with squeezes after the steps of `plan`, on the rows and in the order of `train`; seconds."""
    import evaluate
    import torch

    from loratools.training.anneal import squeeze_model
    from loratools.training.schedule import share_of_rate
    from loratools.training.seeds import batch_of

    rows = [evaluate.encode(real.tokenizer, row) for row in training_rows(steps)]
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), weight_decay=0.0)
    began = time.perf_counter()
    model.train()
    for step in range(steps):
        if step in plan:
            error = squeeze_model(model, plan[step], optimizer)
            print(f"  to rank {plan[step]}: error {error:.3f}", file=sys.stderr, flush=True)
        for group in optimizer.param_groups:
            group["lr"] = RATES[64] * share_of_rate(step, steps)
        batch = [rows[i] for i in batch_of(len(rows), BATCH, step, 0)]
        tensors = (tensor.to(device()) for tensor in evaluate.collate(real.tokenizer, batch))
        loss, _ = evaluate.answer_loss(model, *tensors)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    model.save_pretrained(place, save_embedding_layers=False)
    return time.perf_counter() - began


if __name__ == "__main__":
    print(main(quick="--quick" in sys.argv))
