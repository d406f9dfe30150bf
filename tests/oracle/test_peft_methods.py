"""PEFT merges its other methods, options off their defaults included, exactly as loratools decodes them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pywt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

if not os.environ.get("CI"):  # where it must be installed, its absence is an error
    pytest.importorskip("peft", reason="compares with PEFT: pip install 'loratools[oracle]'")
    pytest.importorskip("transformers", reason="compares with PEFT: pip install 'loratools[oracle]'")

import peft
import transformers
from transformers.pytorch_utils import Conv1D

import loratools
from loratools.errors import AdapterError, InputError, NeedsBaseError, UnsupportedInTargetError
from loratools.families.random_places import drawn
from loratools.formats.method_settings import wavelet_settings
from loratools.ops.reparameterize import Reparameterize, reparameterize

# PEFT announces what it adjusts: block sizes, fan_in_fan_out, projections that it draws again.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Net(nn.Module):
    """Layers of every kind that these methods train; each is probed by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(24, 16)
        self.tall = nn.Linear(16, 32, bias=False)
        self.fused = Conv1D(20, 16)
        self.square = nn.Conv2d(4, 6, 2)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2)
        self.norm = nn.LayerNorm(16)
        self.table = nn.Embedding(30, 12)
        nn.init.normal_(self.fused.bias)  # zero otherwise

    def forward(self, x: Tensor) -> Tensor:
        return self.tall(self.wide(x))


def llama() -> nn.Module:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, **sizes))


@dataclass(frozen=True)
class Case:
    config: Callable[..., peft.PeftConfig]
    options: dict[str, Any]
    model: Callable[[], nn.Module] = Net
    spread: float = 0.3  # of the random parameters
    around: float = 0.0


LINEAR = ["wide", "tall"]
MASKS = {"wide.lora_E": [True, False, True, True], "tall.lora_E": [False, True, False, False]}
ADALORA = {"target_modules": LINEAR, "init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 10}
VBLORA = {"target_modules": LINEAR, "r": 3, "num_vectors": 11, "vector_length": 8, "topk": 2}
RANDLORA = {"target_modules": LINEAR, "r": 5, "randlora_alpha": 7}
BLOCK = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IA3 = {"around": 1.0}
CASES = {
    "adalora": Case(peft.AdaLoraConfig, ADALORA),
    "adalora, pruned": Case(peft.AdaLoraConfig, ADALORA | {"rank_pattern": MASKS}),
    "adalora, no alpha": Case(peft.AdaLoraConfig, ADALORA | {"lora_alpha": 0}),
    "adalora, pruned, no alpha": Case(peft.AdaLoraConfig, ADALORA | {"rank_pattern": MASKS, "lora_alpha": 0}),
    "adalora, convolution": Case(peft.AdaLoraConfig, ADALORA | {"target_modules": ["square"]}),
    "vera": Case(peft.VeraConfig, {"target_modules": LINEAR, "r": 5, "projection_prng_key": 7}),
    "vera, Conv1D": Case(peft.VeraConfig, {"target_modules": ["fused"], "r": 3}),
    "vera, projections not saved": Case(
        peft.VeraConfig, {"target_modules": LINEAR, "r": 5, "projection_prng_key": 11, "save_projection": False}
    ),
    "pvera": Case(peft.PveraConfig, {"target_modules": LINEAR, "r": 4}),
    "pvera, projections not saved": Case(
        peft.PveraConfig, {"target_modules": LINEAR, "r": 4, "projection_prng_key": 3, "save_projection": False}
    ),
    "ia3": Case(peft.IA3Config, {"target_modules": LINEAR, "feedforward_modules": ["tall"]}, **IA3),
    "ia3, feed-forward by expression": Case(
        peft.IA3Config, {"target_modules": LINEAR, "feedforward_modules": "t.ll"}, **IA3
    ),
    "ia3, Conv1D": Case(peft.IA3Config, {"target_modules": ["fused"], "feedforward_modules": []}, **IA3),
    "ia3, Conv1D, feed-forward": Case(
        peft.IA3Config, {"target_modules": ["fused"], "feedforward_modules": ["fused"]}, **IA3
    ),
    "ia3, convolutions": Case(
        peft.IA3Config, {"target_modules": ["square", "grouped"], "feedforward_modules": []}, **IA3
    ),
    "ia3, convolutions, feed-forward": Case(
        peft.IA3Config, {"target_modules": ["square", "grouped"], "feedforward_modules": ["square", "grouped"]}, **IA3
    ),
    **{
        f"oft, {name}": Case(peft.OFTConfig, {"target_modules": LINEAR, "r": 0, "oft_block_size": 8} | options)
        for name, options in {
            "exact": {"use_cayley_neumann": False},
            **{f"{n} terms": {"use_cayley_neumann": True, "num_cayley_neumann_terms": n} for n in (2, 3, 4, 5, 7)},
            "constrained": {"use_cayley_neumann": False, "coft": True, "eps": 0.4},
            "constrained, series": {"use_cayley_neumann": True, "coft": True, "eps": 0.2},
            "shared": {"use_cayley_neumann": False, "block_share": True},
            "shared, constrained": {"use_cayley_neumann": False, "block_share": True, "coft": True, "eps": 0.3},
            "other blocks": {"use_cayley_neumann": False, "r": 4, "oft_block_size": 0},
            "blocks adjusted": {"use_cayley_neumann": False, "oft_block_size": 5},
            "convolution": {"use_cayley_neumann": False, "target_modules": ["square"]},
            "embedding": {"use_cayley_neumann": False, "target_modules": ["table"], "oft_block_size": 4},
        }.items()
    },
    "boft": Case(peft.BOFTConfig, {"target_modules": LINEAR, "boft_block_size": 4, "boft_n_butterfly_factor": 1}),
    "boft, blocks": Case(peft.BOFTConfig, {"target_modules": LINEAR, "boft_block_size": 0, "boft_block_num": 4}),
    "boft, 2 factors": Case(
        peft.BOFTConfig, {"target_modules": LINEAR, "boft_block_size": 4, "boft_n_butterfly_factor": 2}
    ),
    "boft, 3 factors": Case(
        peft.BOFTConfig, {"target_modules": LINEAR, "boft_block_size": 2, "boft_n_butterfly_factor": 3}
    ),
    "boft, convolution": Case(
        peft.BOFTConfig, {"target_modules": ["square"], "boft_block_size": 4, "boft_n_butterfly_factor": 2}
    ),
    "hra": Case(peft.HRAConfig, {"target_modules": LINEAR, "r": 5, "apply_GS": False}),
    "hra, orthogonal": Case(peft.HRAConfig, {"target_modules": LINEAR, "r": 5, "apply_GS": True}),
    "hra, convolution": Case(peft.HRAConfig, {"target_modules": ["square"], "r": 4}),
    "shira": Case(peft.ShiraConfig, {"target_modules": LINEAR, "r": 2, "random_seed": 5}),
    "c3a": Case(peft.C3AConfig, {"target_modules": LINEAR, "block_size": 8}),
    "c3a, a block size of its own": Case(
        peft.C3AConfig, {"target_modules": LINEAR, "block_size": 8, "block_size_pattern": {"tall": 4}}
    ),
    "delora": Case(peft.DeloraConfig, {"target_modules": LINEAR, "r": 3}),
    "delora, ranks of their own": Case(
        peft.DeloraConfig, {"target_modules": LINEAR, "r": 3, "rank_pattern": {"tall": 5}}
    ),
    "gralora": Case(peft.GraloraConfig, {"target_modules": LINEAR, "r": 4, "gralora_k": 2, "alpha": 6}),
    "gralora, hybrid": Case(
        peft.GraloraConfig, {"target_modules": LINEAR, "r": 8, "gralora_k": 4, "alpha": 6, "hybrid_r": 3}
    ),
    "gralora, Conv1D": Case(
        peft.GraloraConfig, {"target_modules": ["fused"], "r": 4, "gralora_k": 2, "fan_in_fan_out": True}
    ),
    "hira": Case(peft.HiraConfig, {"target_modules": LINEAR, "r": 3}),
    "hira, Conv1D": Case(peft.HiraConfig, {"target_modules": ["fused"], "r": 3, "fan_in_fan_out": True}),
    "hira, convolution": Case(peft.HiraConfig, {"target_modules": ["square"], "r": 3}),
    "hira, embedding": Case(peft.HiraConfig, {"target_modules": ["table"], "r": 3}),
    "miss": Case(peft.MissConfig, {"target_modules": LINEAR, "r": 4}),
    "miss, a rank that does not divide": Case(peft.MissConfig, {"target_modules": LINEAR, "r": 5}),
    "miss, mini": Case(peft.MissConfig, {"target_modules": LINEAR, "r": 4, "init_weights": "mini", "mini_r": 8}),
    "miss, bat": Case(peft.MissConfig, {"target_modules": LINEAR, "r": 8, "init_weights": "bat"}),
    "road, 1": Case(peft.RoadConfig, {"target_modules": LINEAR, "variant": "road_1", "group_size": 8}),
    "road, 2": Case(peft.RoadConfig, {"target_modules": LINEAR, "variant": "road_2", "group_size": 4}),
    "road, 4": Case(peft.RoadConfig, {"target_modules": LINEAR, "variant": "road_4", "group_size": 16}),
    "fourierft": Case(peft.FourierFTConfig, {"target_modules": LINEAR, "n_frequency": 30, "scaling": 40.0}),
    "fourierft, Conv1D": Case(
        peft.FourierFTConfig,
        {"target_modules": ["fused"], "n_frequency": 17, "random_loc_seed": 5, "fan_in_fan_out": True},
    ),
    "fourierft, counts of their own": Case(
        peft.FourierFTConfig, {"target_modules": LINEAR, "n_frequency": 30, "n_frequency_pattern": {"tall": 7}}
    ),
    **{
        f"waveft, {name}": Case(peft.WaveFTConfig, {"target_modules": LINEAR, "n_frequency": 40} | options)
        for name, options in {
            "db1": {},
            "db2": {"wavelet_family": "db2", "random_loc_seed": 3},
            "db7": {"wavelet_family": "db7", "scaling": 3.0},
            "sym5": {"wavelet_family": "sym5"},
            "coif2": {"wavelet_family": "coif2"},
            "coif3": {"wavelet_family": "coif3"},
            "db10": {"wavelet_family": "db10"},
            "sym10": {"wavelet_family": "sym10"},
            "no transform": {"use_idwt": False},
            "a share of the parameters": {"proportional_parameters": True},
            "Conv1D": {"target_modules": ["fused"], "fan_in_fan_out": True, "wavelet_family": "db3"},
        }.items()
    },
    "vblora": Case(peft.VBLoRAConfig, VBLORA),
    "vblora, three of each": Case(peft.VBLoRAConfig, VBLORA | {"topk": 3}),
    "vblora, largest alone": Case(peft.VBLoRAConfig, VBLORA | {"topk": 3, "save_only_topk_weights": True}),
    "vblora, Conv1D": Case(
        peft.VBLoRAConfig,
        VBLORA | {"target_modules": ["fused"], "vector_length": 4, "fan_in_fan_out": True},
    ),
    "randlora": Case(peft.RandLoraConfig, RANDLORA),
    "randlora, one shape": Case(peft.RandLoraConfig, RANDLORA | {"target_modules": ["wide"]}),
    "randlora, Conv1D": Case(peft.RandLoraConfig, RANDLORA | {"target_modules": ["fused"], "fan_in_fan_out": True}),
    **{
        f"randlora, {name}projections not saved": Case(
            peft.RandLoraConfig, RANDLORA | {"save_projection": False, "projection_prng_key": 3} | options
        )
        for name, options in {"": {}, "sparse ": {"sparse": True}, "very sparse ": {"very_sparse": True}}.items()
    },
    "tinylora": Case(peft.TinyLoraConfig, {"target_modules": ["tall"], "r": 3, "u": 7}),
    "tinylora, one vector": Case(peft.TinyLoraConfig, {"target_modules": LINEAR, "weight_tying": 1.0, "u": 7}),
    "tinylora, Conv1D": Case(peft.TinyLoraConfig, {"target_modules": ["fused"], "fan_in_fan_out": True, "u": 5}),
    **{
        f"tinylora, {name}": Case(
            peft.TinyLoraConfig,
            {"target_modules": BLOCK, "u": 5, "save_projection": saved, "weight_tying": tied},
            llama,
        )
        for name, saved, tied in (("a block", True, 0.0), ("tied", True, 0.5), ("projections not saved", False, 0.3))
    },
    "unilora": Case(peft.UniLoraConfig, {"target_modules": LINEAR, "r": 3, "theta_d_length": 50, "save_indices": True}),
    "norms": Case(peft.LNTuningConfig, {"target_modules": ["norm"]}),
    "tokens": Case(peft.TrainableTokensConfig, {"target_modules": ["table"], "token_indices": [29, 3, 11]}),
    "lora and tokens": Case(
        peft.LoraConfig,
        {"target_modules": ["q_proj"], "r": 4, "lora_alpha": 6, "trainable_token_indices": [5, 0, 39]},
        llama,
    ),
    "lora and tokens by table": Case(
        peft.LoraConfig,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 0], "lm_head": [7]}},
        llama,
    ),
}
each = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def _butterflies_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT has more than one factor only with its CUDA kernel, which makes block-diagonal matrices of blocks."""

    def block_diagonal(batch: Tensor) -> Tensor:
        return torch.stack([torch.block_diag(*blocks) for blocks in batch])

    monkeypatch.setattr(peft.tuners.boft.layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(peft.tuners.boft.layer, "FastBlockDiag", SimpleNamespace(apply=block_diagonal))


def fresh(case: Case, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return case.model().to(dtype)


def trained(case: Case, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """An adapter as PEFT saves it, with random parameters, beside its base model."""
    save_file({k: t.clone() for k, t in fresh(case, dtype).state_dict().items()}, folder / "model.safetensors")
    model = peft.get_peft_model(fresh(case, dtype), case.config(**case.options))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = case.around + case.spread * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder / "adapter"


def wrapped(case: Case, folder: Path, dtype: torch.dtype = torch.float32) -> peft.PeftModel:
    return peft.PeftModel.from_pretrained(fresh(case, dtype), folder).double().eval()


def merged(case: Case, folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What PEFT changes of each parameter of the base, in float64."""
    base = {key: t.double() for key, t in fresh(case, dtype).state_dict().items()}
    state = wrapped(case, folder, dtype).merge_and_unload(safe_merge=True).state_dict()
    assert state.keys() == base.keys()
    changes = {key: state[key] - base[key] for key in base}
    return {key: change for key, change in changes.items() if change.any()}


def ours(folder: Path) -> dict[str, Tensor]:
    base = loratools.load_base(folder.parent / "model.safetensors")
    return dict(loratools.delta(loratools.load(folder, base=base), base=base))


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert wanted
    assert found.keys() == wanted.keys()
    for key, delta in wanted.items():
        assert found[key].shape == delta.shape
        assert float((found[key] - delta).norm()) <= 3e-7 * float(delta.norm()), key


@each
def test_peft_merges_what_we_decode(tmp_path: Path, name: str) -> None:
    folder = trained(CASES[name], tmp_path)
    assert_equal(ours(folder), merged(CASES[name], folder))


@pytest.mark.parametrize("name", ["randlora", "randlora, Conv1D"])
def test_peft_needs_no_copies_of_the_projections(tmp_path: Path, name: str) -> None:
    folder = trained(CASES[name], tmp_path)
    adapter = loratools.load(folder)
    saved, report = loratools.convert_file(adapter, tmp_path / "slim", "peft")
    copies = {key for key in adapter.extras if not key.startswith(("base_model.randlora", "base_model.model.randlora"))}
    assert copies
    assert set(report.dropped) == copies
    before, after = (load_file(p / "adapter_model.safetensors") for p in (folder, saved.path))
    assert set(before) - set(after) == copies
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items())
    assert_equal(merged(CASES[name], saved.path), merged(CASES[name], folder))


@pytest.mark.parametrize("name", ["vera, projections not saved", "pvera, projections not saved"])
def test_projections_are_drawn_in_the_precision_of_the_base(tmp_path: Path, name: str) -> None:
    folder = trained(CASES[name], tmp_path, torch.bfloat16)
    wanted = merged(CASES[name], folder, torch.bfloat16)
    assert_equal(ours(folder), wanted)


def test_projections_not_saved_need_the_base_when_loading(tmp_path: Path) -> None:
    folder = trained(CASES["vera, projections not saved"], tmp_path)
    adapter = loratools.load(folder)
    assert set(adapter) == {"wide", "tall"}
    with pytest.raises(NeedsBaseError, match=r"(wide|tall): .*save_projection.*--base"):
        dict(loratools.delta(adapter, base=loratools.load_base(tmp_path / "model.safetensors")))


@pytest.mark.parametrize(("saved", "problem"), [(True, "tall: its projections are not"), (False, "were not saved")])
def test_the_order_of_modules_is_not_guessed(tmp_path: Path, saved: bool, problem: str) -> None:
    """`wide` comes before `tall` in the model: which vector is whose depends on it."""
    case = Case(peft.TinyLoraConfig, {"target_modules": LINEAR, "u": 5, "save_projection": saved})
    adapter = loratools.load(trained(case, tmp_path))
    with pytest.raises(AdapterError, match=problem):
        adapter["tall"]


def test_unilora_without_indices_is_refused(tmp_path: Path) -> None:
    case = Case(peft.UniLoraConfig, {"target_modules": LINEAR, "theta_d_length": 20})
    with pytest.raises(AdapterError, match="set save_indices"):
        loratools.load(trained(case, tmp_path))


def test_shira_of_windows(tmp_path: Path) -> None:
    """There PEFT stores the indices as float32."""
    case = CASES["shira"]
    folder = trained(case, tmp_path)
    wanted = merged(case, folder)
    weights = folder / "adapter_model.safetensors"
    save_file({k: t.float() for k, t in load_file(weights).items()}, weights)
    assert_equal(ours(folder), wanted)
    assert_equal(merged(case, folder), wanted)


@pytest.mark.parametrize("rank", [1, 3])
def test_peft_loads_a_shira_that_was_fitted(tmp_path: Path, rank: int) -> None:
    """The largest r (m + n) entries of a LoRA, written by way of loratools' own dialect."""
    case = Case(peft.LoraConfig, {"target_modules": LINEAR, "r": 5, "lora_alpha": 7, "init_lora_weights": False})
    folder = trained(case, tmp_path)
    wanted = {}
    for key, delta in merged(case, folder).items():
        flat = delta.flatten()
        kept = flat.abs().argsort(descending=True)[: rank * sum(delta.shape)]
        wanted[key] = torch.zeros_like(flat).scatter(0, kept, flat[kept]).reshape(delta.shape)
    how = Reparameterize({"rank": str(rank)}, accept_loss=True)
    made, report = reparameterize(loratools.load(folder), "shira", how)
    native = loratools.save(made, tmp_path / "native.safetensors").path
    assert report.total["numbers"] == 3 * rank * (24 + 16 + 16 + 32)  # rows and columns too
    saved = loratools.convert_file(loratools.load(native), tmp_path / "shira", "peft")[0]
    config = json.loads((saved.path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("SHIRA", rank)
    shira = Case(peft.ShiraConfig, {})
    assert_equal(merged(shira, saved.path), wanted)
    assert_equal(ours(saved.path), wanted)
    again = loratools.convert_file(loratools.load(saved.path), tmp_path / "again", "peft")[0]
    assert_equal(merged(shira, again.path), wanted)


def test_a_shira_that_peft_has_no_room_for_is_refused(tmp_path: Path) -> None:
    adapter = loratools.load(trained(Case(peft.LoraConfig, {"target_modules": LINEAR, "r": 5}), tmp_path))
    for options, problem in (
        ({"count": "81"}, r"(wide|tall): holds 81 entries of "),
        ({"count": "240"}, "one for all"),
    ):
        made, _ = reparameterize(adapter, "shira", Reparameterize(options, accept_loss=True))
        with pytest.raises(UnsupportedInTargetError, match=f"{problem}.*--to shira --rank N"):
            loratools.convert(made, "peft")
    made, _ = reparameterize(adapter, "sparse", Reparameterize({"count": "80"}, accept_loss=True))
    with pytest.raises(UnsupportedInTargetError, match="--to shira first"):
        loratools.convert(made, "peft")


def test_the_wavelets_are_those_whose_filters_are_sound_in_peft() -> None:
    """A new PEFT that mends its coiflets, or has more, is found here."""
    from peft.tuners.waveft.constants import WAVELET_REDUCTIONS
    from peft.tuners.waveft.wavelet import Wavelet

    def sound(name: str) -> bool:
        try:
            theirs = np.array(Wavelet(name).rec_lo)
        except ValueError:
            return False
        ours = np.array(pywt.Wavelet(name).rec_lo)
        return theirs.shape == ours.shape and bool(np.allclose(theirs, ours, atol=1e-10))

    accepted = []
    for name in WAVELET_REDUCTIONS:
        try:
            wavelet_settings({"wavelet_family": name}, "")
        except InputError:
            continue
        accepted.append(name)
    assert accepted == [name for name in WAVELET_REDUCTIONS if sound(name)]


PLACES = {  # of a (16, 24) weight; the same for both methods
    777: "490ab015d216a840",
    5: "e63cb75e5d8d8135",
}


@pytest.mark.parametrize("seed", PLACES)
@pytest.mark.parametrize("method", ["fourierft", "waveft"])
def test_places_are_drawn_as_peft_draws_them(method: str, seed: int) -> None:
    """Golden: should torch or PEFT draw otherwise one day, old files would decode to something else."""
    config = {"fourierft": peft.FourierFTConfig, "waveft": peft.WaveFTConfig}[method]
    model = peft.get_peft_model(Net(), config(target_modules=["wide"], n_frequency=50, random_loc_seed=seed))
    layer = model.base_model.model.wide
    indices = (layer.indices if method == "fourierft" else layer.waveft_indices)["default"]
    flat = indices[0] * 24 + indices[1]
    assert torch.equal(flat, drawn(16 * 24, 50, seed))
    assert hashlib.sha256(flat.numpy().astype("<i8").tobytes()).hexdigest()[:16] == PLACES[seed]


FITTED = {
    "fourierft": {"count": "60"},
    "fourierft, Conv1D": {"count": "60"},
    "waveft": {"count": "60"},
    "waveft, sym5": {"count": "90", "wavelet": "sym5"},
    "waveft, Conv1D": {"count": "60", "wavelet": "coif1"},
    "waveft, entries": {"count": "60", "wavelet": "none"},
}


@pytest.mark.parametrize("name", FITTED)
def test_peft_merges_coefficients_that_were_fitted(tmp_path: Path, name: str) -> None:
    """A LoRA written in the method, by way of loratools' own dialect, and by PEFT's layout merged by PEFT."""
    family = name.partition(",")[0]
    targets = {"target_modules": ["fused"], "fan_in_fan_out": True} if "Conv1D" in name else {"target_modules": LINEAR}
    lora = Case(peft.LoraConfig, {**targets, "r": 2, "lora_alpha": 3, "init_lora_weights": False})
    how = Reparameterize(FITTED[name], accept_loss=True, seed=11)
    made, _ = reparameterize(loratools.load(trained(lora, tmp_path)), family, how)
    native = loratools.save(made, tmp_path / "native.safetensors").path
    saved = loratools.convert_file(loratools.load(native), tmp_path / "out", "peft")[0]
    config = json.loads((saved.path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["random_loc_seed"], config["scaling"]) == (family.upper(), 11, 1.0)
    base = loratools.load_base(tmp_path / "model.safetensors")
    wanted = dict(loratools.delta(loratools.load(native)))
    assert wanted.keys() == {f"{target}.weight" for target in targets["target_modules"]}
    assert_equal(merged(Case(peft.LoraConfig, {}), saved.path), wanted)
    assert_equal(dict(loratools.delta(loratools.load(saved.path, base=base), base=base)), wanted)
    again = loratools.convert_file(loratools.load(saved.path, base=base), tmp_path / "again", "peft")[0]
    assert json.loads((again.path / "adapter_config.json").read_text()) == config


def test_counts_of_their_own_are_written(tmp_path: Path) -> None:
    adapter = loratools.load(
        trained(Case(peft.LoraConfig, {"target_modules": LINEAR, "init_lora_weights": False}), tmp_path)
    )
    made, _ = reparameterize(adapter, "fourierft", Reparameterize(budget=600, accept_loss=True))
    counts = {target: len(update.parameters()["fourierft_spectrum"]) for target, update in made.items()}
    assert len(set(counts.values())) == 2
    saved = loratools.convert_file(made, tmp_path / "out", "peft")[0]
    assert_equal(merged(Case(peft.LoraConfig, {}), saved.path), dict(loratools.delta(made)))


def test_wavelets_that_peft_has_wrong_are_refused(tmp_path: Path) -> None:
    adapter = loratools.load(
        trained(Case(peft.LoraConfig, {"target_modules": LINEAR, "init_lora_weights": False}), tmp_path)
    )
    made, _ = reparameterize(adapter, "waveft", Reparameterize({"wavelet": "coif5"}, accept_loss=True))
    with pytest.raises(UnsupportedInTargetError, match=r"no sound filters of the wavelet 'coif5'.*wavelet=db1"):
        loratools.convert(made, "peft")
