"""One delta has one sketch, however it is stored; cosines of sketches estimate those of dense deltas."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hub.conftest import write_peft
from hub.planted import Factors, cosine_of, dense, draw, gauged, write

import loratools
from loratools.errors import AdapterError
from loratools.hub.sketches import LENGTH, sketch
from loratools.linalg.projection import SIDE


def sketch_at(path: Path) -> np.ndarray:
    with loratools.load(path) as adapter:
        return sketch(adapter)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    x, y = a.astype(np.float64), b.astype(np.float64)
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


@pytest.fixture
def planted(tmp_path: Path) -> tuple[Factors, Path]:
    factors = draw(0)
    return factors, write(tmp_path / "a", factors)


def test_a_sketch_is_the_same_bytes_again(planted: tuple[Factors, Path]) -> None:
    found = sketch_at(planted[1])
    assert (found.dtype, found.shape) == (np.float32, (LENGTH,))
    assert found.tobytes() == sketch_at(planted[1]).tobytes()


@pytest.mark.parametrize("kind", ["gauge", "padded", "bf16", "kohya", "ldu", "quantised", "scaled"])
def test_what_is_stored_otherwise_has_the_same_direction(
    planted: tuple[Factors, Path], tmp_path: Path, kind: str
) -> None:
    factors, path = planted
    off, ratio, other = 1e-6, 1.0, tmp_path / "other"
    if kind == "gauge":
        other = write(other, gauged(factors, 5))
    elif kind == "padded":
        more = {
            t: (torch.cat([d, torch.zeros(3, d.shape[1])]), torch.cat([u, torch.ones(len(u), 3)], 1))
            for t, (d, u) in factors.items()
        }
        other = write(other, more)
    elif kind == "bf16":
        other, off = write(other, {t: (d.bfloat16(), u.bfloat16()) for t, (d, u) in factors.items()}), 1e-4
    elif kind == "scaled":
        other, ratio = write(other, factors, alpha=0.5), 0.5
    elif kind == "quantised":
        with loratools.load(path) as adapter:
            saved, _ = loratools.quantize_file(adapter, tmp_path / "q.safetensors", loratools.Quantize(bits=8))
        other, off = saved.path, 1e-3
    else:
        with loratools.load(path) as adapter:
            if kind == "ldu":
                made, _ = loratools.reparameterize(adapter, "ldu")
                other = loratools.save(made, tmp_path / "other.safetensors").path
            else:
                other = loratools.convert_file(adapter, tmp_path / "other.safetensors", kind)[0].path
    a, b = sketch_at(path), sketch_at(other)
    assert 1 - cosine(a, b) < off
    assert np.linalg.norm(b) / np.linalg.norm(a) == pytest.approx(ratio, rel=10 * off)


def test_rows_of_a_fused_projection_are_modules_of_their_own(samples: Callable[[str], Path], tmp_path: Path) -> None:
    """FLUX's authors, and with them sd-scripts, fuse what diffusers keeps apart."""
    path = samples("diffusers/flux_lora") / "pytorch_lora_weights.safetensors"
    with loratools.load(path) as adapter:
        apart = len(adapter)
        fused = loratools.convert_file(adapter, tmp_path / "fused.safetensors", "kohya")[0].path
    with loratools.load(fused) as adapter:
        assert len(adapter) < apart
    assert 1 - cosine(sketch_at(path), sketch_at(fused)) < 1e-6


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_files_of_llama_cpp_are_like_those_that_they_were_made_of(samples: Callable[[str], Path], name: str) -> None:
    folder = samples(f"gguf/{name}")
    assert 1 - cosine(sketch_at(folder / "peft"), sketch_at(folder / "adapter.gguf")) < 1e-6


def test_rows_in_an_order_that_the_file_does_not_tell_are_refused(samples: Callable[[str], Path]) -> None:
    with pytest.raises(AdapterError, match="attention heads"):
        sketch_at(samples("gguf/llama_f32") / "adapter.gguf")


def test_the_error_of_a_cosine_is_what_is_stated(tmp_path: Path) -> None:
    """Root mean squares over pairs: unrelated ones, and ones of cosine 0.8."""
    misses: dict[str, list[float]] = {"unrelated": [], "near": []}
    for seed in range(30):
        a, b = (draw(s, sides=(1024, 768)) for s in (seed, 100 + seed))
        near = {t: (torch.cat([a[t][0], 0.75 * b[t][0]]), torch.cat([a[t][1], b[t][1]], 1)) for t in a}
        paths = [write(tmp_path / f"{name}{seed}", f) for name, f in (("a", a), ("b", b), ("near", near))]
        x, y, z = (sketch_at(p) for p in paths)
        misses["unrelated"].append(cosine(x, y) - cosine_of(dense(a), dense(b)))
        misses["near"].append(cosine(x, z) - cosine_of(dense(a), dense(near)))
    unrelated, close = (float(np.sqrt(np.mean(np.square(m)))) for m in misses.values())
    assert 0.65 < unrelated * LENGTH**0.5 < 1.5
    assert close < (1 - 0.8**2) * 1.6 / LENGTH**0.5
    assert abs(np.mean(misses["unrelated"])) < 4 * unrelated / 30**0.5


def test_the_worst_error_is_that_of_one_target_of_rank_1(tmp_path: Path) -> None:
    """Two deltas u v^T of one u, whose v have a cosine of 0.9."""
    misses = []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        u, v, w = (torch.nn.functional.normalize(torch.randn(48, generator=generator), dim=0) for _ in range(3))
        w = torch.nn.functional.normalize(w - (w @ v) * v, dim=0)
        target = "model.layers.0.self_attn.q_proj"
        paths = [
            write(tmp_path / f"{name}{seed}", {target: (d[None], u[:, None])})
            for name, d in (("a", v), ("b", 0.9 * v + (1 - 0.81) ** 0.5 * w))
        ]
        misses.append(cosine(*(sketch_at(p) for p in paths)) - 0.9)
    assert float(np.sqrt(np.mean(np.square(misses)))) < (1 - 0.81) * (2 / SIDE) ** 0.5


def edited(path: Path, **config: object) -> Path:
    held = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(held | config))
    return path


def test_what_has_no_delta_of_its_own_is_refused(tmp_path: Path) -> None:
    broken = draw(0)
    next(iter(broken.values()))[0][0, 0] = torch.nan
    with pytest.raises(AdapterError, match="NaN"):
        sketch_at(write(tmp_path / "nan", broken))
    huge = {t: (d * 1e25, u * 1e25) for t, (d, u) in draw(0).items()}
    with pytest.raises(AdapterError, match="too large"):
        sketch_at(write(tmp_path / "huge", huge))
    with pytest.raises(AdapterError, match="a base of its own"):
        sketch_at(edited(write_peft(tmp_path / "pissa", 0), init_lora_weights="pissa"))
    dora = write(tmp_path / "dora", draw(0), magnitude=True)
    with pytest.raises(AdapterError, match="dora depends on the base"):
        sketch_at(edited(dora, use_dora=True))
