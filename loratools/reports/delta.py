"""Which dense updates were written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DeltaReport:
    """`parameters` maps each written base parameter to its shape; `skipped` says why others were not."""

    output: str
    parameters: Mapping[str, tuple[int, ...]]
    skipped: Mapping[str, str]
    bytes: int
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "output": self.output,
            "parameters": {name: list(shape) for name, shape in self.parameters.items()},
            "skipped": dict(self.skipped),
            "bytes": self.bytes,
            "warnings": list(self.warnings),
        }
