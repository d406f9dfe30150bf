"""LoRA-XS and LoRA-SB: read with the matrix between the factors, folded exactly, stripped of the base's vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from formats.made import F64, assert_close, f64, rand, write
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratools
from loratools.errors import AdapterError, NeedsBaseError
from loratools.families import LatentLoRA, LoRAXS
from loratools.families.base import Layout
from loratools.families.fitting import Source
from loratools.families.latent_lora import LatentLoRAOptions
from loratools.families.lora_xs import LoRAXSOptions
from loratools.linalg.inner import relative_error
from loratools.operators import Dense, LowRank
from loratools.ops.convert import Convert
from loratools.ops.lowering import Lowering
from loratools.ops.measuring import size_of
from loratools.ops.reparameterize import Reparameterize, reparameterize

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "target_modules": ["q_proj", "down_proj"]}
SHAPES = {"model.layers.0.q_proj": (24, 16), "model.layers.0.mlp.down_proj": (16, 30)}
SPELLINGS = {"current": ".default_lora_latent_mapping.weight", "older": "_lora_latent_mapping.weight"}
RANK, SCALE = 4, 0.5
each_spelling = pytest.mark.parametrize("mapping", SPELLINGS.values(), ids=SPELLINGS)


def bases_of(weight: Tensor) -> tuple[F64, F64]:
    """As LoRA-XS initialises: A = S V^T, B = U; every second pair of vectors with the other sign."""
    u, s, vt = np.linalg.svd(f64(weight), full_matrices=False)
    signs = np.array([1, -1, 1, -1])
    return s[:RANK, None] * vt[:RANK] * signs[:, None], u[:, :RANK] * signs


def sample(folder: Path, mapping: str) -> tuple[Path, dict[str, Tensor], dict[str, F64]]:
    """A trained folder in the authors' layout, its base, and the deltas by the formula."""
    base = {f"{t}.weight": rand(i, *shape) for i, (t, shape) in enumerate(SHAPES.items())}
    tensors, deltas = {}, {}
    for i, target in enumerate(SHAPES):
        a, b = (torch.from_numpy(x).float() for x in bases_of(base[f"{target}.weight"]))
        r = 1e-2 * rand(10 + i, RANK, RANK)
        module = f"base_model.model.{target}"
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b, module + mapping: r}
        deltas[f"{target}.weight"] = SCALE * f64(b) @ f64(r) @ f64(a)
    save_file(base, folder / "base.safetensors")
    return write(folder / "xs", "adapter_model.safetensors", tensors, CONFIG).parent, base, deltas


@each_spelling
def test_the_matrix_between_the_factors_counts(tmp_path: Path, mapping: str) -> None:
    folder, _, deltas = sample(tmp_path, mapping)
    adapter = loratools.load(folder)
    assert adapter.format.name == "lora-xs"
    assert set(adapter) == set(SHAPES)
    assert {entry.rank for entry in adapter.entries.values()} == {RANK}
    for name, delta in loratools.delta(adapter):
        assert_close(delta, deltas[name])


@each_spelling
def test_without_a_config_alpha_is_asked_for(tmp_path: Path, mapping: str) -> None:
    folder, _, deltas = sample(tmp_path, mapping)
    (folder / "adapter_config.json").unlink()
    weights = folder / "adapter_model.safetensors"
    assert any("--alpha" in warning for warning in loratools.load(weights).warnings)
    for name, delta in loratools.delta(loratools.load(weights, alpha=2)):
        assert_close(delta, deltas[name])


@each_spelling
def test_it_folds_into_a_lora_of_the_same_rank(tmp_path: Path, mapping: str) -> None:
    folder, _, deltas = sample(tmp_path, mapping)
    adapter = loratools.load(folder)
    with pytest.raises(AdapterError, match="--exact for the LoRA of rank 4 that it is exactly"):
        loratools.convert(adapter, "peft")
    saved, _ = loratools.convert_file(adapter, tmp_path / "lora", "peft", Convert(lowering=Lowering(exact=True)))
    plain = loratools.load(saved.path)
    assert {entry.family.family for entry in plain.entries.values()} == {"lora"}
    assert {entry.rank for entry in plain.entries.values()} == {RANK}
    for name, delta in loratools.delta(plain):
        assert_close(delta, deltas[name])
    assert not any("latent" in key for key in load_file(saved.weights))


@each_spelling
def test_bases_that_the_base_has_are_stripped(tmp_path: Path, mapping: str) -> None:
    """Whatever signs they had: r^2 numbers are left of each target, and nothing is lost."""
    folder, _, deltas = sample(tmp_path, mapping)
    base = loratools.load_base(tmp_path / "base.safetensors")
    how = Reparameterize({"rank": str(RANK)}, base=base, dtype="f32")
    made, report = reparameterize(loratools.load(folder), "lora-xs", how)
    assert report.total["relative_error"] == pytest.approx(0, abs=1e-6)
    assert report.total["numbers"] == 2 * RANK**2
    assert made.nbytes == 2 * 4 * RANK**2
    saved = loratools.save(made, tmp_path / "stripped.safetensors")
    assert saved.nbytes == size_of(made)
    found = loratools.load(saved.path)
    for name, delta in loratools.delta(found, base=base):
        assert np.linalg.norm(f64(delta) - deltas[name]) < 2e-6 * np.linalg.norm(deltas[name])
    with pytest.raises(NeedsBaseError):
        dict(loratools.delta(found))


def test_signs_of_a_basis_are_signs_of_the_matrix(tmp_path: Path) -> None:
    """R in the canonical basis is e_i e_j R_ij, for the signs e of the stored vectors against those computed again."""
    folder, base, _ = sample(tmp_path, SPELLINGS["current"])
    adapter = loratools.load(folder)
    how = Reparameterize({"rank": str(RANK)}, base=loratools.load_base(tmp_path / "base.safetensors"), dtype="f32")
    made, _ = reparameterize(adapter, "lora-xs", how)
    for target in SHAPES:
        stored, stripped = adapter[target], made[target]
        assert isinstance(stored, LatentLoRA)
        assert isinstance(stripped, LoRAXS)
        largest = stored.b.abs().argmax(0)
        signs = stored.b[largest, torch.arange(RANK)].sign()
        wanted = SCALE * signs.unsqueeze(1) * stored.r * signs
        torch.testing.assert_close(stripped.r, wanted, rtol=1e-4, atol=1e-7)
        assert stripped.base is not None
        assert base[f"{target}.weight"].shape == SHAPES[target]


def test_bases_of_another_weight_are_told_by_the_loss(tmp_path: Path) -> None:
    folder, base, _ = sample(tmp_path, SPELLINGS["current"])
    save_file({name: rand(77, *w.shape) for name, w in base.items()}, tmp_path / "other.safetensors")
    other = loratools.load_base(tmp_path / "other.safetensors")
    with pytest.raises(AdapterError, match=r"lora-xs would lose \d+ % .*--accept-loss"):
        reparameterize(loratools.load(folder), "lora-xs", Reparameterize({"rank": "4"}, base=other))


def test_a_base_that_is_not_the_one_is_refused() -> None:
    base = rand(0, 12, 10)
    made = LoRAXS.encode(Source(Dense(rand(1, 12, 10).double()), Layout(shape=(12, 10)), base), LoRAXSOptions(3))
    assert torch.equal(made.operator(base).to(torch.float64).dense(), made.operator(base.double()).dense())
    with pytest.raises(AdapterError, match="not the one whose singular vectors"):
        made.operator(base + 1e-3)


def test_the_matrix_is_the_best_one() -> None:
    """Captured energy by the formula of the paper's bases, and least squares on all entries."""
    base, delta = rand(0, 14, 10).double(), LowRank(rand(1, 14, 3).double(), rand(2, 3, 10).double(), 0.5)
    found = LoRAXS.encode(Source(delta, Layout(shape=(14, 10)), base, torch.float64), LoRAXSOptions(4))
    u, s, vt = np.linalg.svd(base.numpy(), full_matrices=False)
    truth = delta.dense().numpy()
    captured = np.linalg.norm(u[:, :4].T @ truth @ vt[:4].T) ** 2 / np.linalg.norm(truth) ** 2
    error = relative_error(delta, found.operator(base))
    assert 1 - error**2 == pytest.approx(captured, rel=1e-9)
    design = np.stack([np.outer(u[:, i], s[j] * vt[j]).ravel() for i in range(4) for j in range(4)], axis=1)
    residual = np.linalg.lstsq(design, truth.ravel(), rcond=None)[1][0]
    assert error**2 * np.linalg.norm(truth) ** 2 == pytest.approx(residual, rel=1e-9)


def test_large_bases_are_not_decomposed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leading vectors alone, as near as a whole decomposition has them."""
    from loratools.families import lora_xs

    m, n = 600, 520
    decay = torch.arange(1, n + 1).double() ** -1.0
    base = torch.linalg.qr(rand(0, m, n).double())[0] * decay @ torch.linalg.qr(rand(1, n, n).double())[0]
    delta = LowRank(rand(2, m, 3).double(), rand(3, 3, n).double())
    u, s, vt = np.linalg.svd(base.numpy(), full_matrices=False)
    signs = np.sign(u[np.abs(u).argmax(0), np.arange(n)])[:6]
    wanted = signs[:, None] * (u[:, :6].T @ delta.dense().numpy() @ vt[:6].T) * signs / s[:6]
    monkeypatch.setattr(lora_xs, "thin_svd", lambda op: pytest.fail("decomposed whole"))
    found = LoRAXS.encode(Source(delta, Layout(shape=(m, n)), base, torch.float64), LoRAXSOptions(6))
    np.testing.assert_allclose(found.r.numpy(), wanted, rtol=1e-6, atol=1e-8 * np.abs(wanted).max())


def test_lora_sb_begins_with_the_step_of_full_fine_tuning() -> None:
    """For U0 = -eta sign(G): B and A orthonormal, R0 = diag(S), and B R0 A the best of its rank, with the descent
    <G, delta> that its leading singular values have."""
    gradient, eta = rand(0, 20, 14).double(), 1e-3
    step = -eta * gradient.sign()
    found = LatentLoRA.encode(Source(Dense(step), Layout(shape=(20, 14)), None, torch.float64), LatentLoRAOptions(5))
    eye = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(found.b.T @ found.b, eye, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.a @ found.a.T, eye, rtol=0, atol=1e-9)
    u, s, vt = np.linalg.svd(step.numpy(), full_matrices=False)
    np.testing.assert_allclose(found.r.numpy(), np.diag(s[:5]), rtol=1e-9, atol=1e-12)
    best = (u[:, :5] * s[:5]) @ vt[:5]
    np.testing.assert_allclose(found.operator().dense().numpy(), best, rtol=1e-8, atol=1e-12)
    assert float((gradient * found.operator().dense()).sum()) < 0
    # what the gradient says of R is the gradient in those bases, as trained R follows it
    assert float(-(gradient.sign() * found.operator().dense()).sum()) * eta == pytest.approx(float((s[:5] ** 2).sum()))


@pytest.mark.parametrize("budget", [400, 1000, 3000])
def test_numbers_are_counted(budget: int) -> None:
    given = Source(Dense(rand(0, 24, 16).double()), Layout(shape=(24, 16)), rand(1, 24, 16))
    for family, count in ((LatentLoRA, lambda r: r * 40 + r * r), (LoRAXS, lambda r: r * r)):
        options = family.within(given, budget)
        assert options is not None
        held = sum(t.numel() for t in family.encode(given, options).parameters().values())
        assert held == count(options.rank) <= budget // 4
        assert options.rank == 16 or count(options.rank + 1) > budget // 4
