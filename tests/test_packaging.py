"""The shape of the project: what is packaged, which way imports point, what a bare import costs."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest on Python 3.10

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"loratools": ROOT / "loratools", "loratools_cli": ROOT / "cli"}  # package -> folder

# From the ground up. A room may import itself and what stands on an earlier line, never its neighbour or what is above.
LAYERS = (
    ("errors",),
    ("bootstrap", "budget", "calibration", "sizes"),
    ("ranks",),
    ("_lazy", "_version"),
    ("quant", "pipeline"),
    ("operators", "storage"),
    ("cache", "configs"),
    ("base_weights", "petl"),
    ("linalg",),
    ("families",),
    ("formats",),
    ("adapter",),
    ("files", "rank_choice"),
    ("reports",),  # records of plain data: the verbs return them
    ("ops",),
    ("hub", "training"),
    ("peft",),
    ("loratools",),  # the public face, loratools/__init__.py
    ("loratools_cli",),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}

NAMES_THAT_SAY_NOTHING = {"common", "helpers", "misc", "other", "util", "utils"}
MAX_LINES = 500


def setuptools_table() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        table: dict[str, Any] = tomllib.load(file)["tool"]["setuptools"]
    return table


def modules() -> dict[str, Path]:
    """Dotted name -> file, for every module of both packages."""
    found = {}
    for package, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(p for p in parts if p != "__init__")))] = path
    return found


MODULES = modules()


def room(module: str) -> str:
    """`loratools.ops.squeeze` -> `ops`; the two roots are rooms of their own."""
    package, *rest = module.split(".")
    return rest[0] if package == "loratools" and rest else package


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of this project, those inside functions and for typing included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "." * node.level + (node.module or "")
                continue
            # `from loratools import ops` imports loratools.ops; `from loratools import load` imports the root.
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            named = [name if name in MODULES else str(node.module) for name in whole]
        else:
            continue
        for name in named:
            if name.split(".")[0] in SOURCES:
                yield node.lineno, name


def complaints(importer: str, source: str) -> list[str]:
    """What is wrong with the imports of one module."""
    found = []
    own = room(importer)
    for line, imported in imports(ast.parse(source)):
        if imported.startswith("."):
            found.append(f"line {line}: relative import; say loratools.<room> or loratools_cli.<module>")
        elif room(imported) not in LEVEL:
            found.append(f"line {line}: {imported} has no place in LAYERS")
        elif room(imported) != own and LEVEL[room(imported)] >= LEVEL[own]:
            found.append(f"line {line}: {own} imports {imported}, which is not below it")
    return found


def run_python(code: str) -> None:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


# What is packaged


def test_every_folder_with_python_files_is_a_listed_package() -> None:
    folders = {
        ".".join((package, *path.parent.relative_to(folder).parts))
        for package, folder in SOURCES.items()
        for path in folder.rglob("*.py")
    }
    assert sorted(folders) == sorted(setuptools_table()["packages"]), "mend `packages` in pyproject.toml"


@pytest.mark.parametrize("package", setuptools_table()["packages"])
def test_every_package_has_an_init(package: str) -> None:
    top, *rest = package.split(".")
    assert SOURCES[top].joinpath(*rest, "__init__.py").is_file()


def test_every_data_file_is_packaged() -> None:
    patterns = {
        f"{package.replace('.', '/')}/{pattern}"
        for package, of_package in setuptools_table()["package-data"].items()
        for pattern in of_package
    }
    files = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in SOURCES.items()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc"}
    }
    assert {f"{package}/py.typed" for package in SOURCES} <= files
    lost = sorted(file for file in files if not any(fnmatch(file, pattern) for pattern in patterns))
    assert not lost, f"mend `package-data` in pyproject.toml: {lost}"


def test_the_distribution_claims_two_names_and_no_cli() -> None:
    claimed = importlib.metadata.distribution("loratools").read_text("top_level.txt")
    assert claimed is not None
    assert claimed.split() == ["loratools", "loratools_cli"]


def test_the_installed_version_is_the_stated_one() -> None:
    import loratools

    assert importlib.metadata.version("loratools") == loratools.__version__, "the install is stale: run `make test`"


def test_the_entry_point_leads_to_the_app() -> None:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="loratools")
    assert entry.value == "loratools_cli.app:main"
    assert callable(entry.load())


# Which way imports point


def test_every_room_has_a_place() -> None:
    assert {room(module) for module in MODULES} <= LEVEL.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    path = MODULES[module]
    assert not complaints(module, path.read_text(encoding="utf-8")), str(path.relative_to(ROOT))


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("loratools.reports.html", "from loratools.ops.inspect import inspect"),
        ("loratools.ranks", "from loratools._lazy import torch"),
        ("loratools.families.lora", "import loratools.formats.peft"),
        ("loratools.storage.gguf", "from loratools.operators import Dense"),
        ("loratools.ops.squeeze", "from loratools import load"),
        ("loratools.ops.squeeze", "def f():\n    from loratools_cli import app"),
        ("loratools.ops.squeeze", "from . import merge"),
        ("loratools.ops.squeeze", "from loratools.attic import old"),
    ],
)
def test_an_upward_import_is_seen(importer: str, line: str) -> None:
    assert complaints(importer, line)


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("loratools.ops.squeeze", "from loratools.reports.squeeze import Squeezed"),
        ("loratools.ops.squeeze", "from loratools.ops.measure import measure"),
        ("loratools.ranks", "from loratools.errors import UsageError"),
        ("loratools_cli.app", "import loratools"),
        ("loratools.operators", "import math\nimport torch"),
    ],
)
def test_a_downward_import_is_fine(importer: str, line: str) -> None:
    assert not complaints(importer, line)


# How files are named and how long they are


def test_files_are_named_after_what_they_know() -> None:
    named = [str(path.relative_to(ROOT)) for path in MODULES.values() if path.stem in NAMES_THAT_SAY_NOTHING]
    assert not named


def test_no_file_is_too_long() -> None:
    folders = [ROOT / name for name in ("loratools", "cli", "tests", "benchmarks", "docs", "examples")]
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for folder in folders
        for path in folder.rglob("*.py")
    }
    assert not {path: n for path, n in lengths.items() if n > MAX_LINES}, f"the limit is {MAX_LINES} lines"


# What a bare import costs


def test_importing_loratools_leaves_torch_alone() -> None:
    run_python("import loratools, sys; assert 'torch' not in sys.modules")


def test_help_leaves_torch_alone() -> None:
    run_python(
        "import sys; sys.argv = ['loratools', '--help']\n"
        "from loratools_cli.app import main\n"
        "try: code = main()\n"
        "except SystemExit as stop: code = stop.code\n"
        "assert not code, code\n"
        "assert 'torch' not in sys.modules"
    )
