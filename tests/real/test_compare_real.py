"""A comparison of adapters that were really trained, against dense float64 matrices in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ops import compared as naive
from real.smollm2 import ADAPTERS, RealModel, load_real_model, missing

import loratools

pytestmark = pytest.mark.real

NAMES = ("en_lora_r8", "en_lora_r64", "en_dora_r16")
TOP_K = 10


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> RealModel:
    if reason := missing():
        pytest.skip(reason)
    return load_real_model(tmp_path_factory.mktemp("base"), n_rows=1)


def dense(name: str, update: Any, weight: naive.Array) -> naive.Array:
    """The delta by the formulas of LoRA and DoRA."""
    direction = getattr(update, "direction", update)
    change = update.scale * naive.numpy_of(direction.up) @ naive.numpy_of(direction.down)
    if "dora" not in name:
        return change
    tuned = weight + change
    return (naive.numpy_of(update.magnitude) / np.linalg.norm(tuned, axis=1))[:, None] * tuned - weight


def test_two_layers_are_those_of_dense_matrices(real: RealModel) -> None:
    adapters = {name: loratools.load(ADAPTERS / name, base=real.weights) for name in NAMES}
    report = loratools.compare(real.weights, adapters, target="layers.[37].self_attn.[kv]_proj", top_k=TOP_K)
    assert len(report.targets) == 4
    for parameter, target in report.targets.items():
        assert target.layer in ("3", "7")
        weight = naive.numpy_of(real.weights.source.read(parameter))
        base = u0, _, v0 = naive.thin(weight)
        deltas = {n: dense(n, a[parameter.removesuffix(".weight")], weight) for n, a in adapters.items()}
        apart = {name: naive.thin(delta) for name, delta in deltas.items()}
        for name, delta in deltas.items():
            found, s = target.updates[name], apart[name][1]
            assert found.norm == pytest.approx(np.linalg.norm(delta), rel=1e-6)
            assert found.relative_norm == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(weight), rel=1e-6)
            np.testing.assert_allclose(found.spectrum, s[: len(found.spectrum)], rtol=1e-5, atol=1e-9 * s[0])
            assert found.effective_rank == pytest.approx(naive.effective_rank(s[s > 1e-12 * s[0]]), rel=1e-5)
            assert found.stable_rank == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-6)
            assert found.energy_left == pytest.approx(naive.share_in(u0[:, :TOP_K], delta), rel=1e-4)
            assert found.energy_right == pytest.approx(naive.share_in(v0[:TOP_K].T, delta.T), rel=1e-4)
            counts = naive.intruders(base, weight + delta, TOP_K, 0.5)
            assert (found.left_intruders, found.right_intruders) == counts
            norm = f"model.layers.{target.layer}.input_layernorm.weight"
            gain = naive.numpy_of(real.weights.source.read(norm))
            wanted = naive.bound(weight + delta, gain) / naive.bound(weight, gain)
            assert found.logit_growth == pytest.approx(wanted, rel=1e-7)
            assert (found.gain is not None) == (name == "en_dora_r16")
        for pair in target.pairs:
            a, b = deltas[pair.a], deltas[pair.b]
            cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
            assert pair.cosine == pytest.approx(cosine, rel=1e-4)
            assert pair.relative_distance == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-5)
            rank = min(int(name.rpartition("_r")[2]) for name in (pair.a, pair.b))
            assert pair.overlap_rank == rank
            (u, _, v), (x, _, y) = apart[pair.a], apart[pair.b]
            assert pair.output_overlap == pytest.approx(naive.overlap(u[:, :rank], x[:, :rank]), rel=1e-4)
            assert pair.input_overlap == pytest.approx(naive.overlap(v[:rank].T, y[:rank].T), rel=1e-4)
    # trained on one task from one base, they agree in the directions that they write more than chance would
    assert report.pairs[0].output_overlap is not None
    assert report.pairs[0].output_overlap > 5 * 8 / 576
