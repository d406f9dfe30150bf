"""Maps between two models from what both compute, where the one is the other with its channels in another order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training.tiny import save_tiny_lora, save_tiny_model, tiny_llama

from loratools import load, load_base
from loratools.adapter import Adapter
from loratools.errors import AdapterError, UsageError
from loratools.ops.weight_space import module_pairs, transfer_weights
from loratools.training.applied import applied
from loratools.training.models import load_model
from loratools.training.paired_activations import PairedActivations, PairedText, Side, paired_texts

TEXTS = [f"some text number {i}, with words {chr(97 + i % 26)}{i * i} and more: {i % 7}!" for i in range(24)]


def permuted(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The same function with channels of the stream and of each MLP in another order, and these orders."""
    orders = {"": torch.randperm(16, generator=torch.Generator().manual_seed(3))}
    for i in range(2):
        orders[f"model.layers.{i}.mlp"] = torch.randperm(24, generator=torch.Generator().manual_seed(4 + i))
    found = {}
    for name, tensor in state.items():
        rows, columns = sides(name, orders)
        tensor = tensor if rows is None else tensor[rows]
        found[name] = tensor if columns is None else tensor[:, columns]
    return found, orders


def sides(name: str, orders: dict[str, torch.Tensor]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """In which order rows and columns of a parameter go."""
    stream = orders[""]
    inner = next((order for path, order in orders.items() if path and name.startswith(path)), None)
    leaf = name.split(".")[-2]
    if leaf in ("gate_proj", "up_proj"):
        return inner, stream
    if leaf == "down_proj":
        return stream, inner
    if leaf == "o_proj" or "norm" in leaf:
        return stream, None
    return None, stream  # embeddings, q, k, v and the head


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("models")
    one = save_tiny_model(place / "one")
    two = save_tiny_model(place / "two")
    model = tiny_llama()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj" in name:
                parameter.mul_(20)  # so that heads attend to different things, and all channels tell
    model.save_pretrained(one)
    state, _ = permuted(model.state_dict())
    model.load_state_dict(state)
    model.save_pretrained(two)
    return one, two


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return load(save_tiny_lora(tmp_path_factory.mktemp("lora") / "adapter"))


def two_sides(folders: tuple[Path, Path]) -> tuple[Side, Side]:
    one, two = (Side(*load_model(folder, dtype="float32"), folder.name) for folder in folders)
    return one, two


@pytest.mark.parametrize("budget", [1, 1 << 30])
def test_the_same_model_in_another_order_gets_the_same_adapter(
    folders: tuple[Path, Path], adapter: Adapter, budget: int
) -> None:
    one, two = two_sides(folders)
    bases = [load_base(folder) for folder in folders]
    texts = paired_texts(one, two, TEXTS)
    pairs = module_pairs(adapter, *bases)
    assert len(pairs) == len(adapter)
    maps = PairedActivations(one, two, texts, pairs, budget=budget)
    found, report = transfer_weights(adapter, bases[0], bases[1], maps=maps)
    _, orders = permuted(tiny_llama().state_dict())
    for target in adapter:
        before, after = (a[target].parameters() for a in (adapter, found))
        rows, columns = sides(f"{target}.weight", orders)
        expected = adapter[target].scale * before["up"] @ before["down"]
        expected = expected if rows is None else expected[rows]
        expected = expected if columns is None else expected[:, columns]
        torch.testing.assert_close(after["up"] @ after["down"] * found[target].scale, expected, atol=2e-3, rtol=2e-3)
        row = report.targets[target]
        assert row.method == "activations"
        assert row.kept == pytest.approx(1.0, abs=1e-4)
        assert row.agreement == pytest.approx(1.0, abs=1e-4)
    ids = torch.tensor([two.tokenizer("is it the same?").input_ids])
    with torch.no_grad():
        with applied(one.model, adapter):
            wanted = one.model(input_ids=ids).logits
        bare = two.model(input_ids=ids).logits
        with applied(two.model, found):
            got = two.model(input_ids=ids).logits
    assert float((got - wanted).abs().max()) < 0.02 * float((bare - wanted).abs().max())


def test_few_texts_map_the_few_directions_that_they_show(folders: tuple[Path, Path], adapter: Adapter) -> None:
    one, two = two_sides(folders)
    bases = [load_base(folder) for folder in folders]
    maps = PairedActivations(one, two, paired_texts(one, two, ["ab cd"]), module_pairs(adapter, *bases))
    assert maps.rows == 5
    _, report = transfer_weights(adapter, bases[0], bases[1], maps=maps)
    assert all(0 < row.kept < 0.9 for row in report.targets.values())


def test_the_inside_of_an_mlp_is_one_space(folders: tuple[Path, Path]) -> None:
    """Whatever of it an adapter is for, and however much fits a pass."""
    one, two = two_sides(folders)
    texts = paired_texts(one, two, TEXTS[:3])
    gate, up, down = (f"model.layers.1.mlp.{leaf}_proj" for leaf in ("gate", "up", "down"))
    together = PairedActivations(one, two, texts, [(path, path) for path in (down, gate, up)])
    inner = together(down, down).inputs
    assert together(gate, gate).outputs is inner
    assert together(up, up).outputs is inner
    for budget in (1, 1 << 30):
        alone = PairedActivations(one, two, texts, [(up, up)], budget=budget)(up, up).outputs
        assert torch.equal(alone.left, inner.left)
        assert torch.equal(alone.right, inner.right)


def test_no_logits_are_computed_that_nobody_asks_for(folders: tuple[Path, Path]) -> None:
    one, two = two_sides(folders)
    texts, calls = paired_texts(one, two, TEXTS[:4]), [0]
    for side in (one, two):
        side.model.lm_head.register_forward_hook(lambda *passed: calls.__setitem__(0, calls[0] + 1))
    name = "model.layers.1.mlp.down_proj"
    alone = PairedActivations(one, two, texts, [(name, name)])(name, name)
    assert calls == [0]
    maps = PairedActivations(one, two, texts, [(name, name), ("lm_head", "lm_head")])
    beside = maps(name, name)
    assert calls == [2 * len(texts)]
    assert len(maps("lm_head", "lm_head").outputs.left) == one.model.lm_head.out_features
    for side in ("inputs", "outputs"):
        a, b = (getattr(found, side) for found in (alone, beside))
        assert torch.equal(a.left, b.left)
        assert torch.equal(a.right, b.right)


class Words:
    """A tokenizer that ends a token at every blank and at the end, after a special token of no characters."""

    def __call__(self, text: str, *, return_offsets_mapping: bool) -> dict[str, Any]:
        spans, start = [(0, 0)], 0
        for end in [i for i, c in enumerate(text) if c == " "] + [len(text)]:
            spans.append((start, end))
            start = end
        return {"input_ids": list(range(len(spans))), "offset_mapping": spans}


def test_places_are_where_both_have_read_the_same(folders: tuple[Path, Path]) -> None:
    one, _ = two_sides(folders)
    words = Side(None, Words(), "words")
    (found,) = paired_texts(one, words, ["ab cd e"])
    assert found.places == ((1, 4, 6), (1, 2, 3))
    assert len(found.ids[0]) == 7
    (cut,) = paired_texts(one, words, ["ab cd e"], max_tokens=3)
    assert cut == PairedText((found.ids[0][:3], found.ids[1][:3]), ((1,), (1,)))


def test_texts_that_share_no_place_are_refused(folders: tuple[Path, Path]) -> None:
    one, _ = two_sides(folders)
    with pytest.raises(UsageError, match="end at the same character nowhere"):
        paired_texts(one, Side(None, Words(), "words"), ["abcdef"], max_tokens=2)

    class Slow:
        def __call__(self, text: str, **settings: Any) -> None:
            raise NotImplementedError

    with pytest.raises(UsageError, match="the tokenizer of slow does not tell where its tokens lie"):
        paired_texts(one, Side(None, Slow(), "slow"), ["ab"])


def test_a_module_that_is_not_called_is_named(folders: tuple[Path, Path]) -> None:
    one, two = two_sides(folders)
    one.model.add_module("spare", torch.nn.Linear(2, 2))
    maps = PairedActivations(one, two, paired_texts(one, two, ["ab"]), [("spare", "lm_head")])
    with pytest.raises(AdapterError, match="spare: one calls it 0 times for 1 texts"):
        maps("spare", "lm_head")


def test_models_are_left_as_they_were(folders: tuple[Path, Path], adapter: Adapter) -> None:
    one, two = two_sides(folders)
    one.model.train()
    before = {name: p.detach().clone() for name, p in one.model.named_parameters()}
    bases = [load_base(folder) for folder in folders]
    pairs = module_pairs(adapter, *bases)
    PairedActivations(one, two, paired_texts(one, two, ["ab"]), pairs)(*pairs[0])
    assert one.model.training
    assert not two.model.training
    assert all(torch.equal(before[name], p) for name, p in one.model.named_parameters())
    assert not any(module._forward_hooks for module in one.model.modules())


def test_the_result_is_the_same_every_time(folders: tuple[Path, Path], adapter: Adapter) -> None:
    one, two = two_sides(folders)
    bases = [load_base(folder) for folder in folders]
    pairs = module_pairs(adapter, *bases)
    reports = [
        transfer_weights(
            adapter, bases[0], bases[1], maps=PairedActivations(one, two, paired_texts(one, two, TEXTS[:6]), pairs)
        )[1].to_dict()
        for _ in range(2)
    ]
    assert json.dumps(reports[0]) == json.dumps(reports[1])
