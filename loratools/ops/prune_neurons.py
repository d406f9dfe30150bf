"""Fewer hidden units in nonlinear bottlenecks: those that change nothing, and more by what activations show."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.adapter import Adapter, Extra
from loratools.errors import AdapterError, UnchangedError, UsageError
from loratools.files import Saved, save
from loratools.ops.bottleneck import named_bottlenecks, read_bottleneck
from loratools.ops.exact_pruning import Exact, pruned_exactly
from loratools.reports.prune_neurons import PrunedTarget, PruneNeuronsReport
from loratools.storage.header import spec_of

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.formats.bottlenecks import Place
    from loratools.ops.activations import Activations
    from loratools.ops.bottleneck import Bottleneck, Experts

CHUNK = 4096  # tokens at once


@dataclass(frozen=True)
class PruneNeurons:
    """How many units to keep: `width` of them, each width divided by `ratio`, or with neither all that are needed.

    `ridge` is relative to the mean square of a kept unit's activation about its mean; `held_out` is the share of the
    tokens, the last ones, that errors alone see. `activation` and `experts` are as for `read_bottleneck`.
    """

    width: int | None = None
    ratio: float | None = None
    ridge: float = 1e-6
    held_out: float = 0.2
    activation: str | None = None
    experts: Experts | None = None

    def __post_init__(self) -> None:
        if self.width is not None and self.ratio is not None:
            raise UsageError("width and ratio exclude each other; give one of them")
        if self.width is not None and self.width < 1:
            raise UsageError(f"width {self.width} is below 1")
        if self.ratio is not None and not (math.isfinite(self.ratio) and self.ratio > 1):
            raise UsageError(f"ratio {self.ratio:g} is not above 1")
        if not (math.isfinite(self.ridge) and self.ridge > 0):
            raise UsageError(f"ridge {self.ridge:g} is not above 0")
        if not 0 <= self.held_out <= 0.9:
            raise UsageError(f"held_out {self.held_out:g} lies outside 0 to 0.9")

    @property
    def is_exact(self) -> bool:
        """Whether only units go that change nothing."""
        return self.width is None and self.ratio is None

    def wanted(self, width: int) -> int:
        """The greatest width to leave of `width`."""
        if self.width is not None:
            return min(width, self.width)
        return width if self.ratio is None else max(1, round(width / self.ratio))


def prune_neurons(
    adapter: Adapter,
    options: PruneNeurons = PruneNeurons(),
    *,
    activations: Activations | None = None,
    allow_unchanged: bool = False,
) -> tuple[Adapter, PruneNeuronsReport]:
    """The same file with narrower bottlenecks, in memory, under the same keys, its config made true.

    Units that change nothing go first, exactly up to the rounding of the stored dtype. Where more must go, those with
    the largest |u_j| std(act(z_j)) stay (about 0 where `up` has no bias), over the activations that are not held out.
    Then `up` and its bias are fitted to what the bottleneck added there, by ridge least squares in the w x w Gram
    matrix of hidden units; the bias is not penalised. Bottlenecks that are built with one width get the largest that
    any of them needs: units that are not needed, with columns of zeros, fill the others up. Raises UsageError where
    units must be fitted away and there are no activations, UnchangedError where nothing goes, and AdapterError as
    `read_bottleneck` does.
    """
    places = named_bottlenecks(adapter)
    if adapter.entries:
        raise AdapterError(
            f"{next(iter(adapter.entries))}: is an update of a weight in a file with bottlenecks; save the two apart"
        )
    if not options.is_exact and activations is None:
        raise UsageError("which units matter is not in the file: pass activations (--stats), or prune exactly")
    exacts: dict[str, Exact] = {}
    needed: dict[str, int] = {}
    for name, place in places.items():
        b = read_bottleneck(adapter, name, activation=options.activation, experts=options.experts)
        exacts[name] = exact = pruned_exactly(b)
        least = max(1, min(len(exact.units), options.wanted(b.width)))
        needed[place.group] = max(least, needed.get(place.group, 1))
    targets: dict[str, PrunedTarget] = {}
    tensors: dict[str, Tensor] = {}
    counts: list[tuple[int, int]] = []
    before = after = 0
    for name, place in places.items():
        b = read_bottleneck(adapter, name, activation=options.activation, experts=options.experts)
        rows = None if activations is None else activations.inputs(name, b.down.shape[1])
        pruned, targets[name], used = _pruned(b, exacts[name], needed[place.group], rows, options)
        counts.append(used)
        tensors |= _stored(place, pruned)
        before, after = before + _numbers(b), after + _numbers(pruned)
    if after == before and not allow_unchanged:
        remedy = "give a width with activations" if options.is_exact else "choose a smaller width"
        raise UnchangedError(f"no hidden unit can go; {remedy}, or pass --allow-unchanged")
    changed = _changed(adapter, tensors, {name: t.width_after for name, t in targets.items()}, options)
    total = {
        "bottlenecks": len(targets),
        "parameters_before": before,
        "parameters_after": after,
        "bytes_before": adapter.nbytes,
        "bytes_after": changed.nbytes,
    }
    fitted, held = (min(column) for column in zip(*counts, strict=True))
    assumed = dict.fromkeys(text for place in places.values() for text in place.assumed)
    warnings = (*adapter.warnings, *assumed, *_dropped(places))
    return changed, PruneNeuronsReport(targets, fitted, held, total, warnings=warnings)


def prune_neurons_file(
    adapter: Adapter,
    path: str | os.PathLike[str],
    options: PruneNeurons = PruneNeurons(),
    *,
    activations: Activations | None = None,
    allow_unchanged: bool = False,
    force: bool = False,
) -> tuple[Saved, PruneNeuronsReport]:
    """As `prune_neurons`, written to `path`: a folder where a config goes with the file, else one safetensors file."""
    changed, report = prune_neurons(adapter, options, activations=activations, allow_unchanged=allow_unchanged)
    saved = save(changed, Path(path), force=force)
    return saved, replace(report, output=str(saved.path))


def _pruned(
    b: Bottleneck, exact: Exact, width: int, rows: Tensor | None, options: PruneNeurons
) -> tuple[Bottleneck, PrunedTarget, tuple[int, int]]:
    """The bottleneck with `width` units as they are to be stored, its row, and the tokens fitted and held out."""
    held = 0 if rows is None else min(len(rows) - 2, int(len(rows) * options.held_out))
    fit = None if rows is None else rows[: len(rows) - held]
    if len(exact.units) <= width:
        units = exact.padded(width)
        made = b.kept(units, exact.up[:, units], exact.up_bias)
    else:
        assert fit is not None  # `prune_neurons` asked for them
        made = fitted(b, exact, width, fit, options.ridge)
    errors: list[float | None] = [None, None]
    if rows is not None and fit is not None:
        errors = [relative_error(b, made, part) if len(part) else None for part in (fit, rows[len(fit) :])]
    target = PrunedTarget(b.width, made.width, **asdict(exact.removed), error=errors[0], held_out_error=errors[1])
    return made, target, (0 if fit is None else len(fit), held)


def fitted(b: Bottleneck, exact: Exact, width: int, rows: Tensor, ridge: float) -> Bottleneck:
    """The `width` units that vary most in what is added, with the `up` that makes up best for the others on `rows`.

    `exact` is what is left of `b` without loss, of more units than that.
    """
    mean, gram = _moments(b, rows)
    # Without a bias there is nothing to hold the mean, which the others have to make up for too.
    of = gram if exact.up_bias is None else gram - torch.outer(mean, mean)
    deviation = of.diagonal().clamp_min(0.0).sqrt()
    weighted = exact.up * b.scale.double().reshape(-1, 1)
    scores = weighted[:, exact.units].norm(dim=0) * deviation[exact.units]
    units = exact.units[scores.sort(descending=True, stable=True).indices[:width]].sort().values
    own = of[units][:, units]
    penalty = ridge * float(own.diagonal().mean())
    up = exact.up[:, units]
    if penalty > 0:  # else they are silent on all rows
        penalised = own + penalty * torch.eye(len(units), dtype=own.dtype)
        up = torch.linalg.solve(penalised, of[units] @ exact.up.T).T
    bias = None if exact.up_bias is None else exact.up_bias + exact.up @ mean - up @ mean[units]
    return b.kept(units, up, bias)


def relative_error(before: Bottleneck, after: Bottleneck, rows: Tensor) -> float:
    """|y' - y| / |y| of what the two add on these inputs, in float64 of the tensors as stored; 0 where both add 0."""
    distance = norm = 0.0
    for part in rows.split(CHUNK):
        wanted = before.outputs(part)
        distance += float((after.outputs(part) - wanted).square().sum())
        norm += float(wanted.square().sum())
    return math.sqrt(distance / norm) if norm else 0.0 if distance == 0 else math.inf


def _moments(b: Bottleneck, rows: Tensor) -> tuple[Tensor, Tensor]:
    """E a (w,) and E a a^T (w, w) of the hidden units, float64."""
    total = torch.zeros(b.width, dtype=torch.float64)
    gram = torch.zeros(b.width, b.width, dtype=torch.float64)
    for part in rows.split(CHUNK):
        hidden = b.act(b.before(part))
        total += hidden.sum(0)
        gram += hidden.T @ hidden
    return total / len(rows), gram / len(rows)


def _numbers(b: Bottleneck) -> int:
    return sum(t.numel() for t in (b.down, b.up, b.down_bias, b.up_bias) if t is not None)


def _stored(place: Place, b: Bottleneck) -> dict[str, Tensor]:
    """Key -> tensor of what pruning changes."""
    found = {place.down: b.down, place.up: b.up, place.down_bias: b.down_bias, place.up_bias: b.up_bias}
    return {key: tensor for key, tensor in found.items() if key is not None and tensor is not None}


def _changed(
    adapter: Adapter, tensors: Mapping[str, Tensor], widths: Mapping[str, int], options: PruneNeurons
) -> Adapter:
    bound = adapter.format.resized(widths)
    made = {key: Extra(spec_of(t), lambda t=t: t) for key, t in tensors.items()}  # type: ignore[misc]
    extras = {key: made.get(key) or adapter.extras[key] for key in bound.extras}
    recorded = adapter.recorded("prune-neurons", asdict(options))
    return replace(recorded, format=bound, extras=extras)


def _dropped(places: Mapping[str, Place]) -> tuple[str, ...]:
    if any(place.experts for place in places.values()):
        return ("the experts are left out: what they merge to is written instead",)
    return ()
