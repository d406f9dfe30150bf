"""`loratools explore`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from loratools_cli import options


def explore(
    path: options.AdapterPath,
    base: Annotated[
        Path | None,
        Argument(metavar="BASE", help="Base model: makes norms relative, and DoRA exact and squeezable."),
    ] = None,
    beside: Annotated[
        Path | None, Option("--with", metavar="OTHER", help="A second adapter, shown beside the first.")
    ] = None,
    alpha: options.Alpha = None,
    enable_lora: options.EnableLora = None,
    scaling: options.Scaling = None,
) -> None:
    """Walk through an adapter on the full screen.

    Its targets, their spectra, and what lower ranks would save and lose; save a squeezed copy. Needs a terminal and
    loratools[explore]; press ? for the keys.

    \b
    Examples:
      loratools explore my_lora.safetensors
      loratools explore my_peft_folder path/to/model
      loratools explore before --with after
    """
    if not _has_screen():
        from loratools.errors import UsageError

        raise UsageError(f"explore needs a terminal; without one, see loratools inspect {path}")
    try:
        from loratools_cli.explorer.app import Explorer
        from loratools_cli.explorer.session import Session
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "textual":
            raise
        from loratools.errors import MissingExtraError

        raise MissingExtraError("the explorer needs textual: pip install 'loratools[explore]'") from error
    from loratools_cli.opening import open_adapter, open_base

    weights = open_base(base)
    adapter = open_adapter(path, alpha=alpha, enable_lora=enable_lora, scaling=scaling, base=weights)
    other = None if beside is None else open_adapter(beside, base=weights)
    Explorer(Session(adapter, weights, other)).run()


def _has_screen() -> bool:
    streams = (sys.stdin, sys.stdout, sys.stderr)  # textual draws on standard error
    return all(stream.isatty() for stream in streams) and os.environ.get("TERM") != "dumb"
