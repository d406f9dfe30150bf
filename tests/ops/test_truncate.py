"""Prefix truncation against the formulas of DyLoRA and MatryoshkaLoRA, written out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools.errors import AdapterError, UnchangedError, UsageError
from loratools.files import WEIGHTS_NAME

R, N, M = 8, 20, 12
KEY = "base_model.model.layers.0.q"


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(1)
    return torch.randn(R, N, generator=gen), torch.randn(M, R, generator=gen)  # A, B


@pytest.fixture
def peft(tmp_path: Path, pair: tuple[torch.Tensor, torch.Tensor]) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 12}')
    save_file({f"{KEY}.lora_A.weight": pair[0], f"{KEY}.lora_B.weight": pair[1]}, folder / WEIGHTS_NAME)
    return folder


@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize(
    ("nested", "scaling", "factor"),
    [
        ("keep", None, lambda k: 12 / R),
        ("dylora", None, lambda k: 12 / k),
        ("matryoshka", "none", lambda k: 12 / R),
        ("matryoshka", "rank", lambda k: (12 / R) * R / k),
        ("matryoshka", "sqrt", lambda k: (12 / R) * math.sqrt(R / k)),
    ],
)
def test_prefix_is_sliced_bit_for_bit_and_scaled_by_the_method(
    peft: Path,
    tmp_path: Path,
    pair: tuple[torch.Tensor, torch.Tensor],
    rank: int,
    nested: str,
    scaling: str,
    factor: object,
) -> None:
    a, b = pair
    out = tmp_path / "out"
    saved, report = loratools.truncate_file(loratools.load(peft), out, rank, nested=nested, scaling=scaling)  # type: ignore[arg-type]
    stored = load_file(saved.weights)
    assert torch.equal(stored[f"{KEY}.lora_A.weight"], a[:rank])
    assert torch.equal(stored[f"{KEY}.lora_B.weight"], b[:, :rank])
    truth = factor(rank) * b[:, :rank].double() @ a[:rank].double()  # type: ignore[operator]
    assert torch.allclose(loratools.load(out)["layers.0.q"].delta().double(), truth, rtol=1e-6, atol=1e-6)
    full = 12 / R * b.double() @ a.double()
    change = report.targets["layers.0.q"]
    assert change.relative_error == pytest.approx(float((full - truth).norm() / full.norm()), rel=1e-9)
    cosine = float((full * truth).sum() / (full.norm() * truth.norm()))
    assert change.energy_kept == pytest.approx(cosine**2, rel=1e-9)


def test_dylora_keeps_alpha_itself(peft: Path) -> None:
    small, _ = loratools.truncate(loratools.load(peft), 2, nested="dylora")
    assert small.config is not None
    assert (small.config["r"], small.config["lora_alpha"]) == (2, 12)


@pytest.mark.parametrize("scaling", ["none", "rank", "sqrt"])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_matryoshka_file_decodes_at_every_rank(
    tmp_path: Path, pair: tuple[torch.Tensor, torch.Tensor], scaling: str, rank: int
) -> None:
    a, b = pair[0].T.contiguous(), pair[1].T.contiguous()  # (n, R) and (R, m), as that repository stores them
    torch.save({"model.layers.0.q.lora_A": a, "model.layers.0.q.lora_B": b}, tmp_path / "lora_adapters_step=00010.pt")
    adapter = loratools.load(tmp_path / "lora_adapters_step=00010.pt", scaling=scaling)  # type: ignore[arg-type]
    out = tmp_path / "cut.safetensors"
    loratools.truncate_file(adapter, out, rank, nested="matryoshka", allow_unchanged=True)
    s = {"none": 1.0, "rank": 1 / rank, "sqrt": 1 / math.sqrt(rank)}[scaling]
    truth = s * a[:, :rank].double() @ b[:rank].double()  # y += x A B, so the weight's change is the transpose
    again = loratools.load(out, scaling=scaling)  # type: ignore[arg-type]
    assert torch.allclose(again["model.layers.0.q"].delta().double(), truth.T, rtol=1e-6, atol=1e-6)
    assert load_file(out)["model.layers.0.q.lora_A"].shape == (N, rank)


def test_dylora_pt_file_without_alpha_keeps_the_rule_whatever_alpha(
    tmp_path: Path, pair: tuple[torch.Tensor, torch.Tensor]
) -> None:
    a, b = pair
    torch.save({"enc.0.q.lora_A": a, "enc.0.q.lora_B": b}, tmp_path / "dylora.pt")
    adapter = loratools.load(tmp_path / "dylora.pt")
    assert any("does not state alpha" in w for w in adapter.warnings)
    loratools.truncate_file(adapter, tmp_path / "cut.safetensors", 3, nested="dylora")
    again = loratools.load(tmp_path / "cut.safetensors", alpha=5)
    truth = 5 / 3 * b[:, :3].double() @ a[:3].double()
    assert torch.allclose(again["enc.0.q"].delta().double(), truth, rtol=1e-6, atol=1e-6)


def test_loralib_without_alpha_keeps_the_scale_when_asked(
    tmp_path: Path, pair: tuple[torch.Tensor, torch.Tensor]
) -> None:
    a, b = pair
    torch.save({"enc.0.q.lora_A": a, "enc.0.q.lora_B": b}, tmp_path / "plain.pt")
    loratools.truncate_file(loratools.load(tmp_path / "plain.pt"), tmp_path / "cut.safetensors", 2, nested="keep")
    truth = 5 / R * b[:, :2].double() @ a[:2].double()
    again = loratools.load(tmp_path / "cut.safetensors", alpha=5)
    assert torch.allclose(again["enc.0.q"].delta().double(), truth, rtol=1e-6, atol=1e-6)


def test_matryoshka_needs_to_know_the_scaling(peft: Path) -> None:
    with pytest.raises(UsageError, match="--scaling"):
        loratools.truncate(loratools.load(peft), 2, nested="matryoshka")


def test_nothing_to_cut_is_an_error(peft: Path) -> None:
    with pytest.raises(UnchangedError):
        loratools.truncate(loratools.load(peft), R)
    with pytest.raises(UsageError):
        loratools.truncate(loratools.load(peft), 0)


def test_dora_has_no_prefix(samples) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(AdapterError, match=r"q_proj|up_proj.*DoRA"):
        loratools.truncate(loratools.load(samples("peft/dora")), 2)


def test_alpha_zero_stays_zero(tmp_path: Path) -> None:
    stem = "base_model.model.q.lora_"
    gen = torch.Generator().manual_seed(0)
    tensors = {f"{stem}A.weight": torch.randn(4, 9, generator=gen), f"{stem}B.weight": torch.randn(7, 4, generator=gen)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 0}')
    adapter = loratools.load(tmp_path)
    cut = loratools.truncate(adapter, 2)[0]["q"]
    assert torch.equal(cut.parameters()["up"], tensors[f"{stem}B.weight"][:, :2])
    assert not cut.delta().any()
    assert loratools.inspect(adapter, nested=True).nested is not None
