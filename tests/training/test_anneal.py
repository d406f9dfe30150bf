"""In-tuning squeezes: what becomes of the deltas, of the gradients, and of what the optimizer knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training.tiny import tiny_llama

from loratools.errors import AdapterError, UsageError
from loratools.training.anneal import annealed_ranks, annealing_steps, lora_layers, squeeze_model

peft = pytest.importorskip("peft")


def tuned(rank: int = 6, *, delta_rank: int | None = None, double: bool = False, **config: Any) -> Any:
    """A PEFT model with factors that do something; of deltas of a lower rank, where one is given."""
    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "down_proj"], **config)
    model = peft.get_peft_model(tiny_llama(), settings)
    if double:
        model = model.double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            made = torch.randn(up.shape, generator=generator, dtype=up.dtype)
            if delta_rank is not None:
                made = made[:, :delta_rank] @ torch.randn(delta_rank, rank, generator=generator, dtype=up.dtype)
            up.copy_(0.3 * made)
            down.copy_(torch.randn(down.shape, generator=generator))
    return model


def deltas(model: Any) -> dict[str, np.ndarray]:
    """By the naive product in float64."""
    made = {}
    for name, layer in lora_layers(model):
        A, B = (m["default"].weight.detach().double().numpy() for m in (layer.lora_A, layer.lora_B))
        made[name] = layer.scaling["default"] * B @ A
    return made


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(256, (3, 12), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "labels": ids}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch()).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("rslora", [False, True])
def test_the_deltas_are_the_best_of_the_rank_and_the_config_says_so(tmp_path: Path, rslora: bool) -> None:
    model = tuned(use_rslora=rslora)
    before = deltas(model)
    error = squeeze_model(model, 2)
    after = deltas(model)
    lost = whole = 0.0
    for name, delta in before.items():
        U, S, Vt = np.linalg.svd(delta)
        np.testing.assert_allclose(after[name], (U[:, :2] * S[:2]) @ Vt[:2], atol=1e-5)
        lost, whole = lost + (S[2:] ** 2).sum(), whole + (S**2).sum()
    assert error == pytest.approx(np.sqrt(lost / whole), rel=1e-6)

    model.save_pretrained(tmp_path / "saved")
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "saved")
    assert again.peft_config["default"].r == 2
    for name, delta in deltas(again).items():
        np.testing.assert_allclose(delta, after[name], atol=1e-6)
    torch.testing.assert_close(again(**batch()).loss, model(**batch()).loss)


def test_projected_moments_are_those_of_the_new_factors() -> None:
    model = tuned(delta_rank=2, double=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    gradients(model)
    optimizer.step()  # first moments are now a tenth of the gradients, second ones a thousandth of their squares
    squares = {n: optimizer.state[p]["exp_avg_sq"].clone() for n, p in model.named_parameters() if p.requires_grad}
    loss = model(**batch()).loss  # held over the squeeze, as loops do
    loss.backward()
    assert squeeze_model(model, 3, optimizer) < 1e-12
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    after = gradients(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            known = optimizer.state[parameter]
            # Of the third component, which is empty, nothing was known.
            component = (slice(None), slice(2)) if "lora_B" in name else (slice(2),)
            torch.testing.assert_close(10 * known["exp_avg"][component], after[name][component], rtol=1e-7, atol=1e-12)
            assert known["exp_avg_sq"].shape == parameter.shape
            assert bool((known["exp_avg_sq"] >= 0).all())
            assert known["exp_avg_sq"].sum() > 0 or squares[name].sum() == 0
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer.param_groups[0]["lr"] = 1e-3
    optimizer.step()
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if p.requires_grad)


def test_a_reset_or_unknown_state_is_forgotten() -> None:
    for state, odd in (("reset", False), ("project", True)):
        model = tuned()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        gradients(model)
        optimizer.step()
        if odd:
            for known in optimizer.state.values():
                known["quantised"] = torch.zeros(3)
        squeeze_model(model, 2, optimizer, state=state)  # type: ignore[arg-type]
        assert not optimizer.state
        gradients(model)
        optimizer.step()


def test_components_without_anything_can_still_learn() -> None:
    model = tuned(rank=4)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B["default"].weight.zero_()
    assert squeeze_model(model, 2) == 0.0
    found = gradients(model)
    assert all(bool((grad.abs().sum(0) > 0).all()) for name, grad in found.items() if "lora_B" in name)
    assert all(np.abs(delta).max() == 0.0 for delta in deltas(model).values())


def test_what_cannot_be_annealed_is_said() -> None:
    with pytest.raises(UsageError, match="rank_pattern"):
        squeeze_model(tuned(rank_pattern={"q_proj": 3}), 2)
    with pytest.raises(UsageError, match="no LoRA"):
        squeeze_model(tiny_llama(), 2)
    broken = tuned()
    with torch.no_grad():
        next(lora_layers(broken))[1].lora_A["default"].weight[0, 0] = torch.nan
    with pytest.raises(AdapterError, match=r"q_proj.*NaN"):
        squeeze_model(broken, 2)


def test_a_model_that_is_refused_stays_as_it_was() -> None:
    broken = tuned()
    with torch.no_grad():
        *_, (last, layer) = lora_layers(broken)
        layer.lora_B["default"].weight[0, 0] = torch.inf
    with pytest.raises(AdapterError, match=f"{last}.*infinity"):
        squeeze_model(broken, 2)
    assert {layer.r["default"] for _, layer in lora_layers(broken)} == {6}


class Odd(torch.nn.Module):
    """Layers whose deltas are no products of two factors of one rank."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = torch.nn.Conv2d(8, 8, 3, groups=2)
        self.experts = torch.nn.Module()
        self.experts.weight = torch.nn.Parameter(torch.zeros(3, 8, 8))
        self.plain = torch.nn.Linear(8, 8)


def odd(**config: Any) -> Any:
    return peft.get_peft_model(Odd(), peft.LoraConfig(r=4, **config))


def merged() -> Any:
    model = odd(target_modules=["plain"])
    model.merge_adapter()
    return model


def tied() -> Any:
    plain = tiny_llama()
    plain.config.tie_word_embeddings = True
    plain.tie_weights()
    settings = peft.LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    return peft.get_peft_model(plain, settings)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        pytest.param(
            lambda: odd(target_modules=["grouped"]),
            "grouped: a convolution in groups",
            marks=pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd"),
        ),
        (lambda: odd(target_modules=[], target_parameters=["experts.weight"]), "experts: a parameter with an expert"),
        (lambda: tuned(kasa_config=peft.KasaConfig()), "q_proj: KasaLinearVariant"),
        (merged, "plain: is merged into its weights"),
        (tied, "ensure_weight_tying"),
        (
            lambda: peft.get_peft_model(
                tiny_llama(), peft.AdaLoraConfig(target_modules=["q_proj"], init_r=4, target_r=2, total_step=20)
            ),
            "only a LoRA",
        ),
    ],
)
def test_what_is_no_product_of_two_factors_is_refused(make: Any, told: str) -> None:
    model = make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(UsageError, match=told):
        squeeze_model(model, 2)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_magnitude_stays_and_its_model_too() -> None:
    """With deltas of the rank that is left, a DoRA computes what it did."""
    model = tuned(rank=6, delta_rank=2, use_dora=True)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "magnitude" in n}
    with torch.no_grad():
        logits = model(**batch()).logits
        assert squeeze_model(model, 2) < 1e-6
        torch.testing.assert_close(model(**batch()).logits, logits, rtol=1e-4, atol=1e-4)
    assert before
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_a_rank_that_a_matrix_cannot_have_is_empty_and_can_learn() -> None:
    model = tuned(rank=40)  # of matrices with 16 rows or columns
    before = deltas(model)
    assert squeeze_model(model, 24) < 1e-6
    for name, delta in deltas(model).items():
        np.testing.assert_allclose(delta, before[name], atol=1e-4)
    assert {len(layer.lora_A["default"].weight) for _, layer in lora_layers(model)} == {24}
    found = gradients(model)
    assert all(bool((grad.abs().sum(0) > 0).all()) for name, grad in found.items() if "lora_B" in name)


def test_gathered_gradients_go_along() -> None:
    """A squeeze between the batches of one step: the step is that of a model squeezed before both."""
    model = tuned(delta_rank=2, double=True)
    gradients(model)
    squeeze_model(model, 2)
    carried = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    for name, grad in gradients(model).items():
        torch.testing.assert_close(carried[name], grad, rtol=1e-7, atol=1e-12)


def test_second_moments_go_by_the_squares_of_the_turn() -> None:
    """As if the entries of a gradient did not depend on one another: a mean of squares of sums of them."""
    model = tuned(double=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    gradients(model)
    optimizer.step()

    def both(layer: Any) -> list[torch.Tensor]:
        return [layer.lora_A["default"].weight, layer.lora_B["default"].weight]

    before = {name: [p.detach().clone() for p in both(layer)] for name, layer in lora_layers(model)}
    known = {name: [optimizer.state[p]["exp_avg_sq"] for p in both(layer)] for name, layer in lora_layers(model)}
    squeeze_model(model, 2, optimizer)
    for name, layer in lora_layers(model):
        (down, up), (down_square, up_square) = before[name], known[name]
        turn_down = layer.lora_A["default"].weight.detach() @ torch.linalg.pinv(down)  # N: the new A is N A
        turn_up = torch.linalg.pinv(up) @ layer.lora_B["default"].weight.detach()  # M: the new B is B M
        found = [optimizer.state[p]["exp_avg_sq"] for p in both(layer)]
        torch.testing.assert_close(found[0], turn_up.T**2 @ down_square, rtol=1e-6, atol=0)
        torch.testing.assert_close(found[1], up_square @ turn_down.T**2, rtol=1e-6, atol=0)


def test_parameter_groups_stay_apart() -> None:
    model = tuned()
    halves: list[list[Any]] = [[], []]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            halves["lora_B" in name].append(parameter)
    optimizer = torch.optim.AdamW([{"params": halves[0], "lr": 1e-4}, {"params": halves[1], "lr": 1e-2}])
    gradients(model)
    optimizer.step()
    squeeze_model(model, 2, optimizer)
    for group, is_up in zip(optimizer.param_groups, (False, True), strict=True):
        mine = {id(p) for n, p in model.named_parameters() if p.requires_grad and ("lora_B" in n) == is_up}
        assert {id(p) for p in group["params"]} == mine
    assert set(optimizer.state) == {p for group in optimizer.param_groups for p in group["params"]}


def test_schedules() -> None:
    assert annealed_ranks(64, 4, 4) == (32, 16, 8, 4)
    assert annealed_ranks(36, 9, 4) == (25, 18, 13, 9)
    assert annealed_ranks(5, 4, 3) == (4,)  # the others would change nothing
    assert annealed_ranks(4, 4, 2) == ()
    assert annealing_steps(100, 4) == (20, 40, 60, 80)
    for ranks in ((4, 8, 1), (4, 0, 1), (4, 2, 0)):
        with pytest.raises(UsageError):
            annealed_ranks(*ranks)
    with pytest.raises(UsageError, match="too few"):
        annealing_steps(3, 3)


def test_what_a_trainer_cannot_anneal_is_said_before_it_begins(tmp_path: Path) -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from loratools.training.anneal_callback import AnnealRank

    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    state = TrainerState(max_steps=9)
    with pytest.raises(UsageError, match="rank_pattern"):
        AnnealRank(to=2).on_train_begin(args, state, TrainerControl(), model=tuned(rank_pattern={"q_proj": 3}))
    args.load_best_model_at_end = True
    with pytest.raises(UsageError, match="load_best_model_at_end"):
        AnnealRank(to=2).on_train_begin(args, state, TrainerControl(), model=tuned())


def test_in_a_trainer_and_on_from_a_checkpoint(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    from loratools.training.anneal_callback import AnnealRank

    rows = [{name: value[i] for name, value in batch().items()} for i in range(3)] * 8

    def trainer(model: Any, callback: AnnealRank) -> Any:
        args = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            max_steps=9,
            per_device_train_batch_size=3,
            save_steps=5,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            seed=1,
            logging_steps=1,
            disable_tqdm=True,
        )
        return Trainer(model=model, args=args, train_dataset=rows, callbacks=[callback])

    callback = AnnealRank(to=2, stages=2)
    model = tuned(rank=8)
    first = trainer(model, callback)
    first.train()
    assert [(stage.step, stage.rank) for stage in callback.done] == [(3, 4), (6, 2)]
    assert all(0 < stage.relative_error < 1 for stage in callback.done)
    assert {layer.r["default"] for _, layer in lora_layers(model)} == {2}

    checkpoint = tmp_path / "out" / "checkpoint-5"
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), checkpoint, is_trainable=True)
    assert loaded.peft_config["default"].r == 4
    later = AnnealRank(to=2, stages=2, start=8)
    trainer(loaded, later).train(resume_from_checkpoint=str(checkpoint))
    assert [(stage.step, stage.rank) for stage in later.done] == [(6, 2)]
    for name, delta in deltas(loaded).items():
        np.testing.assert_allclose(delta, deltas(model)[name], atol=1e-5)
