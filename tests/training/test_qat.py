"""Quantisation-aware fine-tuning on a tiny random model: gradients, what stays behind, and what it is good for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loratools import Quantize, load, quantize, quantize_file
from loratools.errors import AdapterError, UsageError
from loratools.ops.gridding import rounded
from loratools.peft import load_adapter
from loratools.quant.petl import fake_quantise
from loratools.training.qat import Grid, quantization_aware, quantization_aware_steps, rounding

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

one_bit = partial(fake_quantise, bits=1)


def tiny(*, dtype: torch.dtype = torch.float32, dropout: float = 0.0, seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": dropout}
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config).to(dtype), peft.LoraConfig(**(settings | more)))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn_like(parameter)
            parameter.data = parameter.data.to(dtype)
    return model


def batches(count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    found = [torch.randint(0, 40, (3, 7), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in found]


def factors(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name}


def by_hand(name: str, weight: Tensor, quantise: Callable[[Tensor], Tensor]) -> Tensor:
    """With a row for each component."""
    return quantise(weight.T.contiguous()).T if "lora_B" in name else quantise(weight)


def test_weights_are_rounded_and_gradients_are_those_of_the_rounded_model() -> None:
    model, other = tiny().double(), tiny().double()  # sums of float32 depend on the number of threads
    names = factors(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name in names:
                parameter.copy_(by_hand(name, parameter, one_bit))
    (batch,) = batches(1)
    wanted = other(**batch).loss
    wanted.backward()
    with quantization_aware(model, one_bit) as latent:
        assert set(latent) == set(names)
        loss = model(**batch).loss
        loss.backward()
        assert torch.equal(loss, wanted)
        for name, parameter in other.named_parameters():
            if name in names:
                torch.testing.assert_close(latent[name].grad, parameter.grad.float(), rtol=1e-5, atol=1e-8)
                assert torch.equal(latent[name], names[name])


def test_the_rounded_weights_stay_and_nothing_else_changes() -> None:
    model = tiny()
    keys, before, others = list(model.state_dict()), factors(model), model.state_dict()
    with quantization_aware(model, rounding("sign", 1)) as latent, torch.no_grad():
        for weight in latent.values():
            weight.add_(1.0)
    assert list(model.state_dict()) == keys
    for name, weight in factors(model).items():
        assert torch.equal(weight, by_hand(name, before[name] + 1.0, rounding("sign", 1))), name
        assert model.get_parameter(name).requires_grad
    assert all(torch.equal(t, others[key]) for key, t in model.state_dict().items() if "lora_" not in key)


def test_an_error_in_the_block_leaves_the_weights_alone() -> None:
    model = tiny()
    before = factors(model)

    def fail() -> None:
        with quantization_aware(model, one_bit) as latent, torch.no_grad():
            for weight in latent.values():
                weight.zero_()
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fail()
    assert all(torch.equal(weight, before[name]) for name, weight in factors(model).items())


def test_half_precision_trains_in_float32_and_comes_back() -> None:
    model = tiny(dtype=torch.bfloat16)
    with quantization_aware(model, one_bit) as latent:
        assert {weight.dtype for weight in latent.values()} == {torch.float32}
        assert model(**batches(1)[0]).loss.isfinite()
    assert {weight.dtype for weight in factors(model).values()} == {torch.bfloat16}


def mean_loss(model: Any, rows: list[dict[str, Tensor]]) -> float:
    model.eval()
    with torch.no_grad():
        return sum(float(model(**row).loss) for row in rows) / len(rows)


@pytest.mark.parametrize("quantise", [one_bit, rounding("sign", 1), rounding("rtn", 2)], ids=["petl", "sign", "rtn"])
def test_training_recovers_what_rounding_lost(quantise: Callable[[Tensor], Tensor]) -> None:
    rows = batches()
    model = tiny()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for step in range(60):
        loss = model(**rows[step % len(rows)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = mean_loss(model, rows)
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    with quantization_aware(model, quantise):
        pass
    rounded = mean_loss(model, rows)
    model.load_state_dict(state, strict=False)
    report = quantization_aware_steps(model, rows, quantise, steps=160, learning_rate=0.01)
    after = mean_loss(model, rows)
    assert rounded > trained + 0.05
    assert after < trained + 0.5 * (rounded - trained), (trained, rounded, after)
    assert len(report.losses) == 160
    assert len(report.factors) == 12
    assert not model.training


def test_the_same_seed_makes_the_same_weights() -> None:
    found = []
    for seed in (3, 3, 4):
        model = tiny(dropout=0.3)
        torch.rand(seed)  # the state outside does not count, and stays
        state = torch.get_rng_state()
        quantization_aware_steps(model, batches(), one_bit, steps=6, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(factors(model))
    one, two, other = found
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_packing_what_was_trained_on_signs_loses_nothing(tmp_path: Path) -> None:
    model = tiny()
    quantization_aware_steps(model, batches(), rounding("sign", 1), steps=5)
    model.save_pretrained(tmp_path / "out")
    _, report = quantize(load(tmp_path / "out"), Quantize("sign", 1, scales="component"))
    assert report.total["relative_error"] < 5e-4  # scales are kept in float16


def on_grid(folder: Path) -> Any:
    """A model with what `quantize` makes of an adapter, its units of many sizes."""
    tiny().save_pretrained(folder / "in")
    saved, _ = quantize_file(load(folder / "in"), folder / "small.safetensors", Quantize(bits=3))
    return load_adapter(tiny().unload(), saved.path, is_trainable=True)


def units(weight: Tensor, *, up: bool) -> Tensor:
    """The smallest number of each component, for at few bits all have a number of one unit; to multiply a weight."""
    rows = (weight.T if up else weight).abs()
    least = torch.stack([row[row > 0].min() for row in rows])
    return least if up else least.unsqueeze(1)


def test_on_a_grid_weights_are_units_and_gradients_those_of_the_rounded_model(tmp_path: Path) -> None:
    model = on_grid(tmp_path)
    before = factors(model)
    (batch,) = batches(1)
    shift = {name: 0.9 * torch.rand_like(weight) - 0.45 for name, weight in before.items()}
    with quantization_aware(model, Grid()) as latent:
        for name, weight in before.items():
            unit = units(weight, up="lora_B" in name)
            torch.testing.assert_close(latent[name].detach(), (weight / unit).round(), rtol=1e-5, atol=1e-5)
            with torch.no_grad():
                latent[name].mul_(2).add_(shift[name])
        model(**batch).loss.backward()
        gradients = {name: weight.grad.clone() for name, weight in latent.items() if weight.grad is not None}
    other = on_grid(tmp_path / "other")
    wanted = {}
    for name, parameter in other.named_parameters():
        if name in before:
            wanted[name] = unit = units(before[name], up="lora_B" in name)
            with torch.no_grad():
                parameter.copy_(rounded(2 * (before[name] / unit).round() + shift[name]) * unit)
    other(**batch).loss.backward()
    assert set(gradients) == set(before)
    for name in before:
        parameter = other.get_parameter(name)
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-5, atol=0)
        torch.testing.assert_close(gradients[name], parameter.grad * wanted[name], rtol=1e-4, atol=1e-7)


def test_training_on_a_grid_recovers_what_it_lost_and_packs_exactly(tmp_path: Path) -> None:
    rows = batches()
    model = tiny()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for step in range(60):
        model(**rows[step % len(rows)]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = mean_loss(model, rows)
    model.save_pretrained(tmp_path / "in")
    start, _ = quantize_file(load(tmp_path / "in"), tmp_path / "start.safetensors", Quantize(bits=1.5))
    small = load_adapter(tiny().unload(), start.path, is_trainable=True)
    coarse = mean_loss(small, rows)
    quantization_aware_steps(small, rows, Grid(), steps=160, learning_rate=0.1)
    after = mean_loss(small, rows)
    assert coarse > trained + 0.05
    assert after < trained + 0.5 * (coarse - trained), (trained, coarse, after)
    small.save_pretrained(tmp_path / "out")
    packed, report = quantize_file(load(tmp_path / "out"), tmp_path / "end.safetensors", Quantize("exact"))
    assert report.total["relative_error"] < 1e-6
    assert packed.nbytes < 2 * start.nbytes  # zeros move, and then cost more
    read = mean_loss(load_adapter(tiny().unload(), packed.path), rows)
    assert abs(read - after) < 1e-4


def test_what_lies_on_no_grid_is_not_trained_on_one() -> None:
    with pytest.raises(AdapterError, match=r"lora_A\.default\.weight: lies on no grid .*loratools quantize"):
        quantization_aware_steps(tiny(), batches(), Grid(), steps=1)


def test_a_loss_of_ones_own_takes_the_batches_as_they_come() -> None:
    model = tiny()
    rows = [row["input_ids"] for row in batches()]
    given = quantization_aware_steps(model, rows, one_bit, steps=5, loss=lambda m, ids: m(ids, labels=ids).loss)
    same = quantization_aware_steps(tiny(), batches(), one_bit, steps=5)
    assert given.losses == same.losses


def test_what_cannot_be_trained_is_refused() -> None:
    frozen = tiny()
    frozen.requires_grad_(False)
    with pytest.raises(AdapterError, match="no trainable lora_A and lora_B; load the adapter with"):
        quantization_aware_steps(frozen, batches(), one_bit, steps=1)
    embedded = tiny(target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(AdapterError, match="factors of an embedding"):
        quantization_aware_steps(embedded, batches(), one_bit, steps=1)
    model = tiny()
    before = factors(model)
    for quantise, problem in (
        (lambda rows: rows[:1], r"lora_A\.default\.weight: the quantiser makes \(1, 16\) of \(4, 16\)"),
        (lambda rows: rows / 0, r"lora_A\.default\.weight: the quantiser makes NaN"),
    ):
        with pytest.raises(AdapterError, match=problem):
            quantization_aware_steps(model, batches(), quantise, steps=1)
    with pytest.raises(AdapterError, match="the loss of step 1 is nan; choose a lower learning rate"):
        quantization_aware_steps(model, batches(), one_bit, steps=2, loss=lambda m, row: m(**row).loss * torch.nan)
    with pytest.raises(UsageError, match="the batches end after 2 of 3 steps"):
        quantization_aware_steps(model, iter(batches(2)), one_bit, steps=3)
    with pytest.raises(UsageError, match="no loss for a batch"):
        quantization_aware_steps(model, [{"input_ids": torch.ones(1, 3, dtype=torch.long)}], one_bit, steps=1)
    with pytest.raises(UsageError, match="0 steps"):
        quantization_aware_steps(model, batches(), one_bit, steps=0)
    assert all(torch.equal(weight, before[name]) for name, weight in factors(model).items())
    broken = tiny()
    with torch.no_grad():
        next(p for n, p in broken.named_parameters() if "lora_B" in n).fill_(torch.inf)
    with pytest.raises(AdapterError, match=r"lora_B\.default\.weight: holds NaN or infinity"):
        quantization_aware_steps(broken, batches(), one_bit, steps=1)
