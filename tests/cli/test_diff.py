"""`loratools diff`: the exit status of diff(1)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[..., Any]
Make = Callable[..., Path]


def test_the_same_update_in_other_factors_is_the_same(run: Run, peft: Make, tmp_path: Path) -> None:
    source = peft("in", rank=8)
    run("squeeze", source, "--rank", 4, "-o", tmp_path / "fold")
    run("squeeze", source, "--rank", 4, "--scale", "keep", "-o", tmp_path / "keep")
    done = run("diff", tmp_path / "fold", tmp_path / "keep")
    assert done.code == 0
    assert done.out.splitlines()[-1].startswith("the same")


def test_another_update_is_different(run: Run, peft: Make) -> None:
    a, b = peft("a", seed=1), peft("b", seed=2)
    done = run("diff", a, b)
    assert done.code == 1
    assert done.out.splitlines()[-1].startswith("different")
    assert run("diff", a, b, "--tolerance", 10).code == 0


def test_quiet_leaves_it_to_the_exit_status(run: Run, peft: Make) -> None:
    a, b = peft("a", seed=1), peft("b", seed=2)
    for second, code in ((a, 0), (b, 1)):
        done = run("diff", a, second, "--quiet")
        assert (done.code, done.out, done.err) == (code, "", "")


def test_what_only_one_has_is_listed(run: Run, peft: Make) -> None:
    done = run("diff", peft("a", n_layers=2), peft("b", n_layers=3))
    assert done.code == 1
    assert "only in the second: 3" in done.out


def test_the_worst_come_first_and_all_show_all(run: Run, peft: Make, tmp_path: Path) -> None:
    source = peft("in", n_layers=6)
    run("squeeze", source, "--rank", 4, "-o", tmp_path / "small")
    few, many = run("diff", source, tmp_path / "small"), run("diff", source, tmp_path / "small", "--all")
    errors = [float(line.split()[4]) for line in few.out.splitlines() if line.startswith("model.layers")]
    assert len(errors) == 10
    assert errors == sorted(errors, reverse=True)
    assert "8 more with --all" in few.out
    assert many.out.count("model.layers") == 18


def test_dialects_are_matched_by_flattened_name(run: Run, kohya: Make, tmp_path: Path) -> None:
    source = kohya("in.safetensors")
    run("squeeze", source, "--rank", 8, "--allow-unchanged", "-o", tmp_path / "same.safetensors")
    assert run("diff", source, tmp_path / "same.safetensors").code == 0
