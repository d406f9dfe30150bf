"""Which scenario each adapter of a hub is for: centroids of example texts, in a JSON file that lies in the hub."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools._lazy import torch
from loratools.configs import read_config
from loratools.errors import InputError, UsageError
from loratools.storage.atomic import printable, refuse_existing, write_whole
from loratools.storage.header import quoted

if TYPE_CHECKING:
    from torch import Tensor

FILE = "route.json"
FALLBACK = "base"
_KIND = "loratools.route"
_REMEDY = "make one with `loratools hub route-fit`"
_UNIT = 1e-4  # how far the length of a centroid may be from 1


@dataclass(frozen=True, eq=False)
class Scenario:
    """What one adapter is for: unit centroids (c, d), and the least cosine at which a text still belongs to it."""

    name: str
    centroids: Tensor
    threshold: float
    examples: int


@dataclass(frozen=True, eq=False)
class AdapterSet:
    """Scenarios to choose from; a text goes to the base where it belongs to none, or nearly as well to two.

    `encoder` tells which encoder made the features, None for the caller's own.
    """

    scenarios: tuple[Scenario, ...]
    encoder: str | None = None
    temperature: float = 0.1
    margin: float = 0.02

    def __post_init__(self) -> None:
        if not self.scenarios:
            raise UsageError("there are no scenarios to choose from")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UsageError(f"temperature {self.temperature} is not above 0; 0.1 is usual")
        if not (math.isfinite(self.margin) and self.margin >= 0):
            raise UsageError(f"margin {self.margin} is negative; 0.02 is usual")

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, in the order of the scores."""
        return tuple(scenario.name for scenario in self.scenarios)

    @property
    def size(self) -> int:
        """How many numbers a feature has."""
        return int(self.scenarios[0].centroids.shape[1])

    def require_encoder(self, encoder: str | None) -> None:
        """UsageError where features of `encoder` (None: the caller's own) are not what the set was fitted with."""
        if encoder != self.encoder:
            ours, theirs = self.encoder or "features of your own", encoder or "features of your own"
            raise UsageError(f"the scenarios were fitted with {ours}, the texts come as {theirs}; {_REMEDY}")

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Write the set as JSON; OutputError where that exists, unless `force`."""
        place = Path(path)
        refuse_existing(place, force=force)
        adapters = {
            s.name: {"threshold": s.threshold, "examples": s.examples, "centroids": s.centroids.float().tolist()}
            for s in self.scenarios
        }
        fields = {"kind": _KIND, "version": 1, "encoder": self.encoder, "fallback": FALLBACK}
        fields |= {"temperature": self.temperature, "margin": self.margin, "adapters": adapters}
        return write_whole(place, (json.dumps(fields) + "\n").encode())


def load_adapter_set(path: str | os.PathLike[str]) -> AdapterSet:
    """Read what `AdapterSet.save` wrote; InputError for anything else."""
    place = Path(path)
    name = printable(place)
    if not place.exists():
        raise InputError(f"{name}: does not exist; {_REMEDY}")
    fields = read_config(place)
    if fields.get("kind") != _KIND or fields.get("version") != 1:
        raise InputError(f"{name}: holds no scenarios that this loratools can read; {_REMEDY}")
    try:
        scenarios = tuple(_scenario(key, value) for key, value in dict(fields["adapters"]).items())
        encoder = None if fields["encoder"] is None else str(fields["encoder"])
        found = AdapterSet(scenarios, encoder, float(fields["temperature"]), float(fields["margin"]))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"{name}: its scenarios are damaged: {reason[:200]}; {_REMEDY}") from None
    except UsageError as error:
        raise InputError(f"{name}: {error}; {_REMEDY}") from None
    if len({scenario.centroids.shape[1] for scenario in scenarios}) > 1:
        raise InputError(f"{name}: its centroids differ in length; {_REMEDY}")
    return found


def _scenario(name: str, fields: Mapping[str, Any]) -> Scenario:
    centroids = torch.tensor(fields["centroids"], dtype=torch.float64)
    threshold = float(fields["threshold"])
    if centroids.ndim != 2 or not centroids.numel():
        raise ValueError(f"{quoted(name, 80)} has no centroids")
    if not bool(((centroids.norm(dim=1) - 1).abs() < _UNIT).all()) or not math.isfinite(threshold):
        raise ValueError(f"{quoted(name, 80)} has a centroid that is not of length 1, or no threshold")
    return Scenario(name, centroids / centroids.norm(dim=1, keepdim=True), threshold, int(fields["examples"]))


def require_in_hub(names: Sequence[str], there: Mapping[str, Path], *, where: str) -> None:
    """InputError where a scenario is for an adapter that the hub does not have; `there` are the hub's, by name."""
    if missing := sorted(set(names) - set(there)):
        known = ", ".join(quoted(name, 80) for name in list(there)[:5]) or "none"
        raise InputError(
            f"{where}: the hub has no adapter {quoted(missing[0], 80)}"
            + (f" nor {len(missing) - 1} others" if len(missing) > 1 else "")
            + f"; it has {known}{' ...' if len(there) > 5 else ''}"
        )
