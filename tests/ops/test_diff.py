"""Comparison by deltas: blind to gauges, sharp on differences."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import loratools
from loratools.errors import AdapterError


def pair(tmp_path: Path, name: str, tensors: dict[str, torch.Tensor]) -> Path:
    path = tmp_path / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def lora(seed: int, m: int = 14, n: int = 10, r: int = 4) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=gen)  # noqa: E731
    return {
        "lora_unet_a.lora_down.weight": draw(r, n),
        "lora_unet_a.lora_up.weight": draw(m, r),
        "lora_unet_a.alpha": torch.tensor(2.0),
    }


def test_another_gauge_is_the_same_update(tmp_path: Path) -> None:
    a = {k: v.double() if v.ndim else v for k, v in lora(0).items()}
    q = torch.randn(4, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    b = dict(a)
    b["lora_unet_a.lora_up.weight"] = a["lora_unet_a.lora_up.weight"] @ q
    b["lora_unet_a.lora_down.weight"] = torch.linalg.solve(q, a["lora_unet_a.lora_down.weight"])
    report = loratools.diff(loratools.load(pair(tmp_path, "a", a)), loratools.load(pair(tmp_path, "b", b)))
    row = report.targets["lora_unet_a"]
    assert report.same
    assert row.relative_error is not None
    assert row.relative_error < 1e-12
    assert row.cosine == pytest.approx(1)
    assert row.output_overlap == pytest.approx(1)


def test_numbers_equal_the_dense_ones(tmp_path: Path) -> None:
    a, b = lora(0), lora(1)
    report = loratools.diff(loratools.load(pair(tmp_path, "a", a)), loratools.load(pair(tmp_path, "b", b)))
    x, y = (0.5 * t["lora_unet_a.lora_up.weight"].double() @ t["lora_unet_a.lora_down.weight"].double() for t in (a, b))
    row = report.targets["lora_unet_a"]
    assert row.relative_error == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-9)
    assert row.cosine == pytest.approx(float((x * y).sum() / (x.norm() * y.norm())), rel=1e-9)
    qx, qy = (torch.linalg.qr(t["lora_unet_a.lora_up.weight"].double())[0] for t in (a, b))
    assert row.output_overlap == pytest.approx(float((qx.T @ qy).square().sum()) / 4, rel=1e-9)
    assert not report.same


def test_what_only_one_has_and_other_extras_make_them_differ(tmp_path: Path) -> None:
    a = lora(0)
    b = {k.replace("_a.", "_b."): v for k, v in a.items()}
    first, second = loratools.load(pair(tmp_path, "a", a)), loratools.load(pair(tmp_path, "b", b))
    report = loratools.diff(first, second)
    assert (report.only_in_a, report.only_in_b, report.same) == (("lora_unet_a",), ("lora_unet_b",), False)
    extra = loratools.diff(first, loratools.load(pair(tmp_path, "c", a | {"emb": torch.ones(2)})))
    assert (extra.extras, extra.same) == ({"emb": "only in b"}, False)
    assert loratools.diff(first, replace(first)).same


def test_biases_count(tmp_path: Path) -> None:
    gen = torch.Generator().manual_seed(3)
    down, up, bias = (torch.randn(*shape, generator=gen) for shape in ((4, 10), (14, 4), (14,)))

    def adapter(name: str, bias: torch.Tensor | None) -> loratools.adapter.Adapter:
        folder = tmp_path / name
        folder.mkdir()
        stem = "base_model.model.a.q."
        tensors = {f"{stem}lora_A.weight": down, f"{stem}lora_B.weight": up}
        save_file(
            tensors | ({} if bias is None else {f"{stem}lora_B.bias": bias}), folder / "adapter_model.safetensors"
        )
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 4}')
        return loratools.load(folder)

    a, b, none, zero = (adapter(*x) for x in (("a", bias), ("b", bias + 1), ("n", None), ("z", bias * 0)))
    assert loratools.diff(a, a).same
    assert loratools.diff(none, zero).same
    for x, y, how in ((a, b, "other values"), (a, none, "only in a"), (none, a, "only in b")):
        report = loratools.diff(x, y)
        assert not report.same
        assert report.extras == {"a.q.bias": how}
    assert loratools.diff(a, b, tolerance=10).same


def test_zero_updates(tmp_path: Path) -> None:
    a = lora(0)
    zero = a | {"lora_unet_a.lora_up.weight": torch.zeros(14, 4)}
    paths = [pair(tmp_path, "z", zero), pair(tmp_path, "a", a)]
    z, full = (loratools.load(p) for p in paths)
    assert loratools.diff(z, z).same
    row = loratools.diff(z, full).targets["lora_unet_a"]
    assert row.relative_error is None
    assert row.cosine is None
    assert loratools.diff(full, z).targets["lora_unet_a"].relative_error == pytest.approx(1)


def test_nan_and_other_shapes_are_named(tmp_path: Path) -> None:
    a = lora(0)
    bad = a | {"lora_unet_a.lora_up.weight": torch.full((14, 4), math.nan)}
    with pytest.raises(AdapterError, match=r"lora_unet_a.*NaN"):
        loratools.diff(loratools.load(pair(tmp_path, "a", a)), loratools.load(pair(tmp_path, "n", bad)))
    with pytest.raises(AdapterError, match="different bases"):
        loratools.diff(loratools.load(tmp_path / "a.safetensors"), loratools.load(pair(tmp_path, "w", lora(0, m=20))))


def test_real_base_dependent_family(samples, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = samples("peft/dora")
    base = loratools.load_base(folder / "base.safetensors")
    adapter = loratools.load(folder)
    small, report = loratools.squeeze(adapter, 2, options=loratools.Squeeze(base=base))
    found = loratools.diff(adapter, small, base=base)
    weights, truth = load_file(folder / "base.safetensors"), load_file(folder / "reference_dW.safetensors")
    for target, change in report.targets.items():
        stored = small[target].delta(weights[f"{target}.weight"])
        wanted = truth[f"{target}.weight"]
        assert change.relative_error == pytest.approx(float((stored - wanted).norm() / wanted.norm()), rel=1e-4)
        assert found.targets[target].relative_error == pytest.approx(change.relative_error, rel=1e-6)
