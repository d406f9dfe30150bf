"""The state of a training run: optimizer, losses and best parameters, kept in a file that it goes on from."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.storage.atomic import write_whole
from loratools.training.agreement import Agreement
from loratools.training.schedule import share_of_rate

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.adapter import Adapter

_LONGEST = 1.0  # norm of a gradient


def identity(adapter: Adapter) -> list[Any]:
    """What tells an adapter from another that lies at the same place some day."""
    return [None if adapter.origin is None else adapter.origin.sha256(), adapter.config]


def digest_of_trainable(model: Any) -> str:
    """Of the parameters that are to be trained; what was made in memory has the `identity` of its file, not these."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
            found.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


@dataclass(frozen=True)
class Look:
    """What the held-out rows said after so many steps."""

    step: int
    held_out: Agreement

    @property
    def quality(self) -> tuple[float, float]:
        """Whole answers first; the likelihood tells apart what has as many."""
        return self.held_out.answers, -self.held_out.nll


class TrainingRun:
    """Steps of AdamW on what is trainable in a model."""

    def __init__(self, model: Any, steps: int, learning_rate: float) -> None:
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._trained:
            raise AdapterError("nothing in the model is trainable; load the adapter with is_trainable=True")
        self._optimizer = torch.optim.AdamW(self._trained.values(), lr=learning_rate, weight_decay=0.0)
        self._rate = learning_rate
        self._best: dict[str, Tensor] = {}
        self.steps = steps
        self.step = self.tokens = 0
        self.seconds = 0.0
        self.losses: list[float] = []
        self.looks: list[Look] = []

    def descend(self, loss: Tensor) -> None:
        """One step down; AdapterError where the loss or its gradient is not finite, and nothing was changed."""
        value = float(loss.detach())
        if not math.isfinite(value):
            raise AdapterError(f"the loss of step {self.step + 1} is {value}; choose a lower learning rate")
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * share_of_rate(self.step, self.steps)
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(list(self._trained.values()), _LONGEST))
        if not math.isfinite(norm):
            raise AdapterError(f"the gradient of step {self.step + 1} is {norm}; does the model hold NaN?")
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.losses.append(value)
        self.step += 1

    def look(self, held_out: Agreement) -> None:
        """Note what the held-out rows say now, and keep the state if it is the best so far."""
        self.looks.append(Look(self.step, held_out))
        if self.best_step == self.step:
            self._best = {name: p.detach().clone() for name, p in self._trained.items()}

    @property
    def best_step(self) -> int:
        """The first of the steps at which the held-out rows agreed best; the last step without any."""
        if not self.looks:
            return self.step
        return max(self.looks, key=lambda look: (*look.quality, -look.step)).step

    def is_over(self, patience: int) -> bool:
        """Whether all steps are done, or the last `patience` looks have found nothing better."""
        since = sum(look.step > self.best_step for look in self.looks)
        return self.step >= self.steps or since >= patience

    def restore_best(self) -> None:
        """Put the best state back."""
        with torch.no_grad():
            for name, parameter in self._best.items():
                self._trained[name].copy_(parameter)

    def save(self, path: Path, made_for: str) -> None:
        """Write all of it, whole or not at all; `made_for` says what run it belongs to."""
        state = {
            "made_for": made_for,
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "losses": self.losses,
            "looks": [(x.step, x.held_out.nll, x.held_out.tokens, x.held_out.answers) for x in self.looks],
            "parameters": {name: p.detach().cpu() for name, p in self._trained.items()},
            "best": {name: p.cpu() for name, p in self._best.items()},
            "optimizer": self._optimizer.state_dict(),
        }
        data = io.BytesIO()
        torch.save(state, data)
        write_whole(path, data.getvalue())

    def load(self, path: Path, made_for: str) -> bool:
        """Go on from a file that `save` wrote for this very run; False where there is none."""
        try:
            state: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            shapes = {name: p.shape for name, p in self._trained.items()}
            fits = state["made_for"] == made_for and {n: p.shape for n, p in state["parameters"].items()} == shapes
        except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, UnpicklingError):
            return False  # a checkpoint is a convenience: without one the run begins anew, with the same result
        if not fits:
            return False
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(state["parameters"][name])
        self._best = {name: p.to(self._trained[name].device) for name, p in state["best"].items()}
        self._optimizer.load_state_dict(state["optimizer"])
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.losses = list(state["losses"])
        self.looks = [Look(step, Agreement(*numbers)) for step, *numbers in state["looks"]]
        return True
