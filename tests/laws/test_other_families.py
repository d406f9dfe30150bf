"""What every family promises that has a delta but no ranks to lower; its examples lie in `family_examples`."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from family_examples.base import Example

from loratools.adapter import entry_of, spec_of
from loratools.errors import NeedsBaseError
from loratools.families import FAMILIES, family_of
from loratools.families.base import LowRankUpdate
from loratools.families.regroup import rescaled
from loratools.linalg.inner import frobenius
from loratools.linalg.svd import spectrum

HERE = Path(__file__).resolve().parents[1] / "family_examples"
MODULES = [importlib.import_module(f"family_examples.{p.stem}") for p in sorted(HERE.glob("*.py")) if p.stem != "base"]
EXAMPLES: dict[str, Example] = {
    f"{module.__name__.rpartition('.')[2]}-{name}": example
    for module in MODULES
    for name, example in module.EXAMPLES.items()
}
each = pytest.mark.parametrize("name", EXAMPLES)


def distance(found: np.ndarray, truth: np.ndarray) -> float:
    assert found.shape == truth.shape
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


def test_every_family_has_examples() -> None:
    assert {example.family for example in EXAMPLES.values()} == {
        family for family in FAMILIES if not issubclass(family, LowRankUpdate)
    }


@each
def test_delta_is_the_formula(name: str) -> None:
    example = EXAMPLES[name]
    delta = example.update().delta(example.base)
    assert delta.dtype == torch.float32
    assert delta.is_contiguous()
    assert distance(delta.double().numpy(), example.delta) < 3e-7


@each
def test_the_operator_is_the_delta(name: str) -> None:
    example = EXAMPLES[name]
    op = example.update().operator(example.base).to(torch.float64)
    norm = np.linalg.norm(example.delta)
    assert np.linalg.norm(op.dense().numpy()) == pytest.approx(norm, rel=1e-6)
    assert frobenius(op) == pytest.approx(norm, rel=1e-6)
    assert float(spectrum(op).norm()) == pytest.approx(norm, rel=1e-6)
    x = torch.randn(op.shape[1], 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(op.matmat(x), op.dense() @ x, rtol=1e-9, atol=1e-9 * norm)


@pytest.mark.parametrize("name", [name for name, example in EXAMPLES.items() if example.family.scaled])
def test_another_scale_keeps_the_delta(name: str) -> None:
    example = EXAMPLES[name]
    update = rescaled(example.update(), -0.3)
    assert update.scale == -0.3
    assert distance(update.delta(example.base).double().numpy(), example.delta) < 3e-7


@each
def test_other_numbers_take_the_places_of_those_that_were_there(name: str) -> None:
    update = EXAMPLES[name].update()
    tensors = {slot: tensor + 1 for slot, tensor in update.parameters().items()}
    changed = update.with_tensors(tensors)
    assert type(changed) is type(update)
    assert changed.scale == update.scale
    assert changed.layout == update.layout
    for slot, tensor in changed.parameters().items():
        assert torch.equal(tensor, tensors[slot]), slot


@each
def test_bias_is_the_formula(name: str) -> None:
    example = EXAMPLES[name]
    found = example.update().bias_delta(example.bias)
    assert (found is None) == (example.bias_delta is None)
    if found is not None and example.bias_delta is not None:
        assert distance(found.double().numpy(), example.bias_delta) < 3e-7


@each
def test_parameters_round_trip(name: str) -> None:
    example = EXAMPLES[name]
    update = example.update()
    own = {slot: t for slot, t in example.tensors.items() if slot not in example.family.references}
    assert set(update.parameters()) == set(own)
    assert all(torch.equal(update.parameters()[slot], t) for slot, t in own.items())
    assert (update.scale, update.layout) == (example.scale, example.layout)
    assert family_of(own) is example.family
    assert example.family.references <= set(example.tensors)


@each
def test_shapes_are_known_from_the_header(name: str) -> None:
    example = EXAMPLES[name]
    entry = entry_of(example.update())
    specs = {slot: spec_of(t) for slot, t in example.update().parameters().items()}
    assert example.family.check(specs, example.layout) is None
    if example.family.needs_base:
        flattened = example.delta.reshape(len(example.delta), -1).shape  # the taps of a kernel among the inputs
        assert entry.base_shape in (None, example.delta.shape, flattened)
    else:
        assert entry.base_shape == example.delta.shape
    assert not entry.is_factored
    assert example.family.rank_of(specs, example.layout) >= 0


@pytest.mark.parametrize("name", [name for name, example in EXAMPLES.items() if example.family.needs_base])
def test_a_base_is_demanded(name: str) -> None:
    with pytest.raises(NeedsBaseError, match="depends on the base"):
        EXAMPLES[name].update().delta()


@each
def test_broken_shapes_are_refused(name: str) -> None:
    """Cutting any tensor along any axis to nothing is noticed from the header."""
    example = EXAMPLES[name]
    specs = {slot: spec_of(t) for slot, t in example.update().parameters().items()}
    for slot in specs:
        shrunk = spec_of(example.tensors[slot].flatten()[:0].reshape(0, *example.tensors[slot].shape[1:]))
        assert example.family.check({**specs, slot: shrunk}, example.layout) is not None, slot
