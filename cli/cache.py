"""`loratools cache`."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from loratools_cli import options


def cache(
    clear: Annotated[bool, Option("--clear", help="Remove everything that is kept.")] = False,
    everything: options.Everything = False,
    as_json: options.Json = False,
) -> None:
    """List or clear what is kept of base models.

    Singular vectors of base weights, by content, in LORATOOLS_CACHE or ~/.cache/loratools; they are computed again
    where they are missing.

    Example: loratools cache --clear
    """
    from loratools.cache import default_cache
    from loratools.ops.cached import cached
    from loratools_cli.output import Output

    Output(as_json=as_json, everything=everything).show(cached(default_cache(), clear=clear))
