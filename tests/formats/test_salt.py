"""SALT's file against the authors' forward pass, and what a fit keeps of a delta."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import with_base_files
from safetensors.torch import save_file

from loratools import delta, load, load_base
from loratools.errors import AdapterError
from loratools.families import SALT
from loratools.families.base import Layout
from loratools.families.fitting import Source
from loratools.families.salt import SALTOptions, decomposed
from loratools.operators import Dense, LowRank

AT = "image_encoder.trunk.blocks.0.attn.qkv"


def rand(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def authors_weight(weight: torch.Tensor, file: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weight that a SALT layer computes with."""
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    top = len(file[f"{AT}.trainable_scale_A"])
    new = torch.diag(s)
    new[:top, :top] = torch.diag(file[f"{AT}.trainable_scale_A"] * s[:top] + file[f"{AT}.trainable_shift_B"])
    new[top:, top:] += file[f"{AT}.trainable_X"] @ file[f"{AT}.trainable_Y"]
    return u @ torch.nn.functional.relu(new) @ vt


def test_the_delta_is_that_of_the_authors_layer(tmp_path: Path) -> None:
    weight = rand(9, 12, 10)
    save_file({f"{AT}.weight": weight}, tmp_path / "base.safetensors")
    adapter = load(with_base_files.write(tmp_path, "salt"))
    assert any("signs" in warning for warning in adapter.warnings)
    [(name, change)] = list(delta(adapter, base=load_base(tmp_path / "base.safetensors")))
    assert name == f"{AT}.weight"
    wanted = authors_weight(weight, with_base_files.salt()) - weight
    torch.testing.assert_close(change, wanted, rtol=0, atol=5e-6)


def test_signs_matter_to_the_block_alone() -> None:
    """The ambiguity of the docstring: another sign of one pair of vectors changes X and Y's part, not the rest."""
    weight = rand(9, 12, 10)
    file = {slot.rpartition(".")[2]: t for slot, t in with_base_files.salt().items() if slot.startswith(AT)}
    slots = {"salt_scale": file["trainable_scale_A"], "salt_shift": file["trainable_shift_B"]}
    block = {"salt_x": file["trainable_X"], "salt_y": file["trainable_Y"]}

    def both(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return [SALT(tensors, signs_fixed=fixed).operator(weight).dense() for fixed in (False, True)]

    one, other = both(slots)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    one, other = both(slots | block)
    assert float((one - other).norm()) > 0.1 * float(one.norm())


def test_another_base_is_refused() -> None:
    update = SALT(
        {"salt_scale": torch.ones(2), "salt_shift": torch.ones(2), "salt_x": rand(0, 8, 2), "salt_y": rand(1, 2, 8)}
    )
    with pytest.raises(AdapterError, match="10 singular values where the base has 7"):
        update.operator(rand(2, 7, 9))


@pytest.mark.parametrize("dense", [False, True])
def test_a_fit_keeps_what_has_a_place(dense: bool) -> None:
    """A change of singular values, and of the block that no ReLU clips, is found; the rest is lost, and only that."""
    weight = rand(5, 14, 11)
    u, _, vt = decomposed(weight.double(), signs_fixed=True)
    x, y = rand(6, 8, 2).abs().double() / 8, rand(7, 2, 8).abs().double() / 8  # positive: nothing is clipped
    middle = torch.zeros(11, 11, dtype=torch.float64)
    middle[:3, :3] = torch.diag(torch.tensor([0.5, -0.25, 0.125], dtype=torch.float64))
    middle[3:, 3:] = x @ y
    member = LowRank(u @ middle, vt)
    given = Dense(member.dense()) if dense else member
    source = Source(given, Layout(shape=(14, 11)), weight, torch.float64)
    made = SALT.encode(source, SALTOptions(rank=2, top=3))
    torch.testing.assert_close(made.operator(weight).dense(), member.dense(), rtol=0, atol=1e-6)

    lost = torch.zeros(11, 11, dtype=torch.float64)
    lost[0, 5], lost[6, 1], lost[0, 1] = 0.75, -0.5, 0.25  # across the blocks, and off the leading diagonal
    source = Source(LowRank(u @ (middle + lost), vt), Layout(shape=(14, 11)), weight, torch.float64)
    error = (SALT.encode(source, SALTOptions(rank=2, top=3)).operator(weight).dense() - source.delta.dense()).norm()
    assert float(error) == pytest.approx(float(lost.norm()), rel=1e-6)


def test_clipping_is_no_loss_where_the_wish_is_zero() -> None:
    """The sweeps, with an entry clipped to zero, come nearer than the one SVD of the sheet."""
    weight = rand(5, 14, 11)
    delta = LowRank(rand(8, 14, 3).double(), rand(9, 3, 11).double(), 0.5)
    source = Source(delta, Layout(shape=(14, 11)), weight, torch.float64)
    made = SALT.encode(source, SALTOptions(rank=3, top=1))
    error = float((made.operator(weight).dense() - delta.dense()).norm())
    u, s, vt = decomposed(weight.double(), signs_fixed=True)
    wanted = u.T @ delta.dense() @ vt.T
    rest = wanted[1:, 1:] + torch.diag(s[1:])
    left, values, right = torch.linalg.svd(rest.clamp(min=0) - torch.diag(s[1:]))
    once = left[:, :3] * values[:3] @ right[:3]
    middle = torch.zeros_like(wanted)
    middle[0, 0] = max(float(wanted[0, 0] + s[0]), 0.0) - float(s[0])
    middle[1:, 1:] = (once + torch.diag(s[1:])).clamp(min=0) - torch.diag(s[1:])
    assert error <= float((u @ middle @ vt - delta.dense()).norm()) + 1e-12
    assert error < float(delta.dense().norm())


@pytest.mark.parametrize(("top", "rank"), [(3, 2), (1, 0), (11, 4)])
def test_as_many_numbers_are_stored_as_the_formula_says(top: int, rank: int) -> None:
    source = Source(LowRank(rand(0, 14, 2), rand(1, 2, 11)), Layout(shape=(14, 11)), rand(5, 14, 11))
    made = SALT.encode(source, SALTOptions(rank=rank, top=top))
    assert sum(t.numel() for t in made.parameters().values()) == 2 * top + 2 * min(rank, 11 - top) * (11 - top)
