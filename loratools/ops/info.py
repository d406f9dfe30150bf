"""What is this file? Answered without reading a tensor, and without torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from loratools.adapter import RECORD_KEY
from loratools.ops.inspect import places
from loratools.reports.info import BottleneckInfo, InfoReport

if TYPE_CHECKING:
    from loratools.adapter import Adapter
    from loratools.formats.bottlenecks import Place

# Config fields that say how an adapter acts; the others concern training or loading.
_CONFIG = (
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "modules_to_save",
    "bias",
    "fan_in_fan_out",
    "init_lora_weights",
    "task_type",
    "peft_version",
)
_MAX_METADATA = 200  # characters of a value that are worth showing


def info(adapter: Adapter) -> InfoReport:
    """Format, family, base, ranks, scale, sizes, dtypes and extras of an adapter, from its header alone."""
    entries = adapter.entries
    specs = [spec for entry in entries.values() for spec in entry.specs.values()]
    config = adapter.config or {}
    return InfoReport(
        path=str(adapter.origin.path) if adapter.origin else "",
        container=adapter.origin.container if adapter.origin else "memory",
        format=adapter.format.name,
        base_model=_base_model(config, adapter.metadata),
        targets=len(entries),
        families=_count(entry.family.family for entry in entries.values()),
        ranks=_count(str(rank) for rank in sorted(entry.rank for entry in entries.values())),
        scales=_count(f"{scale:.6g}" for scale in sorted(entry.scale for entry in entries.values())),
        modules=_count(module for _, module in places(list(entries)).values()),
        dtypes=_count(spec.dtype for spec in specs),
        codings=adapter.origin.codings if adapter.origin else {},
        parameters=sum(spec.numel for spec in specs),
        bytes=adapter.file_nbytes,
        extras={key: extra.spec.nbytes for key, extra in adapter.extras.items()},
        unsupported=adapter.unsupported,
        bottlenecks={name: _bottleneck(adapter, place) for name, place in adapter.format.bottlenecks.items()},
        config={field: config[field] for field in _CONFIG if config.get(field) not in (None, {}, [], False)},
        metadata={
            k: v if len(v) <= _MAX_METADATA else f"{v[:_MAX_METADATA]}…"
            for k, v in adapter.metadata.items()
            if k != RECORD_KEY
        },
        record=_record(adapter.metadata),
        warnings=adapter.warnings,
    )


def _bottleneck(adapter: Adapter, place: Place) -> BottleneckInfo:
    """As its shapes tell; of MoSA's experts one is counted, which is what they merge to."""
    specs = {key: extra.spec for key, extra in adapter.extras.items()}
    down = place.spec(specs, place.down)
    keys = (place.down, place.down_bias, place.up, place.up_bias, *(place.norm or ()))
    return BottleneckInfo(
        kind=place.kind,
        width=down.shape[0] if down.shape else 0,
        inputs=down.shape[-1] if down.shape else 0,
        activation=place.activation,
        parameters=sum(place.spec(specs, key).numel for key in keys if key is not None),
    )


def _count(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values))


def _base_model(config: Mapping[str, Any], metadata: Mapping[str, str]) -> str | None:
    for found in (
        config.get("base_model_name_or_path"),
        metadata.get("ss_sd_model_name"),
        metadata.get("ss_base_model_version"),
    ):
        if found:
            return str(found)
    return None


def _record(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    try:
        record = json.loads(metadata.get(RECORD_KEY, "null"))
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
