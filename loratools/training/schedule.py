"""How the learning rate goes up and down over a run."""

from __future__ import annotations

import math
from typing import Final

_WARM_UP: Final = 10  # steps at most


def share_of_rate(step: int, steps: int) -> float:
    """The share of the learning rate at `step` of `steps`: a linear warm-up, then a cosine to zero."""
    warm_up = min(_WARM_UP, max(1, steps // 10))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))
