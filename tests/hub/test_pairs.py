"""Exact numbers of pairs and of sums, against dense matrices in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hub.planted import TARGETS, Factors, cosine_of, dense, draw, gauged, product, summed, write

import loratools
from loratools.errors import AdapterError
from loratools.hub.pairs import Regression, Shared, regress, shared


def opened(path: Path) -> loratools.Adapter:
    return loratools.load(path)


def both(tmp_path: Path, a: Factors, b: Factors, alpha: float = 1.0) -> Shared:
    return shared(opened(write(tmp_path / "a", a)), [opened(write(tmp_path / "b", b, alpha=alpha))])[0]


def test_numbers_are_those_of_dense_deltas(tmp_path: Path) -> None:
    a, b = draw(0), draw(1)
    near = summed({1.0: a, 0.3: b})
    del near[TARGETS[0]]
    near["model.layers.9.mlp.up_proj"] = summed({0.7: a, 0.3: b})[TARGETS[0]]
    found = both(tmp_path, a, near, alpha=0.5)
    x, y = dense(a), dense(near, 0.5)
    assert found.cosine == pytest.approx(cosine_of(x, y), rel=1e-9)
    assert found.scale == pytest.approx(product(x, y) / product(x, x), rel=1e-9)
    least = min(cosine_of({t: x[t]}, {t: y[t]}) for t in x if t in y)
    assert found.least_cosine == pytest.approx(least, rel=1e-9)
    assert (found.shared, found.only_in_a, found.only_in_b) == (7, 1, 1)


@pytest.mark.parametrize(
    ("made", "alpha", "relation"),
    [
        (lambda f: gauged(f, 3), 1.0, "copy"),
        (lambda f: {t: (d.bfloat16(), u.bfloat16()) for t, (d, u) in f.items()}, 1.0, "copy"),
        (lambda f: f, 0.5, "scaled copy"),
        (lambda f: f, -2.0, "scaled copy"),
        (lambda f: summed({1.0: f, 0.2: draw(8)}), 1.0, "derivative"),
        (lambda f: summed({1.0: f, 0.9: draw(8)}), 1.0, "other"),
        (lambda f: draw(8), 1.0, "other"),
    ],
)
def test_relations(tmp_path: Path, made, alpha: float, relation: str) -> None:  # type: ignore[no-untyped-def]
    found = both(tmp_path, draw(0), made(draw(0)), alpha)
    if relation == "other":
        assert abs(found.cosine) < 0.95
    assert found.relation(0.95) == relation
    if relation == "scaled copy":
        assert found.scale == pytest.approx(alpha, rel=1e-6)


def test_adapters_without_a_common_module(tmp_path: Path) -> None:
    elsewhere = {f"model.layers.{i + 7}.mlp.up_proj": f for i, f in enumerate(draw(0).values())}
    found = both(tmp_path, draw(0), elsewhere)
    assert (found.cosine, found.least_cosine, found.shared) == (0.0, None, 0)
    other_base = both(tmp_path / "shape", draw(0), draw(0, sides=(32, 48)))
    assert (other_base.cosine, other_base.shared, other_base.only_in_a, other_base.only_in_b) == (0.0, 0, 8, 8)


def test_a_module_that_one_leaves_alone_has_a_cosine_of_0(tmp_path: Path) -> None:
    idle = draw(0)
    idle[TARGETS[0]] = (idle[TARGETS[0]][0], torch.zeros_like(idle[TARGETS[0]][1]))
    assert both(tmp_path, draw(0), idle).least_cosine == 0.0
    assert both(tmp_path / "both", idle, idle).least_cosine == pytest.approx(1.0)


def test_a_delta_of_zero_has_no_cosine(tmp_path: Path) -> None:
    zero = {t: (d, torch.zeros_like(u)) for t, (d, u) in draw(0).items()}
    with pytest.raises(AdapterError, match="zero"):
        both(tmp_path, draw(0), zero)


def test_other_tensors_are_noted(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    paths = [write(tmp_path / name, draw(0)) for name in ("a", "b", "c")]
    for path, value in zip(paths, (1.0, 1.0, 2.0), strict=True):
        held = load_file(path / "adapter_model.safetensors")
        held["base_model.model.lm_head.weight"] = torch.full((5, 4), value)
        save_file(held, path / "adapter_model.safetensors")
    same, other = shared(opened(paths[0]), [opened(p) for p in paths[1:]])
    assert (same.note, other.note) == ("", "other tensors differ")


def solved(y: dict[str, torch.Tensor], parts: list[dict[str, torch.Tensor]]) -> tuple[list[float], float]:
    """The naive least squares of flat deltas."""
    flat = [torch.cat([d[t].flatten() for t in TARGETS]) for d in (y, *parts)]
    columns = torch.stack(flat[1:], 1)
    weights = torch.linalg.lstsq(columns, flat[0][:, None]).solution
    return weights.flatten().tolist(), float((flat[0] - (columns @ weights)[:, 0]).norm() / flat[0].norm())


def regressed(tmp_path: Path, y: Factors, parts: list[Factors]) -> Regression:
    terms = [opened(write(tmp_path / f"part{i}", p)) for i, p in enumerate(parts)]
    return regress(opened(write(tmp_path / "y", y)), terms)


def test_weights_and_errors_are_those_of_dense_least_squares(tmp_path: Path) -> None:
    parts = [draw(0), draw(1), draw(2)]
    y = summed({0.5: parts[0], -0.25: parts[1], 0.3: parts[2], 0.1: draw(7)})
    found = regressed(tmp_path, y, parts)
    weights, error = solved(dense(y), [dense(p) for p in parts])
    assert found.weights == pytest.approx(weights, rel=1e-6)
    assert found.relative_error == pytest.approx(error, rel=1e-6)
    for i, without in enumerate(found.without):
        rest = [dense(p) for k, p in enumerate(parts) if k != i]
        assert without == pytest.approx(solved(dense(y), rest)[1], rel=1e-6)
    assert found.is_lean()


def test_a_term_that_does_not_matter_is_told(tmp_path: Path) -> None:
    parts = [draw(0), draw(1), draw(2)]
    found = regressed(tmp_path, summed({0.5: parts[0], 0.25: parts[1]}), parts)
    assert found.relative_error < 1e-6
    assert not found.is_lean()
