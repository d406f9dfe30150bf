"""Every requirement of every server: an adapter that does not meet it, and what `fitted` makes of that."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loratools.errors import MutatedBaseError, UnchangedError, UnsupportedInTargetError, UsageError
from loratools.files import load
from loratools.ops.check import check, fitted, fitted_file
from loratools.ops.convert import Convert
from loratools.ops.diff import diff
from loratools.ops.lowering import Lowering
from loratools.ops.servers import SERVERS

Samples = Callable[[str], Path]
ATTENTION = tuple(f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qkvo")


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def peft(
    folder: Path,
    *,
    targets: tuple[str, ...] = ATTENTION,
    ranks: Mapping[str, int] | None = None,
    outputs: Mapping[str, int] | None = None,
    more: Mapping[str, torch.Tensor] | None = None,
    with_config: bool = True,
    rank: int = 4,
    **config: Any,
) -> Path:
    folder.mkdir()
    tensors = dict(more or {})
    for target in targets:
        r = (ranks or {}).get(target, rank)
        tensors[f"base_model.model.{target}.lora_A.weight"] = rand(r, 24)
        tensors[f"base_model.model.{target}.lora_B.weight"] = rand((outputs or {}).get(target, 24), r)
    save_file(tensors, folder / "adapter_model.safetensors")
    if with_config:
        leaves = sorted({t.rpartition(".")[2] for t in targets})
        fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": leaves}
        if ranks:
            fields["rank_pattern"] = dict(ranks)
        (folder / "adapter_config.json").write_text(json.dumps(fields | config))
    return folder


def kohya(path: Path) -> Path:
    name = "lora_unet_double_blocks_0_img_mlp_0"
    save_file({f"{name}.lora_down.weight": rand(4, 24), f"{name}.lora_up.weight": rand(16, 4)}, path)
    return path


def gguf(samples: Samples, tmp_path: Path) -> Path:
    return samples("gguf/llama_f32") / "adapter.gguf"


def convolution(folder: Path) -> Path:
    more = {
        "base_model.model.conv.lora_A.weight": rand(4, 8, 3, 3),
        "base_model.model.conv.lora_B.weight": rand(6, 4, 1, 1),
    }
    return peft(folder, more=more, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "conv"])


def magnitudes(targets: tuple[str, ...] = ATTENTION) -> dict[str, torch.Tensor]:
    return {f"base_model.model.{t}.lora_magnitude_vector": rand(24) for t in targets}


def experts(folder: Path) -> Path:
    target = "base_model.model.model.layers.0.mlp.experts"
    more = {
        f"{target}.lora_A.weight": rand(8, 24),
        f"{target}.lora_B.weight": rand(16, 8),
        f"{target}.base_layer.lora_A.weight": rand(8, 24),
        f"{target}.base_layer.lora_B.weight": rand(16, 8),
    }
    return peft(folder, more=more, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])


def embedding(folder: Path) -> Path:
    stem = "base_model.model.model.embed_tokens"
    more = {f"{stem}.lora_embedding_A": rand(4, 50), f"{stem}.lora_embedding_B": rand(24, 4)}
    return peft(folder, more=more)


def paca(folder: Path) -> Path:
    folder.mkdir()
    columns = {"base_model.model.q.paca_w": rand(6, 2), "base_model.model.q.paca_indices": torch.tensor([3, 0])}
    save_file(columns, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "PACA", "r": 2, "paca_alpha": 2}))
    return folder


def lora_bias(folder: Path) -> Path:
    more = {f"base_model.model.{t}.lora_B.bias": rand(24) for t in ATTENTION}
    return peft(folder, more=more, lora_bias=True)


HEAD = {"base_model.model.lm_head.weight": rand(50, 24)}
MLP = (*ATTENTION, "model.layers.0.mlp.up_proj")
# Requirement -> an adapter that does not meet it.
BREAKS: dict[str, Callable[[Path, Samples], Path]] = {
    "peft-dialect": lambda p, s: kohya(p / "x.safetensors"),
    "gguf-dialect": lambda p, s: peft(p / "x"),
    "diffusers-dialect": lambda p, s: kohya(p / "x.safetensors"),
    "known-dialect": lambda p, s: gguf(s, p),
    "config": lambda p, s: peft(p / "x", with_config=False) / "adapter_model.safetensors",
    "only-lora": lambda p, s: s("peft/loha"),
    "known-family": lambda p, s: s("peft/ia3"),
    "known-method": lambda p, s: paca(p / "x"),
    "no-dora": lambda p, s: peft(p / "x", more=magnitudes(), use_dora=True),
    "no-lora-bias": lambda p, s: lora_bias(p / "x"),
    "no-trained-biases": lambda p, s: peft(p / "x", bias="lora_only"),
    "no-other-tensors": lambda p, s: peft(p / "x", more=HEAD, modules_to_save=["lm_head"]),
    "no-convolutions": lambda p, s: convolution(p / "x"),
    "no-expert-stacks": lambda p, s: experts(p / "x"),
    "no-embeddings": lambda p, s: embedding(p / "x"),
    "no-mid": lambda p, s: s("lycoris/locon_tucker") / "adapter.safetensors",
    "original-base": lambda p, s: peft(p / "x", init_lora_weights="pissa"),
    "one-rank": lambda p, s: peft(p / "x", ranks={ATTENTION[0]: 2}),
    "one-alpha": lambda p, s: peft(p / "x", alpha_pattern={ATTENTION[0]: 3}),
    "rank-at-most-512": lambda p, s: peft(p / "x", rank=513),
    "no-rslora": lambda p, s: peft(p / "x", use_rslora=True),
    "qkv-together": lambda p, s: peft(p / "x", targets=ATTENTION[:2]),
    "attention-only": lambda p, s: peft(p / "x", targets=MLP),
    "square": lambda p, s: peft(p / "x", outputs=dict.fromkeys(ATTENTION[1:3], 8)),
    "all-projections": lambda p, s: peft(p / "x", targets=ATTENTION[::2]),
}
ROWS = [(server, r.name) for server, row in SERVERS.items() for r in row.requirements]


@pytest.mark.parametrize(("server", "requirement"), ROWS, ids=[f"{s}-{r}" for s, r in ROWS])
def test_what_does_not_meet_a_requirement_is_found(
    samples: Samples, tmp_path: Path, server: str, requirement: str
) -> None:
    (row,) = (r for r in SERVERS[server].requirements if r.name == requirement)
    with load(BREAKS[requirement](tmp_path, samples)) as adapter:
        report = check(adapter, server)
        found = {f.requirement: f for f in report.findings}
        assert requirement in found
        finding = found[requirement]
        assert (finding.severity, finding.reason, finding.fix) == (row.severity, row.reason, row.fix)
        assert 1 <= len(finding.where) <= 5
        assert finding.count == len(tuple(row.broken_by(adapter)))
        assert report.loads == all(f.severity == "old" for f in report.findings)
        assert set(report.met) | set(found) == {r.name for r in SERVERS[server].requirements}


@pytest.mark.parametrize("server", ["vllm", "sglang", "slora", "peft"])
def test_a_plain_adapter_loads_everywhere(tmp_path: Path, server: str) -> None:
    report = check(load(peft(tmp_path / "x")), server)
    assert report.loads
    assert report.findings == ()


def test_what_s_lora_stacks_is_named(tmp_path: Path) -> None:
    layers = [t.replace("layers.0", f"layers.{i}") for i in (0, 2) for t in ATTENTION]
    findings = {f.requirement: f for f in check(load(peft(tmp_path / "gap", targets=tuple(layers))), "slora").findings}
    assert list(findings) == ["all-projections"]
    assert findings["all-projections"].where == tuple(
        f"model.layers.1.self_attn.{leaf}_proj" for leaf in ("k", "o", "q", "v")
    )
    elsewhere = ("model.h.0.attn.q_proj",)
    assert [f.requirement for f in check(load(peft(tmp_path / "h", targets=elsewhere)), "slora").findings] == [
        "attention-only"
    ]
    grouped = check(load(peft(tmp_path / "g", outputs=dict.fromkeys(ATTENTION[1:3], 8))), "slora").findings
    assert [(f.requirement, f.where) for f in grouped] == [("square", tuple(f"{t} (8 x 24)" for t in ATTENTION[1:3]))]


@pytest.mark.parametrize(("rank", "setting"), [(1, 1), (4, 8), (16, 16), (17, 32), (300, 320), (512, 512)])
def test_the_setting_that_vllm_needs(tmp_path: Path, rank: int, setting: int) -> None:
    assert check(load(peft(tmp_path / "x", rank=rank)), "vllm").setting == f"--max-lora-rank {setting}"


def test_an_unknown_server(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no server 'ollama'.*vllm"):
        check(load(peft(tmp_path / "x")), "ollama")


@pytest.mark.parametrize("server", ["vllm", "sglang", "slora"])
@pytest.mark.parametrize("broken", ["one-rank", "no-rslora", "one-alpha"])
def test_fitted_files_load_and_do_the_same(samples: Samples, tmp_path: Path, server: str, broken: str) -> None:
    before = load(BREAKS[broken](tmp_path, samples))
    if not check(before, server).findings:
        with pytest.raises(UnchangedError, match="nothing to fix"):
            fitted(before, server)
        return
    report = fitted_file(before, tmp_path / "out", server)
    assert report.loads
    assert report.findings == ()
    assert report.output == str(tmp_path / "out")
    after = load(tmp_path / "out")
    assert diff(before, after, tolerance=1e-6).same
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert not config["use_rslora"]


def test_a_kohya_file_for_diffusers(tmp_path: Path) -> None:
    before = load(kohya(tmp_path / "x.safetensors"))
    assert fitted_file(before, tmp_path / "out.safetensors", "diffusers").loads
    assert check(load(tmp_path / "out.safetensors"), "diffusers").loads


def test_other_families_as_lora(samples: Samples, tmp_path: Path) -> None:
    before = load(samples("peft/loha"))
    with pytest.raises(UnsupportedInTargetError, match="--rank N"):
        fitted(before, "vllm")
    assert fitted_file(before, tmp_path / "out", "vllm", Convert(Lowering(rank=4))).loads


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("no-dora", "no-dora"),
        ("no-convolutions", "no-convolutions"),
        ("no-expert-stacks", "a stack of experts"),
        ("no-other-tensors", "no-other-tensors.*pass --drop extras"),
    ],
)
def test_what_no_conversion_mends_is_an_error(samples: Samples, tmp_path: Path, broken: str, message: str) -> None:
    with pytest.raises(UnsupportedInTargetError, match=message):
        fitted(load(BREAKS[broken](tmp_path, samples)), "vllm")


def test_the_initial_factors_are_asked_for(samples: Samples, tmp_path: Path) -> None:
    with pytest.raises(MutatedBaseError, match="--initial-adapter"):
        fitted(load(BREAKS["original-base"](tmp_path, samples)), "vllm")


def test_what_may_be_dropped_is(samples: Samples, tmp_path: Path) -> None:
    before = load(BREAKS["no-other-tensors"](tmp_path, samples))
    assert fitted_file(before, tmp_path / "out", "vllm", Convert(drop=frozenset({"extras"}))).loads
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] is None


def test_the_rest_of_the_config_stays(tmp_path: Path) -> None:
    kept = {"base_model_name_or_path": "org/model", "task_type": "CAUSAL_LM", "revision": "abc"}
    before = load(peft(tmp_path / "x", use_rslora=True, ranks={ATTENTION[0]: 2}, **kept))
    fitted_file(before, tmp_path / "out", "slora")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {key: config[key] for key in kept} == kept
