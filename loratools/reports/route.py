"""Which adapter each text goes to, and how well that is chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from loratools.reports.frames import Kind, Tabular


@dataclass(frozen=True)
class Candidate:
    """An adapter with the cosine of the text and its nearest centroid; `confidence` is a softmax over all adapters."""

    adapter: str
    cosine: float
    confidence: float


@dataclass(frozen=True)
class Choice:
    """The adapter of one text, "base" where none will do; `reason` tells then whether it is below the `threshold` of
    the nearest, or whether the second lies within the `margin`. `candidates` begin with the nearest."""

    adapter: str
    reason: str
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Routed:
    """One text: its choice, and the adapter that it is known to be for, if it is."""

    text: str
    choice: Choice
    label: str | None = None


@dataclass(frozen=True)
class Regret:
    """What wrong choices cost: the mean of loss(chosen) - min loss over texts whose scenario has losses.

    `matrix` is that difference for each scenario (row) and adapter; `single` is the regret of the best adapter for all
    texts, `of_base` that of the base alone, where its losses are known.
    """

    mean: float
    texts: int
    adapters: tuple[str, ...]
    matrix: Mapping[str, tuple[float, ...]]
    single: float
    single_adapter: str
    of_base: float | None


@dataclass(frozen=True)
class Quality:
    """How well texts of known scenarios are routed.

    `nearest` is the share whose nearest adapter is theirs, before any is turned away, and `accuracy` that after; both
    over texts that have an adapter, as is `rejected`. `base_rejected` is the share of the texts labelled "base" that go
    there. `ece` is the expected calibration error of the nearest one's confidence, in ten bins. `confusion` counts
    choices: scenario -> adapter -> texts.
    """

    texts: int
    nearest: float | None
    accuracy: float | None
    rejected: float | None
    base_texts: int
    base_rejected: float | None
    ece: float | None
    confusion: Mapping[str, Mapping[str, int]]
    regret: Regret | None = None


@dataclass(frozen=True)
class RouteReport(Tabular):
    """Every text, in the order given; `quality` where labels are known; `output` is a mixture, if one was written."""

    columns: ClassVar[Mapping[str, Kind]] = {
        "text": "text",
        "adapter": "text",
        "reason": "text",
        "nearest": "text",
        "cosine": "number",
        "confidence": "number",
        "label": "text",
    }

    hub: str
    texts: tuple[Routed, ...]
    quality: Quality | None = None
    warnings: tuple[str, ...] = ()
    output: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "hub": self.hub,
            "texts": [{"text": t.text, "label": t.label} | asdict(t.choice) for t in self.texts],
            "quality": None if self.quality is None else asdict(self.quality),
            "warnings": list(self.warnings),
            "output": self.output,
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each text, with the keys of `columns`."""
        for t in self.texts:
            nearest = t.choice.candidates[0]
            yield {
                "text": t.text,
                "adapter": t.choice.adapter,
                "reason": t.choice.reason,
                "nearest": nearest.adapter,
                "cosine": nearest.cosine,
                "confidence": nearest.confidence,
                "label": t.label,
            }


@dataclass(frozen=True)
class Fitted:
    """One adapter of a set: its examples and the least cosine at which a text still goes to it."""

    examples: int
    centroids: int
    threshold: float


@dataclass(frozen=True)
class RouteFitReport:
    """What was fitted, from all examples; `held_out` is how well it does on one in five when fitted on the rest."""

    output: str
    encoder: str | None
    adapters: Mapping[str, Fitted]
    held_out: Quality
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "output": self.output,
            "encoder": self.encoder,
            "adapters": {name: asdict(fitted) for name, fitted in self.adapters.items()},
            "held_out": asdict(self.held_out),
            "warnings": list(self.warnings),
        }
