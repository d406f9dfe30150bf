"""`loratools formats` and `loratools families`."""

from __future__ import annotations

from loratools_cli import options


def formats(as_json: options.Json = False) -> None:
    """List the dialects that can be read and written.

    Example: loratools formats --json
    """
    from loratools.ops import tables
    from loratools_cli.output import Output

    Output(as_json=as_json).show(tables.formats())


def families(as_json: options.Json = False) -> None:
    """List the families of updates, and where they can be written.

    Example: loratools families --json
    """
    from loratools.ops import tables
    from loratools_cli.output import Output

    Output(as_json=as_json).show(tables.families())
