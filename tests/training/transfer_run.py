"""The report of a transfer and the files of its stages, as a run would leave them; no model has been asked."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loratools.reports.evaluate import Evaluation
from loratools.reports.transfer import (
    Agreed,
    Distillation,
    Diversity,
    Labelling,
    Moved,
    Sample,
    StageTime,
    Synthesis,
    TransferReport,
)
from loratools.training.transfer.settings import Transfer

KEPT, IMPROBABLE, EQUAL, NEAR, LEAST = 48, 25, 7, 3, 0.5
UNSEEN = (0.41, 0.93, 0.97, 0.88, 0.99)


def transfer_report(work: Path, texts: tuple[str, ...] = (), *, seeds: int = 5, **changes: Any) -> TransferReport:
    """A report whose stage files lie in `work`; prompts, answers, reasons and names take turns through `texts`."""
    work.mkdir(parents=True, exist_ok=True)

    def say(i: int, otherwise: str) -> str:
        return texts[i % len(texts)] if texts else otherwise

    inputs = [
        {"id": i, "prompt": say(i, f"Number: {i}\nWords:"), "p": round(0.5 + i / (2 * KEPT), 6)} for i in range(KEPT)
    ]
    labelled = [
        {"id": r["id"], "prompt": r["prompt"], "answer": say(i, f" answer {i}"), "ended": i % 9 > 0, "confidence": 0.9}
        for i, r in enumerate(inputs)
    ]
    reasons = ["improbable"] * IMPROBABLE + ["duplicate"] * EQUAL + ["similar"] * NEAR
    rejected: list[dict[str, Any]] = [
        {
            "id": 1000 + i,
            "prompt": say(i, f"odd {i}"),
            "p": round(0.45 - 0.01 * i, 6) if reason == "improbable" else 0.8,
            "reason": reason,
        }
        for i, reason in enumerate(reasons)
    ]
    rejected += [
        {"id": 2000, "prompt": "", "flaw": "empty", "reason": "empty"},
        {"id": 2001, "prompt": "and so on", "flaw": "unfinished", "reason": say(0, "unfinished")},
    ]
    for name, rows in (("inputs", inputs), ("labelled", labelled), ("rejected", rejected)):
        (work / f"{name}.jsonl").write_bytes(
            "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows).encode()
        )
    if seeds:
        fields = {
            "format": "loratools discriminator", "version": 1, "bias": 0.0, "loss": 0.31, "floor": LEAST, "real": 5,
            "made_up": 32, "reads": "generator", "unseen": UNSEEN, "strength": 1.0, "mean": [0.0], "unit": [1.0],
            "weights": [1.0],
        }  # fmt: skip
        (work / "discriminator.json").write_text(json.dumps(fields))
    n = KEPT + len(rejected)
    spread = {
        "seeds": Diversity(5, 1.0, 1.0, None, 1.0, (4, 5, 9, 12, 20), (1, 1, 2, 3, 4)),
        "generated": Diversity(n - 2, 0.61, 0.85, 0.9, 0.97, (1, 6, 14, 31, 64), (1, 2, 4, 7, 15)),
        "kept": Diversity(KEPT, 0.75, 0.94, 0.99, 0.98, (3, 6, 12, 25, 60), (1, 2, 4, 6, 12)),
    }
    if not seeds:
        del spread["seeds"]
    synthesis = Synthesis(
        inputs="few-shot" if seeds else "self-prompted", seeds=seeds, generated=n, kept=KEPT, empty=1, unfinished=1,
        duplicate=EQUAL, similar=NEAR, improbable=IMPROBABLE, acceptance=KEPT / n, distinct_1=0.75, distinct_2=0.94,
        distinct_3=0.99, discrepancy=0.0123 if seeds else None, discriminator="made here" if seeds else "none",
        discriminator_loss=0.31 if seeds else None, least=LEAST if seeds else None, diversity=spread,
    )  # fmt: skip
    looks = tuple(Agreed(10 * i, min(0.02 + 0.1 * i, 0.8), min(0.3 + 0.08 * i, 0.95), 2.5 * 0.75**i) for i in range(11))
    losses = tuple(2.6 * 0.975**i + 0.25 * ((7 * i) % 11) / 11 for i in range(100))
    fields = {
        "adapter": say(0, "/data/my-adapter"), "source": say(1, "/data/base1"), "target": say(2, "/data/base2"),
        "generator": say(3, "/data/base2"), "method": "lora", "rank": 16, "synthesis": synthesis,
        "labelling": Labelling(42, 0, 6, 0.9),
        "distillation": Distillation(38, 4, 100, 80, True, 12345, losses, looks),
        "agreement": looks[8].answers, "agreement_before": looks[0].answers,
        "evaluations": {
            "target": Evaluation(2.5, 0.02, 20, 80), "transferred": Evaluation(0.4, 0.7, 20, 80),
            "teacher": Evaluation(0.2, 0.85, 20, 80),
        },
        "squeezed": None,
        "stages": tuple(
            StageTime(name, 12.5 + i, None if i in (2, 5) else 1000 * (i + 1))
            for i, name in enumerate(("prepare", "generate", "filter", "label", "train", "evaluate"))
        ),
        "samples": (Sample("a", "b", 0.5),), "settings": asdict(Transfer(samples=KEPT)), "work": str(work),
        "output": say(4, "/data/moved"), "bytes": 1_234_567,
        "moved": Moved(("lora",), (8,), "llama", say(0, "qwen2")),
        "warnings": texts or ("6 answers did not end within 128 tokens and were left out; raise --max-answer-tokens",),
    }  # fmt: skip
    return TransferReport(**{**fields, **changes})
