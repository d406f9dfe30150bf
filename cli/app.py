"""The program: its commands, and what its failures look like."""

from __future__ import annotations

import copy
import functools
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.main import get_command, get_command_name
from typer.models import CommandInfo

from loratools_cli.bakeoff import bakeoff
from loratools_cli.cache import cache
from loratools_cli.calibrate import calibrate
from loratools_cli.check import check
from loratools_cli.commands import Grouped
from loratools_cli.compare import compare
from loratools_cli.convert import convert
from loratools_cli.delta import delta
from loratools_cli.diff import diff
from loratools_cli.eval import eval as evaluation
from loratools_cli.exit_codes import ExitCode, exit_code_lines
from loratools_cli.explore import explore
from loratools_cli.extract import extract
from loratools_cli.fuse import fuse
from loratools_cli.hub import hub
from loratools_cli.info import info
from loratools_cli.inspect import inspect
from loratools_cli.interrupts import Interrupts
from loratools_cli.intruders import intruders
from loratools_cli.merge import merge
from loratools_cli.neurons import neurons
from loratools_cli.output import say
from loratools_cli.pareto import pareto
from loratools_cli.prune_neurons import prune_neurons
from loratools_cli.quantize import dequantize, quantize
from loratools_cli.recover import recover
from loratools_cli.reparameterize import reparameterize
from loratools_cli.resize import expand, restrict
from loratools_cli.squeeze import squeeze
from loratools_cli.tables import families, formats
from loratools_cli.transfer import transfer
from loratools_cli.truncate import truncate

# rich_markup_mode: help is plain text, which costs no import and reads the same in a pipe.
app = typer.Typer(
    cls=Grouped,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    epilog="\n".join(["\b", "Exit codes:", *exit_code_lines()]),
)
GROUPS = {
    "Look at an adapter": (info, inspect, explore, diff, evaluation),
    "Make it smaller": (squeeze, truncate, quantize, dequantize, pareto, calibrate, neurons, prune_neurons),
    "Write it otherwise": (convert, check, reparameterize, bakeoff, expand, restrict),
    "Adapters and whole models": (merge, extract, fuse, delta, transfer, recover, intruders, compare),
    "What there is": (formats, families, cache),
}
for title, commands in GROUPS.items():
    for command in commands:
        app.command(rich_help_panel=title)(command)
app.add_typer(hub, name="hub", rich_help_panel="Many adapters")


def _show_version(wanted: bool) -> None:
    if wanted:
        from loratools import __version__

        typer.echo(f"loratools {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _loratools(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Probe, transcode and compress LoRA adapters, offline.

    Example: loratools squeeze my_lora.safetensors --rank 8
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(ExitCode.USAGE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks
    with Interrupts() as interrupts:
        try:
            code = _run(arguments)
        except KeyboardInterrupt:
            code = ExitCode.INTERRUPTED
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else ExitCode.OK
        except Exception as error:  # noqa: BLE001 - the last resort, which never hides an error
            code = ExitCode.INTERRUPTED if interrupts.received else _failed(error)
    if code == ExitCode.INTERRUPTED:
        say("interrupted")
    return int(code)


def _run(arguments: Sequence[str] | None) -> int:
    told = list(sys.argv[1:] if arguments is None else arguments)
    code = program(told[0] if told else "").main(args=told, prog_name="loratools", standalone_mode=False)
    return code if isinstance(code, int) else ExitCode.OK


@functools.cache
def program(name: str) -> Any:
    """The program with the command or group of that name alone, with all where there is none.

    To make all of them takes longer than many a command runs.
    """
    alone = copy.copy(app)
    alone.registered_commands = [info for info in app.registered_commands if _name(info) == name]
    alone.registered_groups = [info for info in app.registered_groups if info.name == name]
    return get_command(alone if alone.registered_commands or alone.registered_groups else app)


def _name(command: CommandInfo) -> str:
    return command.name or get_command_name(getattr(command.callback, "__name__", ""))


def _failed(error: Exception) -> int:
    from loratools_cli.failures import explain

    if os.environ.get("LORATOOLS_DEBUG"):
        import traceback

        traceback.print_exception(error)
    code, message = explain(error)
    say(f"error: {message}")
    return code
