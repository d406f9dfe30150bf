"""Scenarios made of examples: centroids, thresholds, and how well they do on examples that were held out."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.errors import InputError, UsageError
from loratools.hub.adapter_set import FALLBACK, AdapterSet, Scenario
from loratools.hub.route import choose, unit_rows
from loratools.hub.route_quality import Losses, quality
from loratools.reports.route import Fitted, Quality

if TYPE_CHECKING:
    from torch import Tensor

_ROUNDS = 100
_HELD_OUT = 5  # one example in so many is held out


@dataclass(frozen=True)
class Fit:
    """How scenarios are made of examples: `centroids` for each adapter, and `quantile`, the share of its own examples
    that an adapter's threshold turns away."""

    centroids: int = 1
    quantile: float = 0.05
    temperature: float = 0.1
    margin: float = 0.02

    def __post_init__(self) -> None:
        if self.centroids < 1:
            raise UsageError(f"centroids {self.centroids} is below 1")
        if not 0 <= self.quantile < 1:
            raise UsageError(f"quantile {self.quantile} is not in [0, 1); 0.05 is usual")


def fit(labels: Sequence[str], features: Tensor, *, encoder: str | None = None, options: Fit = Fit()) -> AdapterSet:
    """A set of scenarios from examples: `labels` name the adapter of each row of `features` (n, d).

    Rows labelled "base" belong to none, and are left out. A threshold is that quantile of the cosines of an adapter's
    examples with its centroids, each example left out of the centroid that it is compared with. Raises InputError for
    an adapter with fewer than two examples, AdapterError for features that are no directions.
    """
    units = unit_rows(features, len(labels))
    scenarios = []
    places: defaultdict[str, list[int]] = defaultdict(list)
    for i, label in enumerate(labels):
        places[label].append(i)
    for name in sorted(set(places) - {FALLBACK}):
        rows = units[places[name]]
        if len(rows) < 2:
            raise InputError(f"{name}: has one example only, from which no threshold can be had; give at least two")
        centroids, members = _clusters(rows, min(options.centroids, len(rows)))
        own = _left_out(rows, centroids, members)
        scenarios.append(Scenario(name, centroids, float(own.quantile(options.quantile)), len(rows)))
    if not scenarios:
        raise InputError('the examples name no adapter; give rows such as {"adapter": "...", "text": "..."}')
    return AdapterSet(tuple(scenarios), encoder, options.temperature, options.margin)


def held_out(labels: Sequence[str]) -> list[bool]:
    """Which examples to keep for measuring: every fifth of each adapter, at least one, and all of the base.

    InputError for an adapter with fewer than three, which leaves too few to fit.
    """
    seen: Counter[str] = Counter()
    counts = Counter(labels)
    if few := sorted(label for label, count in counts.items() if count < 3 and label != FALLBACK):
        raise InputError(f"{few[0]}: has {counts[few[0]]} examples; give at least three, one of which is held out")
    chosen = []
    for label in labels:
        seen[label] += 1
        every = min(_HELD_OUT, counts[label])
        chosen.append(label == FALLBACK or seen[label] % every == 0)
    return chosen


def fit_measured(
    labels: Sequence[str],
    features: Tensor,
    *,
    encoder: str | None = None,
    options: Fit = Fit(),
    losses: Losses | None = None,
) -> tuple[AdapterSet, dict[str, Fitted], Quality]:
    """The set fitted on all examples, what it has of each adapter, and how well one does that never saw a fifth."""
    away = held_out(labels)
    kept = [i for i, out in enumerate(away) if not out]
    rest = [i for i, out in enumerate(away) if out]
    trial = fit([labels[i] for i in kept], unit_rows(features, len(labels))[kept], encoder=encoder, options=options)
    measured = quality(choose(trial, features[rest]), [labels[i] for i in rest], losses)
    found = fit(labels, features, encoder=encoder, options=options)
    told = {s.name: Fitted(s.examples, len(s.centroids), s.threshold) for s in found.scenarios}
    return found, told, measured


def _clusters(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Unit centroids (count, d) and the cluster of each row, by spherical k-means from the farthest rows."""
    first = int((rows @ rows.mean(dim=0)).argmax())
    picked = [first]
    while len(picked) < count:
        picked.append(int((rows @ rows[picked].T).max(dim=1).values.argmin()))
    centroids = rows[picked]
    members = (rows @ centroids.T).argmax(dim=1)
    for _ in range(_ROUNDS):
        sums = torch.stack([rows[members == c].sum(dim=0) for c in range(count)])
        norms = sums.norm(dim=1, keepdim=True)
        centroids = torch.where(norms > 0, sums / norms, centroids)
        again = (rows @ centroids.T).argmax(dim=1)
        if bool((again == members).all()):
            break
        members = again
    return centroids, members


def _left_out(rows: Tensor, centroids: Tensor, members: Tensor) -> Tensor:
    """The cosine of each row with the nearest centroid, its own one made without it."""
    cosines = rows @ centroids.T  # (n, c)
    sums = torch.stack([rows[members == c].sum(dim=0) for c in range(len(centroids))])
    rest = sums[members] - rows
    norms = rest.norm(dim=1)
    alone = norms < 1e-12  # its cluster holds nothing else
    own = torch.where(alone, -1.0, (rest * rows).sum(dim=1) / norms.clamp_min(1e-300))
    return cosines.scatter(1, members.unsqueeze(1), own.unsqueeze(1)).max(dim=1).values
