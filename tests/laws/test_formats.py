"""What every dialect promises, on the files of the real libraries and a few made here."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import bottleneck_files
import gguf
import petl_files
import pytest
import torch
import with_base_files
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from loratools.adapter import Adapter
from loratools.configs import config_beside
from loratools.errors import AdapterError, InputError, OutputError
from loratools.files import is_folder_adapter, load, locate, save
from loratools.formats import FORMATS, Format, Header, Hints, recognise
from loratools.formats.peft_methods import METHODS
from loratools.petl import open_petl
from loratools.storage import open_source
from loratools.storage.base import TensorSpec

Samples = Callable[[str], Path]

# Dialect -> its samples; loralib's files are made by `bare`.
SAMPLES: dict[str, list[str]] = {
    "peft": [
        "peft/adapter_name_infix", "peft/alora", "peft/bias_lora_only", "peft/dora", "peft/exclude_modules",
        "peft/layers_pattern", "peft/lora_all_linear", "peft/lora_bias_true", "peft/lora_conv2d",
        "peft/lora_conv_grouped", "peft/lora_embedding", "peft/lora_embedding_saved", "peft/lora_f16",
        "peft/lora_plain", "peft/modules_to_save", "peft/moe_target_parameters", "peft/old_bin",
        *(f"peft/{name}" for name in (
            "adalora", "ia3", "ln_tuning", "oft", "oft_cayley_neumann", "pvera", "shira", "trainable_tokens", "vera",
            "c3a", "fourierft", "gralora", "miss", "randlora", "road", "tinylora", "unilora_indices", "vblora",
        )),
        "peft/loha", "peft/loha_conv", "peft/lokr", "peft/lokr_big_r", "peft/lokr_conv_effective",
        "peft/rank_alpha_pattern", "peft/rslora", "peft/two_adapters_subfolder", "peft/two_adapters_subfolder/other",
    ],
    "kohya": [
        "kohya/flux_bfl/lora.safetensors", "kohya/sd15_linear_only/lora.safetensors", "kohya/sd15_pt_pickle/lora.pt",
        "kohya/sd15_unet_te/lora.safetensors",
        *(
            f"lycoris/{name}/adapter.safetensors"
            for name in (
                "boft", "full", "glora", "locon", "locon_dora", "locon_f16", "locon_norm", "locon_scalar",
                "locon_tucker", "loha", "loha_dora", "lokr", "lokr_decompose_both", "lokr_dora", "lokr_full_matrix",
                "lokr_scaled", "lokr_tucker", "oft", "oft_constraint", "tlora",
            )
        ),
        "diffusers/sd_to_kohya/pytorch_lora_weights_kohya.safetensors",
    ],
    "diffusers": [
        *(f"diffusers/{name}/pytorch_lora_weights.safetensors" for name in (
            "flux_lora", "qwen_image_tiny", "sd3_tiny", "sd_conv", "sd_unet_te", "sd_unet_te_nometa",
        )),
        "diffusers/sd_bin/pytorch_lora_weights.bin", "oldest",
    ],
    "comfy": ["comfy", "bfl"],
    "xlabs": ["xlabs"],
    "loralib": ["loralib", "matryoshka"],
    "omi": ["omi"],
    "gguf": [f"gguf/{name}/adapter.gguf" for name in (
        "gemma3", "llama_embed", "llama_f16", "llama_f32", "llama_lm_head", "llama_q8_0", "llama_rslora", "qwen2",
        "qwen3",
    )],
    "mlx": ["mlx/gemma3_text", "mlx/llama_dora", "mlx/llama_lora", "mlx/llama_lora_all"],
    "adapterhub": [
        "others/adapters_ia3", "others/adapters_lora_bert", "others/adapters_lora_gpt2",
        "others/adapters_lora_llama_full",
    ],
    "litgpt": ["others/litgpt_mha"],
    "torchtune": ["others/torchtune_lora/adapter_model.pt"],
    "petl-vit": ["lora", "lora-bihead", "adaptformer"],
    "bitdelta": ["bitdelta"],
    "loratools": ["native"],
    "bottleneck": ["adaptertune", "mosa", "mosa houlsby"],
    "qhft": ["qhft"],
    **{name: [name] for name in with_base_files.FILES},
    "lora-xs": ["lora-xs", "lora-xs-old"],
    "mosa": ["mosl"],
    "s2ft": ["s2ft"],
}  # fmt: skip
READ_ONLY = {
    "adapterhub",
    "bitdelta",
    "bottleneck",
    "hydra",
    "litgpt",
    "loldu",
    "lora-xs",
    "mosa",
    "omi",
    "petl-vit",
    "qhft",
    "s2ft",
    "salt",
    "snell",
    "torchtune",
}
CASES = [(dialect, name) for dialect, names in SAMPLES.items() for name in names]
each = pytest.mark.parametrize(("dialect", "name"), CASES, ids=[name for _, name in CASES])
WRITABLE = [case for case in CASES if case[0] not in READ_ONLY]
each_writable = pytest.mark.parametrize(("dialect", "name"), WRITABLE, ids=[name for _, name in WRITABLE])


def bare(folder: Path, name: str) -> Path:
    """Bare parameters: A (r, n) and B (m, r), or both transposed."""
    tensors = {f"layers.{i}.q.lora_A": torch.randn(3, 7 + i) for i in range(2)}
    tensors |= {f"layers.{i}.q.lora_B": torch.randn(5 + i, 3) for i in range(2)}
    if name == "matryoshka":
        tensors = {key: t.T.contiguous() for key, t in tensors.items()}
    save_file(tensors | {"head.bias": torch.randn(4)}, folder / f"{name}.safetensors", {"note": "kept"})
    return folder / f"{name}.safetensors"


def image_model(folder: Path, name: str) -> Path:
    """Files that no library at hand writes, by the rules of their readers."""

    def pair(stem: str, a: str, b: str) -> dict[str, Tensor]:
        return {f"{stem}.{a}": torch.randn(3, 7), f"{stem}.{b}": torch.randn(6, 3)}

    kohya, block = ("lora_down.weight", "lora_up.weight"), "double_blocks.0"
    tensors = {
        "oldest": pair("unet.mid_block.attn1.processor.to_q_lora", "down.weight", "up.weight")
        | pair("unet.mid_block.attn1.processor.to_out_lora", "down.weight", "up.weight"),
        "comfy": pair(f"diffusion_model.{block}.img_attn.qkv", *kohya)
        | {f"diffusion_model.{block}.img_attn.qkv.alpha": torch.tensor(2.0)}
        | pair("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1", *kohya),
        "bfl": pair(f"{block}.img_attn.qkv", "lora_A.weight", "lora_B.weight")
        | {f"{block}.img_attn.qkv.lora_B.bias": torch.randn(6)}
        | {f"{block}.img_attn.norm.query_norm.scale": torch.randn(4)},
        "xlabs": pair(f"{block}.processor.qkv_lora1", "down.weight", "up.weight")
        | pair("single_blocks.1.processor.proj_lora", "down.weight", "up.weight"),
        "omi": pair(f"transformer.{block}.img_attn.qkv.1", *kohya)
        | {f"transformer.{block}.img_attn.qkv.1.alpha": torch.tensor(2.0)}
        | pair("clip_l.text_model.encoder.layers.0.mlp.fc1", *kohya)
        | {"bundle_emb.word.clip_l": torch.randn(2, 5)},
    }[name]
    save_file(tensors, folder / f"{name}.safetensors", {"note": "kept"})
    return folder / f"{name}.safetensors"


def petl(folder: Path, name: str) -> Path:
    return petl_files.write(folder, name)[0]


def bitdelta(folder: Path, name: str) -> Path:
    """Signs of one module, factors of another, and parameters that are kept whole."""
    tensors = {
        "layers.0.q_proj.mask": torch.randint(-(2**31), 2**31 - 1, (2, 6)).to(torch.int32),
        "layers.0.q_proj.coeff": torch.nn.Parameter(torch.tensor(0.01)),
        "layers.1.q_proj.A": torch.randn(7, 2),
        "layers.1.q_proj.B": torch.randn(2, 5),
        "norm.weight": torch.ones(4),
    }
    torch.save(tensors, folder / f"{name}.bin")
    return folder / f"{name}.bin"


def native(folder: Path, name: str) -> Path:
    """Two families, a scale, a parameter by another name, settings and a tensor that two targets share."""
    half = {"unilora_indices_A": (2, 5), "unilora_indices_B": (6, 2)}
    tensors: dict[str, Tensor] = {"layers.0.q_proj.down": torch.randn(2, 7), "layers.0.q_proj.up": torch.randn(6, 2)}
    for target in ("layers.1.q_proj", "layers.2.q_proj"):
        for slot, shape in half.items():
            tensors[f"{target}.{slot}"] = torch.randint(0, 4, shape)
            tensors[f"{target}.{slot.replace('indices', 'scales')}"] = torch.rand(shape)
    tensors["shared.0.unilora_theta_d"] = torch.randn(4)
    theta = {"unilora_theta_d": "shared.0.unilora_theta_d"}
    kinds = [
        {"targets": ["layers.0.q_proj"], "shape": [6, 7], "scale": 0.25, "layout": {"magnitude_axis": 1}},
        {"targets": ["layers.1.q_proj", "layers.2.q_proj"], "shape": [6, 5], "shared": theta, "settings": {"seed": 3}},
    ]
    updates = {"version": 1, "kinds": kinds, "parameters": {"layers.0.q_proj": "layers.0.q.weight"}}
    save_file(tensors, folder / f"{name}.safetensors", {"loratools.updates": json.dumps(updates), "note": "kept"})
    return folder / f"{name}.safetensors"


def bottlenecks(folder: Path, name: str) -> Path:
    layout = bottleneck_files.LAYOUTS[name]
    return bottleneck_files.write(folder, layout, bottleneck_files.made(layout))


def qhft(folder: Path, name: str) -> Path:
    """A module of QWHA, in the layout of its authors."""
    stem = "base_model.model.layers.0.q_proj.qhft"
    tensors = {
        f"{stem}_spectrum": torch.randn(5),
        f"{stem}_indices_default": torch.randint(0, 8, (2, 5)).to(torch.int32),
        f"{stem}_scaling_default": torch.tensor(0.25),
        f"{stem}_n_frequency_default": torch.tensor(5),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "QHFT", "fan_in_fan_out": False}))
    return folder


def lora_xs(folder: Path, name: str) -> Path:
    """A folder of PEFT's with a latent mapping, spelt as current PEFT saves it, or as older PEFT did."""
    mapping = "_lora_latent_mapping.weight" if name == "lora-xs-old" else ".default_lora_latent_mapping.weight"
    tensors = {}
    for i in range(2):
        module = f"base_model.model.layers.{i}.q_proj"
        tensors |= {f"{module}.lora_A.weight": torch.randn(3, 7), f"{module}.lora_B.weight": torch.randn(5, 3)}
        tensors[module + mapping] = torch.randn(3, 3)
    (folder / name).mkdir()
    save_file(tensors, folder / name / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]}
    (folder / name / "adapter_config.json").write_text(json.dumps(config))
    return folder / name


def experts(folder: Path, name: str) -> Path:
    """Sparse experts and their mean, of LoRA on queries and outputs, or S2FT's trained rows."""
    layer = "enc.transformer.encoder.layer.0"
    stems = {
        "mosl": [
            (f"{layer}.attn.lora_{side}_{part}", s) for part in "qo" for side, s in (("A", (2, 6)), ("B", (6, 2)))
        ],
        "s2ft": [],
    }[name]
    tensors = {f"{stem}{rest}.weight": torch.randn(shape) for stem, shape in stems for rest in (".0", ".1", "_merge")}
    tensors |= (
        {"model.layers.0.mlp.down_proj.s2": torch.randn(6, 3)} if name == "s2ft" else {"head.bias": torch.ones(2)}
    )
    torch.save(tensors, folder / f"{name}.bin")
    return folder / f"{name}.bin"


@pytest.fixture
def source(samples: Samples, tmp_path: Path) -> Callable[[str], Path]:
    made = {"loralib": bare, "matryoshka": bare, "bitdelta": bitdelta, "native": native, "qhft": qhft}
    made |= dict.fromkeys(SAMPLES["bottleneck"], bottlenecks)
    made |= dict.fromkeys(with_base_files.FILES, with_base_files.write)
    made |= dict.fromkeys(SAMPLES["petl-vit"], petl) | dict.fromkeys(SAMPLES["lora-xs"], lora_xs)
    made |= dict.fromkeys([*SAMPLES["mosa"], *SAMPLES["s2ft"]], experts)
    return lambda name: samples(name) if "/" in name else made.get(name, image_model)(tmp_path, name)


def header_of(path: Path) -> Header:
    weights, config = locate(path)
    with open_petl(weights) or open_source(weights) as opened:
        fields = json.loads(config.read_text()) if config else None
        return Header(weights, opened.specs, opened.metadata, fields, partial(config_beside, weights.parent))


def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file, by the libraries that wrote it."""
    weights, _ = locate(path)
    if weights.suffix == ".gguf":
        return gguf_contents(weights)
    if weights.suffix != ".safetensors":
        loaded = torch.load(weights, weights_only=True)
        return {key: t for key, t in loaded.items() if isinstance(t, Tensor)}, {}
    with safe_open(weights, "pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118


def gguf_contents(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As llama.cpp's own package reads them, packed blocks as float32; numbers among the key-values as text."""
    reader = gguf.GGUFReader(path)
    plain = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
    tensors = {
        t.name: torch.from_numpy(
            (t.data if t.tensor_type in plain else gguf.quants.dequantize(t.data, t.tensor_type)).copy()
        ).reshape(tuple(t.shape[::-1].tolist()))
        for t in reader.tensors
    }
    return tensors, {name: str(field.contents()) for name, field in reader.fields.items() if name[:5] != "GGUF."}


def assert_same_tensors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for key, tensor in wanted.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (found[key], tensor)]
        assert torch.equal(*as_bytes), key


def test_every_dialect_has_samples() -> None:
    assert set(SAMPLES) == {f.name for f in FORMATS}
    assert {f.name for f in FORMATS if not f.writable} == READ_ONLY


def test_no_loadable_sample_is_forgotten(shared: Path) -> None:
    known = {name for names in SAMPLES.values() for name in names}
    for config in (shared / "samples" / "peft").rglob("adapter_config.json"):
        if config.parent.name != "unilora" and json.loads(config.read_text())["peft_type"] in ("LORA", *METHODS):
            assert str(config.parent.relative_to(shared / "samples")) in known
    for pattern in ("kohya/*/lora.*", "lycoris/*/adapter.*", "diffusers/*/pytorch_lora*"):
        for path in (shared / "samples").glob(pattern):
            assert str(path.relative_to(shared / "samples")) in known
    for path in (shared / "samples" / "mlx").iterdir():
        assert f"mlx/{path.name}" in known or "lora_a" not in (path / "sample.json").read_text()


@each
def test_one_dialect_recognises_it(source: Callable[[str], Path], dialect: str, name: str) -> None:
    header = header_of(source(name))
    assert [f.name for f in FORMATS if f.recognises(header)] == [dialect]
    assert recognise(header).name == dialect


def bound_to(path: Path) -> tuple[Format, Header]:
    header = header_of(path)
    return recognise(header).bind(header, Hints()), header


@each
def test_every_key_is_accounted_for_once(source: Callable[[str], Path], dialect: str, name: str) -> None:
    bound, header = bound_to(source(name))
    spelt = [key for slots in bound.keys.values() for key in slots.values()]
    scales = [key for target in bound.keys if (key := bound.scale_key(target)) is not None]
    assert sorted([*spelt, *scales, *bound.extras]) == sorted(header.specs)
    assert bound.keys or bound.unsupported or bound.replacements()
    assert not set(bound.unsupported) & set(bound.keys)


@each
def test_keys_are_spelt_as_they_were_read(source: Callable[[str], Path], dialect: str, name: str) -> None:
    bound, _ = bound_to(source(name))
    for target, slots in bound.keys.items():
        assert {slot: bound.spell(target, slot) for slot in slots} == dict(slots)


@each_writable
def test_the_scale_survives_being_stated(source: Callable[[str], Path], dialect: str, name: str) -> None:
    """What `declare` states for another rank is what a reader of it computes."""
    adapter = load(source(name))
    bound = adapter.format
    for mode in ("fold", "keep"):
        for rank in (1, 3):
            scales = {t: bound.writable_scale(t, rank, e.scale, mode) for t, e in adapter.entries.items()}
            written = {t: type(w)(rank, scales[t]) for t, w in adapter.written().items()}
            declared = bound.declare(written, adapter.metadata)
            specs = header_of(source(name)).specs
            ranked = {key: TensorSpec(spec.dtype, spec.shape) for key, spec in specs.items()}
            ranked |= {key: spec for key, (_, spec) in declared.scalars.items()}
            header = Header(Path("again"), ranked, declared.metadata, declared.config)
            if declared.config and declared.config.get("target_parameters"):
                continue  # the shapes of experts tell their number only beside the true rank; tests/ops covers them
            again = recognise(header).bind(header, Hints())
            for target, scale in scales.items():
                key = again.scale_key(target)
                alpha = declared.scalars[key][0] if key else None
                assert again.scale(target, rank, alpha) == pytest.approx(scale, rel=1e-6)


NO_UPDATES = ("adaptformer", *SAMPLES["bottleneck"], *SAMPLES["s2ft"])  # all that they hold is carried along


@pytest.mark.parametrize("name", [*NO_UPDATES, "others/adapters_pfeiffer", "others/adapters_prefix"])
def test_what_is_only_carried_along_is_written_as_it_was(
    source: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    adapter = load(source(name))
    wanted = {key: extra.read() for key, extra in adapter.extras.items()}
    config = adapter.config
    saved = save(adapter, tmp_path / "out")
    assert_same_tensors(contents(saved.weights)[0], wanted)
    assert load(saved.path).config == config
    assert load(saved.path).format.name == adapter.format.name


@pytest.mark.parametrize(
    ("dialect", "name"), [case for case in CASES if case[0] in READ_ONLY and case[1] not in NO_UPDATES]
)
def test_what_is_only_read_says_how_to_write_it(
    source: Callable[[str], Path], tmp_path: Path, dialect: str, name: str
) -> None:
    with pytest.raises(OutputError, match=r"read, not written; .* loratools convert --to peft"):
        save(load(source(name)), tmp_path / "out", force=True)
    assert not (tmp_path / "out").exists()


@each_writable
def test_load_save_load_is_bit_exact(source: Callable[[str], Path], tmp_path: Path, dialect: str, name: str) -> None:
    """Every tensor, config field and metadata entry; a pickle comes back as safetensors."""
    original = source(name)
    adapter = load(original)
    kind = adapter.format.container
    saved = save(adapter, tmp_path / "out" / "copy" if is_folder_adapter(adapter) else tmp_path / f"copy.{kind}")
    assert saved.weights.suffix == f".{kind}"
    assert saved.nbytes == saved.weights.stat().st_size
    tensors, metadata = contents(original)
    again, metadata_again = contents(saved.path)
    assert_same_tensors(again, tensors)
    assert metadata_again == metadata
    _, config = locate(original)
    assert (saved.config is None) == (config is None)
    if config and saved.config:
        assert json.loads(saved.config.read_text()) == json.loads(config.read_text())
    assert_same_adapter(load(saved.path), adapter)


def assert_same_adapter(found: Adapter, wanted: Adapter) -> None:
    assert type(found.format) is type(wanted.format)
    assert set(found) == set(wanted)
    assert found.written() == wanted.written()
    assert set(found.extras) == set(wanted.extras)
    assert dict(found.unsupported) == dict(wanted.unsupported)
    assert found.config == wanted.config
    for target, update in wanted.items():
        assert (type(found[target]), found[target].layout) == (type(update), update.layout)
        assert_same_tensors(found[target].parameters(), update.parameters())


def header(*keys: str, config: dict[str, object] | None = None) -> Header:
    return Header(Path("made-up.safetensors"), {key: TensorSpec("F32", (4, 4)) for key in keys}, {}, config)


def test_keys_of_two_dialects_are_refused() -> None:
    with pytest.raises(InputError, match=r"more than one dialect \(peft, kohya\)"):
        recognise(
            header("base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight", "lora_unet_q.lora_up.weight")
        )


def test_keys_of_none_are_listed() -> None:
    with pytest.raises(InputError, match=r"its keys begin with a\.weight, b\.weight"):
        recognise(header("a.weight", "b.weight"))
    with pytest.raises(InputError, match="holds no tensors"):
        recognise(header())


@pytest.mark.parametrize(
    ("keys", "config", "problem"),
    [
        (
            ["base_model.model.q.lora_A.weight", "base_model.model.q.lora_A.default.weight"],
            None,
            "two tensors for down",
        ),
        (["base_model.model.q.lora_C.weight"], {"peft_type": "LORA"}, "variant of LoRA"),
        (["base_model.model.q.lora_A.weight"], {"peft_type": "NONE"}, "PEFT type 'NONE'"),
        (["base_model.model.q.lora_A.weight"], {"peft_type": "LORA", "use_qalora": True}, "variant use_qalora"),
    ],
)
def test_what_peft_cannot_be_is_refused(keys: list[str], config: dict[str, object] | None, problem: str) -> None:
    found = header(*keys, config=config)
    with pytest.raises(AdapterError, match=problem):
        recognise(found).bind(found, Hints())
