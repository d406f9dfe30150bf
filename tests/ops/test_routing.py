"""Routers: what is read of them, and what is said of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from loratools.errors import AdapterError, InputError, LoratoolsError, UsageError
from loratools.ops.routing import effective_experts, leading_experts, load_routing, perplexity, router_report, routing


def test_the_numbers_of_a_router_by_their_definitions() -> None:
    weights = np.random.default_rng(0).random((5, 3, 4))
    report = router_report(routing(torch.from_numpy(weights)), top_k=2)
    assert (report.samples, report.experts, len(report.layers)) == (5, 4, 3)
    for layer, row in enumerate(report.layers):
        essences, perplexities, mass = [], [], np.zeros(4)
        for sample in weights[:, layer]:
            p = [value / sum(sample) for value in sample]
            essences.append(sum(p) ** 2 / sum(x * x for x in p))
            perplexities.append(math.exp(-sum(x * math.log(x) for x in p)))
            mass += np.array(p) / 5
        assert row.ess == pytest.approx(sum(essences) / 5)
        assert row.perplexity == pytest.approx(sum(perplexities) / 5)
        assert row.mass == pytest.approx(tuple(mass))
        assert row.ess_of_mean == pytest.approx(1 / (mass**2).sum())
        assert row.coverage == pytest.approx(np.sort(mass)[2:].sum())
        assert row.chosen == tuple(sorted(np.argsort(-mass)[:2] + 1))
    assert report.ess == pytest.approx(sum(row.ess for row in report.layers) / 3)


def test_extremes() -> None:
    assert effective_experts(torch.tensor([0.0, 3.0, 0.0])).item() == 1.0
    assert perplexity(torch.tensor([0.0, 3.0, 0.0])).item() == 1.0
    assert effective_experts(torch.ones(8)).item() == pytest.approx(8)
    one_each = routing(torch.eye(4).reshape(4, 1, 4))  # each sample uses one expert, and each another
    row = router_report(one_each).layers[0]
    assert (row.ess, row.ess_of_mean, row.is_collapsed) == (1.0, pytest.approx(4.0), True)
    assert not router_report(routing(torch.tensor([1.0]))).layers[0].is_collapsed  # one expert cannot


def test_of_equal_mass_the_first_are_chosen() -> None:
    assert leading_experts(torch.ones(5), 2) == (0, 1)
    assert leading_experts(torch.tensor([0.1, 0.3, 0.2, 0.3]), 2) == (1, 3)
    for count in (0, 6):
        with pytest.raises(UsageError, match="from 1 to 5"):
            leading_experts(torch.ones(5), count)


def _npy(path: Path, value: np.ndarray) -> None:
    np.save(path, value)


def _json(path: Path, value: np.ndarray) -> None:
    path.write_text(json.dumps(value.tolist()))


def _csv(path: Path, value: np.ndarray) -> None:
    path.write_text("\n".join(",".join(map(str, row)) for row in value) + "\n\n")


def _safetensors(path: Path, value: np.ndarray) -> None:
    save_file({"w": torch.from_numpy(value)}, path)


@pytest.mark.parametrize("write", [_npy, _json, _csv, _safetensors])
def test_files(tmp_path: Path, write: Callable[[Path, np.ndarray], None]) -> None:
    weights = np.array([[1.0, 3.0], [2.0, 2.0], [0.0, 5.0]])
    place = tmp_path / f"w.{write.__name__[1:]}"
    write(place, weights)
    found = load_routing(place, 2).shares
    assert torch.allclose(found, torch.tensor([[[0.25, 0.75], [0.5, 0.5], [0.0, 1.0]]], dtype=torch.float64))
    softened = load_routing(place, 2, logits=True).shares[0, 0]
    assert softened.tolist() == pytest.approx([1 / (1 + math.exp(2)), 1 / (1 + math.exp(-2))])
    with pytest.raises(AdapterError, match="routes between 2 experts, and 3 adapters"):
        load_routing(place, 3)


def test_the_classifier_of_xlora_is_read_by_its_last_biases(tmp_path: Path) -> None:
    stem = "base_model.internal_xlora_classifier.layers"
    tensors = {f"{stem}.0.bias": torch.zeros(7), f"{stem}.0.weight": torch.zeros(7, 4)}
    tensors |= {f"{stem}.10.weight": torch.zeros(6, 7), f"{stem}.10.bias": torch.tensor([0.0, 1, 2, 3, 4, 5])}
    save_file(tensors, tmp_path / "xlora.safetensors")
    found = load_routing(tmp_path / "xlora.safetensors", 3)
    assert torch.allclose(found.shares[0], torch.tensor([[0.0, 1, 2], [3, 4, 5]]).double().softmax(dim=1))
    with pytest.raises(AdapterError, match="4 experts do not divide"):
        load_routing(tmp_path / "xlora.safetensors", 4)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("w.csv", "1,2\n1\n", "line 2: 1 numbers, before it 2"),
        ("w.csv", "1,2\n1,x\n", "line 2: is not numbers"),
        ("w.csv", "\n", "holds no numbers"),
        ("w.csv", "1,nan\n", "NaN"),
        ("w.csv", "1,-2\n", "--logits"),
        ("w.csv", "1,2\n0,0\n", "row of the routing weights is zero"),
        ("w.json", "[[1, 2], [1]]", "no nested lists of numbers"),
        ("w.json", '{"a": 1}', "no nested lists"),
        ("w.json", "[[[[1, 2]]]]", "of shape"),
        ("w.json", "[", "no nested lists"),
        ("w.npy", "no array", "cannot be read as .npy"),
        ("w.txt", "1,2", "cannot be read as routing weights"),
    ],
)
def test_what_is_no_router(tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(LoratoolsError, match=says) as caught:
        load_routing(tmp_path / name, 2)
    assert "\n" not in str(caught.value)


def test_a_header_that_promises_more_than_the_file_holds(tmp_path: Path) -> None:
    np.save(tmp_path / "w.npy", np.ones((2, 2)))
    data = (tmp_path / "w.npy").read_bytes()
    (tmp_path / "w.npy").write_bytes(data.replace(b"(2, 2), ", b"(2, 10000000000000), ").replace(b" " * 13, b"", 1))
    with pytest.raises(InputError, match=r"cannot be read as \.npy"):
        load_routing(tmp_path / "w.npy", 2)
    (tmp_path / "w.npy").write_bytes(data[:-8])
    with pytest.raises(InputError, match=r"cannot be read as \.npy"):
        load_routing(tmp_path / "w.npy", 2)


def test_other_files_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "o.npy", np.array([object()]), allow_pickle=True)
    np.save(tmp_path / "c.npy", np.array([1j]))
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "two.safetensors")
    for name in ("o.npy", "c.npy", "two.safetensors", "missing.csv", "missing.json", "missing.npy"):
        with pytest.raises(InputError):
            load_routing(tmp_path / name, 2)
