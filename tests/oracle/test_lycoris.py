"""LyCORIS itself: its modules act as the deltas that loratools reads off their files, and it loads what we write."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

if not os.environ.get("CI"):  # where it must be installed, its absence is an error
    pytest.importorskip("lycoris", reason="compares with LyCORIS: pip install 'loratools[oracle]'")

from lycoris import modules
from lycoris.wrapper import create_lycoris_from_weights

from loratools.adapter import Adapter
from loratools.base_weights import load_base
from loratools.files import load, save
from loratools.ops.delta import delta
from loratools.ops.squeeze import Squeeze, squeeze_file

logging.disable(logging.INFO)  # what it factorises, for every module

# Of the change that a module makes to its output, in float32.
BOUND = 1e-5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(20, 24)
        self.thin = nn.Linear(16, 32, bias=False)
        self.conv = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.point = nn.Conv2d(6, 8, 1)
        self.wide = nn.Conv1d(10, 16, 5)
        self.norm = nn.LayerNorm(10)
        self.groups = nn.GroupNorm(2, 6)


INPUTS = {
    "line": (5, 20), "thin": (7, 16), "conv": (2, 8, 7, 6), "point": (2, 6, 4, 4), "wide": (3, 10, 9),
    "norm": (4, 10), "groups": (3, 6, 5),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A module class of LyCORIS, its options, and the layers of `Net` that it takes."""

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[str, ...] = ("line", "thin", "conv", "point", "wide")
    reloads: bool = True  # the library cannot read all that it writes


CASES = {
    "locon": Case("LoConModule", {"lora_dim": 3, "alpha": 5.0}),
    "locon_rs": Case("LoConModule", {"lora_dim": 3, "alpha": 5.0, "rs_lora": True}),
    "locon_tucker_scalar": Case("LoConModule", {"lora_dim": 3, "alpha": 2.0, "use_tucker": True, "use_scalar": True}),
    "locon_dora": Case("LoConModule", {"lora_dim": 3, "alpha": 2.0, "weight_decompose": True}),
    "locon_dora_inputs": Case(
        "LoConModule", {"lora_dim": 3, "alpha": 2.0, "weight_decompose": True, "wd_on_out": False}, reloads=False
    ),
    "loha": Case("LohaModule", {"lora_dim": 3, "alpha": 5.0}),
    "loha_tucker_rs": Case("LohaModule", {"lora_dim": 2, "alpha": 5.0, "use_tucker": True, "rs_lora": True}),
    "loha_dora": Case("LohaModule", {"lora_dim": 2, "alpha": 1.5, "weight_decompose": True, "use_scalar": True}),
    "loha_dora_inputs": Case(
        "LohaModule", {"lora_dim": 2, "alpha": 1.5, "weight_decompose": True, "wd_on_out": False}, reloads=False
    ),
    "loha_tucker_dora_inputs": Case(
        "LohaModule",
        {"lora_dim": 2, "alpha": 1.5, "weight_decompose": True, "wd_on_out": False, "use_tucker": True},
        reloads=False,
    ),
    "lokr": Case("LokrModule", {"lora_dim": 1, "alpha": 3.0, "factor": 2}),
    "lokr_unbalanced": Case(
        "LokrModule", {"lora_dim": 1, "alpha": 3.0, "factor": 4, "unbalanced_factorization": True}, reloads=False
    ),
    "lokr_whole": Case("LokrModule", {"lora_dim": 4, "alpha": 3.0, "factor": 4, "full_matrix": True}, reloads=False),
    "lokr_both_tucker": Case(
        "LokrModule",
        {"lora_dim": 1, "alpha": 3.0, "factor": 4, "decompose_both": True, "use_tucker": True},
        reloads=False,
    ),
    "lokr_dora": Case("LokrModule", {"lora_dim": 1, "alpha": 3.0, "factor": 2, "weight_decompose": True}),
    "lokr_dora_inputs": Case(
        "LokrModule",
        {"lora_dim": 1, "alpha": 3.0, "factor": 2, "weight_decompose": True, "wd_on_out": False},
        reloads=False,
    ),
    "full": Case("FullModule"),
    "norms": Case("NormModule", layers=("norm", "groups")),
    "oft": Case("DiagOFTModule", {"lora_dim": 4}),
    "oft_constrained_rescaled": Case("DiagOFTModule", {"lora_dim": 4, "constraint": 0.02, "rescaled": True}),
    "boft": Case("ButterflyOFTModule", {"lora_dim": 4}, ("thin", "point", "wide")),
    "boft_constrained_rescaled": Case("ButterflyOFTModule", {"lora_dim": 8, "constraint": 0.02, "rescaled": True}),
    "glora": Case("GLoRAModule", {"lora_dim": 2, "alpha": 3.0}),
    "glora_scalar": Case("GLoRAModule", {"lora_dim": 4, "alpha": 3.0, "use_scalar": True}),
    "ia3": Case("IA3Module", reloads=False),
    "ia3_inputs": Case("IA3Module", {"train_on_input": True}, reloads=False),
}


def built(case: Case, net: Net, seed: int) -> dict[str, nn.Module]:
    """The case's modules on the layers of `net`, with parameters as if trained."""
    made: dict[str, nn.Module] = {}
    for layer in case.layers:
        module = getattr(modules, case.kind)(f"lycoris_{layer}", getattr(net, layer), 1.0, **case.options)
        if case.kind == "FullModule":
            module.apply_to()  # before which it does not know its own difference
        torch.manual_seed(seed)
        for name, parameter in module.named_parameters():
            drawn = torch.randn_like(parameter) * 0.5
            positive = name.endswith(("dora_scale", "rescale", "scalar"))
            parameter.data = parameter.data + drawn if case.kind == "FullModule" else drawn.abs() if positive else drawn
        made[layer] = module.eval()
    return made


def stored(made: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {
        f"lycoris_{layer}.{key}": tensor.detach().clone().contiguous()
        for layer, module in made.items()
        for key, tensor in module.state_dict().items()
    }


def fresh() -> Net:
    torch.manual_seed(7)
    net = Net()
    for parameter in net.parameters():
        parameter.data.copy_(torch.randn_like(parameter) * 0.3)
    return net.eval()


def changes(net: Net, made: Mapping[str, nn.Module], layers: tuple[str, ...]) -> dict[str, Tensor]:
    """What the modules add to the output of their layers, on one batch of random inputs each."""
    torch.manual_seed(3)
    inputs = {layer: torch.randn(*INPUTS[layer]) for layer in INPUTS}
    before = fresh()
    with torch.no_grad():
        return {layer: made[layer](inputs[layer]) - getattr(before, layer)(inputs[layer]) for layer in layers}


def changes_by(adapter: Adapter, base: Path, layers: tuple[str, ...]) -> dict[str, Tensor]:
    """The same, in float64, of layers whose parameters are those of the base and the deltas."""
    torch.manual_seed(3)
    inputs = {layer: torch.randn(*INPUTS[layer]).double() for layer in INPUTS}
    before, after = fresh().double(), fresh().double()
    parameters = dict(after.named_parameters())
    for name, change in delta(adapter, base=load_base(base)):
        parameters[name].data.add_(change)
    with torch.no_grad():
        return {layer: getattr(after, layer)(inputs[layer]) - getattr(before, layer)(inputs[layer]) for layer in layers}


def assert_same_changes(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for layer, change in wanted.items():
        assert float(change.norm()) > 0.1, layer
        assert float((found[layer] - change).norm() / change.norm()) < BOUND, layer


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_file(dict(fresh().state_dict()), tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


@pytest.mark.parametrize("name", CASES)
def test_modules_act_as_their_deltas(name: str, tmp_path: Path, base: Path) -> None:
    case, net = CASES[name], fresh()
    made = built(case, net, 11)
    save_file(stored(made), tmp_path / "a.safetensors")
    adapter = load(tmp_path / "a.safetensors")
    assert not adapter.extras
    assert {t.removesuffix(".bias") for t in adapter} == {f"lycoris_{layer}" for layer in case.layers}
    assert_same_changes(changes_by(adapter, base, case.layers), changes(net, made, case.layers))


def reloaded(path: Path, net: Net) -> dict[str, nn.Module]:
    network, _ = create_lycoris_from_weights(1.0, str(path), net)
    return {module.lora_name.removeprefix("lycoris_"): module.eval() for module in network.loras}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.reloads])
def test_what_is_saved_is_loaded(name: str, tmp_path: Path, base: Path) -> None:
    case = CASES[name]
    save_file(stored(built(case, fresh(), 12)), tmp_path / "a.safetensors")
    saved = save(load(tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    net = fresh()
    found = changes(net, reloaded(saved.weights, net), case.layers)
    assert_same_changes(found, changes_by(load(tmp_path / "a.safetensors"), base, case.layers))


@pytest.mark.parametrize("name", ["locon", "locon_rs", "locon_tucker_scalar", "locon_dora"])
def test_what_is_squeezed_is_loaded(name: str, tmp_path: Path, base: Path) -> None:
    """Beside a norm, whose difference is carried over."""
    case, net = CASES[name], fresh()
    tensors = stored(built(case, net, 13)) | stored(built(CASES["norms"], net, 14))
    save_file(tensors, tmp_path / "a.safetensors", {"ss_network_dim": "3"})
    path = tmp_path / "b.safetensors"
    squeeze_file(load(tmp_path / "a.safetensors"), path, 2, options=Squeeze(base=load_base(base)))
    assert sum(t.numel() for t in load_file(path).values()) < sum(t.numel() for t in tensors.values())
    squeezed, layers, after = load(path), (*case.layers, "norm", "groups"), fresh()
    assert_same_changes(changes_by(squeezed, base, layers), changes(after, reloaded(path, after), layers))
