"""Block-LoRA: the best of its rank, in equal blocks, of the size that is told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loratools.errors import UsageError
from loratools.families import BlockLoRA
from loratools.families.base import Layout
from loratools.families.blocklora import BlockLoRAOptions
from loratools.families.fitting import Source
from loratools.linalg.inner import relative_error
from loratools.operators import LowRank


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


GIVEN = Source(LowRank(rand(0, 20, 6), rand(1, 6, 14), 0.5), Layout(shape=(20, 14)), None, torch.float64)


@pytest.mark.parametrize("blocks", [1, 2, 8])
def test_it_is_the_best_of_its_rank(blocks: int) -> None:
    values = torch.linalg.svdvals(GIVEN.delta.dense())
    for rank in (1, 3, 6):
        found = BlockLoRA.encode(GIVEN, BlockLoRAOptions(rank, blocks))
        wanted = float(values[rank:].norm() / values.norm())
        assert relative_error(GIVEN.delta, found.operator()) == pytest.approx(wanted, rel=1e-9, abs=1e-9)
        held = sum(t.numel() for t in found.parameters().values())
        assert held == rank * blocks * 20 + rank * blocks * 14 // blocks
        assert all(torch.equal(block, found.b[0]) for block in found.b)
    assert relative_error(GIVEN.delta, BlockLoRA.encode(GIVEN, BlockLoRAOptions(None, blocks)).operator()) < 1e-12


@pytest.mark.parametrize("options", [BlockLoRAOptions(0), BlockLoRAOptions(2, 0)])
def test_nothing_is_no_block(options: BlockLoRAOptions) -> None:
    with pytest.raises(UsageError, match="have to be 1 or more"):
        BlockLoRA.encode(GIVEN, options)
