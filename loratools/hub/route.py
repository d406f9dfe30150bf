"""Which adapter a text is for: the nearest centroid of example texts by cosine, or the base where none is near.

The published system (arXiv 2502.01709) chooses one of several adapter sets by a classifier that it does not describe;
nearest centroids with a threshold are our reconstruction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.hub.adapter_set import FALLBACK, AdapterSet
from loratools.reports.route import Candidate, Choice

if TYPE_CHECKING:
    from torch import Tensor


def choose(found: AdapterSet, features: Tensor) -> list[Choice]:
    """The adapter of each row of `features` (n, d), with all candidates in the order of their cosines."""
    units = unit_rows(features, features.shape[0])
    if units.shape[1] != found.size:
        raise AdapterError(
            f"features of {units.shape[1]} numbers, and the scenarios have {found.size}; use the encoder that they "
            "were fitted with"
        )
    scores = torch.stack([(units @ s.centroids.T).max(dim=1).values for s in found.scenarios], dim=1)  # (n, adapters)
    confidences = (scores / found.temperature).softmax(dim=1)
    order = scores.argsort(dim=1, descending=True, stable=True)
    return [
        _choice(found, s, c, o) for s, c, o in zip(scores.tolist(), confidences.tolist(), order.tolist(), strict=True)
    ]


def _choice(found: AdapterSet, scores: list[float], confidences: list[float], order: list[int]) -> Choice:
    candidates = tuple(Candidate(found.scenarios[i].name, scores[i], confidences[i]) for i in order)
    best = candidates[0]
    if best.cosine < found.scenarios[order[0]].threshold:
        return Choice(FALLBACK, "threshold", candidates)
    if len(candidates) > 1 and best.cosine - candidates[1].cosine < found.margin:
        return Choice(FALLBACK, "margin", candidates)
    return Choice(best.adapter, "", candidates)


def unit_rows(features: Tensor, count: int) -> Tensor:
    """Rows of length 1 in float64; AdapterError for another number of rows, NaN, and rows of zeros."""
    if features.ndim != 2 or features.shape[0] != count or not features.shape[1]:
        raise AdapterError(f"features of shape {tuple(features.shape)}; give one row for each of {count} texts")
    found = features.double()
    bad = ~torch.isfinite(found).all(dim=1)
    if bool(bad.any()):
        raise AdapterError(f"row {int(bad.nonzero()[0]) + 1} of the features holds NaN or infinity")
    norms = found.norm(dim=1, keepdim=True)
    if bool((norms == 0).any()):
        raise AdapterError(
            f"row {int((norms[:, 0] == 0).nonzero()[0]) + 1} of the features is zero: it has no direction"
        )
    return found / norms
