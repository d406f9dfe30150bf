"""What a file is, from its header alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class BottleneckInfo:
    """A nonlinear bottleneck, scale * up(act(down h)): no update of a weight. `activation` is null where none says."""

    kind: str
    width: int
    inputs: int
    activation: str | None
    parameters: int


@dataclass(frozen=True)
class InfoReport:
    """Header facts. `ranks` and `scales` count targets by value; sizes are in bytes, `parameters` in numbers stored."""

    path: str
    container: str
    format: str
    base_model: str | None
    targets: int
    families: Mapping[str, int]
    ranks: Mapping[str, int]
    scales: Mapping[str, int]
    modules: Mapping[str, int]
    dtypes: Mapping[str, int]
    codings: Mapping[str, int]
    parameters: int
    bytes: int
    extras: Mapping[str, int]
    unsupported: Mapping[str, str]
    bottlenecks: Mapping[str, BottleneckInfo]
    config: Mapping[str, Any]
    metadata: Mapping[str, str]
    record: Mapping[str, Any] | None
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"warnings": list(self.warnings)}
