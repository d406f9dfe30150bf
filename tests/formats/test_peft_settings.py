"""Configs of PEFT's methods are read with suspicion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loratools import load
from loratools.errors import LoratoolsError

ROAD = {"road_theta": torch.ones(8), "road_alpha": torch.ones(8)}
GRALORA = {"gralora_A": torch.ones(2, 4, 4), "gralora_B": torch.ones(2, 4, 4)}


@pytest.mark.parametrize(
    ("kind", "tensors", "config", "problem"),
    [
        ("ROAD", ROAD, {"variant": "road_3"}, "variant is 'road_3'"),
        ("ROAD", ROAD, {"variant": ["road_1"]}, r"variant is \['road_1'\]"),
        ("ROAD", ROAD, {"group_size": 7}, "group_size is 7, not an even number"),
        ("ROAD", ROAD, {"group_size": -4}, "group_size is -4"),
        ("ROAD", ROAD, {"group_size": "8"}, "group_size is '8'"),
        ("ROAD", ROAD, {"group_size": True}, "group_size is True"),
        ("ROAD", ROAD, {"group_size": 10}, "q: 8 angles do not fill groups of 10"),
        ("GRALORA", GRALORA, {"alpha": "much"}, "alpha is 'much', not a number"),
        ("GRALORA", GRALORA, {"r": 3, "hybrid_r": -3}, "make no scale for q"),
        ("GRALORA", GRALORA | {"gralora_A_general.weight": torch.ones(2, 8)}, {}, "gralora_B_general is missing"),
        ("FOURIERFT", {"fourierft_spectrum": torch.ones(3)}, {"random_loc_seed": "x"}, "random_loc_seed is 'x'"),
        ("FOURIERFT", {"fourierft_spectrum": torch.ones(65)}, {}, "65 coefficients do not fit"),
        ("WAVEFT", {"waveft_spectrum": torch.ones(3)}, {"wavelet_family": "bior1.3"}, "wavelet_family is 'bior1.3'"),
        ("WAVEFT", {"waveft_spectrum": torch.ones(3)}, {"wavelet_family": "coif4"}, "wavelet_family is 'coif4'"),
        ("RANDLORA", {"randlora_lambda": torch.ones(3, 4), "randlora_gamma": torch.ones(5, 8)}, {}, "do not chain"),
        ("TINYLORA", {"tinylora_A": torch.ones(2, 8), "tinylora_B": torch.ones(8, 2)}, {"weight_tying": 7}, "a share"),
        ("C3A", {"c3a_kernel": torch.ones(2, 4)}, {}, "is not .rows, columns, block size."),
        ("MISS", {"miss_block": torch.ones(2, 3, 4)}, {}, "is neither"),
        ("HIRA", {"hira_A": torch.ones(2, 4)}, {}, "no pair of factors"),
    ],
)
def test_what_makes_no_sense_is_named(
    tmp_path: Path, kind: str, tensors: dict[str, torch.Tensor], config: dict[str, Any], problem: str
) -> None:
    save_file({f"base_model.model.q.{name}": t for name, t in tensors.items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "target_modules": ["q"]} | config))
    with pytest.raises(LoratoolsError, match=problem) as caught:
        load(tmp_path)["q"].delta(torch.ones(8, 8))
    assert "\n" not in str(caught.value)


def test_a_base_of_another_shape_is_named(tmp_path: Path) -> None:
    for kind, tensors in {"ROAD": ROAD, "MISS": {"miss_block": torch.ones(2, 7)}}.items():
        folder = tmp_path / kind
        folder.mkdir()
        save_file({f"base_model.model.q.{n}": t for n, t in tensors.items()}, folder / "adapter_model.safetensors")
        stated = {"peft_type": kind, "target_modules": ["q"], "group_size": 4}
        (folder / "adapter_config.json").write_text(json.dumps(stated))
        with pytest.raises(LoratoolsError, match="base"):
            load(folder)["q"].delta(torch.ones(6, 6))
