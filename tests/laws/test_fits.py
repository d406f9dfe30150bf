"""What every family with an encoder promises: decoding what was encoded, sizes, determinism, and what it is told."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratools.adapter import Adapter, entry_of
from loratools.base_weights import BaseWeights, load_base
from loratools.errors import AdapterError, UsageError
from loratools.families import FITTABLE, Fittable, LoRA
from loratools.families.base import Layout
from loratools.families.fitting import Source, options_of
from loratools.files import load, save
from loratools.formats import Order
from loratools.formats.base import Part
from loratools.formats.peft import Peft
from loratools.linalg.inner import relative_error
from loratools.operators import Dense, LowRank, Operator
from loratools.ops.measuring import size_of
from loratools.ops.reparameterize import Reparameterize, reparameterize

each = pytest.mark.parametrize("name", FITTABLE)
SHAPE = (24, 16)


def rand(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank(rank: int = 3, shape: tuple[int, int] = SHAPE) -> LowRank:
    return LowRank(rand(0, shape[0], rank), rand(1, rank, shape[1]), 0.5)


def source(delta: Operator, dtype: torch.dtype = torch.float64) -> Source:
    base = rand(2, *delta.shape).float()
    return Source(delta, Layout(shape=delta.shape), base, dtype, squares=rand(3, delta.shape[1]).square() + 0.1)


def nbytes(update: Fittable) -> int:
    return sum(t.nbytes for t in update.parameters().values())


def roomy(family: type[Fittable], given: Source) -> object:
    """Options for a budget of half of the dense matrix."""
    found = family.within(given, given.shape[0] * given.shape[1] * given.stored.itemsize // 2)
    assert found is not None
    return found


@each
def test_options_are_plain_and_have_defaults(name: str) -> None:
    options = FITTABLE[name].Options()
    assert dataclasses.is_dataclass(options)
    assert options_of(FITTABLE[name], {}) == options
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        assert value is None or isinstance(value, int | float | str | bool), field.name
        assert options_of(FITTABLE[name], {field.name: str(value)}) == options
    with pytest.raises(UsageError, match="has no option 'nonsense'"):
        options_of(FITTABLE[name], {"nonsense": "1"})


@each
@pytest.mark.parametrize("kind", ["factors", "dense"])
def test_a_fit_is_in_the_budget_and_no_farther_than_nothing(name: str, kind: str) -> None:
    family = FITTABLE[name]
    delta = low_rank() if kind == "factors" else Dense(low_rank(9).dense())
    given = source(delta)
    for share in (2, 4):
        limit = SHAPE[0] * SHAPE[1] * given.stored.itemsize // share
        options = family.within(given, limit)
        if options is None:
            continue
        update = family.encode(given, options)
        assert nbytes(update) <= limit
        assert nbytes(update) == family.size(given, options)
        assert update.scale == 1.0
        made = update.operator(given.base).to(torch.float64)
        assert made.shape == delta.shape
        assert relative_error(delta, made) < 1 + 1e-9


@each
def test_nothing_fits_into_nothing(name: str) -> None:
    assert FITTABLE[name].within(source(low_rank()), 0) is None


@each
def test_encoding_what_was_decoded_changes_nothing(name: str) -> None:
    """A member of the family is found again; to rounding where the fit is exact or optimal."""
    family = FITTABLE[name]
    given = source(low_rank())
    options = roomy(family, given)
    once = family.encode(given, options)
    member = once.operator(given.base).to(torch.float64)
    again = family.encode(dataclasses.replace(given, delta=member), options)
    error = relative_error(member, again.operator(given.base).to(torch.float64))
    assert error < (1e-6 if family.guarantee != "local" else 0.5)


@each
def test_the_same_input_gives_the_same_bytes(name: str) -> None:
    family = FITTABLE[name]
    given = source(low_rank(), torch.float32)
    options = roomy(family, given)
    one, two = (family.encode(given, options).parameters() for _ in range(2))
    assert all(torch.equal(one[slot], two[slot]) for slot in one)


@each
def test_a_delta_of_zeros_stays_zero(name: str) -> None:
    family = FITTABLE[name]
    given = source(LowRank(torch.zeros(SHAPE[0], 2, dtype=torch.float64), rand(1, 2, SHAPE[1])))
    made = family.encode(given, roomy(family, given)).operator(given.base).to(torch.float64).dense()
    assert torch.isfinite(made).all()
    assert float(made.norm()) < 1e-6


@each
def test_facts_are_told(name: str) -> None:
    family = FITTABLE[name]
    assert family.guarantee in ("exact", "optimal", "local")
    assert family.formula
    assert family.count
    assert family.paper


def peft_adapter(tmp_path: Path, shapes: dict[str, tuple[int, int]], rank: int = 3) -> Adapter:
    """A LoRA with these targets, as a file."""
    updates = {
        t: LoRA((rand(i, rank, n) / 8).float(), (rand(i + 9, m, rank) / 8).float(), 2.0)
        for i, (t, (m, n)) in enumerate(shapes.items())
    }
    parts = {t: Part(("down", "up"), Layout(), shapes[t], rank, 2.0) for t in shapes}
    made = Adapter(Peft.compose(parts, Order()), {t: entry_of(u) for t, u in updates.items()}, {}, {})
    return load(save(made, tmp_path / "in").path)


def base_for(family: type[Fittable], shapes: dict[str, tuple[int, int]], folder: Path) -> BaseWeights | None:
    """Weights of the base, for a family that needs them."""
    if not family.fits_with_base and not family.awaits_base(Layout(shape=SHAPE)):
        return None
    weights = {f"{t}.weight": rand(50 + i, *s).float() for i, (t, s) in enumerate(shapes.items())}
    save_file(weights, folder / "base.safetensors")
    return load_base(folder / "base.safetensors")


@each
def test_a_file_decodes_to_what_was_fitted(name: str, tmp_path: Path) -> None:
    shapes = {"model.layers.0.q_proj": (24, 16), "model.layers.0.v_proj": (16, 16), "model.layers.1.q_proj": (24, 16)}
    adapter = peft_adapter(tmp_path, shapes)
    base = base_for(FITTABLE[name], shapes, tmp_path)
    how = Reparameterize(budget=3000, base=base, dtype="f32", accept_loss=True)
    made, report = reparameterize(adapter, name, how)
    saved = save(made, tmp_path / "out.safetensors")
    assert saved.nbytes == size_of(made) == report.total["bytes_after"]
    found = load(saved.path)
    assert {entry.family for entry in found.entries.values()} == {FITTABLE[name]}
    for target, update in made.items():
        weight = None if base is None else base.find(made.format.parameter(target), None)
        one, other = (u.operator(weight).to(torch.float64) for u in (update, found[target]))
        torch.testing.assert_close(one.dense(), other.dense(), rtol=0, atol=0)
        truth = adapter[target].operator().to(torch.float64)
        assert report.targets[target].relative_error == pytest.approx(relative_error(truth, other), rel=1e-9, abs=1e-12)


@each
def test_loss_has_to_be_accepted(name: str, tmp_path: Path) -> None:
    """Little room for a delta of high rank: refused, and made where that is accepted."""
    family, shapes = FITTABLE[name], {"a.q_proj": (24, 16)}
    adapter = peft_adapter(tmp_path, shapes, rank=12)
    base = base_for(family, shapes, tmp_path)
    weight = None if base is None else base.find("a.q_proj.weight", None)
    given = dataclasses.replace(source(adapter["a.q_proj"].operator().to(torch.float64), torch.float32), base=weight)
    budget = next(b for b in range(8, 4000, 8) if family.within(given, b) is not None)
    with pytest.raises(AdapterError, match="accept-loss"):
        reparameterize(adapter, name, Reparameterize(budget=budget, base=base, dtype="f32"))
    how = Reparameterize(budget=budget, base=base, dtype="f32", accept_loss=True)
    assert reparameterize(adapter, name, how)[1].total["relative_error"] > 0.5


@each
@pytest.mark.parametrize("shape", [SHAPE, (23, 17), (48, 64)])
def test_a_size_is_told_without_a_fit(name: str, shape: tuple[int, int]) -> None:
    """To the byte, but where a delta lets a family leave out what is zero: sides of bands differ for odd shapes."""
    family = FITTABLE[name]
    given = source(Dense(rand(7, *shape)), torch.float32)
    choices = [family.within(given, shape[0] * shape[1] * 4 // share) for share in (1, 2, 3, 6, 10, 20)]
    known = [options for options in choices if options is not None]
    assert known or name == "nm"
    for options in known:
        told = family.size(given, options)
        if shape[0] % 2 and name in ("wara", "qwha"):
            with pytest.raises(AdapterError):
                family.encode(given, options)
            continue
        found = nbytes(family.encode(given, options))
        assert found == told or (name == "wavelet" and shape[0] % 2 and found < told)


@each
def test_shares_of_a_budget_are_made_without_a_fit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FITTABLE[name]
    sources = {"a": source(low_rank()), "b": source(low_rank(5, (16, 32)))}

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("it was fitted")

    monkeypatch.setattr(family, "encode", refused)
    monkeypatch.setattr(family, "encode_together", refused)
    options = family.within_together(sources, 5000)
    assert set(options) == set(sources)
