"""BitDelta's file: as its loader reads it, and as `extract` writes it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools import convert_file, delta, delta_file, differences, extract_bitdelta, fuse, inspect, load, load_base
from loratools.errors import AdapterError, OutputError, UnchangedError
from loratools.families import LoRA
from loratools.families.bitdelta import BitDelta, encode_bitdelta
from loratools.ops.bitdelta import write_bitdelta
from loratools.ops.convert import Convert
from loratools.ops.lowering import Lowering

GOLDEN = Path(__file__).resolve().parents[1] / "fixtures" / "quant"


def authors_words(signs: np.ndarray) -> np.ndarray:
    """The packed words (n / 32, m) of an (m, n) matrix of booleans, as the authors' code packs its transpose."""
    flipped = signs.T
    out = np.zeros((flipped.shape[0] // 32, flipped.shape[1]), dtype=np.int64)
    for i, row in enumerate(flipped):
        out[i // 32] += row.astype(np.int64) << (i % 32)
    return out.astype(np.uint32).view(np.int32).reshape(out.shape)


def rand(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def two_models(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A model and one that was tuned from it: two matrices to pack, others to keep, one parameter left alone."""
    before = {
        "model.embed_tokens.weight": rand(0, 20, 64),
        "model.layers.0.self_attn.q_proj.weight": rand(1, 48, 64),
        "model.layers.0.self_attn.q_proj.bias": rand(2, 48),
        "model.layers.0.mlp.down_proj.weight": rand(3, 64, 96),
        "model.layers.0.mlp.odd_proj.weight": rand(4, 8, 40),
        "model.norm.weight": rand(5, 64),
        "lm_head.weight": rand(6, 20, 64),
    }
    after = {name: t + 0.05 * rand(10 + i, *t.shape) for i, (name, t) in enumerate(before.items())}
    after["model.norm.weight"] = before["model.norm.weight"]
    q = "model.layers.0.self_attn.q_proj.weight"
    after[q][0, :5] = before[q][0, :5]  # zeros, which count as plus
    save_file(before, folder / "before.safetensors")
    save_file(after, folder / "after.safetensors")
    return before, after


def extracted(folder: Path) -> Path:
    base, tuned = load_base(folder / "before.safetensors"), load_base(folder / "after.safetensors")
    extract_bitdelta(differences(base, tuned), tuned, folder / "delta.bin")
    return folder / "delta.bin"


PACKED = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")


def test_the_file_is_the_authors(tmp_path: Path) -> None:
    before, after = two_models(tmp_path)
    found = torch.load(extracted(tmp_path), weights_only=True)
    whole = {n for n in after if n.removesuffix(".weight") not in PACKED and n != "model.norm.weight"}
    assert set(found) == whole | {f"{t}.{part}" for t in PACKED for part in ("mask", "coeff")}
    for name in whole:
        assert torch.equal(found[name], after[name])
    for target in PACKED:
        d = (after[f"{target}.weight"].double() - before[f"{target}.weight"].double()).numpy()
        words = authors_words(~(d < 0))
        assert found[f"{target}.mask"].dtype == torch.int32
        assert np.array_equal(found[f"{target}.mask"].numpy(), words)
        assert found[f"{target}.coeff"].dtype == torch.float32
        assert found[f"{target}.coeff"].shape == ()
        assert float(found[f"{target}.coeff"]) == pytest.approx(np.abs(d).mean(), rel=1e-6)


def test_what_is_read_is_what_the_authors_loader_adds(tmp_path: Path) -> None:
    """W += ((2 unpack(mask) - 1) coeff)^T, and parameters that are there whole take the place of the model's."""
    before, after = two_models(tmp_path)
    adapter = load(extracted(tmp_path))
    stored = torch.load(tmp_path / "delta.bin", weights_only=True)
    assert set(adapter) == set(PACKED)
    for target in PACKED:
        words, coeff = stored[f"{target}.mask"].numpy().view(np.uint32), float(stored[f"{target}.coeff"])
        bits = np.stack([words >> i & 1 for i in range(32)], axis=1).reshape(-1, words.shape[1])
        truth = ((2.0 * bits - 1) * coeff).T
        np.testing.assert_allclose(adapter[target].delta().numpy(), truth, rtol=1e-6)
    base = load_base(tmp_path / "before.safetensors")
    changes = dict(delta(adapter, base=base))
    assert set(changes) == set(after) - {"model.norm.weight"}
    torch.testing.assert_close(changes["lm_head.weight"], after["lm_head.weight"] - before["lm_head.weight"])
    report = delta_file(adapter, tmp_path / "d.safetensors")
    assert set(load_file(tmp_path / "d.safetensors")) == {f"{t}.weight" for t in PACKED}
    assert "replaces a parameter outright" in report.skipped["lm_head.weight"]


def test_the_reported_error_is_that_of_the_signs(tmp_path: Path) -> None:
    before, after = two_models(tmp_path)
    base, tuned = load_base(tmp_path / "before.safetensors"), load_base(tmp_path / "after.safetensors")
    report = extract_bitdelta(differences(base, tuned), tuned, None)
    assert not (tmp_path / "delta.bin").exists()
    adapter = load(extracted(tmp_path))
    squares = np.zeros(2)
    for target, row in report.targets.items():
        d = after[f"{target}.weight"].double() - before[f"{target}.weight"].double()
        error = float((adapter[target].delta().double() - d).norm())
        assert row.relative_error == pytest.approx(error / float(d.norm()), rel=1e-5)
        assert row.relative_error**2 == pytest.approx(1 - 2 / np.pi, abs=0.02)  # of Gaussian numbers
        squares += error**2, float(d.norm()) ** 2
    assert report.total["relative_error"] == pytest.approx(np.sqrt(squares[0] / squares[1]), rel=1e-5)
    assert report.unchanged == 1
    assert report.left_out == {}
    assert "4 changed parameters are kept whole" in report.warnings[0]
    assert "1 of them are no weights, which BitDelta's own loader passes over" in report.warnings[1]


def test_factors_are_transposed_and_signs_go_before_them(tmp_path: Path) -> None:
    a, b, mask = rand(0, 12, 3), rand(1, 3, 7), torch.ones(1, 5, dtype=torch.int32)
    tensors = {
        "q.A": a,
        "q.B": b,
        "v.mask": mask,
        "v.coeff": torch.tensor(1.0),
        "v.A": a,
        "v.weight": torch.ones(5, 32),
    }
    torch.save(tensors, tmp_path / "x.bin")
    adapter = load(tmp_path / "x.bin")
    assert isinstance(adapter["q"], LoRA)
    torch.testing.assert_close(adapter["q"].delta(), (a @ b).T)
    assert isinstance(adapter["v"], BitDelta)
    assert set(adapter.extras) == {"v.A", "v.weight"}
    assert not adapter.format.replacements()
    assert adapter.warnings == ("2 weights and factors of modules that have signs are not used",)


def test_a_base_with_it_is_the_model_of_the_authors_loader(tmp_path: Path) -> None:
    before, after = two_models(tmp_path)
    adapter = load(extracted(tmp_path))
    (tmp_path / "model").mkdir()
    save_file(before, tmp_path / "model" / "model.safetensors")
    fuse(adapter, load_base(tmp_path / "model"), tmp_path / "fused")
    found = load_file(tmp_path / "fused" / "model.safetensors")
    assert set(found) == set(before)
    for name, tensor in found.items():
        target = name.removesuffix(".weight")
        wanted = before[name] + adapter[target].delta() if target in PACKED else after[name]
        torch.testing.assert_close(tensor, wanted, rtol=1e-6, atol=1e-6)


def test_it_can_be_inspected_and_made_a_lora(tmp_path: Path) -> None:
    two_models(tmp_path)
    adapter = load(extracted(tmp_path))
    assert len(inspect(adapter).targets) == 2
    options = Convert(Lowering(rank=48), drop=frozenset({"extras"}))
    saved, _ = convert_file(adapter, tmp_path / "lora", "peft", options)
    again = load(saved.path)
    for target in PACKED[:1]:  # 48 is the full rank of this one
        torch.testing.assert_close(again[target].delta(), adapter[target].delta(), rtol=1e-4, atol=1e-6)


def test_golden_file_decodes_for_ever() -> None:
    adapter = load(GOLDEN / "bitdelta.bin")
    digest = hashlib.sha256()
    for target in adapter:
        digest.update(adapter[target].delta().numpy().astype("<f4").tobytes())
    assert digest.hexdigest() == (GOLDEN / "bitdelta.sha256").read_text().split()[0]


def test_signs_and_their_scale() -> None:
    d = torch.tensor([[0.0, -0.0, -2.0, 1.0] * 8])
    mask, coeff = encode_bitdelta(d)
    assert mask.tolist() == [[int("1011" * 8, 2) - 2**32]]
    assert float(coeff) == 0.75
    for wrong, problem in (
        (torch.ones(2, 31), "fill words of 32 inputs"),
        (torch.ones(64), "fill words"),
        (torch.ones(0, 32), "fill words"),
        (torch.full((1, 32), torch.nan), "NaN or infinity"),
    ):
        with pytest.raises(AdapterError, match=problem):
            encode_bitdelta(wrong)


def test_deltas_of_ones_own_are_written(tmp_path: Path) -> None:
    deltas = {"q": rand(0, 6, 64), "v": rand(1, 3, 32).bfloat16()}
    whole = {"norm.weight": torch.ones(4), "q.bias": torch.zeros(6)}
    assert write_bitdelta(tmp_path / "x.bin", deltas, whole) == (tmp_path / "x.bin").stat().st_size
    adapter = load(tmp_path / "x.bin")
    assert adapter.format.replacements() == {name: name for name in whole}
    for target, d in deltas.items():
        d = d.double()
        wanted = torch.where(d < 0, -1.0, 1.0).double() * d.abs().sum() / d.numel()
        torch.testing.assert_close(adapter[target].delta().double(), wanted, rtol=1e-6, atol=0)
    before = (tmp_path / "x.bin").read_bytes()
    for bad, raw, problem in (
        ({}, whole, "no delta to pack"),
        ({"q": torch.ones(2, 33)}, whole, r"q: a delta of shape \(2, 33\)"),
        (deltas, {"q.weight": torch.ones(6, 64)}, r"q\.weight: the signs of q go before it"),
    ):
        with pytest.raises(AdapterError, match=problem):
            write_bitdelta(tmp_path / "x.bin", bad, raw, force=True)
    with pytest.raises(OutputError, match="exists already"):
        write_bitdelta(tmp_path / "x.bin", deltas, whole)
    assert (tmp_path / "x.bin").read_bytes() == before


def test_what_cannot_be_extracted_is_refused(tmp_path: Path) -> None:
    before, _ = two_models(tmp_path)
    save_file(before | {"model.norm.weight": torch.ones(64)}, tmp_path / "after.safetensors")
    with pytest.raises(UnchangedError, match="nothing to pack"):
        extracted(tmp_path)
    two_models(tmp_path)
    place = extracted(tmp_path)
    content = place.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        extracted(tmp_path)
    assert place.read_bytes() == content


def test_rows_in_another_order_that_must_be_kept_whole_are_refused(tmp_path: Path) -> None:
    before = {"a.up.weight": rand(0, 40, 32), "a.down.weight": rand(1, 64, 40), "b.weight": rand(2, 8, 64)}
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    after = {"a.up.weight": before["a.up.weight"][order], "a.down.weight": before["a.down.weight"][:, order] + 0.01}
    after["b.weight"] = before["b.weight"] + 0.01
    save_file(before, tmp_path / "before.safetensors")
    save_file(after, tmp_path / "after.safetensors")
    with pytest.raises(AdapterError, match=r"a\.down\.weight: lies in another order"):
        extracted(tmp_path)
