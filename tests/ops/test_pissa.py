"""PiSSA's three states, with PEFT as the judge of what each of them does to the base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from loratools import fuse, load, load_base, pissa_state, save, subtract_initial, subtract_principal, subtract_residual
from loratools.errors import AdapterError, MutatedBaseError
from loratools_cli.app import main

N, M, R = 24, 18, 4


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(N, M, bias=False)
        self.k = nn.Linear(N, M, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x) + self.k(x)


def base_model() -> Model:
    """Spectra that fall, as those of real weights do."""
    torch.manual_seed(0)
    model = Model()
    for layer in (model.q, model.k):
        u, _, vt = torch.linalg.svd(layer.weight.data, full_matrices=False)
        layer.weight.data = u * torch.logspace(0, -1.5, M) @ vt
    return model


def trained(folder: Path, init: str, *, rslora: bool = False) -> dict[str, torch.Tensor]:
    """PEFT trains for a step and saves; what is in `folder`, and the weights that it computes with."""
    model = base_model()
    save_file({f"{n}.weight": getattr(model, n).weight.detach().clone() for n in "qk"}, folder / "base.safetensors")
    config = LoraConfig(r=R, lora_alpha=6, target_modules=["q", "k"], init_lora_weights=init, use_rslora=rslora)
    peft = get_peft_model(model, config)
    assert isinstance(peft, PeftModel)
    layers = {name: getattr(peft.base_model.model, name) for name in "qk"}
    save_file(
        {f"{n}.weight": layer.base_layer.weight.detach().clone() for n, layer in layers.items()},
        folder / "residual.safetensors",
    )
    peft.peft_config["default"].init_lora_weights = True  # as the docs of PEFT have the initial factors saved
    peft.save_pretrained(str(folder / "initial"))
    peft.peft_config["default"].init_lora_weights = init
    torch.manual_seed(1)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data += 0.02 * torch.randn_like(parameter)
    peft.save_pretrained(str(folder / "declared"))
    return {n: (layer.base_layer.weight + layer.get_delta_weight("default")).detach() for n, layer in layers.items()}


def check_deltas(adapter: object, tuned: dict[str, torch.Tensor], folder: Path) -> None:
    base = load_file(folder / "base.safetensors")
    again = load(save(adapter, folder / "plain").path)  # type: ignore[arg-type]
    assert again.config is not None
    assert again.config["init_lora_weights"] is True
    assert not again.warnings
    for name, weight in tuned.items():
        assert again.entries[name].rank == 2 * R
        torch.testing.assert_close(again[name].delta(), weight - base[f"{name}.weight"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_full_svd_is_computed_again(tmp_path: Path, rslora: bool) -> None:
    tuned = trained(tmp_path, "pissa", rslora=rslora)
    adapter, base = load(tmp_path / "declared"), load_base(tmp_path / "base.safetensors")
    check_deltas(subtract_principal(adapter, base), tuned, tmp_path)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_a_residual_base_serves_any_initialisation(tmp_path: Path, init: str) -> None:
    tuned = trained(tmp_path, init)
    base, residual = (load_base(tmp_path / f"{name}.safetensors") for name in ("base", "residual"))
    check_deltas(subtract_residual(load(tmp_path / "declared"), residual, base), tuned, tmp_path)


def test_what_cannot_be_computed_again_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, "pissa_niter_4")
    base = load_base(tmp_path / "base.safetensors")
    with pytest.raises(MutatedBaseError, match=r"pissa_niter_4', which came of random numbers .*--residual-base"):
        subtract_principal(load(tmp_path / "declared"), base)
    with pytest.raises(MutatedBaseError, match="the config states no PiSSA"):
        subtract_principal(load(tmp_path / "initial"), base)
    with pytest.raises(AdapterError, match=r"no other than the original"):
        subtract_residual(load(tmp_path / "declared"), base, base)
    other = {name: t + torch.randn_like(t) for name, t in load_file(tmp_path / "base.safetensors").items()}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(AdapterError, match=r"differ by more than rank 4"):
        subtract_residual(load(tmp_path / "declared"), load_base(tmp_path / "other.safetensors"), base)


def test_equal_singular_values_are_refused(tmp_path: Path) -> None:
    trained(tmp_path, "pissa")
    u, _, vt = torch.linalg.svd(base_model().q.weight.data, full_matrices=False)
    save_file({f"{name}.weight": u @ vt for name in "qk"}, tmp_path / "flat.safetensors")
    with pytest.raises(AdapterError, match=r"singular values 4 and 5 of the base are equal"):
        subtract_principal(load(tmp_path / "declared"), load_base(tmp_path / "flat.safetensors"))


def test_the_three_states_are_told_apart(tmp_path: Path) -> None:
    trained(tmp_path, "pissa")
    base = load_base(tmp_path / "base.safetensors")
    declared, initial = load(tmp_path / "declared"), load(tmp_path / "initial")
    assert pissa_state(declared) == "declared"
    plain = subtract_initial(declared, initial)
    assert pissa_state(plain, base) == "plain"
    config = json.loads((tmp_path / "declared" / "adapter_config.json").read_text())
    config["init_lora_weights"] = True  # a published residual adapter
    (tmp_path / "declared" / "adapter_config.json").write_text(json.dumps(config))
    silent = load(tmp_path / "declared")
    assert not silent.warnings
    assert pissa_state(silent) == "plain"  # nothing in the file tells
    assert pissa_state(silent, base) == "residual"
    config["base_model_name_or_path"] = "fxmeng/PiSSA-Llama-3-8B-r128"
    (tmp_path / "declared" / "adapter_config.json").write_text(json.dumps(config))
    assert pissa_state(load(tmp_path / "declared")) == "residual"
    assert any("would be added twice" in w for w in load(tmp_path / "declared").warnings)


def test_fusing_a_residual_state_into_the_original_warns(tmp_path: Path) -> None:
    tuned = trained(tmp_path, "pissa")
    base = load_base(tmp_path / "base.safetensors")
    config = json.loads((tmp_path / "declared" / "adapter_config.json").read_text()) | {"init_lora_weights": True}
    plain = subtract_principal(load(tmp_path / "declared"), base)
    assert not any("count twice" in w for w in fuse(plain, base, tmp_path / "fused").warnings)
    found = load_file(tmp_path / "fused" / "base.safetensors")
    for name, weight in tuned.items():
        torch.testing.assert_close(found[f"{name}.weight"], weight, rtol=0, atol=3e-6)
    (tmp_path / "declared" / "adapter_config.json").write_text(json.dumps(config))
    silent = load(tmp_path / "declared")
    assert any("count twice" in w for w in fuse(silent, base, tmp_path / "wrong").warnings)
    residual = load_base(tmp_path / "residual.safetensors")
    assert not any("count twice" in w for w in fuse(silent, residual, tmp_path / "right").warnings)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path, "pissa")
    source, base = str(tmp_path / "declared"), str(tmp_path / "base.safetensors")
    assert main(["convert", source, "--to", "kohya"]) == 4
    assert "--initial-from-base" in capsys.readouterr().err
    assert main(["convert", source, "--to", "peft", "--initial-from-base"]) == 2
    assert (
        main(["convert", source, "--to", "peft", "--base", base, "--initial-from-base", "-o", str(tmp_path / "a")]) == 0
    )
    residual = ["--residual-base", str(tmp_path / "residual.safetensors")]
    assert main(["convert", source, "--to", "peft", "--base", base, *residual, "-o", str(tmp_path / "b")]) == 0
    one, two = load(tmp_path / "a"), load(tmp_path / "b")
    for name in "qk":
        torch.testing.assert_close(one[name].delta(), two[name].delta(), rtol=0, atol=2e-6)
    assert main(["convert", source, "--to", "peft", "--base", base, "--initial-from-base", *residual]) == 2
