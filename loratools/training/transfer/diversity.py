"""How different texts are from one another, and how long."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, quantiles

from loratools.reports.transfer import Diversity
from loratools.training.transfer.duplicates import distinct


def diversity(texts: Sequence[str], group: int) -> Diversity:
    """Of some texts: distinct-n of all, distinct-2 of `group` at a time, and the spread of their lengths."""
    every = list(texts)
    groups = [every[i : i + group] for i in range(0, len(every) - group + 1, group)] if group else []
    few = [found for some in groups if (found := distinct(some, 2)) is not None]
    return Diversity(
        len(every),
        distinct(every, 1),
        distinct(every, 2),
        distinct(every, 3),
        fmean(few) if few else None,
        _five([len(text) for text in every]),
        _five([len(text.split()) for text in every]),
    )


def _five(lengths: Sequence[int]) -> tuple[float, float, float, float, float]:
    """The least, the quartiles and the greatest."""
    if len(lengths) == 1:
        return (float(lengths[0]),) * 5
    low, middle, high = quantiles(lengths, n=4, method="inclusive")
    return float(min(lengths)), low, middle, high, float(max(lengths))
