"""Each documented exit status, one line that says what would work, and nothing left behind."""

from __future__ import annotations

import json
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import loratools
from loratools import errors
from loratools_cli.exit_codes import ExitCode

Run = Callable[..., Any]
Make = Callable[..., Path]
Spawn = Callable[..., "subprocess.Popen[str]"]


def check(done: Any, code: int, *words: str) -> None:
    """One line on standard error with these words, and no traceback."""
    assert done.code == code, done.err
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert all(word in done.err for word in words), done.err


def test_the_codes_are_the_errors_own() -> None:
    read = [error.exit_code for error in (errors.UsageError, errors.InputError, errors.AdapterError)]
    assert read == [ExitCode.USAGE, ExitCode.INPUT, ExitCode.ADAPTER]
    written = [error.exit_code for error in (errors.LoratoolsError, errors.OutputError, errors.UnchangedError)]
    assert written == [ExitCode.ADAPTER, ExitCode.OUTPUT, ExitCode.UNCHANGED]


# 2: usage


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--rank", "--energy", "--budget", "--adaptertune"]),
        (["--rank", 8, "--energy", 0.9], ["--rank and --energy exclude each other"]),
        (["--rank", 0], ["rank 0 is below 1"]),
        (["--rank", "eight"], ["--rank", "loratools squeeze --help"]),
        (["--energy", 95], ["0.95"]),
        (["--energy", "nan"], ["0.95"]),
        (["--budget", "4 MX"], ["MiB"]),
        (["--budget", "10B"], ["too small"]),
        (["--ratio", 0.5], ["--ratio"]),
        (["--ratio", "nan"], ["--ratio"]),
        (["--threshold", 2], ["threshold"]),
        (["--adaptertune", "1e-4"], ["1e-4:5000"]),
        (["--rank", 4, "--relative-to", "self"], ["--budget or --ratio"]),
        (["--rank", 4, "--max-rank", 0], ["maximum"]),
        (["--rank", 4, "--method", "fast"], ["auto"]),
        (["--rank", 4, "--nonsense"], ["--nonsense"]),
    ],
)
def test_usage(run: Run, peft: Make, arguments: list[object], words: list[str]) -> None:
    check(run("squeeze", peft(), *arguments), 2, *words)


def test_unknown_commands_and_missing_arguments(run: Run) -> None:
    check(run("sqeeze", "x"), 2, "squeeze")
    check(run("squeeze"), 2, "PATH")
    check(run("truncate", "x"), 2, "--rank")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(run: Run, peft: Make) -> None:
    check(run("squeeze", peft(), "--rank", 4, "--device", "cuda"), 2, "--device cpu")


# 3: input


def test_missing(run: Run, tmp_path: Path) -> None:
    for command in (["info"], ["inspect"], ["squeeze", "--rank", 2], ["truncate", "--rank", 2]):
        check(run(*command, tmp_path / "none.safetensors"), 3, "none.safetensors")
    check(run("diff", tmp_path / "a", tmp_path / "b"), 3)
    check(run("delta", tmp_path / "a", "-o", tmp_path / "b"), 3)


def test_truncated(run: Run, kohya: Make) -> None:
    path = kohya()
    path.write_bytes(path.read_bytes()[:-100])
    check(run("squeeze", path, "--rank", 2), 3, str(path))


def test_no_tensors_no_dialect_no_json(run: Run, peft: Make, tmp_path: Path) -> None:
    (tmp_path / "empty.safetensors").write_bytes(b"")
    check(run("info", tmp_path / "empty.safetensors"), 3)
    (tmp_path / "notes.txt").write_text("nothing of the kind\n")
    check(run("info", tmp_path / "notes.txt"), 3)
    save_file({"encoder.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    check(run("info", tmp_path / "model.safetensors"), 3, "no known adapter dialect", "encoder.weight")
    folder = peft()
    (folder / "adapter_config.json").write_text("{")
    check(run("info", folder), 3, "adapter_config.json")


def test_a_folder_with_several_files(run: Run, kohya: Make, tmp_path: Path) -> None:
    kohya("one.safetensors")
    kohya("two.safetensors")
    check(run("squeeze", tmp_path, "--rank", 2), 3, "one.safetensors", "two.safetensors")


def test_an_unreadable_folder(run: Run, peft: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    folder = peft()
    (folder / "adapter_model.safetensors").rename(folder / "other.safetensors")
    monkeypatch.setattr(Path, "iterdir", refuse)
    check(run("info", folder), 3, "Permission denied")


def test_names_of_strangers_cannot_forge_lines(run: Run, tmp_path: Path) -> None:
    save_file({"a\n\x1b[31mwrote everything": torch.zeros(2)}, tmp_path / "evil.safetensors")
    check(run("info", tmp_path / "evil.safetensors"), 3, "\\n\\x1b[31mwrote")


# 4: adapter


def test_nan(run: Run, peft: Make, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"][3, 1] = float("nan")

    source = peft("in", edit=spoil)
    for rule in (["--rank", 4], ["--energy", 0.9]):
        check(run("squeeze", source, *rule), 4, "model.layers.1.self_attn.k_proj", "--allow-nonfinite")
    assert {path.name for path in tmp_path.iterdir()} == {"in"}
    done = run("squeeze", source, "--energy", 0.9, "--allow-nonfinite")
    assert done.code == 0
    assert "holds NaN" in done.out


def test_a_missing_pair_and_shapes_that_do_not_chain(run: Run, peft: Make) -> None:
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[key]

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key] = torch.zeros(32, 5)

    check(run("info", peft("a", edit=drop)), 4, "q_proj", "up missing")
    check(run("info", peft("b", edit=widen)), 4, "q_proj", "do not chain")


def test_dora_needs_its_base(run: Run, samples: Callable[[str], Path], tmp_path: Path) -> None:
    check(run("delta", samples("peft/dora"), "-o", tmp_path / "d.safetensors"), 4, "--base")
    assert not (tmp_path / "d.safetensors").exists()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")])
def test_no_memory(run: Run, peft: Make, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(loratools, "load", lambda *_, **__: (_ for _ in ()).throw(error))
    check(run("squeeze", peft(), "--rank", 4), 4, "out of memory", "--batch or --target")


# 5: output


def test_an_existing_output(run: Run, peft: Make, tmp_path: Path) -> None:
    source = peft("in")
    assert run("squeeze", source, "--rank", 4).code == 0
    before = (tmp_path / "in.r4" / "adapter_model.safetensors").read_bytes()
    check(run("squeeze", source, "--rank", 4), 5, "--force")
    check(run("truncate", source, "--rank", 4, "-o", tmp_path / "in.r4"), 5, "--force")
    assert (tmp_path / "in.r4" / "adapter_model.safetensors").read_bytes() == before


def test_an_unwritable_place(run: Run, peft: Make, kohya: Make) -> None:
    for source, name in (
        (peft(), "/proc/out"),
        (kohya(), "/proc/out.safetensors"),
        (kohya(), "/dev/null/x.safetensors"),
    ):
        check(run("squeeze", source, "--rank", 4, "-o", name), 5, "cannot be written")
    check(run("delta", kohya(), "-o", "/proc/d.safetensors"), 5, "cannot be written")


def test_a_name_that_does_not_suit(run: Run, peft: Make, tmp_path: Path) -> None:
    check(run("squeeze", peft(), "--rank", 4, "-o", tmp_path / "x.safetensors"), 5, "name a folder")


@pytest.mark.parametrize("kind", ["peft", "kohya"])
def test_a_full_disk(spawn: Spawn, peft: Make, kohya: Make, tmp_path: Path, kind: str) -> None:
    source = peft("in", size=256) if kind == "peft" else kohya("in.safetensors", n_layers=20)
    process = spawn(
        *("squeeze", source, "--rank", 7),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode == 5
    assert err.startswith("error: ")
    assert {path.name for path in tmp_path.iterdir()} == {source.name}


def test_a_full_standard_output(spawn: Spawn, peft: Make) -> None:
    with Path("/dev/full").open("w") as full:
        process = spawn("info", peft(), stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 5
    assert err.startswith("error: standard output: cannot be written")


# 6: unchanged


def test_nothing_to_do(run: Run, peft: Make, tmp_path: Path) -> None:
    source = peft("in", rank=8)
    for command in (["squeeze", "--rank", 8], ["squeeze", "--rank", 64], ["truncate", "--rank", 8]):
        check(run(*command, source), 6, "--allow-unchanged")
    assert {path.name for path in tmp_path.iterdir()} == {"in"}
    assert run("squeeze", "--rank", 64, source, "--allow-unchanged").code == 0


# 70: a bug; and readers that go away


def test_a_bug_is_one_line_too(run: Run, peft: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loratools, "load", lambda *_, **__: {}["gone"])
    check(run("info", peft()), 70, "KeyError", "LORATOOLS_DEBUG=1")
    monkeypatch.setenv("LORATOOLS_DEBUG", "1")
    assert "Traceback" in run("info", peft("b")).err


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_that_goes_away_is_no_error(spawn: Spawn, peft: Make, options: list[str]) -> None:
    a, b = peft("a", seed=1), peft("b", seed=2)
    for command, code in ((["info", a], 0), (["diff", a, b], 1)):
        process = spawn(*command, *options)
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (code, "")


def test_a_terminal_of_another_encoding(spawn: Spawn, kohya: Make) -> None:
    process = spawn("info", kohya(note="größer → 大"), env={"PYTHONIOENCODING": "ascii"})
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out.isascii()
    assert json.dumps("größer")[1:-1].replace("\\u00", "\\x") in out


@pytest.mark.parametrize("command", ["truncate", "diff", "delta", "inspect", "squeeze"])
def test_the_remedy_for_nan_is_an_option_that_exists(run: Run, tmp_path: Path, command: str) -> None:
    source = tmp_path / "nan.safetensors"
    stem = "lora_unet_a.lora_"
    save_file({f"{stem}down.weight": torch.full((4, 9), torch.nan), f"{stem}up.weight": torch.ones(7, 4)}, source)
    rest = {"truncate": ["--rank", 2], "diff": [source], "delta": ["-o", tmp_path / "d"], "squeeze": ["--rank", 2]}
    done = run(command, source, *rest.get(command, []))
    assert done.code == 4
    named = {word.strip(";,") for word in done.err.split() if word.startswith("--")}
    owner = next((c for c in ("squeeze", "inspect") if f" {c} with" in done.err or f" {c} --" in done.err), command)
    options = run(owner, "--help").out
    assert named
    assert all(option in options for option in named)
