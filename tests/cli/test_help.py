"""Help, and what comes out when nobody watches."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

import loratools
from loratools_cli.app import GROUPS, app, program
from loratools_cli.exit_codes import ExitCode
from loratools_cli.progress import Progress
from loratools_cli.render import table

Run = Callable[..., Any]
Make = Callable[..., Path]

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
INSIDE = {name: command.commands for name, command in COMMANDS.items() if hasattr(command, "commands")}
ALL = {name: command for name, command in COMMANDS.items() if name not in INSIDE} | {
    f"{group} {name}": command for group, inside in INSIDE.items() for name, command in inside.items()
}


def test_the_commands_are_the_files() -> None:
    assert list(COMMANDS) == [
        "info",
        "inspect",
        "explore",
        "diff",
        "eval",
        "squeeze",
        "truncate",
        "quantize",
        "dequantize",
        "pareto",
        "calibrate",
        "neurons",
        "prune-neurons",
        "convert",
        "check",
        "reparameterize",
        "bakeoff",
        "expand",
        "restrict",
        "merge",
        "extract",
        "fuse",
        "delta",
        "transfer",
        "recover",
        "intruders",
        "compare",
        "formats",
        "families",
        "cache",
        "hub",
    ]


def test_help_groups_the_commands(run: Run) -> None:
    shown = run("--help").out
    for title, commands in GROUPS.items():
        section = shown.split(f"{title}:\n", 1)[1].split("\n\n", 1)[0]
        assert [line.split()[0] for line in section.splitlines()] == [c.__name__.replace("_", "-") for c in commands]
    assert "Commands:" not in shown


@pytest.mark.parametrize("name", ALL)
def test_every_command_has_help_with_an_example(run: Run, name: str) -> None:
    done = run(*name.split(), "--help")
    assert (done.code, done.err) == (0, "")
    assert "Example" in done.out
    assert f"loratools {name} " in done.out.split("Example", 1)[1]
    assert all(len(line) <= 80 for line in done.out.splitlines())
    assert all(parameter.help for parameter in ALL[name].params if parameter.name != "help")


def test_a_command_alone_is_what_it_is_among_all() -> None:
    every = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, command in every.items():
        alone = program.__wrapped__(name)  # no test has asked it for help yet, which it keeps
        assert list(alone.commands) == [name]
        expected, found = (
            (
                one.get_help(typer.Context(one, info_name=name)),
                [(p.name, p.opts, p.default, p.required) for p in one.params],
            )
            for one in (command, alone.commands[name])
        )
        assert found == expected
    for name in ("", "--help", "squeez", "prune_neurons"):
        assert list(program(name).commands) == list(every)


def test_help_lists_every_exit_code_and_whole_descriptions(run: Run) -> None:
    done = run("--help")
    assert done.code == 0
    assert "..." not in done.out.replace("[ARGS]...", "")
    assert all(f" {code.value}  {code.meaning}" in done.out for code in ExitCode)
    assert all(len(line) <= 80 for line in done.out.splitlines())


def test_a_wrong_choice_is_named_plainly(run: Run) -> None:
    refused = run("quantize", "a", "--method", "foo")
    assert refused.code == 2
    assert "Invalid value for '--method': 'foo' is not one of 'grid'" in refused.err


def test_no_arguments_show_help(run: Run) -> None:
    done = run()
    assert done.code == 2
    assert done.out == run("--help").out == run("-h").out


def test_version(run: Run) -> None:
    assert run("--version").out == f"loratools {loratools.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["squeeze", "--help"], ["explore", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from loratools_cli.app import main; assert main(sys.argv[1:]) == 0\n"
        "print(sorted({'torch', 'numpy', 'rich', 'textual'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == "[]\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(spawn: Callable[..., subprocess.Popen[str]], shell: str) -> None:
    shown, _ = spawn(env={"_LORATOOLS_COMPLETE": f"source_{shell}"}).communicate(timeout=60)
    assert "_LORATOOLS_COMPLETE" in shown
    words = {"COMP_WORDS": "loratools sq", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "loratools sq"}
    offered, _ = spawn(
        env={"_LORATOOLS_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"} | words
    ).communicate(timeout=60)
    assert "squeeze" in offered


def test_a_pipe_gets_no_colour_and_80_columns(run: Run, peft: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(peft("a", n_layers=10).parent)
    for arguments in (
        ["info", "a"],
        ["inspect", "a", "--nested"],
        ["squeeze", "a", "--rank", "4"],
        ["squeeze", "a", "--energy", "0.9", "--all"],
        ["truncate", "a", "--rank", "4"],
        ["diff", "a", "a.r4"],
        ["delta", "a", "-o", "d.safetensors"],
    ):
        done = run(*arguments)
        assert done.code in (0, 1)
        assert "\x1b" not in done.out
        assert "\x1b" not in done.err
        assert max(map(len, done.out.splitlines())) <= 80, done.out


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_colour_unless_no_color_is_set(peft: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    report = loratools.info(loratools.load(peft()))
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    assert "\x1b[" in table(report, Terminal())
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in table(report, Terminal())
    monkeypatch.delenv("TERM")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in table(report, Terminal())


def test_progress_shows_on_a_terminal_after_a_while_only(peft: Make) -> None:
    adapter = loratools.load(peft())
    for stream, silent, shown in ((Terminal(), 0.0, True), (Terminal(), 60.0, False), (io.StringIO(), 0.0, False)):
        with Progress(stream=stream, silent=silent) as progress:
            for _ in progress.watch(adapter).values():
                time.sleep(0.03)
        assert ("of 6 targets" in stream.getvalue()) is shown
        if shown:
            assert stream.getvalue().endswith(" \r")  # wiped
