"""Hydra's files against its forward pass, its export, its fit, and what its branches read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import with_base_files
from safetensors.torch import save_file

from loratools import delta, hydra_branches, load, load_base, save
from loratools.errors import AdapterError, UnsupportedInTargetError, UsageError
from loratools.families import Hydra, LoRA
from loratools.families.base import Layout
from loratools.families.fitting import Source
from loratools.families.hydra import HydraOptions
from loratools.linalg.inner import relative_error
from loratools.operators import Dense, LowRank
from loratools.ops.convert import Convert, convert
from loratools.ops.lowering import Lowering

SHAPES = {
    "blocks.0.mlp.fc2": (6, 9),
    "blocks.0.attn.proj": (6, 6),
    "h.mlp.c_proj": (6, 9),
    "bert.layer.0.output.dense": (6, 9),
}
PREFIXES = {
    "blocks.0.mlp.fc2": "blocks.0.mlp.hydra_mlp_",
    "blocks.0.attn.proj": "blocks.0.attn.hydra_proj_",
    "h.mlp.c_proj": "h.mlp.ad_lin.adapter_",
    "bert.layer.0.output.dense": "bert.layer.0.output.hydra_",
}


def rand(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tensors = {f"{t}.weight": rand(30 + i, *shape) for i, (t, shape) in enumerate(SHAPES.items())}
    tensors |= {f"{t}.bias": rand(40 + i, shape[0]) for i, (t, shape) in enumerate(SHAPES.items())}
    save_file(tensors, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def forward(
    file: dict[str, torch.Tensor], prefix: str, base: torch.nn.Linear, scale: float, x: torch.Tensor
) -> torch.Tensor:
    """The authors' layer: base, and both branches added."""
    y = base(x)
    out = y.clone()
    for branch, seen in (("par", x), ("seq", y)):
        held = {
            k.removeprefix(f"{prefix}{branch}."): t.double()
            for k, t in file.items()
            if k.startswith(f"{prefix}{branch}.")
        }
        down = held.get("down_proj.weight", held.get("hydra_A.weight"))
        up = held.get("up_proj.weight", held.get("hydra_B.weight"))
        assert down is not None
        assert up is not None
        inner = seen @ down.T + held.get("down_proj.bias", torch.zeros(2, dtype=torch.float64))
        change = inner @ up.T + held.get("up_proj.bias", torch.zeros(6, dtype=torch.float64))
        out += change * held.get("scale", scale)
    return out


@pytest.mark.parametrize("exported", [False, True])
def test_deltas_and_the_exact_lora_give_the_branches_outputs(tmp_path: Path, base: Path, exported: bool) -> None:
    weights = load_base(base)
    adapter = load(with_base_files.write(tmp_path, "hydra"), alpha=0.5)
    assert set(adapter) == set(SHAPES)
    if exported:
        lora, report = convert(adapter, "peft", Convert(Lowering(exact=True), base=weights, drop=frozenset({"extras"})))
        assert {t.rank for t in report.targets.values()} == {4}
        assert lora.config is not None
        assert lora.config["lora_bias"] is True
        adapter = load(save(lora, tmp_path / "lora").path)
        assert {e.family for e in adapter.entries.values()} == {LoRA}
    changes = dict(delta(adapter, base=weights))
    x = rand(1, 3, 9).double()
    for target, (m, n) in SHAPES.items():
        layer = torch.nn.Linear(n, m).double()
        layer.weight.data = weights.find(f"{target}.weight", None).double()
        layer.bias.data = weights.find(f"{target}.bias", None).double()
        wanted = forward(with_base_files.hydra(), PREFIXES[target], layer, 0.5, x[:, :n])
        layer.weight.data += changes[f"{target}.weight"].double()
        layer.bias.data += changes[f"{target}.bias"].double()
        torch.testing.assert_close(layer(x[:, :n]), wanted, rtol=1e-5, atol=1e-5)


def test_what_is_not_stated_is_said(tmp_path: Path, base: Path) -> None:
    path = with_base_files.write(tmp_path, "hydra")
    assert any("--alpha" in w for w in load(path).warnings)
    assert not load(path, alpha=0.5).warnings
    how = Convert(Lowering(exact=True), base=load_base(base), drop=frozenset({"extras"}))
    with pytest.raises(UnsupportedInTargetError, match="pass --drop bias"):
        convert(load(path), "kohya", how)
    with pytest.raises(AdapterError, match=r"base weight is \(6, 6\) where its parallel branch is for \(6, 9\)"):
        load(path)["blocks.0.mlp.fc2"].operator(rand(0, 6, 6))


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)], ids=str)
@pytest.mark.parametrize("dense", [False, True])
def test_planted_branches_are_recovered(shape: tuple[int, int], dense: bool) -> None:
    m, n = shape
    weight = rand(0, m, n)
    parallel, sequential = (
        rand(1, m, 3).double() @ rand(2, 3, n).double(),
        rand(3, m, 2).double() @ rand(4, 2, m).double(),
    )
    planted = parallel + sequential @ weight.double()
    if dense:
        given: Dense | LowRank = Dense(planted)
    else:
        u, s, vt = torch.linalg.svd(planted, full_matrices=False)
        given = LowRank(u[:, :5] * s[:5], vt[:5])
    made = Hydra.encode(Source(given, Layout(shape=shape), weight, torch.float64), HydraOptions(3, 2))
    assert relative_error(Dense(planted), made.operator(weight)) < 1e-6
    assert sum(t.numel() for t in made.parameters().values()) == 3 * (m + n) + 2 * 2 * m


def test_a_fit_is_no_farther_than_a_lora_of_the_parallel_rank() -> None:
    m, n = 16, 24
    weight, delta_ = rand(0, m, n), rand(5, m, n).double()
    made = Hydra.encode(Source(Dense(delta_), Layout(shape=(m, n)), weight, torch.float64), HydraOptions(3, 2))
    error = float((made.operator(weight).dense() - delta_).norm())
    values = torch.linalg.svdvals(delta_)
    assert float(values[5:].norm()) - 1e-9 <= error < float(values[3:].norm())


def test_branches_tell_general_from_novel_features(tmp_path: Path) -> None:
    """A sequential branch made of the base's leading output reads its leading input; a parallel one may not."""
    weight = rand(0, 6, 9).double()
    u, s, vt = (t.numpy() for t in torch.linalg.svd(weight, full_matrices=False))
    file = {
        "a.mlp.hydra_mlp_par.down_proj.weight": torch.from_numpy(vt[5:6].copy()).float(),
        "a.mlp.hydra_mlp_par.up_proj.weight": torch.ones(6, 1),
        "a.mlp.hydra_mlp_seq.down_proj.weight": torch.from_numpy(u[:, :1].T.copy()).float(),
        "a.mlp.hydra_mlp_seq.up_proj.weight": torch.ones(6, 1),
    }
    torch.save(file, tmp_path / "h.pt")
    save_file({"a.mlp.fc2.weight": weight.float()}, tmp_path / "b.safetensors")
    report = hydra_branches(load(tmp_path / "h.pt"), load_base(tmp_path / "b.safetensors"), top=2)
    found = report.targets["a.mlp.fc2"]
    assert found.parallel is not None
    assert found.sequential is not None
    assert found.parallel.norm == pytest.approx(6**0.5, rel=1e-6)
    assert found.sequential.norm == pytest.approx(6**0.5 * s[0], rel=1e-6)
    assert found.parallel.inside == pytest.approx(0.0, abs=1e-9)
    assert found.sequential.inside == pytest.approx(1.0, rel=1e-6)
    assert found.sequential.cosines == pytest.approx((1.0,), rel=1e-6)
    assert found.cosine == pytest.approx(0.0, abs=1e-6)
    assert found.norm == pytest.approx(np.hypot(found.parallel.norm, found.sequential.norm), rel=1e-6)
    save_file({"q.lora_A": rand(1, 2, 4), "q.lora_B": rand(2, 4, 2)}, tmp_path / "l.safetensors")
    with pytest.raises(UsageError, match="no target of the adapter is a Hydra"):
        hydra_branches(load(tmp_path / "l.safetensors"), load_base(tmp_path / "b.safetensors"))


def test_another_family_says_that_it_leaves_biases_out(tmp_path: Path, base: Path) -> None:
    from loratools.ops.reparameterize import Reparameterize, reparameterize

    adapter = load(with_base_files.write(tmp_path, "hydra"), alpha=0.5)
    report = reparameterize(adapter, "lora", Reparameterize(base=load_base(base)))[1]
    assert any("3 targets change their bias too" in w for w in report.warnings)
    assert report.total["relative_error"] < 1e-6
