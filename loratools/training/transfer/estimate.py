"""What a transfer will take, before it starts: from the sizes of the models, and how fast this machine multiplies."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loratools._lazy import torch
from loratools.base_weights import load_base
from loratools.errors import LoratoolsError
from loratools.sizes import format_size
from loratools.training.transfer.settings import Transfer

_SIZE: Final = 1024  # of the matrices that are multiplied to see how fast that goes
_SHARE: Final = 0.5  # of that speed which a model reaches
_FILLED: Final = 0.35  # of the longest inputs and answers, which is what they take on average


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds, None where the models are not there to be measured."""

    nbytes: int | None
    seconds: float | None

    @property
    def sentence(self) -> str:
        """For people."""
        if self.nbytes is None or self.seconds is None:
            return "memory and time: not known before the models are here"
        return f"estimated: {format_size(self.nbytes)} of memory, {_about(self.seconds)} (longer answers take longer)"


def estimated(source: str, target: str, options: Transfer) -> Estimate:
    """A rough estimate: within a factor of two or three."""
    try:
        sizes = [_n_weights(place) for place in (source, target)]
    except (LoratoolsError, OSError):
        return Estimate(None, None)
    on_gpu = options.device.startswith("cuda")
    width = 2 if on_gpu else 4
    both = options.train.loss != "ce"
    held = width * (sum(sizes) if both else max(sizes))
    # activations of a step, and what AdamW keeps of the adapter, which is small beside the model
    tokens = options.train.batch * (options.max_input_tokens + options.max_answer_tokens)
    nbytes = round(1.3 * held + 30 * width * tokens * math.sqrt(sizes[1]))
    answer = _FILLED * options.max_answer_tokens
    asked = _FILLED * options.max_input_tokens
    slow, fast = _speed(options.device, options.batch), _speed(options.device, _SIZE)
    generated = 2 * sizes[1] * 2 * options.samples * asked / slow
    labelled = 2 * sizes[0] * options.samples * answer / slow * (2 if options.weighing == "robust" else 1)
    passes = 4 * sizes[1] + (2 * sizes[0] if both else 0)
    trained = passes * options.training.n_steps(options.samples) * options.train.batch * (asked + answer) / fast
    return Estimate(nbytes, generated + labelled + trained)


def _n_weights(place: str) -> int:
    path = Path(place)
    if not path.exists():
        raise FileNotFoundError(place)
    return sum(math.prod(spec.shape) for spec in load_base(path).source.specs.values())


def _speed(device: str, rows: int) -> float:
    """Operations a second, of products of a few rows or of many."""
    a, b = torch.ones(rows, _SIZE, device=device), torch.ones(_SIZE, _SIZE, device=device)
    best = math.inf
    for _ in range(4):
        began = time.perf_counter()
        float((a @ b).sum())
        best = min(best, time.perf_counter() - began)
    return _SHARE * 2 * rows * _SIZE**2 / best


def _about(seconds: float) -> str:
    if seconds < 90:
        return f"about {max(seconds, 1):.0f} seconds"
    return f"about {seconds / 60:.0f} minutes" if seconds < 5400 else f"about {seconds / 3600:.1f} hours"
