"""SNELL's files against the authors' layers, written with torch's own functions, and what a fit reaches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import with_base_files
from torch.nn import functional

from loratools import delta, info, load, load_base
from loratools.errors import AdapterError, InputError, UsageError
from loratools.families import SNELL
from loratools.families.base import Layout
from loratools.families.fitting import Source
from loratools.families.snell import SNELLOptions, quantile, slopes
from loratools.linalg.inner import relative_error
from loratools.operators import Dense, LowRank
from loratools_cli.app import main

TARGETS = ("blocks.0.attn.q", "blocks.0.attn.v", "blocks.0.mlp.fc1")


def rand(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(file: dict[str, torch.Tensor], target: str, threshold: float) -> torch.Tensor:
    """The weight that a layer of the authors adds, from its forward pass on the identity."""
    head, _, module = target.rpartition(".")
    held = {k.rpartition(".")[2]: t for k, t in file.items() if k.startswith(f"{head}.additional_{module}.")}
    ends = "_1" if "In_Qs_1" in held else ""
    weight = (held["shared_coeff_fc"] * torch.cdist(held[f"In_Qs{ends}"], held[f"Out_Qs{ends}"], p=2.0)).sum(0)
    if "alpha" in held:
        weight = weight + held["alpha"] * torch.softmax(weight / held["gamma"], dim=-1) + held["beta"]
    if not ends:
        size = weight.abs()
        weight = weight * functional.threshold(size, float(torch.quantile(size.flatten(), threshold)), 0)
    return functional.linear(torch.eye(weight.shape[0]), weight.T).T


@pytest.mark.parametrize("told", ["number", "mapping", "beside"])
def test_deltas_are_those_of_the_authors_layers(tmp_path: Path, told: str) -> None:
    path = with_base_files.write(tmp_path, "snell")
    shares = {"blocks.0.attn.q": 0.6, "blocks.0.mlp.fc1": 0.6 if told == "number" else 0.25}
    if told == "beside":
        stated = {"*": 0.6, "blocks.0.mlp.fc1": 0.25}
        (tmp_path / "thresholds.json").write_text(json.dumps(stated))
    adapter = load(path, thresholds=None if told == "beside" else 0.6 if told == "number" else shares)
    assert tuple(adapter) == TARGETS
    assert not adapter.warnings
    for target in TARGETS:
        wanted = layer(with_base_files.snell(), target, shares.get(target, 0.0))
        torch.testing.assert_close(adapter[target].delta(), wanted, rtol=1e-5, atol=1e-6)
    dropped = [float((adapter[t].delta() == 0).float().mean()) for t in TARGETS]
    assert dropped == pytest.approx([0.6, 0.0, shares["blocks.0.mlp.fc1"]], abs=0.04)


def test_a_share_that_nobody_states_is_asked_for(tmp_path: Path) -> None:
    adapter = load(with_base_files.write(tmp_path, "snell"))
    assert info(adapter).targets == 3
    assert any("2 targets do not say" in w and "blocks.0.attn.q" in w for w in adapter.warnings)
    with pytest.raises(AdapterError, match=r"blocks\.0\.attn\.q: the share of entries .* --snell-threshold"):
        list(delta(adapter))
    assert adapter["blocks.0.attn.v"].delta().shape == (6, 5)
    (tmp_path / "thresholds.json").write_text(json.dumps({"*": 2}))
    with pytest.raises(InputError, match=r"thresholds\.json: \* is 2, not a share"):
        load(tmp_path / "snell.pt")


def test_the_command_line_takes_a_share_or_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(with_base_files.write(tmp_path, "snell"))
    shares = tmp_path / "shares.json"
    shares.write_text(json.dumps({"blocks.0.attn.q": 0.6, "blocks.0.mlp.fc1": 0.6}))
    for name, given in (("a", "0.6"), ("b", str(shares))):
        assert main(["delta", path, "--snell-threshold", given, "-o", str(tmp_path / f"{name}.safetensors")]) == 0
    one, two = (load_base(tmp_path / f"{name}.safetensors").source for name in "ab")
    for target in TARGETS:
        assert torch.equal(one.read(f"{target}.weight"), two.read(f"{target}.weight"))
    capsys.readouterr()


@pytest.mark.parametrize("share", [0.0, 0.31, 0.5, 0.9, 1.0])
def test_the_quantile_is_that_of_torch(share: float) -> None:
    values = rand(0, 7, 9)
    wanted = torch.quantile(values.flatten(), share)
    torch.testing.assert_close(quantile(values, share), wanted, rtol=1e-14, atol=1e-14)


def fit(given: Dense | LowRank, options: SNELLOptions) -> tuple[SNELL, float]:
    made = SNELL.encode(Source(given, Layout(shape=given.shape), None, torch.float32), options)
    return made, relative_error(given, made.operator())


def test_a_delta_of_low_rank_is_nearly_a_kernel() -> None:
    """At rank q / 2 - 1 the start is near, and the steps bring it nearer; no base is needed."""
    given = LowRank(rand(0, 40, 3), rand(1, 3, 30), 0.01)
    start, far = fit(given, SNELLOptions(8, 0.0, steps=0))
    made, near = fit(given, SNELLOptions(8, 0.0, steps=200))
    assert near < far / 10 < 2e-3
    assert made.is_kernel
    assert sum(t.numel() for t in start.parameters().values()) == 8 * (40 + 30)


def test_a_sparse_delta_of_its_kind_is_found_better_with_steps() -> None:
    """Squared entries of a product, of which a tenth is kept: the filled-in SVD finds the product."""
    kernel = rand(2, 40, 2) @ rand(3, 2, 30)
    given = Dense(torch.where(kernel.abs() > quantile(kernel.abs(), 0.9), kernel * kernel.abs(), 0.0))
    made, start = fit(given, SNELLOptions(6, 0.9, steps=0))
    assert start < 0.5
    assert fit(given, SNELLOptions(6, 0.9, steps=100))[1] < start
    kept = int((made.delta() != 0).sum())
    assert abs(kept - 120) <= 1


def test_large_deltas_are_refused_with_steps() -> None:
    given = LowRank(rand(0, 1100, 1), rand(1, 1, 1000))
    with pytest.raises(AdapterError, match="more than a fit with steps is for; pass --set steps=0"):
        fit(given, SNELLOptions(4))
    assert fit(given, SNELLOptions(4, steps=0))[1] < 2e-2
    with pytest.raises(UsageError, match="an even number"):
        SNELLOptions(5)


@pytest.mark.parametrize("threshold", [0.0, 0.6])
def testslopes_are_those_of_automatic_differentiation(threshold: float) -> None:
    draw = torch.Generator().manual_seed(0)
    points = [torch.randn(2, n, 3, generator=draw, dtype=torch.float64, requires_grad=True) for n in (13, 7)]
    wanted = torch.randn(13, 7, generator=draw, dtype=torch.float64)
    near, far = (torch.cdist(p, q) for p, q in zip(*points, strict=True))
    kernel = 0.1 * (near - far)
    if threshold:
        kept = kernel.abs() > torch.quantile(kernel.detach().abs(), threshold)
        kernel = torch.where(kept, kernel * kernel.abs(), 0.0)
    (kernel - wanted).square().sum().backward()
    found = slopes(points[0].detach(), points[1].detach(), wanted, threshold)
    for point, slope in zip(points, found, strict=True):
        assert point.grad is not None
        torch.testing.assert_close(slope, point.grad)
