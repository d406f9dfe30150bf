"""What every stage of a transfer is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.training.transfer.models_in_turn import ModelsInTurn
from loratools.training.transfer.prompt_frame import PromptFrame
from loratools.training.transfer.seed_inputs import Seed
from loratools.training.transfer.settings import Transfer
from loratools.training.transfer.stage_files import StageFiles

# (steps, of what) -> to be called with the tokens of each step
Meter: TypeAlias = Callable[[int, str], Callable[[int], None]]

GENERATED, INPUTS, REJECTED, LABELLED = "generated.jsonl", "inputs.jsonl", "rejected.jsonl", "labelled.jsonl"
PROBES, DISCRIMINATOR, CHECKPOINT = "probes.jsonl", "discriminator.json", "training.pt"
TRAINED, START, TRAINING = "adapter", "start", "training.json"
# what a new beginning removes; folders are replaced by the stages that make them
EVERY = (PROBES, DISCRIMINATOR, GENERATED, INPUTS, REJECTED, LABELLED, CHECKPOINT, TRAINING)
STAGES = ("prepare", "generate", "filter", "label", "start", "train", "evaluate")


def no_meter(total: int, what: str) -> Callable[[int], None]:
    """Counts nothing."""
    return lambda tokens: None


@dataclass(frozen=True, eq=False)
class Job:
    """One transfer: `kit` is a discriminator that was made with the adapter, where there is one."""

    models: ModelsInTurn
    files: StageFiles
    options: Transfer
    seeds: tuple[Seed, ...] = ()
    kit: Path | None = None
    meter: Meter = no_meter

    @property
    def frame(self) -> PromptFrame:
        """What all seeds have in common."""
        return PromptFrame.of([seed.prompt for seed in self.seeds])


@contextmanager
def in_memory(stage: str) -> Iterator[None]:
    """Turns running out of memory into an AdapterError that says in which stage, and what would help."""
    try:
        yield
    except (MemoryError, torch.cuda.OutOfMemoryError, RuntimeError) as error:
        text = str(error).lower()
        if isinstance(error, RuntimeError) and "out of memory" not in text and "can't allocate memory" not in text:
            raise
        raise AdapterError(
            f"{stage}: out of memory; finished stages are kept: go on with --resume and a smaller --batch"
        ) from error
