"""Entries switched on and off in a running model: the sum of fuse, and the very bits of before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from loratools.adapter import Adapter, entry_of
from loratools.errors import AdapterError, UsageError
from loratools.families import NM, S2FT, BlockSparse, LoRA, PaCA, SHiRA, SparseEntries, Update
from loratools.families.base import Layout
from loratools.families.fitting import Source
from loratools.families.s2ft import S2FTOptions
from loratools.families.shira import SHiRAOptions
from loratools.families.sparse import SparseOptions
from loratools.formats.native import Described, Native
from loratools.operators import Dense
from loratools.ops.reparameterize import composed
from loratools.training import switch as switch_module
from loratools.training.switch import Switch, switched

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def rand(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Stored(nn.Module):
    """A weight that is (inputs, outputs), as GPT-2's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(rand(8, 6, 9))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(12, 10)
        self.two = nn.Conv2d(3, 5, 2)
        self.stored = Stored()


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def update(family: type[Any], shape: tuple[int, ...], seed: int, *, transposed: bool = False) -> Update:
    sides = shape[::-1] if transposed else (shape[0], torch.Size(shape[1:]).numel())
    source = Source(Dense(rand(seed, *sides).double()), Layout(shape=shape, transposed=transposed))
    made: Update = family.encode(source, (SHiRAOptions if family is SHiRA else SparseOptions)(count=17))
    return made


def adapter(updates: dict[str, Update]) -> Adapter:
    empty = Adapter(FORMAT, {t: entry_of(u) for t, u in updates.items()}, {}, {})
    return composed(empty, updates, {t: t for t in updates})


UPDATES = {
    "one": update(SHiRA, (10, 12), 1),
    "two": update(SparseEntries, (5, 3, 2, 2), 2),
    "stored": update(SparseEntries, (6, 9), 3, transposed=True),
}
FORMAT = Native.of(
    {t: Described(u.layout) for t, u in UPDATES.items()},
    {t: tuple(u.parameters()) for t, u in UPDATES.items()},
    {t: f"{t}.weight" for t in UPDATES},
)


def bits(model: nn.Module) -> dict[str, list[int]]:
    return {name: t.contiguous().view(-1).view(torch.uint8).tolist() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("piece", [5, 1 << 15])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_is_there_and_gone_again(dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(switch_module, "_PIECE", piece)
    model = net(dtype)
    before, weights = bits(model), {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        model.one.weight[0, 0] = float("-0.0")  # which adding and subtracting would not restore
    before = bits(model)
    weights["one.weight"] = model.one.weight.detach().clone()
    switch = Switch.of(model, adapter(UPDATES))
    for _ in range(3):
        switch.apply()
        assert switch.is_on
        for target, one in UPDATES.items():
            wide = torch.promote_types(dtype, torch.float32)
            delta = one.operator(weights[f"{target}.weight"]).dense()
            delta = (delta.T if one.layout.transposed else delta).reshape(weights[f"{target}.weight"].shape)
            wanted = (weights[f"{target}.weight"].to(wide) + delta.to(wide)).to(dtype)
            assert torch.equal(dict(model.named_parameters())[f"{target}.weight"], wanted), target
            assert int((wanted != weights[f"{target}.weight"]).sum()) > 10
        assert torch.equal(model.one.bias, weights["one.bias"])
        switch.undo()
        assert not switch.is_on
        assert bits(model) == before


@pytest.mark.parametrize("family", [PaCA, S2FT, NM, BlockSparse])
def test_rows_columns_and_blocks_are_switched_too(family: type[Any]) -> None:
    model = net()
    weight = model.one.weight.detach().clone()
    for axis in ("rows", "columns") if family is S2FT else (None,):
        source = Source(Dense(rand(4, 10, 12).double()), Layout(shape=(10, 12)), weight)
        made = family.encode(source, family.Options() if axis is None else S2FTOptions(rank=3, axis=axis))
        with switched(model, adapter({"one": made})):
            assert torch.equal(model.one.weight, weight + made.operator(weight).to(torch.float64).dense().float())
        assert torch.equal(model.one.weight, weight)


def test_several_are_undone_in_turn() -> None:
    model = net()
    before = bits(model)
    one, two = (Switch.of(model, adapter({"one": update(SHiRA, (10, 12), seed)})) for seed in (5, 6))
    one.apply()
    between = bits(model)
    two.apply()
    with pytest.raises(UsageError, match="one: its entries were changed since; undo later switches first"):
        one.undo()
    two.undo()
    assert bits(model) == between
    one.undo()
    assert bits(model) == before


def test_targets_that_share_a_weight_are_undone_in_turn() -> None:
    model = net()
    model.two = nn.Linear(12, 10)
    model.two.weight = model.one.weight
    before, start = bits(model), model.one.weight.detach().clone()
    updates = {"one": UPDATES["one"], "two": update(SparseEntries, (10, 12), 1)}
    with switched(model, adapter(updates)):
        deltas = [u.operator(start).dense() for u in updates.values()]
        assert int(((deltas[0] != 0) & (deltas[1] != 0)).sum()) > 5
        torch.testing.assert_close(model.one.weight.detach(), start + sum(deltas).float())
    assert bits(model) == before


def test_what_was_changed_elsewhere_leaves_all_as_it_is() -> None:
    model = net()
    switch = Switch.of(model, adapter(UPDATES))
    switch.apply()
    first = switch.patches[0]  # the last to be undone
    assert first.target == "one"
    with torch.no_grad():
        model.one.weight.view(-1)[first.places[-1]] += 1
    there = bits(model)
    with pytest.raises(UsageError, match="one: its entries were changed since"):
        switch.undo()
    assert bits(model) == there
    assert switch.is_on


def test_states_are_minded() -> None:
    switch = Switch.of(net(), adapter(UPDATES))
    with pytest.raises(UsageError, match="not switched on"):
        switch.undo()
    off = switch.nbytes
    assert off == 3 * 17 * (8 + 4)
    switch.apply()
    assert switch.nbytes == off + 3 * 17 * 8
    with pytest.raises(UsageError, match="on already"):
        switch.apply()


def test_a_context_cleans_up_after_errors() -> None:
    model = net()
    before = bits(model)
    during = []

    def fail() -> None:
        with switched(model, adapter(UPDATES)) as changed:
            during.append(bits(changed))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert during[0] != before
    assert bits(model) == before


def test_the_outputs_are_those_of_the_fused_model() -> None:
    model, x = net(), rand(9, 4, 12)
    wanted = model.one(x) + x @ UPDATES["one"].delta().T
    with switched(model, adapter(UPDATES)):
        torch.testing.assert_close(model.one(x), wanted)


def test_what_cannot_be_switched_is_refused() -> None:
    lora = adapter({"one": LoRA(rand(0, 2, 12), rand(1, 10, 2), 1.0, Layout(shape=(10, 12)))})
    with pytest.raises(AdapterError, match=r"one: an update of lora changes every entry; .*--to sparse"):
        Switch.of(net(), lora)
    with pytest.raises(AdapterError, match="three: the model has no module three"):
        Switch.of(net(), adapter({"three": UPDATES["one"]}))
    model = net()
    model.one = nn.Linear(10, 12)
    with pytest.raises(AdapterError, match=r"one: the model's weight is \(12, 10\)"):
        Switch.of(model, adapter(UPDATES))
    model = net()
    model.one.weight = nn.Parameter(torch.zeros(10, 12, dtype=torch.int8), requires_grad=False)
    with pytest.raises(AdapterError, match="no weight of 16 bits or more"):
        Switch.of(model, adapter(UPDATES))
    model = net()
    model.one.weight = nn.Parameter(rand(0, 12, 10).T)
    with pytest.raises(AdapterError, match="is a view"):
        Switch.of(model, adapter(UPDATES))
    with pytest.raises(AdapterError, match="holds no update"):
        Switch.of(net(), Adapter(FORMAT, {}, {}, {}))
