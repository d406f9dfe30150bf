"""`loratools formats` and `loratools families`."""

from __future__ import annotations

from typing import Annotated

from typer import Argument

from loratools_cli import options


def formats(as_json: options.Json = False) -> None:
    """List the dialects that can be read and written.

    Example: loratools formats --json
    """
    from loratools.ops import tables
    from loratools_cli.output import Output

    Output(as_json=as_json).show(tables.formats())


def families(
    name: Annotated[str | None, Argument(metavar="NAME", help="Only this one, with all that is known of it.")] = None,
    as_json: options.Json = False,
) -> None:
    """List the families of updates, and what each can hold.

    \b
    Examples:
      loratools families
      loratools families shira
    """
    from loratools.ops import tables
    from loratools_cli.output import Output

    Output(as_json=as_json).show(tables.families(name))
