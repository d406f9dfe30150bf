"""docs/hub.md, followed to the letter: every command of its walk runs, and leaves what the text says."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from loratools_cli.app import main

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "hub.md").read_text(encoding="utf-8")
PER_TOPIC, COUNT = 4, 20  # 14 and 60 in the text
BROKEN = "uploads/broken-download"
FAILED = 3  # one adapter of the example is a download that broke off
CODES = {"ls": 0, "similar": 0, "run": FAILED, "status": 0, "catalog": FAILED, "plan": 0, "pack": FAILED, "unpack": 0}


def commands() -> list[list[str]]:
    """The lines of the first block of code, as a shell reads them."""
    block = re.search(r"^```\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert block is not None
    return [shlex.split(line, comments=True) for line in block[1].splitlines()]


def test_the_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On the example's own adapters, fewer of them and with smaller matrices."""
    monkeypatch.chdir(tmp_path)
    (python, script, hub), *walk = commands()
    assert python == "python"
    spec = importlib.util.spec_from_file_location("make_hub", ROOT / script)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "WIDTH", 192)
    monkeypatch.setattr(example, "LAYERS", 1)
    monkeypatch.setattr(sys, "argv", [script, hub, "--per-topic", str(PER_TOPIC)])
    example.main()
    capsys.readouterr()
    said = {}
    for program, group, verb, *arguments in walk:
        assert (program, group) == ("loratools", "hub")
        code = main([group, verb, *arguments])
        shown = capsys.readouterr()
        assert code == CODES[verb], shown.err
        said[verb] = shown.out + shown.err
    assert list(said) == list(CODES)  # in the order of the numbered text
    told = re.findall(r"^\d\. \*\*(\S+)\*\*", PAGE, re.MULTILINE)
    assert told == [verb for verb in CODES if verb != "unpack"]
    assert BROKEN in said["ls"]
    assert "makes 60 adapters" in PAGE.replace("\n", " ")
    assert f"{COUNT} adapters" in said["ls"]
    for line in ("law-half", "scaled copy (x0.500)", "uploads/my-law-lora", "derivative"):
        assert line in said["similar"]
    assert "uploads/code-and-poems = 0.600 x code/code-00 + 0.400 x poems/poems-00" in said["similar"]
    assert f"{COUNT} done, 1 failed" in said["run"]
    assert said["status"].splitlines()[-1].startswith(f"{COUNT} done, 1 failed")
    assert (tmp_path / "catalog.html").stat().st_size > 1000
    assert f"{COUNT} of {COUNT + 1} adapters can be served" in said["plan"]
    assert main(["hub", "ls", "pack", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["adapters"]) == COUNT
    assert main(["info", "law-03"]) == 0
