"""What a server holds of a hub: buckets of ranks, residents, hit rates, and what to change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from loratools.reports.frames import Kind, Tabular


@dataclass(frozen=True)
class Unfit:
    """Adapters that the server cannot serve, or not beside the others, with some of their names."""

    reason: str
    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Bucket:
    """Adapters served at one rank.

    `padded` are those of a lower rank, `squeezed` those of a higher one, which are to be squeezed down to it with an
    error of at most `largest_error`. `waste` is the share of `bytes`, the sum over all of them at that rank, that are
    zeros; `saved_bytes` is what squeezing takes off. `resident` of them stay in memory; a bucket of vLLM is a server of
    its own, started with `setting`.
    """

    rank: int
    adapters: int
    padded: int
    squeezed: int
    waste: float
    bytes: int
    saved_bytes: int
    largest_error: float | None
    resident: int
    requests: float
    setting: str = ""


@dataclass(frozen=True)
class Policy:
    """How a policy does: `expected` in the long run, the rest from a trace. Misses load `loaded_bytes` in all."""

    name: str
    expected: float
    hit_rate: float
    evictions: int
    loads: int
    loaded_bytes: int


@dataclass(frozen=True)
class Planned:
    """One adapter. `action`: `keep`, `pad` or `squeeze` to the rank of its bucket; `unfit` for the `reason`."""

    name: str
    rank: int
    action: str
    bucket: int | None
    error: float | None
    bytes: int
    popularity: float
    resident: bool
    reason: str = ""


@dataclass(frozen=True)
class HubPlanReport(Tabular):
    """The plan for one server and one base model.

    `capacity` is in cells for S-LoRA, of `unit_bytes`, after `reserve_tokens`; in bytes for vLLM. `facts` is what the
    shapes tell. `used` of it is taken by the `resident` adapters, `displaced_tokens` of the cache; `host_bytes` are
    those of all adapters that fit the server, as stored there. `bound` is the hit rate that no choice of residents
    exceeds, and `one_bucket_waste` the share that padding to the largest rank would waste. `popularity` says where it
    comes from; `elsewhere` is the share of requests for adapters that are unfit, `unknown` of those for names that are
    not there.
    """

    columns: ClassVar[Mapping[str, Kind]] = {
        "name": "text",
        "rank": "integer",
        "action": "text",
        "bucket": "integer",
        "error": "number",
        "bytes": "integer",
        "popularity": "number",
        "resident": "flag",
        "reason": "text",
    }

    source: str
    server: str
    title: str
    base_model: str
    adapters: int
    fit: int
    mended: int
    unfit: tuple[Unfit, ...]
    memory: int
    unit_bytes: int
    capacity: int
    reserve_tokens: int
    facts: Mapping[str, Any]
    buckets: tuple[Bucket, ...]
    waste: float
    one_bucket_waste: float
    largest_error: float | None
    resident: int
    used: int
    displaced_tokens: int
    host_bytes: int
    bound: float
    popularity: str
    elsewhere: float
    unknown: float
    unknown_names: tuple[str, ...]
    requests: int
    trace: str
    seed: int
    policies: tuple[Policy, ...]
    top: tuple[Planned, ...]
    settings: tuple[str, ...]
    commands: tuple[str, ...]
    warnings: tuple[str, ...]
    every: Callable[[], Iterator[Planned]] = field(repr=False, compare=False)
    groups: Any = field(default=(), repr=False, compare=False)  # adapters that need the same commands

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: everything but a row for each adapter, which `rows` has."""
        told = [field.name for field in fields(self) if field.name not in ("every", "groups")]
        return {name: _plain(getattr(self, name)) for name in told}

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each adapter of the hub, with the keys of `columns`."""
        for planned in self.every():
            yield asdict(planned)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return dict(value)
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value
