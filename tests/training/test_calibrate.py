"""Statistics of activations, against a naive loop over single texts through the adapter as PEFT runs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from training.tiny import byte_tokenizer, save_tiny_lora, save_tiny_model, tiny_llama

from loratools import Calibrate, Statistics, calibrate, data_free_statistics, load, load_base
from loratools.adapter import Adapter
from loratools.errors import AdapterError, InputError, MissingExtraError, UsageError
from loratools.training.models import load_model

TEXTS = ["one two three", "four", "five six seven eight nine ten", "a", "eleven twelve"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_lora(tmp_path_factory.mktemp("lora") / "adapter")


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Adapter:
    return load(folder)


@pytest.fixture(scope="module")
def tuned(folder: Path) -> Any:
    return by_peft(folder)


def by_peft(folder: Path) -> Any:
    import peft

    return peft.PeftModel.from_pretrained(tiny_llama(), folder).base_model.model


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


def naive(model: Any, adapter: Adapter, texts: list[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Moment and channels, one text at a time, so that there is nothing to pad."""
    entered: dict[str, list[torch.Tensor]] = {target: [] for target in adapter}
    handles = [
        model.get_submodule(t).register_forward_pre_hook(lambda m, args, t=t: entered[t].append(args[0][0]))
        for t in adapter
    ]
    with torch.no_grad():
        for text in texts:
            model(input_ids=torch.tensor([byte_tokenizer(text).input_ids]))
    for handle in handles:
        handle.remove()
    found = {}
    for target in adapter:
        x = torch.cat(entered[target])  # (tokens, n)
        if not x.is_floating_point():
            x = torch.nn.functional.one_hot(x, 256)
        x = x.double()
        c = x.T @ x / len(x)
        down = adapter[target].parameters()["down"].double()
        found[target] = (down @ c @ down.T, c.diagonal())
    return found


def assert_same(found: Statistics, expected: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    for target, (moment, channels) in expected.items():
        torch.testing.assert_close(found.moment(target), moment, rtol=1e-4, atol=1e-6 * float(moment.max()))
        torch.testing.assert_close(found.channels(target), channels, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("batch", [1, 2, 5, 64])
def test_moments_are_those_of_a_naive_loop_whatever_the_batch(
    model: Any, adapter: Adapter, tuned: Any, batch: int
) -> None:
    found = calibrate(model, adapter, TEXTS, tokenizer=byte_tokenizer, options=Calibrate(batch=batch))
    assert_same(found, naive(tuned, adapter, TEXTS))
    assert found.tokens == sum(map(len, TEXTS))


def test_a_bare_model_runs_as_it_is(model: Any, adapter: Adapter, tuned: Any) -> None:
    found = calibrate(model, adapter, TEXTS, tokenizer=byte_tokenizer, options=Calibrate(bare=True))
    assert_same(found, naive(model, adapter, TEXTS))
    last = "model.layers.1.mlp.down_proj"
    applied = calibrate(model, adapter, TEXTS, tokenizer=byte_tokenizer)
    assert not torch.allclose(found.moment(last), applied.moment(last), rtol=0.05)
    # one that has the adapter inside already, as PEFT puts it there
    assert_same(calibrate(tuned, adapter, TEXTS, tokenizer=byte_tokenizer, options=Calibrate(bare=True)),
                naive(tuned, adapter, TEXTS))  # fmt: skip


def test_limits_cut_texts_and_tokens(model: Any, adapter: Adapter, tuned: Any) -> None:
    how = Calibrate(max_texts=3, max_tokens=5)
    found = calibrate(model, adapter, TEXTS, tokenizer=byte_tokenizer, options=how)
    assert_same(found, naive(tuned, adapter, [text[:5] for text in TEXTS[:3]]))
    assert found.tokens == 14


def test_the_model_is_left_as_it_was(adapter: Adapter) -> None:
    model = tiny_llama().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    steps: list[int] = []
    how = Calibrate(batch=2)
    calibrate(model, adapter, TEXTS, tokenizer=byte_tokenizer, options=how, step=lambda: steps.append(1))
    assert len(steps) == 3
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_error_on_the_way_leaves_the_model_as_it_was(adapter: Adapter, dtype: torch.dtype) -> None:
    model = tiny_llama().to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def stop() -> None:
        changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
        assert sorted(changed) == sorted(f"{target}.weight" for target in adapter)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, adapter, TEXTS, tokenizer=byte_tokenizer, step=stop)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.inf  # after most of the others were changed
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.down_proj\.weight holds NaN or infinity"):
        calibrate(model, adapter, TEXTS, tokenizer=byte_tokenizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("tied", [False, True])
def test_the_embedding_and_the_head_are_applied_where_they_change_inputs(tmp_path: Path, tied: bool) -> None:
    folder = save_tiny_lora(tmp_path / "lora", modules=("lm_head", "embed_tokens", "q_proj"))
    model, tuned = tiny_llama(), by_peft(folder)
    if tied:  # PEFT changes each end by itself, and what enters the layers does not depend on the head
        model.lm_head.weight = model.model.embed_tokens.weight
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter = load(folder)
    assert_same(calibrate(model, adapter, TEXTS, tokenizer=byte_tokenizer), naive(tuned, adapter, TEXTS))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_head_and_the_embedding_are_weighed_too(model: Any, tmp_path: Path) -> None:
    adapter = load(save_tiny_lora(tmp_path / "lora", modules=("lm_head", "embed_tokens")))
    found = calibrate(model, adapter, TEXTS, tokenizer=byte_tokenizer)
    head, table = (next(t for t in adapter if t.endswith(name)) for name in ("lm_head", "embed_tokens"))
    ids = torch.tensor(list("".join(TEXTS).encode()))
    one_hot = torch.nn.functional.one_hot(ids, 256).double()
    down = adapter[table].parameters()["down"].double()
    torch.testing.assert_close(found.moment(table), down @ (one_hot.T @ one_hot / len(ids)) @ down.T)
    assert float(found.moment(head).trace()) > 0
    assert found.channels(head).shape == (16,)


def test_a_dora_is_calibrated_by_its_down_factor(model: Any, tmp_path: Path) -> None:
    folder = save_tiny_lora(tmp_path / "dora", use_dora=True)
    adapter = load(folder)
    assert_same(calibrate(model, adapter, TEXTS, tokenizer=byte_tokenizer), naive(by_peft(folder), adapter, TEXTS))


def test_what_is_no_update_of_weights_runs_bare_alone(model: Any, tmp_path: Path) -> None:
    adapter = load(save_tiny_lora(tmp_path / "alora", alora_invocation_tokens=[5, 6]))
    with pytest.raises(AdapterError, match=r"an activated LoRA .* run as it is: --bare"):
        calibrate(model, adapter, TEXTS, tokenizer=byte_tokenizer)
    assert calibrate(model, adapter, TEXTS, tokenizer=byte_tokenizer, options=Calibrate(bare=True)).tokens > 0
    wrapped = by_peft(save_tiny_lora(tmp_path / "lora"))
    with pytest.raises(AdapterError, match=r"^model\.layers\.0\.\S+: the model has no parameter for it; .*--bare"):
        calibrate(wrapped, load(tmp_path / "lora"), TEXTS, tokenizer=byte_tokenizer)


def test_weights_of_whole_numbers_are_not_added_to(adapter: Adapter) -> None:
    model = tiny_llama()
    linear = model.model.layers[0].self_attn.q_proj
    del linear.weight
    linear.weight = torch.nn.Parameter(torch.zeros(16, 16, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(AdapterError, match=r"q_proj\.weight: the model holds it as torch\.uint8; load it in 16 or 32"):
        calibrate(model, adapter, TEXTS, tokenizer=byte_tokenizer)


def test_a_module_that_the_model_lacks_is_named(adapter: Adapter) -> None:
    model = tiny_llama()
    del model.model.layers[1]
    with pytest.raises(AdapterError, match=r"^model\.layers\.1\.\S+: the model has no module"):
        calibrate(model, adapter, TEXTS, tokenizer=byte_tokenizer)


def test_a_module_of_another_width_is_named(model: Any, adapter: Adapter) -> None:
    target = "model.layers.0.mlp.down_proj"
    update = adapter[target]
    narrow = type(update).from_parameters(
        {"down": torch.ones(4, 9), "up": torch.ones(16, 4)}, scale=1.0, layout=update.layout
    )
    other = adapter.with_updates({target: narrow})
    with pytest.raises(AdapterError, match=rf"{target}\.weight is \(16, 24\) where the adapter has \(16, 9\)"):
        calibrate(model, other, TEXTS, tokenizer=byte_tokenizer)
    with pytest.raises(AdapterError, match=rf"^{target}: its module takes \(5, \d+, 24\)"):
        calibrate(model, other, TEXTS, tokenizer=byte_tokenizer, options=Calibrate(bare=True))


@pytest.mark.parametrize(
    ("texts", "tokenizer", "message"),
    [([], byte_tokenizer, "no texts"), (["", ""], byte_tokenizer, "no texts"), ("text", byte_tokenizer, "not one"),
     (TEXTS, None, "needs its tokenizer")],
)  # fmt: skip
def test_what_cannot_be_run_is_refused(model: Any, adapter: Adapter, texts: Any, tokenizer: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        calibrate(model, adapter, texts, tokenizer=tokenizer)


def test_options_are_checked() -> None:
    with pytest.raises(UsageError, match="batch must be at least 1, not 0"):
        Calibrate(batch=0)


def test_an_adapter_without_ranks_is_refused(model: Any, samples: Any) -> None:
    with pytest.raises(AdapterError, match="no LoRA or DoRA target"):
        calibrate(model, load(samples("peft/loha")), TEXTS, tokenizer=byte_tokenizer)
    with pytest.raises(AdapterError, match=r"a convolution, .*without\s--weights"):
        calibrate(model, load(samples("peft/lora_conv2d")), TEXTS, tokenizer=byte_tokenizer)


def test_a_folder_is_loaded(adapter: Adapter, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    found = calibrate(folder, adapter, ["abc", "defg"])
    loaded, tokenizer = load_model(folder)
    again = calibrate(loaded, adapter, ["abc", "defg"], tokenizer=tokenizer)
    assert found.tokens == again.tokens == 7
    for target in adapter:
        assert torch.equal(found.moment(target), again.moment(target))


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="transformers cannot load it"):
        load_model(tmp_path)


def test_without_transformers_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'loratools\[models\]'"):
        load_model(tmp_path)


def test_without_data_the_gains_of_the_norms_weigh(model: Any, adapter: Adapter, tmp_path: Path) -> None:
    found = data_free_statistics(load_base(save_tiny_model(tmp_path / "model")), adapter)
    assert found.tokens == 0
    for target in adapter:
        layer = model.model.layers[int(target.split(".")[2])]
        leaf = target.rpartition(".")[2]
        if leaf in ("q_proj", "k_proj", "v_proj"):
            gain = layer.input_layernorm.weight
        elif leaf in ("gate_proj", "up_proj"):
            gain = layer.post_attention_layernorm.weight
        else:
            gain = torch.ones(adapter[target].parameters()["down"].shape[1])
        gain = gain.detach().double()
        down = adapter[target].parameters()["down"].double()
        torch.testing.assert_close(found.channels(target), gain.square())
        torch.testing.assert_close(found.moment(target), down @ torch.diag(gain.square()) @ down.T)


def gemma_like(tmp_path: Path, norms: tuple[str, ...], model_type: str) -> Any:
    from safetensors.torch import save_file

    folder = tmp_path / model_type
    folder.mkdir()
    named = {f"model.layers.{i}.{norm}.weight": torch.full((16,), 0.5) for i in range(2) for norm in norms}
    save_file(named, folder / "model.safetensors")
    (folder / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    return load_base(folder)


def test_gemma_and_models_with_norms_after_their_blocks(adapter: Adapter, tmp_path: Path) -> None:
    sandwich = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm")
    found = data_free_statistics(gemma_like(tmp_path, sandwich, "gemma3_text"), adapter)
    assert found.channels("model.layers.1.mlp.up_proj").tolist() == [2.25] * 16
    behind = ("post_attention_layernorm", "post_feedforward_layernorm")  # OLMo 2: none is in front of anything
    with pytest.raises(AdapterError, match=r"has no norm in front of model\.layers\.0"):
        data_free_statistics(gemma_like(tmp_path, behind, "olmo2"), adapter)
