"""Row norms of base + low rank against the dense sum in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loratools.linalg import row_norms as module
from loratools.linalg.row_norms import row_norms
from loratools.operators import LowRank


def rand(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def truth(base: Tensor, low: LowRank) -> np.ndarray:
    dense = base.double().numpy() + low.scale * (low.left.double().numpy() @ low.right.double().numpy())
    return np.linalg.norm(dense, axis=1)


@given(
    seed=st.integers(0, 2**32 - 1),
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    r=st.integers(1, 12),
    scale=st.sampled_from([0.0, 1.0, -2.0, 1 / 3, 1e4, -1e-4]),
)
def test_any_shape_and_scale(seed: int, m: int, n: int, r: int, scale: float) -> None:
    base, low = rand(seed, m, n), LowRank(rand(seed + 1, m, r), rand(seed + 2, r, n), scale)
    found = row_norms(base, low)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), truth(base, low), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_stored_dtypes_are_exact(dtype: torch.dtype) -> None:
    """What is stored is what counts: nothing is rounded on the way."""
    base, low = rand(0, 9, 30, dtype=dtype), LowRank(rand(1, 9, 4, dtype=dtype), rand(2, 4, 30, dtype=dtype), -0.7)
    np.testing.assert_allclose(row_norms(base, low).numpy(), truth(base, low), rtol=1e-12)


@pytest.mark.parametrize("left_over", [1e-3, 1e-6, 1e-9, 0.0])
def test_rows_that_cancel_are_done_densely(left_over: float) -> None:
    """base_i = -low_i (1 + left_over): the sum of three terms would keep no digit below 1e-8."""
    low = LowRank(rand(1, 6, 2), rand(2, 2, 40), 1.5)
    base = rand(0, 6, 40)
    base[::2] = -low.dense()[::2] * (1 + left_over)
    wanted = truth(base, low)
    found = row_norms(base, low).numpy()
    np.testing.assert_allclose(found[1::2], wanted[1::2], rtol=1e-12)
    np.testing.assert_allclose(found[::2], wanted[::2], rtol=1e-6, atol=1e-13)


def test_zero_rows() -> None:
    base, low = rand(0, 4, 5), LowRank(rand(1, 4, 2), rand(2, 2, 5))
    base[1] = 0
    low.left[1:3] = 0
    found = row_norms(base, low)
    assert float(found[1]) == 0.0
    np.testing.assert_allclose(found.numpy(), truth(base, low), rtol=1e-12)


def test_wide_bases_go_by_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many columns are read in steps; the steps must not show."""
    seen = []
    double = Tensor.double
    monkeypatch.setattr(Tensor, "double", lambda self: (seen.append(self.numel()), double(self))[1])
    base, low = (
        torch.ones(1 << 12, (1 << 11) + 3, dtype=torch.float16),
        LowRank(torch.ones(1 << 12, 1), torch.ones(1, (1 << 11) + 3)),
    )
    found = module.row_norms(base, low)
    assert max(seen) <= 1 << 22
    np.testing.assert_allclose(found.numpy(), 2 * np.sqrt((1 << 11) + 3), rtol=1e-12)
