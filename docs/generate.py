"""Write the generated pages of the documentation, or with --check fail where one is out of date.

The pages come from what the program says of itself: the help of its commands, the report classes, and the tables of
families, dialects and containers.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

# Before Typer reads them: the pages must not depend on who writes them.
os.environ.update(NO_COLOR="1", COLUMNS="80", TERMINAL_WIDTH="80", TERM="dumb")

HERE = Path(__file__).resolve().parent
NOTE = "<!-- Written by docs/generate.py (make docs); do not edit. -->\n\n"


def commands() -> str:
    """The command line: help, JSON fields, exit codes."""
    import typer

    from loratools_cli.app import app
    from loratools_cli.exit_codes import ExitCode

    root: Any = typer.main.get_command(app)
    parts = ["# Commands", _help(root, "loratools")]
    for name, command in _all_commands(root):
        parts += [f"## loratools {name}", _help(command, f"loratools {name}")]
    parts += ["## Exit codes", _table(("code", "meaning"), [(str(c.value), c.meaning) for c in ExitCode])]
    parts += ["# JSON", "What `--json` prints: one object, whose fields are those of the command's report."]
    for command, module in REPORTS.items():
        parts += [f"## {command}", *_records(module)]
    return _page(parts)


REPORTS = {
    "loratools info": "info",
    "loratools inspect": "inspect",
    "loratools squeeze, loratools truncate": "squeeze",
    "loratools quantize": "quantize",
    "loratools pareto": "pareto",
    "loratools eval, loratools pareto --eval": "evaluate",
    "loratools calibrate": "calibrate",
    "loratools recover": "recover",
    "loratools reparameterize": "reparameterize",
    "loratools bakeoff": "bakeoff",
    "loratools hub": "hub",
    "loratools hub mixture": "mixture",
    "loratools hub route, loratools hub route-fit": "route",
    "loratools hub pack, unpack, pack-add": "pack",
    "loratools neurons": "neurons",
    "loratools prune-neurons": "prune_neurons",
    "loratools convert": "convert",
    "loratools check": "check",
    "loratools merge": "merge",
    "loratools extract": "extract",
    "loratools expand, loratools restrict": "resize",
    "loratools fuse": "fuse",
    "loratools intruders": "intruders",
    "loratools compare": "compare",
    "loratools diff": "diff",
    "loratools delta": "delta",
    "loratools transfer --weights-only": "weight_transfer",
    "loratools transfer": "transfer",
    "loratools formats, loratools families": "tables",
    "loratools cache": "cache",
}
INTERNAL = {"Outcome"}  # records that no report holds


def families() -> str:
    """What the parameters may mean."""
    from loratools.families import FAMILIES
    from loratools.ops import tables

    found = tables.families().families
    rows = [
        (f"[{n}](#{n})", f"`{f.formula}`", f.count, f.guarantee, _needed(f), f.paper)
        for n, f in found.items()
        if f.guarantee
    ]
    parts = ["# Families", "What the parameters of a target mean. The set of slots that a file fills picks the family."]
    parts += [
        (
            "`loratools reparameterize --to NAME` writes any delta in one of these. *exact*: every delta, but for "
            "rounding; *optimal*: the nearest one of the family, with these options; *local*: the best that was found. "
            "A delta is (m, n), outputs by inputs, and W its base weight; the sections below tell of the other "
            "letters. How near each comes to trained deltas: [measured](measured/parameterisations.md)."
        ),
        _table(("family", "delta", "numbers stored", "fit", "needs the base", "source"), rows),
    ]
    for family in FAMILIES:
        told = found[family.family]
        facts = [
            ("slots", _names(family.required) or "one set or the other of the optional ones"),
            ("optional slots", _names(family.optional) or "none"),
            ("needs the base weight", _needed(told)),
        ]
        if told.guarantee:
            options = ", ".join(f"`{name}` ({value})" for name, value in told.options.items()) or "none"
            facts += [("fit", told.guarantee), ("options", options)]
            facts += [("feasible", f"up to {told.most_entries:,} entries of a matrix")] if told.most_entries else []
        if told.reconstruction:
            facts.append(("reconstruction", told.reconstruction))
        parts += [f"## {family.family}", _doc(family), _table(("", ""), facts)]
    return _page(parts)


def _needed(family: Any) -> str:
    return {"yes": "yes", "shape": "its shape, which loratools' own files state", "fit": "to be fitted", "no": "no"}[
        family.base
    ]


def formats() -> str:
    """How adapters are spelt and stored."""
    from loratools.formats import FORMATS
    from loratools.formats.matrix import DIALECTS, GRADES, MATRIX
    from loratools.storage import CONTAINERS, packed

    parts = ["# Formats", "A dialect is how keys and config are spelt. Exactly one must recognise a file."]
    for dialect in FORMATS:
        parts += [f"## {dialect.name}", _first_sentence(dialect), _doc(dialect)]
    parts += [
        "# Conversions",
        "What each kind of update, or each thing about it, becomes; the worst of the rows that hold for a file counts.",
        _table(("", *DIALECTS), [(kind, *(row[d] for d in DIALECTS)) for kind, row in MATRIX.items()]),
        _table(("", "meaning"), [(f"*{grade}*", meaning) for grade, meaning in GRADES.items()]),
    ]
    rows = []
    for container in CONTAINERS:
        opener: Any = container.open
        rows.append((opener.container, _names(container.suffixes, ordered=True), _doc(opener).split("\n\n")[0]))
    parts += [
        "# Containers",
        "A container is how tensors lie in a file. Its content tells it, not its name. Output is safetensors, or GGUF.",
        _table(("container", "usual suffixes", "reading"), rows),
        "## packed",
        inspect.getdoc(packed) or "",
    ]
    return _page(parts)


def servers() -> str:
    """What servers and libraries take."""
    from loratools.ops.servers import SERVERS

    kinds = {"refused": "refused", "wrong": "computed wrongly", "old": "old versions only"}
    introduction = (
        "What `loratools check --for SERVER` looks at. *Refused*: it does not load. *Computed wrongly*: it loads, and "
        "does something else. The sources are files of the projects' own code."
    )
    parts = ["# Servers", introduction]
    for name, server in SERVERS.items():
        rows = [(f"`{r.name}`", kinds[r.severity], r.reason, r.fix, r.source) for r in server.requirements]
        parts += [f"## {server.title} (`--for {name}`)"]
        if server.max_ranks:
            ranks = ", ".join(map(str, server.max_ranks))
            parts += [f"`{server.max_rank_setting}` may be {ranks}; ranks above its default of 16 need it."]
        if server.memory:
            parts += [f"{server.memory} `loratools hub plan --server {name}` counts that."]
        parts += [_table(("requirement", "otherwise", "why", "what helps", "source"), rows)]
    return _page(parts)


PAGES: dict[str, Callable[[], str]] = {
    "commands.md": commands,
    "families.md": families,
    "formats.md": formats,
    "servers.md": servers,
}


def _all_commands(root: Any) -> Iterator[tuple[str, Any]]:
    """Every command by its name, those of groups after the group."""
    for name, command in root.commands.items():
        yield name, command
        for inner, its in getattr(command, "commands", {}).items():
            yield f"{name} {inner}", its


def _help(command: Any, name: str) -> str:
    context = command.make_context(name, [], resilient_parsing=True)
    text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    return f"```\n{text}\n```"


def _records(name: str) -> Iterator[str]:
    """The report first, then the records inside it."""
    module = importlib.import_module(f"loratools.reports.{name}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and dataclasses.is_dataclass(value) and value.__module__ == module.__name__
    ]
    found = [record for record in found if record.__name__ not in INTERNAL]
    found.sort(key=lambda record: not record.__name__.endswith("Report"))  # stable: otherwise as in the file
    for record in found:
        rows = [
            (f"`{field.name}`", f"`{_json_type(str(field.type), vars(module))}`")
            for field in dataclasses.fields(record)
        ]
        rows += [
            (f"`{key}`", "`float`")
            for key, value in vars(record).items()
            if isinstance(value, property) and key in ("mib", "mb")
        ]
        yield f"### {record.__name__}"
        yield _doc(record)
        yield _table(("field", "type"), rows)


def _json_type(annotation: str, names: dict[str, Any]) -> str:
    """`Mapping[str, int]` as a program sees it: `{str: int}`; a choice of words as these words."""
    if choices := get_args(names.get(annotation)):
        return " or ".join(f'"{choice}"' for choice in choices)
    previous = ""
    while annotation != previous:
        previous = annotation
        annotation = re.sub(r"Mapping\[(\w+), ([^\[\]]*)\]", r"{\1: \2}", annotation)
        annotation = re.sub(r"tuple\[([^\[\],|]*), \.\.\.\]", r"list of \1", annotation)
        annotation = re.sub(r"tuple\[([^\[\],]*), \.\.\.\]", r"list of (\1)", annotation)
        annotation = re.sub(r"tuple\[(\w+)(?:, \1)+\]", r"list of \1", annotation)
    return annotation.replace("None", "null").replace("{int:", "{str:").replace("|", "or")


def _doc(thing: object) -> str:
    return (inspect.getdoc(thing) or "").strip()


def _first_sentence(thing: type) -> str:
    """Of the module's docstring: what the dialect is."""
    return _doc(sys.modules[thing.__module__]).split("\n\n")[0]


def _names(names: Any, *, ordered: bool = False) -> str:
    return ", ".join(f"`{name}`" for name in (names if ordered else sorted(names)))


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def _page(parts: list[str]) -> str:
    return NOTE + "\n\n".join(part for part in parts if part) + "\n"


def main(arguments: list[str]) -> int:
    """Write or compare; 1 where --check finds a difference."""
    stale = False
    for name, page in PAGES.items():
        path, text = HERE / name, page()
        old = path.read_text(encoding="utf-8") if path.is_file() else ""
        if old == text:
            continue
        stale = True
        if "--check" in arguments:
            lines = difflib.unified_diff(old.splitlines(), text.splitlines(), name, f"{name} (new)", lineterm="", n=1)
            print(*list(lines)[:40], sep="\n")
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(HERE.parent)}")
    if stale and "--check" in arguments:
        print("the documentation is out of date: run `make docs`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
