"""llama.cpp itself loads what a conversion wrote, and its probabilities are those of PEFT."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

if not os.environ.get("CI"):  # where they must be installed, their absence is an error
    for name in ("xllamacpp", "peft", "transformers"):
        pytest.importorskip(name, reason="runs llama.cpp: pip install 'loratools[oracle]'")

import peft
import transformers
import xllamacpp

from loratools.base_weights import load_base
from loratools.files import load
from loratools.ops.convert import Convert, convert_file

Samples = Callable[[str], Path]
# The relative error that a model of this architecture has in llama.cpp without any adapter, rounded up.
BASES = {
    "llama_f32": 1e-6,
    "llama_embed": 1e-6,
    "llama_lm_head": 1e-6,
    "llama_rslora": 1e-6,
    "qwen2": 1e-6,
    "qwen3": 1e-6,
    "gemma3": 5e-4,
}
PROMPT = [3, 17, 42, 9, 28, 51, 6, 33]


@contextmanager
def served(base: Path, adapter: Path | None) -> Iterator[Any]:
    """llama.cpp in this process, in float32 throughout."""
    settings = xllamacpp.CommonParams()
    settings.model.path = str(base)
    settings.n_ctx = 64
    settings.n_gpu_layers = 0
    settings.warmup = False
    settings.verbosity = -1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = str(adapter), 1.0
        settings.lora_adapters = [lora]
    yield xllamacpp.Server(settings)


def llama_cpp(base: Path, adapter: Path | None, prompt: list[int], vocabulary: int) -> Tensor:
    """Log-probabilities after every prefix of the prompt, (positions, vocabulary)."""
    found = torch.full((len(prompt), vocabulary), torch.nan, dtype=torch.float64)
    with served(base, adapter) as server:
        for position in range(len(prompt)):
            answer = server.handle_completions(
                {"prompt": prompt[: position + 1], "max_tokens": 1, "n_probs": vocabulary, "cache_prompt": False}
            )
            answer = json.loads(answer) if isinstance(answer, str) else answer
            for one in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
                found[position, one["id"]] = one["logprob"]
    return found


def transformers_with(sample: Path, adapter: Path | None) -> Tensor:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        sample, gguf_file="base-f32.gguf", dtype=torch.float32, attn_implementation="eager"
    )
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        logits = model.eval()(torch.tensor([PROMPT])).logits[0]
    return torch.log_softmax(logits.double(), dim=-1)


def distance(a: Tensor, b: Tensor) -> float:
    known = ~torch.isnan(a)
    assert known.double().mean() > 0.9
    return float((a - b)[known].norm() / b[known].norm())


def written(sample: Path, adapter: Path, out: Path, **options: Any) -> Path:
    base = load_base(sample / "base_hf")
    return convert_file(load(adapter, base=base), out, "gguf", Convert(base=base, **options))[0].path


@pytest.mark.parametrize("name", BASES)
def test_llama_cpp_computes_what_peft_did(samples: Samples, tmp_path: Path, name: str) -> None:
    """The sample holds the logits of PEFT on the model that the GGUF base was made from."""
    sample = samples(f"gguf/{name}")
    stored = load_file(sample / "reference_logits.safetensors")
    wanted, without = (torch.log_softmax(stored[f"logits_{x}"].double(), dim=-1) for x in ("lora", "base"))
    prompt = stored["input_ids"][0].tolist()
    found = llama_cpp(sample / "base-f32.gguf", written(sample, sample / "peft", tmp_path / "a.gguf"), prompt, 64)
    assert distance(found, wanted) < BASES[name]
    assert distance(without, wanted) > 50 * BASES[name]  # the adapter does something


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_alphas_of_their_own(samples: Samples, tmp_path: Path, rslora: bool) -> None:
    """llama.cpp's own converter drops both; a file has one alpha."""
    sample = samples("gguf/llama_f32")
    changed = tmp_path / "peft"
    shutil.copytree(sample / "peft", changed)
    config = json.loads((changed / "adapter_config.json").read_text())
    config |= {"alpha_pattern": {"q_proj": 3, "down_proj": 30}, "use_rslora": rslora}
    (changed / "adapter_config.json").write_text(json.dumps(config))
    wanted, without = transformers_with(sample, changed), transformers_with(sample, None)
    found = llama_cpp(sample / "base-f32.gguf", written(sample, changed, tmp_path / "a.gguf"), PROMPT, 64)
    assert distance(found, wanted) < 1e-6
    assert distance(without, wanted) > 0.02


@pytest.mark.parametrize(("dtype", "bound"), [("f16", 1e-4), ("bf16", 1e-3), ("q8_0", 1e-3)])
def test_rounded_factors(samples: Samples, tmp_path: Path, dtype: Any, bound: float) -> None:
    sample = samples("gguf/llama_q8_0")  # whose rows are whole blocks
    wanted, without = transformers_with(sample, sample / "peft"), transformers_with(sample, None)
    place = written(sample, sample / "peft", tmp_path / "a.gguf", dtype=dtype)
    found = llama_cpp(sample / "base-f32.gguf", place, PROMPT, wanted.shape[1])
    error = distance(found, wanted)
    assert error < bound
    assert distance(without, wanted) > 3 * error
