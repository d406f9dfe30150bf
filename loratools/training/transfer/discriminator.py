"""Telling a task's real inputs from what a model makes up: logistic regression on features of inputs alone.

How strongly its weights are held down is chosen by cross-validation: as strongly as is no worse than the best but for
chance; where nothing tells the two apart, nothing but a constant is left, and all inputs pass. A handful of real inputs
says little about how others may look: with so few, what looks as real as the oddest of them did unseen passes too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loratools._lazy import torch
from loratools.errors import InputError, UsageError
from loratools.storage.atomic import printable, write_whole
from loratools.training.seeds import order
from loratools.training.transfer.features import N_PLAIN, plain, pooled
from loratools.training.transfer.prompt_frame import PromptFrame

if TYPE_CHECKING:
    from torch import Tensor

_STRENGTHS: Final = (math.inf, 10.0, 1.0, 0.1, 0.01)  # of L2; infinity leaves nothing but the constant
_FOLDS: Final = 5
_FEW: Final = 20  # real inputs
_NEWTON: Final = 25
_VERSION: Final = 1


@dataclass(frozen=True, eq=False)
class Discriminator:
    """The probability that an input is a real one, where as many are real as are not.

    `floor` is the probability from which inputs pass whatever the threshold: that of the oddest real input, unseen,
    where there were few, else 1. `reads` says which model the hidden states are of, "source" or "generator"; `loss` is
    its cross-validated loss in nats, of which a constant has log 2; `unseen` are probabilities of the real inputs, each
    by a discriminator that was made without it. `frame` is that of the prompts it was made of, whose looks it knows
    without it.
    """

    mean: Tensor  # (width,)
    unit: Tensor  # (width,)
    weights: Tensor  # (width,)
    bias: float
    strength: float
    loss: float
    floor: float
    real: int
    made_up: int
    reads: str
    unseen: tuple[float, ...] = ()
    frame: PromptFrame | None = None

    def probabilities(self, features: Tensor) -> list[float]:
        """Of each row of `features`; InputError for those of another model."""
        if features.shape[1] != len(self.mean):
            raise InputError(
                f"the discriminator was made with a model {len(self.mean) - N_PLAIN} numbers wide, and this one has "
                f"{features.shape[1] - N_PLAIN}; is --from the base that it was made with?"
            )
        return torch.sigmoid(((features - self.mean) / self.unit) @ self.weights + self.bias).tolist()

    def save(self, path: Path) -> None:
        """Write it as JSON, which people can look at."""
        fields = {
            "format": "loratools discriminator",
            "version": _VERSION,
            **{name: getattr(self, name) for name in ("bias", "loss", "floor", "real", "made_up", "reads")},
            "unseen": list(self.unseen),
            "frame": None if self.frame is None else [self.frame.before, self.frame.after],
            "strength": None if math.isinf(self.strength) else self.strength,
            **{name: getattr(self, name).tolist() for name in ("mean", "unit", "weights")},
        }
        write_whole(path, (json.dumps(fields) + "\n").encode())


def read_discriminator(path: Path) -> Discriminator:
    """What `save` wrote; InputError for anything else."""
    name = printable(path)
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        vectors = [torch.tensor(fields[key], dtype=torch.float64) for key in ("mean", "unit", "weights")]
        if fields["version"] != _VERSION or len({v.shape for v in vectors}) != 1 or vectors[0].ndim != 1:
            raise ValueError
        if not all(bool(torch.isfinite(v).all()) for v in vectors) or not bool((vectors[1] > 0).all()):
            raise ValueError
        strength = math.inf if fields["strength"] is None else float(fields["strength"])
        if fields["reads"] not in ("source", "generator"):
            raise ValueError
        mean, unit, weights = vectors
        bias, loss, floor = (float(fields[key]) for key in ("bias", "loss", "floor"))
        counts = int(fields["real"]), int(fields["made_up"])
        unseen = tuple(map(float, fields.get("unseen", ())))
        if not all(0 <= p <= 1 for p in unseen):
            raise ValueError
        framed = fields.get("frame")
        if framed is not None and not all(isinstance(text, str) for text in framed):
            raise ValueError
        frame = None if framed is None else PromptFrame(*framed)
        return Discriminator(mean, unit, weights, bias, strength, loss, floor, *counts, fields["reads"], unseen, frame)
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}; make one with --prepare-only") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{name}: is no discriminator; make one with --prepare-only") from None


def features_of(
    model: Any, tokenizer: Any, prompts: Sequence[str], frame: PromptFrame, *, batch: int, device: str
) -> Tensor:
    """(prompts, width) float64: what the model makes of whole prompts, and the looks of what is their own."""
    parts = [pooled(model, tokenizer, prompts[i : i + batch], device=device) for i in range(0, len(prompts), batch)]
    return torch.cat([torch.cat(parts), plain([frame.inside(prompt) for prompt in prompts])], 1)


def fit_discriminator(real: Tensor, made_up: Tensor, *, reads: str, seed: int = 0) -> Discriminator:
    """The discriminator of (inputs, width) features; the same for the same seed. UsageError without both kinds."""
    if not len(real) or not len(made_up):
        raise UsageError("a discriminator needs real inputs and made-up ones; there are none of one kind")
    x = torch.cat([real, made_up])
    y = torch.cat([torch.ones(len(real)), torch.zeros(len(made_up))]).double()
    unseen = [_unseen(x, y, strength, seed) for strength in _STRENGTHS]
    losses = [_balanced(found, y) for found in unseen]
    best = min(losses, key=lambda loss: loss[0])
    few = len(real) < _FEW  # by so few, chance could explain anything: the floor does its work instead
    worst = best[0] if few else sum(best)
    chosen = next(i for i, (loss, _) in enumerate(losses) if loss <= worst)  # the strongest comes first
    passed = torch.sigmoid(unseen[chosen][y == 1]).tolist()
    floor = min(passed) if few else 1.0
    mean, unit = _standard(x)
    strength = _STRENGTHS[chosen]
    weights, bias = _logistic((x - mean) / unit, y, strength)
    counts = len(real), len(made_up)
    loss, seen = round(losses[chosen][0], 6), tuple(round(p, 6) for p in passed)
    return Discriminator(mean, unit, weights, bias, strength, loss, round(floor, 6), *counts, reads, seen)


def _standard(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unit of each feature; hidden states and looks together count as much as each other."""
    mean, deviation = x.mean(0), x.std(0, correction=0)
    unit = torch.where(deviation > 1e-9 * (1 + mean.abs()), deviation, math.inf)
    hidden = x.shape[1] - N_PLAIN
    share = torch.tensor([hidden] * hidden + [N_PLAIN] * N_PLAIN, dtype=torch.float64).sqrt()
    unit = torch.where(torch.isinf(unit), 1e12, unit * share)  # a constant feature says nothing, now or later
    return mean, unit


def _unseen(x: Tensor, y: Tensor, strength: float, seed: int) -> Tensor:
    """The log-odds of every row by weights that were fitted to others."""
    fold = torch.zeros(len(y), dtype=torch.long)
    for kind in (0.0, 1.0):  # each kind spread over the folds
        rows = (y == kind).nonzero().flatten()
        fold[rows[list(order(len(rows), seed))]] = torch.arange(len(rows)) % _FOLDS
    scores = torch.zeros(len(y), dtype=torch.float64)
    for i in range(_FOLDS):
        held, kept = fold == i, fold != i
        if not bool(held.any()) or len(y[kept].unique()) < 2:
            continue
        mean, unit = _standard(x[kept])
        weights, bias = _logistic((x[kept] - mean) / unit, y[kept], strength)
        scores[held] = ((x[held] - mean) / unit) @ weights + bias
    return scores


def _balanced(scores: Tensor, y: Tensor) -> tuple[float, float]:
    """The mean loss of both kinds, and its standard error."""
    losses = torch.nn.functional.softplus(torch.where(y == 1, -scores, scores))
    kinds = [losses[y == kind] for kind in (0, 1)]
    error = sum(float(kind.var(correction=0)) / len(kind) for kind in kinds)
    return float(sum(kind.mean() for kind in kinds)) / 2, math.sqrt(error) / 2


def _logistic(x: Tensor, y: Tensor, strength: float) -> tuple[Tensor, float]:
    """Weights and bias that minimise the balanced mean loss plus strength / 2 |weights|^2, by Newton's method.

    Where there are fewer rows than features, in the rows' own coordinates: the weights lie in their span.
    """
    if math.isinf(strength):
        return torch.zeros(x.shape[1], dtype=torch.float64), 0.0
    basis, z = None, x
    if len(x) < x.shape[1]:
        basis, r = torch.linalg.qr(x.T)  # x = r.T @ basis.T
        z = r.T
    balance = torch.where(y == 1, 0.5 / (y == 1).sum(), 0.5 / (y == 0).sum())  # (rows,)
    z = torch.cat([z, torch.ones(len(z), 1, dtype=torch.float64)], 1)
    held = torch.full((z.shape[1],), strength, dtype=torch.float64)
    held[-1] = 1e-9  # the bias is free
    w = torch.zeros(z.shape[1], dtype=torch.float64)
    objective = _objective(z, y, balance, held)
    for _ in range(_NEWTON):
        p = torch.sigmoid(z @ w)
        gradient = z.T @ (balance * (p - y)) + held * w
        if float(gradient.abs().max()) < 1e-10:
            break
        hessian = (z * (balance * p * (1 - p))[:, None]).T @ z + torch.diag(held)
        move, size, now = torch.linalg.solve(hessian, gradient), 1.0, objective(w)
        while objective(w - size * move) > now and size > 1e-6:
            size /= 2
        w = w - size * move
    weights = w[:-1] if basis is None else basis @ w[:-1]
    return weights, float(w[-1])


def _objective(z: Tensor, y: Tensor, balance: Tensor, held: Tensor) -> Callable[[Tensor], float]:
    def value(w: Tensor) -> float:
        scores = z @ w
        losses = torch.nn.functional.softplus(torch.where(y == 1, -scores, scores))
        return float((balance * losses).sum() + (held * w * w).sum() / 2)

    return value
