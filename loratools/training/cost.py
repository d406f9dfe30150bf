"""What running models will take, before it starts: from their sizes, and how fast this machine multiplies."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, ParamSpec

from loratools._lazy import torch
from loratools.base_weights import load_base
from loratools.errors import LoratoolsError
from loratools.sizes import format_size
from loratools.training.models import working_dtype

_SIZE: Final = 1024  # of the matrices that are multiplied to see how fast that goes
_SHARE: Final = 0.5  # of that speed which a model reaches
_LETTERS: Final = 4  # to a token
P = ParamSpec("P")


@dataclass(frozen=True)
class Cost:
    """Bytes and seconds, rough: within a factor of two or three."""

    nbytes: int
    seconds: float

    @property
    def sentence(self) -> str:
        """For people."""
        return f"estimated: {format_size(self.nbytes)} of memory, {_about(self.seconds)} (longer answers take longer)"


@dataclass(frozen=True)
class Machine:
    """A place to run models, whose speed is measured as it is asked for."""

    device: str

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        found: torch.dtype = getattr(torch, working_dtype(self.device))
        return found

    def saying(self, weights: int, tokens: float, batch: int) -> float:
        """Seconds in which `batch` answers at once come to so many tokens."""
        return 2 * weights * tokens / self._speed(batch)

    def reading(self, weights: int, tokens: float) -> float:
        """Seconds in which so many tokens of given texts are read."""
        return 2 * weights * tokens / self._speed(_SIZE)

    def training(self, weights: int, tokens: float) -> float:
        """Seconds in which an adapter learns from so many tokens: there and back through weights that stay."""
        return 2 * self.reading(weights, tokens)

    def memory(self, held: int, weights: int, tokens: int) -> int:
        """Bytes that models of `held` weights take, with the activations of one of `weights` over so many tokens."""
        width = self.dtype.itemsize
        return round(1.3 * width * held + 30 * width * tokens * math.sqrt(weights))

    def _speed(self, rows: int) -> float:
        """Operations a second, of products of a few rows or of many."""
        a, b = (torch.ones(n, _SIZE, device=self.device, dtype=self.dtype) for n in (rows, _SIZE))
        best = math.inf
        for _ in range(4):
            began = time.perf_counter()
            float((a @ b).sum())
            best = min(best, time.perf_counter() - began)
        return _SHARE * 2 * rows * _SIZE**2 / best


def if_known(find: Callable[P, Cost]) -> Callable[P, Cost | None]:
    """A function of the same arguments that comes to None where a model is not here yet, or is none."""

    @functools.wraps(find)
    def found(*args: P.args, **kwargs: P.kwargs) -> Cost | None:
        try:
            return find(*args, **kwargs)
        except (LoratoolsError, OSError):
            return None

    return found


def n_weights(place: str | os.PathLike[str]) -> int:
    """How many numbers the weights of a model are; FileNotFoundError where they are not here."""
    path = Path(place)
    specs = load_base(path).source.specs if path.exists() else {}
    if not specs:  # a folder may hold a config alone
        raise FileNotFoundError(place)
    return sum(math.prod(spec.shape) for spec in specs.values())


def n_tokens(*texts: str) -> float:
    """About how many tokens texts have."""
    return sum(map(len, texts)) / _LETTERS


def _about(seconds: float) -> str:
    if seconds < 1.5:
        return "about a second"
    if seconds < 90:
        return f"about {seconds:.0f} seconds"
    return f"about {seconds / 60:.0f} minutes" if seconds < 5400 else f"about {seconds / 3600:.1f} hours"
