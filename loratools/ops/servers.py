"""What each server and library takes, as data: a row for each thing that it refuses or silently gets wrong."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from loratools.adapter import Adapter

# `refused`: it does not load. `wrong`: it loads, and computes another delta. `old`: so in old versions alone.
Severity = Literal["refused", "wrong", "old"]
Test = Callable[["Adapter"], Iterable[str]]


@dataclass(frozen=True)
class Requirement:
    """One thing that a server asks of an adapter: why, where that is written, and what helps.

    `broken_by` names the targets, keys or settings that do not meet it, none for an adapter that does.
    """

    name: str
    severity: Severity
    reason: str
    source: str
    fix: str
    broken_by: Test


@dataclass(frozen=True)
class Server:
    """A server or library: the dialect that it reads, its requirements, and whether it wants one rank and scale 1.

    `max_ranks`: the values that its setting for the largest rank may have, where there is such a setting. `memory`:
    what an adapter takes of its memory, where `loratools hub plan` counts that.
    """

    title: str
    dialect: str
    requirements: tuple[Requirement, ...]
    portable: bool = False
    max_ranks: tuple[int, ...] = ()
    max_rank_setting: str = ""
    memory: str = ""


def _dialect(*names: str) -> Test:
    return lambda a: () if a.format.name in names else (a.format.name,)


def _families(*names: str) -> Test:
    return lambda a: (f"{t} ({e.family.family})" for t, e in a.entries.items() if e.family.family not in names)


def _families_are(*names: str) -> Test:
    return lambda a: (t for t, e in a.entries.items() if e.family.family in names)


def _rank_above(limit: int) -> Test:
    return lambda a: (f"{t} (rank {e.rank})" for t, e in a.entries.items() if e.rank > limit)


def _slot(*names: str) -> Test:
    return lambda a: (t for t, e in a.entries.items() if set(names) & set(e.specs))


def _no_config(a: Adapter) -> Iterable[str]:
    return ("adapter_config.json",) if a.config is None else ()


def _mixed_ranks(a: Adapter) -> Iterable[str]:
    largest = max((e.rank for e in a.entries.values()), default=0)
    return (f"{t} (rank {e.rank} of {largest})" for t, e in a.entries.items() if e.rank != largest)


def _patterns(a: Adapter) -> Iterable[str]:
    config = a.config or {}
    return (f"{field}: {key}" for field in ("rank_pattern", "alpha_pattern") for key in config.get(field) or {})


def _unequal(a: Adapter) -> Iterable[str]:
    return (*_mixed_ranks(a), *_patterns(a))


def _rslora(a: Adapter) -> Iterable[str]:
    return ("use_rslora",) if (a.config or {}).get("use_rslora") else ()


def _mixed_alphas(a: Adapter) -> Iterable[str]:
    """Targets whose alpha is not that of the first: a GGUF file has one place for it."""
    alphas = {t: e.scale * e.rank for t, e in a.entries.items()}
    first = next(iter(alphas.values()), 0.0)
    return (t for t, alpha in alphas.items() if abs(alpha - first) > 1e-6 * abs(first))


def _extras(a: Adapter) -> Iterable[str]:
    return a.loose_extras


def _trained_biases(a: Adapter) -> Iterable[str]:
    kind = (a.config or {}).get("bias", "none")
    return (f"bias: {kind}",) if kind not in (None, "none") else ()


def _convolutions(a: Adapter) -> Iterable[str]:
    return (t for t, e in a.entries.items() if any(len(s.shape) > 2 for s in e.specs.values()) and e.layout.experts < 2)


def _experts(a: Adapter) -> Iterable[str]:
    return (t for t, e in a.entries.items() if e.layout.experts > 1)


def _embeddings(a: Adapter) -> Iterable[str]:
    return (t for t, e in a.entries.items() if e.layout.embedding)


def _mutated(a: Adapter) -> Iterable[str]:
    init = a.format.mutated_init
    return () if init is None else (f"init_lora_weights: {init}",)


def _incomplete_qkv(a: Adapter) -> Iterable[str]:
    """Targets of attention blocks of which q, k and v are not all there."""
    blocks: dict[str, set[str]] = {}
    for target in a.entries:
        block, _, leaf = target.rpartition(".")
        if leaf in _QKV:
            blocks.setdefault(block, set()).add(leaf)
    return (f"{b}.{leaf}" for b, found in blocks.items() for leaf in sorted(_QKV - found))


def outside_attention(targets: Iterable[str]) -> Iterable[str]:
    """Those that are not q, k, v or o of the attention of a numbered layer."""
    return (t for t in targets if not _ATTENTION.fullmatch(t))


def not_square(shapes: Mapping[str, tuple[int, ...]]) -> Iterable[str]:
    """Targets whose inputs or outputs are not as many as most have."""
    sides = Counter(side for shape in shapes.values() for side in shape)
    hidden = sides.most_common(1)[0][0] if sides else 0
    return (f"{t} ({' x '.join(map(str, shape))})" for t, shape in shapes.items() if set(shape) != {hidden})


def missing_projections(targets: Iterable[str]) -> Iterable[str]:
    """Projections of attention that are not there, of every layer up to the last that has any."""
    found: dict[tuple[str, str], dict[int, set[str]]] = {}
    for match in filter(None, map(_ATTENTION.fullmatch, targets)):
        found.setdefault((match[1], match[3]), {}).setdefault(int(match[2]), set()).add(match[4])
    return (
        f"{before}{layer}{after}{leaf}"
        for (before, after), layers in found.items()
        for layer in range(max(layers) + 1)
        for leaf in sorted(SLORA_MODULES - layers.get(layer, set()))
    )


_QKV = frozenset({"q_proj", "k_proj", "v_proj"})
SLORA_MODULES: Final = frozenset({*_QKV, "o_proj"})
_ATTENTION: Final = re.compile(r"(.*\blayers\.)(\d{1,4})(\.self_attn\.)([qkvo]_proj)")
_MAX_VLLM: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)

_PORTABLE = "loratools convert --to peft --portable (or check --fix)"
_TO_LORA = "loratools convert --to peft --exact, or --rank N where there is no exact form"
_DORA = "loratools fuse and serve the fused model, or loratools extract --rank N from it"
_FUSE = "loratools fuse and serve the fused model"
_DROP = "pass --drop extras to leave them out, which changes the model; or loratools fuse and serve that"


def _peft_file(source: str) -> tuple[Requirement, ...]:
    return (
        Requirement(
            "peft-dialect",
            "refused",
            "it reads the keys of PEFT alone",
            source,
            "loratools convert --to peft (or check --fix)",
            _dialect("peft"),
        ),
        Requirement(
            "config",
            "refused",
            "it takes rank and alpha from adapter_config.json",
            source,
            "put adapter_config.json beside the weights, or loratools convert --to peft --alpha A",
            _no_config,
        ),
    )


def _no_convolutions(source: str) -> Requirement:
    return Requirement("no-convolutions", "refused", "it serves matrices alone", source, _FUSE, _convolutions)


def _no_expert_stacks(source: str) -> Requirement:
    reason = "it has no LoRA on the stacked weights of experts"
    return Requirement("no-expert-stacks", "refused", reason, source, _FUSE, _experts)


def _one_rank(
    source: str,
    severity: Severity = "wrong",
    reason: str = "it reads r alone; rank_pattern and alpha_pattern are ignored",
) -> Requirement:
    return Requirement("one-rank", severity, reason, source, _PORTABLE, _unequal)


def _plain_lora(source: str) -> tuple[Requirement, ...]:
    return (
        Requirement("only-lora", "refused", "it knows LoRA alone", source, _TO_LORA, _families("lora", "dora")),
        Requirement("no-dora", "refused", "it has no magnitudes", source, _DORA, _families_are("dora")),
        Requirement(
            "no-lora-bias",
            "refused",
            "it has no place for a bias of lora_B",
            source,
            "loratools convert --to peft --drop bias, which changes the model",
            _slot("up_bias"),
        ),
        Requirement(
            "no-trained-biases",
            "refused",
            "biases of the base model stay as they are",
            source,
            _FUSE,
            _trained_biases,
        ),
        Requirement(
            "no-other-tensors", "refused", "it loads pairs of factors and no whole parameters", source, _DROP, _extras
        ),
        _no_convolutions(source),
        Requirement(
            "original-base",
            "wrong",
            "it serves the original base, which this initialisation changed",
            source,
            "loratools squeeze --initial-adapter with the saved initial factors, or load with PEFT",
            _mutated,
        ),
    )


_VLLM = "vllm/lora/peft_helper.py, vllm/lora/lora_model.py, vllm/config/lora.py"
_SGLANG = "sglang/srt/lora/lora_config.py, sglang/srt/lora/lora.py"
_SLORA = "slora/models/peft/lora_adapter.py, slora/models/peft/layer_weights"
_SLORA_POOL = "slora/common/mem_allocator.py, slora/server/router/model_infer/infer_adapter.py"
_LLAMACPP = "llama.cpp src/llama-adapter.cpp, convert_lora_to_gguf.py"
_PEFT = "peft/tuners/lora/model.py, peft/utils/save_and_load.py"
_DIFFUSERS = "diffusers/loaders/lora_base.py, diffusers/loaders/lora_conversion_utils.py"
_COMFY = "comfy/lora.py, comfy/weight_adapter"

SERVERS: Final[Mapping[str, Server]] = {
    "vllm": Server(
        "vLLM",
        "peft",
        (
            *_peft_file(_VLLM),
            *_plain_lora(_VLLM),
            _one_rank(_VLLM),
            Requirement(
                "rank-at-most-512",
                "refused",
                "max_lora_rank ends at 512",
                _VLLM,
                "loratools squeeze --rank 512",
                _rank_above(512),
            ),
            _no_expert_stacks(_VLLM),
        ),
        portable=True,
        max_ranks=_MAX_VLLM,
        max_rank_setting="--max-lora-rank",
        memory=(
            "Every one of `--max-loras` slots is set aside at the start, for `--max-lora-rank` R: R (inputs + outputs) "
            "numbers for each module, zeros where an adapter has less. `--max-cpu-loras` keeps further adapters in "
            "host memory, at their own ranks."
        ),
    ),
    "sglang": Server(
        "SGLang",
        "peft",
        (
            *_peft_file(_SGLANG),
            *_plain_lora(_SGLANG),
            _one_rank(_SGLANG, "old", "old versions read r and lora_alpha alone, and ignore both patterns"),
            Requirement(
                "no-rslora",
                "old",
                "old versions scale by alpha / r whatever use_rslora says",
                _SGLANG,
                _PORTABLE,
                _rslora,
            ),
            Requirement(
                "qkv-together",
                "old",
                "old versions stack q, k and v and fail where one is missing",
                _SGLANG,
                "train q_proj, k_proj and v_proj, or use a newer version",
                _incomplete_qkv,
            ),
            _no_expert_stacks(_SGLANG),
        ),
        portable=True,
    ),
    "slora": Server(
        "S-LoRA",
        "peft",
        (
            *_peft_file(_SLORA),
            *_plain_lora(_SLORA),
            Requirement(
                "attention-only",
                "wrong",
                "it applies LoRA to q, k, v and o of the attention and to nothing else",
                _SLORA,
                _FUSE,
                lambda a: outside_attention(a.entries),
            ),
            Requirement(
                "square",
                "refused",
                "its pool has rows of the hidden size alone, so that k and v of grouped queries have no place",
                _SLORA_POOL,
                _FUSE,
                lambda a: not_square({t: e.base_shape for t, e in a.entries.items() if e.base_shape is not None}),
            ),
            Requirement(
                "all-projections",
                "refused",
                "it stacks q, k, v and o of every layer, and fails where one is missing",
                _SLORA,
                "train q_proj, k_proj, v_proj and o_proj in all layers, or loratools fuse and serve the fused model",
                lambda a: missing_projections(a.entries),
            ),
            _one_rank(_SLORA),
            Requirement(
                "no-rslora", "wrong", "it scales by alpha / r whatever use_rslora says", _SLORA, _PORTABLE, _rslora
            ),
        ),
        portable=True,
        memory=(
            "An adapter of rank r takes 4 r cells of a pool that it shares with the cache of keys and values. A cell "
            "is a vector of hidden numbers for each layer in both buffers, the room of one token: 16 x layers x r x "
            "hidden bytes in all, at any rank and in any place, without padding. Ranks of a batch are padded to the "
            "largest."
        ),
    ),
    "llamacpp": Server(
        "llama.cpp",
        "gguf",
        (
            Requirement(
                "gguf-dialect",
                "refused",
                "it loads GGUF files alone",
                _LLAMACPP,
                "loratools convert --to gguf --base CONFIG_OR_DIR (or check --fix --base CONFIG_OR_DIR)",
                _dialect("gguf"),
            ),
            Requirement("only-lora", "refused", "it knows LoRA alone", _LLAMACPP, _TO_LORA, _families("lora", "dora")),
            Requirement("no-dora", "refused", "it has no magnitudes", _LLAMACPP, _DORA, _families_are("dora")),
            Requirement(
                "one-alpha",
                "wrong",
                "a file states one alpha; the converter of llama.cpp drops rsLoRA and alpha_pattern",
                _LLAMACPP,
                "loratools convert --to gguf, which multiplies what differs into the factors",
                lambda a: _mixed_alphas(a) if a.format.name != "gguf" else (),
            ),
            Requirement(
                "no-lora-bias",
                "refused",
                "it has no place for a bias of lora_B",
                _LLAMACPP,
                "loratools convert --to gguf --drop bias, which changes the model",
                _slot("up_bias"),
            ),
            Requirement(
                "no-other-tensors",
                "refused",
                "a file holds pairs of factors and nothing else",
                _LLAMACPP,
                _DROP,
                _extras,
            ),
            _no_convolutions(_LLAMACPP),
            Requirement(
                "original-base",
                "wrong",
                "it serves the original base, which this initialisation changed",
                _LLAMACPP,
                "loratools squeeze --initial-adapter with the saved initial factors",
                _mutated,
            ),
        ),
    ),
    "peft": Server(
        "PEFT",
        "peft",
        (
            *_peft_file(_PEFT),
            Requirement(
                "known-method",
                "refused",
                "it has no PaCA, which is a fork's",
                "peft/utils/peft_types.py",
                "loratools convert --to peft --exact --base MODEL, as the LoRA that it is",
                _families_are("paca"),
            ),
        ),
    ),
    "diffusers": Server(
        "diffusers",
        "diffusers",
        (
            Requirement(
                "diffusers-dialect",
                "wrong",
                "it converts other dialects itself and leaves out keys that it does not know",
                _DIFFUSERS,
                "loratools convert --to diffusers (or check --fix)",
                _dialect("diffusers"),
            ),
            Requirement(
                "only-lora",
                "refused",
                "it knows LoRA and DoRA alone",
                _DIFFUSERS,
                "loratools convert --to diffusers --exact, or --rank N where there is no exact form",
                _families("lora", "dora"),
            ),
            Requirement(
                "no-mid",
                "refused",
                "it has no place for a Tucker core",
                _DIFFUSERS,
                "loratools convert --to diffusers --exact multiplies the core into the down factor",
                _slot("mid"),
            ),
        ),
    ),
    "comfy": Server(
        "ComfyUI",
        "comfy",
        (
            Requirement(
                "known-dialect",
                "refused",
                "it reads its own names, kohya's, those of diffusers, OneTrainer's and XLabs'",
                _COMFY,
                "loratools convert --to comfy (or check --fix)",
                _dialect("comfy", "kohya", "diffusers", "omi", "xlabs"),
            ),
            Requirement(
                "known-family",
                "refused",
                "its weight adapters are LoRA, DoRA, LoHa, LoKr, OFT, BOFT, GLoRA and whole differences",
                _COMFY,
                "loratools convert --to comfy --exact, or --rank N where there is no exact form",
                _families(
                    "lora", "dora", "loha", "doha", "lokr", "dokr", "oft_lycoris", "boft_lycoris", "glora", "full"
                ),
            ),
            Requirement(
                "no-embeddings",
                "wrong",
                "it multiplies pairs as matrices, and has no lookup",
                _COMFY,
                "loratools fuse",
                _embeddings,
            ),
        ),
    ),
}
