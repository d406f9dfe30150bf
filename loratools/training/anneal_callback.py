"""Annealing the rank in Hugging Face's Trainer."""

from __future__ import annotations

from typing import Any

from loratools.errors import MissingExtraError, UsageError
from loratools.training.anneal import Stage, State, annealable_config, annealed_ranks, annealing_steps, squeeze_model

try:
    from transformers import TrainerCallback
except ImportError:
    raise MissingExtraError("annealing in a Trainer needs transformers: pip install 'loratools[models]'") from None


class AnnealRank(TrainerCallback):
    """Squeezes the LoRA of a Trainer's model to rank `to` in stages, spread evenly over its steps.

        trainer = Trainer(model=peft_model, args=args, train_dataset=rows, callbacks=[AnnealRank(to=4)])

    `done` tells what each stage lost. The optimizer's state is projected, or reset. To go on from a checkpoint, load
    the model from it (PeftModel.from_pretrained(checkpoint, is_trainable=True)), and pass `start`, the rank at first:
    stages that the checkpoint is past are not done again. One process only: UsageError where there are more.
    """

    def __init__(
        self, to: int, *, stages: int = 3, state: State = "project", adapter: str = "default", start: int | None = None
    ) -> None:
        if to < 1 or stages < 1:
            raise UsageError(f"rank {to} in {stages} stages: give at least 1 of each")
        self.to, self.stages, self.state, self.adapter, self.start = to, stages, state, adapter, start
        self.done: list[Stage] = []
        self._plan: dict[int, int] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the plan, for the steps and the rank are known now."""
        if args.world_size > 1:
            raise UsageError("ranks are annealed in one process; train without a distributed launcher")
        if args.load_best_model_at_end:
            raise UsageError(
                "load_best_model_at_end cannot load a checkpoint of another rank; leave it out, and choose one yourself"
            )
        rank = annealable_config(kwargs["model"], self.adapter).r
        ranks = annealed_ranks(self.start or rank, self.to, self.stages)
        steps = annealing_steps(state.max_steps, len(ranks)) if ranks else ()
        self._plan = dict(zip(steps, ranks, strict=True))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Squeeze, where the plan says so."""
        if (rank := self._plan.get(state.global_step)) is not None:
            lost = squeeze_model(kwargs["model"], rank, kwargs.get("optimizer"), state=self.state, adapter=self.adapter)
            self.done.append(Stage(state.global_step, rank, lost))
