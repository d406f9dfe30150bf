"""What every family promises, on updates whose delta a naive float64 formula gives."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from loratools.adapter import entry_of, spec_of
from loratools.errors import AdapterError, NeedsBaseError
from loratools.families import FAMILIES, DoRA, LoRA, Update, family_of
from loratools.families.base import Layout, LowRankUpdate
from loratools.linalg.svd import blocks_of, truncate
from loratools.operators import BlockDiagonal, LowRank, Operator
from loratools.storage.base import TensorSpec

F64 = np.ndarray


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def f64(x: Tensor) -> F64:
    return x.double().numpy()


@dataclass(frozen=True)
class Case:
    update: Update
    delta: F64  # of the base parameter, in the base's layout
    base: Tensor | None = None


def lora(down: Tensor, up: Tensor, scale: float, layout: Layout = Layout(), **more: Tensor) -> LoRA:
    return LoRA.from_parameters({"down": down, "up": up, **more}, scale=scale, layout=layout)


def plain(down: Tensor, up: Tensor, scale: float) -> F64:
    """scale * up @ down for 2-D factors, and for kernels summed tap by tap."""
    return scale * np.einsum("or,r...->o...", f64(up).reshape(up.shape[0], -1), f64(down))


def grouped(down: Tensor, up: Tensor, scale: float, groups: int) -> F64:
    parts = zip(np.split(f64(up), groups), np.split(f64(down), groups), strict=True)
    return np.concatenate([scale * np.einsum("or,r...->o...", u.reshape(u.shape[0], -1), d) for u, d in parts])


def experts(down: Tensor, up: Tensor, scale: float, count: int) -> F64:
    a = f64(down).reshape(count, -1, down.shape[1])  # expert-major
    b = f64(up).reshape(up.shape[0], -1, count)  # expert-minor
    return np.stack([scale * b[:, :, e] @ a[e] for e in range(count)])


def tucker(down: Tensor, mid: Tensor, up: Tensor, scale: float) -> F64:
    u, d = f64(up).reshape(up.shape[0], -1), f64(down).reshape(down.shape[0], -1)
    return scale * np.einsum("op,pq...,qi->oi...", u, f64(mid), d)


def dora(direction: LoRA, delta: F64, magnitude: Tensor, base: Tensor, kept: int) -> Case:
    """weight' = m V / ||V||, norms over every axis of the base but `kept`."""
    v = f64(base) + delta
    axes = tuple(i for i in range(v.ndim) if i != kept)
    m = f64(magnitude).reshape([-1 if i == kept else 1 for i in range(v.ndim)])
    weight = m * v / np.sqrt((v**2).sum(axis=axes, keepdims=True))
    return Case(DoRA(direction, magnitude), weight - f64(base), base)


def cases() -> dict[str, Case]:
    a, b = rand(0, 4, 9), rand(1, 7, 4)
    wide_a, wide_b = rand(2, 8, 5), rand(3, 3, 8)  # more terms than rows
    c1, c2, c3 = rand(4, 3, 5, 3), rand(5, 3, 5, 3, 2), rand(6, 2, 4, 2, 3, 2)
    one = rand(7, 3, 5, 1, 1)
    ga, gb = rand(8, 6, 4, 3, 3), rand(9, 8, 3, 1, 1)  # 2 groups: rank 6 in steps of 2
    ta, tm, tb = rand(10, 3, 5, 1, 1), rand(11, 3, 3, 3, 3), rand(12, 8, 3, 1, 1)
    ea, eb = rand(13, 3 * 2, 5), rand(14, 6, 2 * 3)  # 3 experts of rank 2
    flipped, table = Layout(transposed=True), Layout(transposed=True, embedding=True)
    up8 = rand(15, 8, 3)
    kernel_up = up8.reshape(8, 3, 1, 1)
    per_input = Layout(magnitude_axis=1)
    direct = {
        "linear": Case(lora(a, b, 0.5), plain(a, b, 0.5)),
        "linear_negative": Case(lora(a, b, -1.25), plain(a, b, -1.25)),
        "linear_wide": Case(lora(wide_a, wide_b, 2.0), plain(wide_a, wide_b, 2.0)),
        "linear_biased": Case(lora(a, b, 0.5, up_bias=rand(20, 7)), plain(a, b, 0.5)),
        "conv1d_of_gpt2": Case(lora(a, b, 0.5, flipped), plain(a, b, 0.5).T),
        "embedding": Case(lora(a, b, 3.0, table), plain(a, b, 3.0).T),
        "conv1d": Case(lora(c1, up8.reshape(8, 3, 1), 0.7), plain(c1, up8, 0.7)),
        "conv2d": Case(lora(c2, kernel_up, 0.7), plain(c2, up8, 0.7)),
        "conv3d": Case(lora(c3, rand(16, 6, 2, 1, 1, 1), 1.5), plain(c3, rand(16, 6, 2, 1, 1, 1), 1.5)),
        "conv_1x1": Case(lora(one, kernel_up, 0.7), plain(one, up8, 0.7)),
        "grouped": Case(lora(ga, gb, 0.4), grouped(ga, gb, 0.4, 2)),
        "tucker": Case(lora(ta, tb, 0.6, mid=tm), tucker(ta, tm, tb, 0.6)),
        "experts": Case(lora(ea, eb, 0.9, Layout(experts=3)), experts(ea, eb, 0.9, 3)),
        "experts_transposed": Case(
            lora(ea, eb, 0.9, Layout(experts=3, transposed=True)), experts(ea, eb, 0.9, 3).transpose(0, 2, 1)
        ),
    }
    magnitudes = rand(17, 16).abs() + 0.5

    def scaled(name: str, layout: Layout, shape: tuple[int, ...], kept: int, base: Tensor) -> Case:
        direction = replace(direct[name].update, layout=layout)
        count = int(np.prod(shape))
        return dora(direction, direct[name].delta, magnitudes[:count].reshape(shape), base, kept)

    direct |= {
        "dora": scaled("linear", Layout(), (7,), 0, rand(21, 7, 9)),
        "dora_biased": scaled("linear_biased", Layout(), (7, 1), 0, rand(21, 7, 9)),
        "dora_conv1d_of_gpt2": scaled("conv1d_of_gpt2", flipped, (7,), 1, rand(22, 9, 7)),
        "dora_embedding": scaled("embedding", table, (7,), 1, rand(23, 9, 7)),
        "dora_conv": scaled("conv2d", Layout(), (1, 8, 1, 1), 0, rand(24, 8, 5, 3, 2)),
        "dora_tucker": scaled("tucker", Layout(), (8, 1, 1, 1), 0, rand(25, 8, 5, 3, 3)),
        "dora_per_input": scaled("linear", per_input, (1, 9), 1, rand(26, 7, 9)),
        "dora_per_input_conv": scaled("conv2d", per_input, (1, 5, 1, 1), 1, rand(27, 8, 5, 3, 2)),
    }
    return direct


CASES = cases()
each = pytest.mark.parametrize("name", CASES)


def specs_of(update: Update) -> dict[str, TensorSpec]:
    return {slot: spec_of(t) for slot, t in update.parameters().items()}


def distance(found: Tensor, wanted: F64 | Tensor) -> float:
    truth = wanted.double().numpy() if isinstance(wanted, Tensor) else wanted
    assert tuple(found.shape) == truth.shape
    return float(np.linalg.norm(f64(found) - truth) / np.linalg.norm(truth))


def at_rank(case: Case, rank: int, scale: float) -> Update:
    part = case.update.low_rank_part(case.base)
    step = type(case.update).rank_step(specs_of(case.update), case.update.layout)
    return case.update.fit(truncate(part, rank // step).operator, scale=scale, base=case.base)


def ranks(case: Case) -> list[int]:
    """Every rank that a squeeze may choose, the fullest last."""
    update, specs = case.update, specs_of(case.update)
    step = type(update).rank_step(specs, update.layout)
    block = blocks_of(update.low_rank_part(case.base))[0]
    return list(range(step, min(type(update).rank_of(specs, update.layout), step * min(block.shape)) + 1, step))


def test_every_family_has_examples() -> None:
    assert {type(case.update) for case in CASES.values()} == {f for f in FAMILIES if issubclass(f, LowRankUpdate)}


@each
def test_delta_is_the_formula(name: str) -> None:
    case = CASES[name]
    delta = case.update.delta(case.base)
    assert delta.dtype == torch.float32
    assert distance(delta, case.delta) < 3e-7


@each
def test_the_operator_is_the_delta(name: str) -> None:
    """The (m, n) map has the delta's norm, and the low-rank part is all of it unless a base is needed."""
    case = CASES[name]
    op = case.update.operator(case.base)
    whole = np.linalg.norm(op.to(torch.float64).dense().numpy())
    assert whole == pytest.approx(np.linalg.norm(case.delta), rel=1e-6)
    if not type(case.update).needs_base:
        part = case.update.low_rank_part().to(torch.float64).dense()
        assert torch.equal(part, op.to(torch.float64).dense())


@each
def test_parameters_round_trip(name: str) -> None:
    update = CASES[name].update
    again = type(update).from_parameters(update.parameters(), scale=update.scale, layout=update.layout)
    assert (again.scale, again.layout) == (update.scale, update.layout)
    assert list(again.parameters()) == list(update.parameters())
    assert all(torch.equal(again.parameters()[slot], t) for slot, t in update.parameters().items())
    assert family_of(update.parameters()) is type(update)
    assert type(update).check(specs_of(update), update.layout) is None


@each
def test_shapes_and_sizes_agree_with_a_fit(name: str) -> None:
    case = CASES[name]
    family, layout, specs = type(case.update), case.update.layout, specs_of(case.update)
    assert family.base_shape(specs, layout) == case.delta.shape
    per_rank = family.bytes_per_rank(specs, layout)
    for rank in ranks(case):
        fitted = at_rank(case, rank, 1.0)
        found = specs_of(fitted)
        assert family.rank_of(found, layout) == rank
        assert family.rank_step(found, layout) == family.rank_step(specs, layout)
        assert family.bytes_per_rank(found, layout) == per_rank
        assert family.base_shape(found, layout) == case.delta.shape
        assert family.check(found, layout) is None
        factors = sum(t.nbytes for slot, t in fitted.parameters().items() if slot in ("down", "up", "mid"))
        assert factors == rank * per_rank
        others = {slot: spec for slot, spec in found.items() if slot not in ("down", "up", "mid")}
        assert others == {slot: spec for slot, spec in specs.items() if slot not in ("down", "up", "mid")}
        entry = entry_of(fitted)
        assert (entry.rank, entry.base_shape, entry.scale) == (rank, case.delta.shape, 1.0)


@each
@pytest.mark.parametrize("scale", [1.0, -2.5, 1 / 3])
def test_a_full_fit_reproduces_the_delta(name: str, scale: float) -> None:
    case = CASES[name]
    fitted = at_rank(case, ranks(case)[-1], scale)
    assert fitted.scale == scale
    assert {t.dtype for t in fitted.parameters().values()} == {torch.float32}
    assert distance(fitted.delta(case.base), case.delta) < 1e-6
    before, after = case.update.bias_delta(), fitted.bias_delta()
    assert (before is None) == (after is None)
    if before is not None and after is not None:
        torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if isinstance(case.update, LoRA)])
def test_minus_is_the_difference_or_refused(name: str) -> None:
    case = CASES[name]
    update = case.update
    assert isinstance(update, LoRA)
    other = replace(update, up=2 * update.up.flip(0), down=update.down.flip(1))
    if name in ("linear_biased", "grouped", "tucker", "experts", "experts_transposed"):
        with pytest.raises(AdapterError, match="only plain factors"):
            update.minus(other)
        return
    difference = update.minus(other)
    specs = specs_of(difference)
    assert LoRA.check(specs, update.layout) is None
    assert LoRA.rank_of(specs, update.layout) == 2 * LoRA.rank_of(specs_of(update), update.layout)
    assert (difference.scale, difference.layout) == (update.scale, update.layout)
    assert distance(difference.delta(), case.delta - f64(other.delta())) < 1e-6
    with pytest.raises(AdapterError, match="scales differ"):
        update.minus(replace(other, scale=other.scale + 1))


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if isinstance(case.update, LoRA)])
@pytest.mark.parametrize(("delta_scale", "scale"), [(0.5, 0.5), (1.5, -2.0), (0.0, 1.0), (0.0, 0.0)])
def test_a_prefix_is_the_first_terms_or_refused(name: str, delta_scale: float, scale: float) -> None:
    update = CASES[name].update
    assert isinstance(update, LoRA)
    full = LoRA.rank_of(specs_of(update), update.layout)
    if name in ("grouped", "tucker"):
        with pytest.raises(AdapterError, match="have a prefix"):
            update.prefix(1, delta_scale=delta_scale, scale=scale)
        return
    for rank in range(1, full + 1):
        part = update.prefix(rank, delta_scale=delta_scale, scale=scale)
        specs = specs_of(part)
        assert LoRA.check(specs, update.layout) is None
        assert LoRA.rank_of(specs, update.layout) == rank
        assert (part.scale, part.layout) == (scale, update.layout)
        count = update.layout.experts
        a, b = f64(update.down.flatten(1)), f64(update.up.flatten(1))
        downs, ups = a.reshape(count, full, -1)[:, :rank], b.reshape(b.shape[0], full, count)[:, :rank]
        wanted = delta_scale * np.einsum("ore,ern->eon", ups, downs)
        if update.layout.transposed:
            wanted = wanted.transpose(0, 2, 1)
        np.testing.assert_allclose(f64(part.delta()), wanted.reshape(CASES[name].delta.shape), rtol=1e-5, atol=1e-5)
        before, after = update.bias_delta(), part.bias_delta()
        assert (before is None) == (after is None)
        if before is not None and after is not None and scale:
            torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if isinstance(case.update, DoRA)])
def test_a_magnitude_has_neither_difference_nor_prefix(name: str) -> None:
    update = CASES[name].update
    assert isinstance(update, DoRA)
    with pytest.raises(AdapterError, match="cannot be subtracted"):
        update.minus(update)
    with pytest.raises(AdapterError, match="a prefix is not defined"):
        update.prefix(1, delta_scale=1.0, scale=1.0)


def regauged(op: Operator, seed: int) -> Operator:
    """The same map from other factors: (B Q, Q^-1 A) with cond(Q) = 100."""
    if isinstance(op, BlockDiagonal):
        return BlockDiagonal(tuple(regauged(b, seed + i) for i, b in enumerate(op.blocks)))  # type: ignore[arg-type]
    assert isinstance(op, LowRank)
    r = op.rank
    u, v = (torch.linalg.qr(rand(seed + i, r, r).double())[0] for i in (0, 1))
    s = torch.logspace(-1, 1, r, dtype=torch.float64)
    return LowRank(op.left.double() @ (u * s) @ v, v.T @ (u / s).T @ op.right.double(), op.scale)


@each
def test_a_squeeze_does_not_depend_on_the_gauge(name: str) -> None:
    case = CASES[name]
    direction = case.update.direction if isinstance(case.update, DoRA) else case.update
    assert isinstance(direction, LoRA)
    moved: Update = direction.fit(regauged(direction.operator(), 31), scale=direction.scale)
    if isinstance(case.update, DoRA):
        moved = DoRA(moved, case.update.magnitude)  # type: ignore[arg-type]
    other = Case(moved, case.delta, case.base)
    assert distance(moved.delta(case.base), case.delta) < 1e-5
    for rank in ranks(case)[:-1]:
        wanted = at_rank(case, rank, 1.0).delta(case.base)
        assert distance(at_rank(other, rank, 1.0).delta(case.base), wanted) < 1e-5


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if type(case.update).needs_base])
def test_a_base_is_demanded_and_checked(name: str) -> None:
    case = CASES[name]
    assert case.base is not None
    for ask in (case.update.delta, case.update.operator, case.update.low_rank_part):
        with pytest.raises(NeedsBaseError, match="depends on the base"):
            ask()
        with pytest.raises(AdapterError, match="the base weight is"):
            ask(torch.cat([case.base, case.base]))


def spec(*shape: int, dtype: str = "F32") -> TensorSpec:
    return TensorSpec(dtype, shape)


GOOD = {"down": spec(4, 9), "up": spec(7, 4)}
CONV = {"down": spec(4, 5, 3, 3), "up": spec(8, 4, 1, 1)}
EXPERTS = Layout(experts=3)
MISMATCHES: dict[str, tuple[type[Update], dict[str, TensorSpec], Layout, str]] = {
    "ranks": (LoRA, GOOD | {"up": spec(7, 5)}, Layout(), "do not chain"),
    "integers": (LoRA, GOOD | {"up": spec(7, 4, dtype="I32")}, Layout(), "floating-point"),
    "vector": (LoRA, GOOD | {"up": spec(7)}, Layout(), "hold no rank"),
    "rank zero": (LoRA, {"down": spec(0, 9), "up": spec(7, 0)}, Layout(), "hold no rank"),
    "up with a kernel": (LoRA, CONV | {"up": spec(8, 4, 3, 3)}, Layout(), "do not chain"),
    "groups": (LoRA, CONV | {"up": spec(8, 3, 1, 1)}, Layout(), "do not chain"),
    "rows of groups": (LoRA, CONV | {"up": spec(7, 2, 1, 1)}, Layout(), "do not chain"),
    "mid": (LoRA, CONV | {"down": spec(4, 5, 1, 1), "mid": spec(4, 3, 3, 3)}, Layout(), "do not chain"),
    "mid and a kernel": (LoRA, CONV | {"mid": spec(4, 4, 3, 3)}, Layout(), "do not chain"),
    "expert count": (LoRA, {"down": spec(8, 5), "up": spec(6, 8)}, EXPERTS, "3 experts"),
    "expert ranks": (LoRA, {"down": spec(6, 5), "up": spec(6, 9)}, EXPERTS, "3 experts"),
    "expert kernels": (LoRA, {"down": spec(6, 5, 1, 1), "up": spec(6, 6, 1, 1)}, EXPERTS, "3 experts"),
    "bias": (LoRA, GOOD | {"up_bias": spec(6)}, Layout(), "bias"),
    "magnitude": (DoRA, GOOD | {"magnitude": spec(9)}, Layout(), "9 numbers where 7"),
    "magnitude per input": (DoRA, GOOD | {"magnitude": spec(1, 7)}, Layout(magnitude_axis=1), "7 numbers where 9"),
    "magnitude over ranks": (DoRA, GOOD | {"up": spec(7, 5), "magnitude": spec(7)}, Layout(), "do not chain"),
    "magnitude on experts": (
        DoRA, {"down": spec(6, 5), "up": spec(6, 6), "magnitude": spec(6)}, EXPERTS, "not supported"
    ),
    "magnitude on groups": (DoRA, CONV | {"up": spec(8, 2, 1, 1), "magnitude": spec(8)}, Layout(), "not supported"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISMATCHES)
def test_mismatches_are_refused(name: str) -> None:
    family, specs, layout, problem = MISMATCHES[name]
    found = family.check(specs, layout)
    assert found is not None
    assert problem in found
