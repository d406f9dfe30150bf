"""`loratools squeeze`: where it writes, what it says, and that every rule of ranks is reachable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import loratools
from loratools import ranks
from loratools.rank_choice import RankChoice

Run = Callable[..., Any]
Make = Callable[..., Path]


def test_a_lone_file_is_written_beside_itself(run: Run, kohya: Make, tmp_path: Path) -> None:
    done = run("squeeze", kohya("in.safetensors"), "--rank", 4)
    assert done.code == 0
    assert (tmp_path / "in.r4.safetensors").is_file()
    assert done.out.splitlines()[-1].startswith(f"wrote {tmp_path}/in.r4.safetensors: ")
    assert " % of it" in done.out


def test_a_peft_adapter_becomes_a_folder_beside_its_own(run: Run, peft: Make, tmp_path: Path) -> None:
    source = peft("in")
    for given in (source, source / "adapter_model.safetensors"):
        assert run("squeeze", given, "--rank", 4, "--force").code == 0
        config = json.loads((tmp_path / "in.r4" / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (4, 4)


def test_the_current_folder_has_a_name_too(
    run: Run, peft: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(peft("in"))
    assert run("squeeze", ".", "--rank", 4).code == 0
    assert (tmp_path / "in.r4").is_dir()


def test_a_pickle_becomes_safetensors(run: Run, kohya: Make, tmp_path: Path) -> None:
    torch.save(load_file(kohya()), tmp_path / "old.pt")
    assert run("squeeze", tmp_path / "old.pt", "--rank", 4).code == 0
    assert (tmp_path / "old.r4.safetensors").is_file()


def test_output_may_be_a_file_or_a_folder_to_put_it_in(run: Run, kohya: Make, tmp_path: Path) -> None:
    source = kohya("in.safetensors")
    (tmp_path / "there").mkdir()
    run("squeeze", source, "--rank", 4, "-o", tmp_path / "there")
    run("squeeze", source, "--rank", 4, "-o", tmp_path / "new" / "name.safetensors")
    first = (tmp_path / "there" / "in.r4.safetensors").read_bytes()
    assert first == (tmp_path / "new" / "name.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "tag", "policy"),
    [
        (["--rank", "3"], "r3", ranks.Fixed(3)),
        (["--energy", "0.95"], "e0.95", ranks.Energy(0.95)),
        (["--budget", "7 kB"], "7kB", ranks.Budget(7000)),
        (["--threshold", "1e-1"], "t0.1", ranks.Threshold(0.1)),
        (["--elbow"], "elbow", ranks.Elbow()),
        (["--sv-ratio", "20"], "svr20", ranks.Ratio(20)),
        (["--sv-fro", "0.9"], "svf0.9", ranks.Frobenius(0.9)),
        (["--sv-cumulative", "0.8"], "svc0.8", ranks.Cumulative(0.8)),
        (["--adaptertune", "500:60"], "at500-60", ranks.AdapterTuneElbow(500, 60)),
    ],
)
def test_every_rule_is_the_library_s(
    run: Run, peft: Make, tmp_path: Path, arguments: list[str], tag: str, policy: ranks.Policy
) -> None:
    source = peft("in")
    done = run("squeeze", source, *arguments, "--json")
    assert done.code == 0, done.err
    expected = loratools.squeeze(loratools.load(source), policy)[1].to_dict()["targets"]
    assert done.json["targets"] == expected
    assert done.json["output"] == str(tmp_path / f"in.{tag}")
    assert (tmp_path / f"in.{tag}").is_dir()


def test_a_ratio_divides_the_file_and_the_output_fits(run: Run, kohya: Make, tmp_path: Path) -> None:
    source = kohya("in.safetensors", n_layers=8)
    assert run("squeeze", source, "--ratio", 2).code == 0
    written = (tmp_path / "in.x2.safetensors").stat().st_size
    assert 0.3 * source.stat().st_size < written <= source.stat().st_size / 2


def test_limits_are_respected(run: Run, peft: Make) -> None:
    limits = ("--max-rank", 6, "--min-rank", 3, "--multiple-of", 2)
    found = run("squeeze", peft(), "--energy", 0.999, *limits, "--json").json["targets"]
    assert {t["rank_after"] for t in found.values()} <= {4, 6}
    uniform = run("squeeze", peft("b"), "--energy", 0.99, "--uniform", "--json").json["targets"]
    assert len({t["rank_after"] for t in uniform.values()}) == 1


def test_the_scale_is_folded_or_kept(run: Run, peft: Make, tmp_path: Path) -> None:
    source = peft("in", rank=8)  # alpha 16: scale 2
    for mode, scale in (("fold", 1.0), ("keep", 2.0)):
        run("squeeze", source, "--rank", 4, "--scale", mode, "-o", tmp_path / mode)
        assert loratools.load(tmp_path / mode).entries["model.layers.0.self_attn.q_proj"].scale == scale
    assert run("diff", tmp_path / "fold", tmp_path / "keep").code == 0


def test_the_method_and_its_seed_arrive(run: Run, kohya: Make, tmp_path: Path) -> None:
    run("squeeze", kohya("in.safetensors"), "--rank", 4, "--method", "rsvd", "--seed", 7)
    with safe_open(tmp_path / "in.r4.safetensors", "pt") as file:
        arguments = json.loads(file.metadata()["loratools"])["arguments"]
    assert (arguments["method"], arguments["seed"]) == ("rsvd", 7)


def test_a_dry_run_writes_nothing(run: Run, peft: Make, tmp_path: Path) -> None:
    source = peft("in")
    done = run("squeeze", source, "--rank", 4, "--dry-run")
    assert done.code == 0
    assert "dry run" in done.out
    assert str(tmp_path / "in.r4") in done.out
    assert {path.name for path in tmp_path.iterdir()} == {"in"}
    table = run("squeeze", source, "--rank", 4).out.splitlines()[:-1]
    assert done.out.splitlines()[: len(table) - 1] == table[:-1]  # the total line counts the header of a written file


def test_quiet_prints_the_path_alone(run: Run, peft: Make, tmp_path: Path) -> None:
    done = run("squeeze", peft("in"), "--rank", 4, "--quiet")
    assert (done.out, done.err) == (f"{tmp_path / 'in.r4'}\n", "")


def test_many_targets_are_grouped_unless_all_are_asked_for(run: Run, peft: Make) -> None:
    source = peft(n_layers=10)
    grouped = run("squeeze", source, "--rank", 4, "--dry-run").out
    assert "q_proj x10" in grouped
    assert "model.layers" not in grouped
    single = run("squeeze", source, "--rank", 4, "--dry-run", "--all").out
    assert single.count("model.layers") == 30


def test_unchanged_targets_are_listed_with_the_reason(run: Run, peft: Make) -> None:
    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        for key in [k for k in tensors if "q_proj" in k]:
            tensors[key] = tensors[key][:3].contiguous() if "lora_A" in key else tensors[key][:, :3].contiguous()

    source = peft(edit=shrink, rank_pattern={"q_proj": 3}, alpha_pattern={"q_proj": 6})
    done = run("squeeze", source, "--rank", 4)
    assert "unchanged: 2" in done.out
    assert "model.layers.0.self_attn.q_proj and 1 more: rank 3 is not above the chosen 4" in done.out


def test_warnings_go_to_standard_error_in_a_table_and_into_json(run: Run, peft: Make, tmp_path: Path) -> None:
    (peft("in") / "adapter_config.json").unlink()
    table = run("squeeze", tmp_path / "in", "--rank", 4)
    assert table.err.startswith("warning: no adapter_config.json")
    assert "no adapter_config.json" not in table.out
    assert (tmp_path / "in" / "adapter_model.r4.safetensors").is_file()  # without its config it is a lone file
    data = run("squeeze", tmp_path / "in" / "adapter_model.safetensors", "--rank", 4, "--json", "--force")
    assert data.err == ""
    assert data.json["warnings"][0].startswith("no adapter_config.json")
    assert run("squeeze", tmp_path / "in" / "adapter_model.safetensors", "--rank", 2, "--alpha", 8).err == ""


@pytest.mark.parametrize("kind", ["peft", "kohya"])
def test_the_input_may_be_the_output_with_force(run: Run, peft: Make, kohya: Make, tmp_path: Path, kind: str) -> None:
    source = peft("in") if kind == "peft" else kohya("in.safetensors")
    assert run("squeeze", source, "--rank", 4, "-o", tmp_path / "elsewhere").code == 0
    before = _content(source)
    refused = run("squeeze", source, "--rank", 4, "-o", source)
    assert refused.code == 5
    assert "--force" in refused.err
    assert _content(source) == before
    assert run("squeeze", source, "--rank", 4, "-o", source, "--force").code == 0
    elsewhere = tmp_path / ("elsewhere" if kind == "peft" else "elsewhere.safetensors")
    assert _content(source) == _content(elsewhere)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_an_initial_adapter_is_subtracted(run: Run, peft: Make) -> None:
    source, initial = peft("after", seed=1, init_lora_weights="pissa"), peft("before", seed=2)
    done = run("squeeze", source, "--rank", 12, "--initial-adapter", initial, "--json")
    assert done.code == 0
    assert {t["rank_before"] for t in done.json["targets"].values()} == {16}


def test_relative_to_the_base_reads_the_base(run: Run, peft: Make, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = peft("in")
    targets = loratools.load(source).entries
    save_file({f"{t}.weight": torch.randn(32, 32) for t in targets}, tmp_path / "base.safetensors")
    command = ("squeeze", source, "--ratio", 2, "--relative-to", "base")
    assert run(*command).code == 2
    assert run(*command, "--base", tmp_path / "base.safetensors").code == 0


def test_rank_choice_names_every_option() -> None:
    with pytest.raises(loratools.errors.UsageError, match=r"--rank, --energy, --budget, --ratio, .*--adaptertune"):
        _ = RankChoice().given
    with pytest.raises(loratools.errors.UsageError, match="--rank and --elbow exclude each other"):
        _ = RankChoice(rank=0, elbow=True).given


def _content(path: Path) -> dict[str, str]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return {p.suffix: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
