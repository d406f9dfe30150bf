"""PEFT draws the random bases that loratools draws, loads what is written of them, and merges the same deltas."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

if not os.environ.get("CI"):  # where it must be installed, its absence is an error
    pytest.importorskip("peft", reason="compares with PEFT: pip install 'loratools[oracle]'")

import peft

import loratools
from loratools.adapter import Adapter, entry_of
from loratools.errors import UnsupportedInTargetError
from loratools.families import LoRA, RandLoRA, VeRA
from loratools.families.base import Layout
from loratools.families.unilora import drawn as entries_of_unilora
from loratools.formats import Order
from loratools.formats.base import Part
from loratools.formats.peft import Peft
from loratools.ops.reparameterize import Reparameterize, reparameterize

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SHAPES = {"layers.0.wide": (16, 24), "layers.0.tall": (32, 16), "layers.1.wide": (16, 24), "layers.1.tall": (32, 16)}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(24, 16)
        self.tall = nn.Linear(16, 32)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x: Tensor) -> Tensor:
        return x


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def lora() -> Adapter:
    """A LoRA of rank 3 on every linear layer, in memory."""
    draw = torch.Generator().manual_seed(1)
    updates = {
        t: LoRA(torch.randn(3, n, generator=draw) / 8, torch.randn(m, 3, generator=draw) / 8, 2.0)
        for t, (m, n) in SHAPES.items()
    }
    parts = {t: Part(("down", "up"), Layout(), shape, 3, 2.0) for t, shape in SHAPES.items()}
    return Adapter(Peft.compose(parts, Order()), {t: entry_of(u) for t, u in updates.items()}, {}, {})


def merged(folder: Path) -> dict[str, Tensor]:
    """What PEFT changes of each weight."""
    base = {key: t.double() for key, t in fresh().state_dict().items()}
    model = peft.PeftModel.from_pretrained(fresh(), folder).double().eval()
    state = model.merge_and_unload(safe_merge=True).state_dict()
    return {key: state[key] - base[key] for key in base if key.endswith(".weight")}


OPTIONS: dict[str, dict[str, dict[str, str]]] = {
    "vera": {"vera": {"rank": "11"}},
    "randlora": {
        "dense": {"rank": "5"},
        "sparse": {"rank": "4", "draw": "sparse"},
        "very sparse": {"rank": "4", "draw": "very_sparse"},
    },
}


@pytest.mark.parametrize(("family", "kind"), [(family, kind) for family, kinds in OPTIONS.items() for kind in kinds])
def test_peft_merges_what_was_encoded(tmp_path: Path, family: str, kind: str) -> None:
    how = Reparameterize(OPTIONS[family][kind], dtype="f32", seed=5, accept_loss=True)
    made, _ = reparameterize(lora(), family, how)
    saved, _ = loratools.convert_file(made, tmp_path / "peft", "peft")
    assert saved.config is not None
    found = merged(saved.path)
    assert set(found) == {f"{target}.weight" for target in SHAPES}
    for target, update in made.items():
        wanted = update.operator().to(torch.float64).dense()
        assert float((found[f"{target}.weight"] - wanted).norm()) <= 3e-7 * float(wanted.norm()), target
    assert {e.family for e in loratools.load(saved.path).entries.values()} == {VeRA if family == "vera" else RandLoRA}


@pytest.mark.parametrize(
    ("family", "options"), [(family, options) for family, kinds in OPTIONS.items() for options in kinds.values()]
)
def test_a_target_less_is_another_draw(family: str, options: dict[str, str]) -> None:
    """Without its widest targets PEFT would draw smaller projections."""
    made, _ = reparameterize(lora(), family, Reparameterize(options, dtype="f32", accept_loss=True))
    few = {target: entry for target, entry in made.entries.items() if target.endswith("wide")}
    with pytest.raises(UnsupportedInTargetError, match="drawn from a seed for just these targets"):
        loratools.convert(Adapter(made.format, few, {}, {}), "peft")


def digest(*tensors: Tensor) -> str:
    """Of two digits of each number, which no processor rounds otherwise."""
    coarse = [(100 * t.double() / t.double().abs().max()).round().to(torch.int8).contiguous() for t in tensors]
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in coarse)).hexdigest()[:16]


# Of the draws for `SHAPES`: a new torch or PEFT that draws other numbers is found here.
GOLDEN = {
    "vera": "b17137180bf8d14f",
    "dense": "cc397a7d9efa6013",
    "sparse": "f1e4be847c3d216e",
    "very sparse": "8e7a68e998392dbc",
}


def drawn_by_peft(kind: str) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = {"target_modules": ["wide", "tall"], "r": 5, "projection_prng_key": 7}
    if kind == "vera":
        model = peft.get_peft_model(fresh(), peft.VeraConfig(**options)).base_model
        return model.vera_A["default"], model.vera_B["default"]
    draws = {"sparse": kind == "sparse", "very_sparse": kind == "very sparse"}
    model = peft.get_peft_model(fresh(), peft.RandLoraConfig(**options, **draws)).base_model
    return model.randlora_A["default"], model.randlora_B["default"]


def drawn_by_us(kind: str) -> tuple[Tensor, Tensor]:
    from loratools.families.randlora import drawn
    from loratools.families.random_projections import Projections

    if kind == "vera":
        return Projections(5, 5, None, 7, (32, 24), exact=True).cut(32, 24, torch.float32)
    return drawn(5, 32, 24, 7, kind.replace(" ", "_"))  # type: ignore[arg-type]


def test_the_entries_of_unilora_are_those_that_peft_assigns() -> None:
    """For the order in which the model has its modules, which is that of the file here."""
    how = Reparameterize({"rank": "3", "repeats": "7"}, dtype="f32", seed=9, accept_loss=True)
    made, _ = reparameterize(lora(), "unilora", how)
    theta = next(iter(made.values())).theta  # type: ignore[attr-defined]
    config = peft.UniLoraConfig(target_modules=["wide", "tall"], r=3, theta_d_length=len(theta), proj_seed=9)
    model = peft.get_peft_model(fresh(), config)
    model.base_model.unilora_theta_d["default"].data.copy_(theta)
    layers = [module for module in model.modules() if hasattr(module, "unilora_indices_A")]
    theirs = torch.cat([i["default"].flatten() for x in layers for i in (x.unilora_indices_A, x.unilora_indices_B)])
    assert torch.equal(theirs, entries_of_unilora(len(theirs), len(theta), 9)[0])
    assert hashlib.sha256(theirs.numpy().tobytes()).hexdigest()[:16] == "a89b1a4f05e15317"
    state, base = model.double().merge_and_unload(safe_merge=True).state_dict(), fresh().state_dict()
    for target, update in made.items():
        wanted = update.operator().to(torch.float64).dense()
        change = state[f"{target}.weight"] - base[f"{target}.weight"].double()
        assert float((change - wanted).norm()) <= 3e-7 * float(wanted.norm()), target


@pytest.mark.parametrize("kind", GOLDEN)
def test_the_bases_are_those_that_peft_draws(kind: str) -> None:
    theirs, ours = drawn_by_peft(kind), drawn_by_us(kind)
    assert all(torch.equal(a.double(), b.double()) for a, b in zip(theirs, ours, strict=True))
    assert digest(*ours) == GOLDEN[kind]
