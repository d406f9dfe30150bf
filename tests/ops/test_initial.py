"""PiSSA: the delta against the original base, from trained and initial factors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import loratools
from loratools.errors import AdapterError

N, M, R = 24, 18, 4


def write(folder: Path, up: torch.Tensor, down: torch.Tensor, **config: object) -> Path:
    folder.mkdir()
    fields = {
        "peft_type": "LORA",
        "r": R,
        "lora_alpha": 6,
        "init_lora_weights": "pissa",
        "target_modules": ["q"],
    } | config
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    prefix = "base_model.model.layers.0.q"
    pair = {f"{prefix}.lora_A.weight": down.contiguous(), f"{prefix}.lora_B.weight": up.contiguous()}
    save_file(pair, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def factors() -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(3)
    base = torch.randn(M, N, generator=gen, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(base, full_matrices=False)
    up0, down0 = (u[:, :R] * s[:R].sqrt()).float(), (s[:R].sqrt()[:, None] * vt[:R]).float()
    up = up0 + 0.1 * torch.randn(M, R, generator=gen)
    down = down0 + 0.1 * torch.randn(R, N, generator=gen)
    return {"base": base, "up0": up0, "down0": down0, "up": up, "down": down}


@pytest.mark.parametrize("rslora", [False, True])
def test_difference_is_the_delta_against_the_original_base(
    tmp_path: Path, factors: dict[str, torch.Tensor], rslora: bool
) -> None:
    f = factors
    trained = loratools.load(write(tmp_path / "t", f["up"], f["down"], use_rslora=rslora))
    initial = loratools.load(write(tmp_path / "i", f["up0"], f["down0"], use_rslora=rslora))
    assert any("init_lora_weights='pissa'" in w for w in trained.warnings)
    scale = 6 / R**0.5 if rslora else 6 / R
    residual = f["base"] - scale * f["up0"].double() @ f["down0"].double()
    tuned = residual + scale * f["up"].double() @ f["down"].double()

    plain = loratools.subtract_initial(trained, initial)
    loratools.save(plain, tmp_path / "plain")
    again = loratools.load(tmp_path / "plain")
    update = again["layers.0.q"]
    assert torch.allclose(update.delta().double(), tuned - f["base"], atol=2e-6)
    assert again.entries["layers.0.q"].rank == 2 * R
    assert torch.equal(update.parameters()["up"], torch.cat([f["up"], -f["up0"]], dim=1))
    assert again.config is not None
    assert again.config["init_lora_weights"] is True
    assert again.config["lora_alpha"] == pytest.approx(6 * (2**0.5 if rslora else 2), rel=1e-12)
    assert not again.warnings


def test_plain_adapter_squeezes_to_the_optimum(tmp_path: Path, factors: dict[str, torch.Tensor]) -> None:
    f = factors
    plain = loratools.subtract_initial(
        loratools.load(write(tmp_path / "t", f["up"], f["down"])),
        loratools.load(write(tmp_path / "i", f["up0"], f["down0"])),
    )
    true = 1.5 * (f["up"].double() @ f["down"].double() - f["up0"].double() @ f["down0"].double())
    best = torch.linalg.svdvals(true)[R:].norm() / true.norm()
    _, report = loratools.squeeze(plain, R)
    assert report.targets["layers.0.q"].relative_error == pytest.approx(float(best), rel=1e-6)


def test_other_ranks_or_targets_are_refused(tmp_path: Path, factors: dict[str, torch.Tensor]) -> None:
    f = factors
    trained = loratools.load(write(tmp_path / "t", f["up"], f["down"]))
    short = loratools.load(write(tmp_path / "i", f["up0"][:, :2], f["down0"][:2], r=2))
    with pytest.raises(AdapterError, match=r"layers\.0\.q: rank, shape or scale differ"):
        loratools.subtract_initial(trained, short)
    (tmp_path / "o").mkdir()
    save_file(
        {
            "base_model.model.k.lora_A.weight": f["down0"].contiguous(),
            "base_model.model.k.lora_B.weight": f["up0"].contiguous(),
        },
        tmp_path / "o" / "adapter_model.safetensors",
    )
    with pytest.raises(AdapterError, match="in one of adapter and initial adapter only"):
        loratools.subtract_initial(trained, loratools.load(tmp_path / "o"))
