"""What a transfer is asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from loratools.errors import UsageError
from loratools.ops.weight_space import Align
from loratools.training.distil import Train
from loratools.training.new_adapter import NewAdapter
from loratools.training.transfer.confidence import Weighing
from loratools.training.transfer.sampling import Sampling

Passing = Literal["threshold", "ratio", "none"]
Showing = Literal["inputs", "pairs"]


@dataclass(frozen=True)
class Transfer:
    """How many inputs to make up, how to choose and label them, and how to train on them.

    `passing`: an input passes where it is real with a probability of at least `threshold`; or by chance, with the odds
    p / (1 - p) up to 1; or always. `similar` is the share of n-grams from which a long input is a duplicate;
    `candidates` how many are made at most for each that is wanted. `show`: examples without or with their answers.
    `weighing` says how much rows count by how sure their teacher was; `held_out` is the share of rows that training
    is stopped by. `warm_start` lets training begin with the adapter carried over by weights, aligned in that way.
    `chat`, `device` and `seed` are those of all stages.
    """

    samples: int = 500
    shots: int = 5
    sampling: Sampling = Sampling()
    show: Showing = "inputs"
    max_input_tokens: int = 64
    max_answer_tokens: int = 128
    batch: int = 16
    passing: Passing = "threshold"
    threshold: float = 0.5
    similar: float = 0.7
    candidates: int = 8
    weighing: Weighing = "none"
    held_out: float = 0.1
    adapter: NewAdapter = NewAdapter()
    train: Train = Train()
    warm_start: Align | None = None
    squeeze_to: int | None = None
    chat: bool = False
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "shots", "max_input_tokens", "max_answer_tokens", "batch", "candidates", "squeeze_to"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")
        for name in ("threshold", "similar", "held_out"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} must be from 0 to 1, not {getattr(self, name):g}")
        if self.squeeze_to is not None and self.squeeze_to > self.adapter.rank:
            raise UsageError(f"a squeeze to {self.squeeze_to} of an adapter of rank {self.adapter.rank}: give less")
        if not self.sampling.temperature > 0:
            raise UsageError("inputs are sampled: give a temperature above 0")

    @property
    def training(self) -> Train:
        """How to train, with what is the same in all stages."""
        return replace(self.train, chat=self.chat, device=self.device, seed=self.seed)
