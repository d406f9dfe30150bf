"""What a file keeps of the one that it was converted from, so that the way back restores names, config and metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loratools.adapter import Adapter
    from loratools.formats import Format, Order

CARRIED_KEY = "loratools_source"


def carried_by(adapter: Adapter) -> dict[str, Any] | None:
    """What an earlier conversion kept of the file that it was made from."""
    try:
        found = json.loads(adapter.metadata.get(CARRIED_KEY, "null"))
    except (ValueError, RecursionError):
        return None
    shapes = {"format": str, "config": dict, "metadata": dict, "names": dict}
    if not isinstance(found, dict) or any(not isinstance(found.get(k, t()), t) for k, t in shapes.items()):
        return None
    return found


def metadata_for(
    adapter: Adapter, destination: type[Format], order: Order, names: Callable[[], Mapping[str, str]]
) -> dict[str, str]:
    """The new file's own fields, and what of the old one it has no place for, to be found again on the way back.

    `names` are those that targets would not get back by themselves.
    """
    if not order.metadata:
        return {}
    if type(adapter.format) is destination:
        return dict(adapter.metadata)
    carried = carried_by(adapter)
    if carried is not None and carried.get("format") == destination.name:
        return {k: str(v) for k, v in (carried.get("metadata") or {}).items()}
    own = destination.fresh_metadata(order)
    if carried is not None:
        return own | {CARRIED_KEY: adapter.metadata[CARRIED_KEY]}
    source = {key: value for key, value in adapter.metadata.items() if key != CARRIED_KEY}
    kept = {
        "format": adapter.format.name,
        "config": adapter.format.carried_config(),
        "metadata": source,
        "names": names(),
    }
    return own | {CARRIED_KEY: json.dumps(kept, sort_keys=True)}
