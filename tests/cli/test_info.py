"""`loratools info`: the header, told in a few lines."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_it_tells_what_a_peft_folder_is(run: Callable[..., Any], peft: Callable[..., Path]) -> None:
    done = run("info", peft(rank=8, base_model_name_or_path="some/model"))
    assert done.code == 0
    assert done.err == ""
    lines = dict(line.split(None, 1) for line in done.out.splitlines() if not line.startswith(" "))
    assert lines["format"] == "peft in safetensors"
    assert lines["rank"] == "8"
    assert lines["scale"] == "2"
    assert lines["dtype"] == "F32"
    assert lines["targets"] == "6: k_proj x2, q_proj x2, v_proj x2"
    assert "some/model" in done.out


def test_flattened_names_are_grouped_by_module(run: Callable[..., Any], kohya: Callable[..., Path]) -> None:
    done = run("info", kohya(n_layers=3))
    assert "9: k_proj x3, q_proj x3, v_proj x3" in done.out


def test_who_made_it_is_told(run: Callable[..., Any], peft: Callable[..., Path], tmp_path: Path) -> None:
    run("squeeze", peft(), "--rank", 2, "-o", tmp_path / "small")
    assert "squeeze" in run("info", tmp_path / "small").out


def test_all_shows_what_a_summary_cuts(run: Callable[..., Any], kohya: Callable[..., Path]) -> None:
    path = kohya(**{f"ss_field_{i}": "x" * 300 for i in range(40)})
    short, long = run("info", path), run("info", path, "--all")
    assert len(short.out.splitlines()) < 80
    assert "more with --all" in short.out
    assert "ss_field_39" in long.out


def test_metadata_cannot_act_on_the_terminal(run: Callable[..., Any], kohya: Callable[..., Path]) -> None:
    done = run("info", kohya(evil="\x1b[31mred\x07 [bold]b[/bold] \u202egnp\r\nerror: no"))
    assert "\x1b" not in done.out
    assert "\x07" not in done.out
    assert "\u202e" not in done.out
    assert "\\x1b[31mred\\x07 [bold]b[/bold] \\u202egnp\\r\\nerror: no" in done.out.replace("\n" + " " * 12, "")


def test_real_samples(run: Callable[..., Any], samples: Callable[[str], Path]) -> None:
    for name in ("peft/lora_plain", "peft/dora", "peft/old_bin", "kohya/sd15_unet_te/lora.safetensors"):
        assert run("info", samples(name)).code == 0


def test_torch_and_numpy_stay_out(kohya: Callable[..., Path]) -> None:
    code = (
        "import sys; from loratools_cli.app import main; assert main(sys.argv[1:]) == 0\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    for extra in ([], ["--json"]):
        command = [sys.executable, "-c", code, "info", str(kohya()), *extra]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
