"""Bounds on cosines with all singular vectors, against dense float64 SVDs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loratools.linalg.cosine_bounds import Question, _first_of_inverse, cosine_bounds
from loratools.operators import Dense, LowRank, sum_of


def weight(m: int, n: int, kind: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(m, n, generator=generator, dtype=torch.float64) / n**0.5
    if kind == "noise":
        return noise
    u, _, vt = torch.linalg.svd(noise, full_matrices=False)
    p = min(m, n)
    spectra = {
        "power": torch.arange(1, p + 1, dtype=torch.float64) ** -1.0,
        "gap": torch.cat([torch.full((p // 4,), 3.0), torch.linspace(1, 0, p - p // 4)]).double(),
        "equal": torch.ones(p, dtype=torch.float64),
        "deficient": torch.cat([torch.linspace(2, 1, p // 2), torch.zeros(p - p // 2)]).double(),
    }
    return (u * spectra[kind]) @ vt


def starts(matrix: torch.Tensor, seed: int) -> torch.Tensor:
    """Some that are singular vectors, some that are near one, sums of a few, and ones that are like none."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.svd(matrix, full_matrices=False).U
    m = u.shape[0]
    noise = torch.randn(m, 8, generator=generator, dtype=torch.float64) / m**0.5
    chosen = u[:, torch.randint(0, u.shape[1], (8,), generator=generator)]
    few = u[:, torch.randint(0, u.shape[1], (5,), generator=generator)].sum(1, keepdim=True)
    x = torch.cat([noise, chosen + 0.3 * noise, chosen + noise, chosen[:, :2], few], dim=1)
    return x / x.norm(dim=0)


def largest(matrix: torch.Tensor, x: torch.Tensor, below: float = np.inf) -> np.ndarray:
    u, s, _ = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    return np.abs(x.double().numpy().T @ u[:, s <= below]).max(1)


@pytest.mark.parametrize("kind", ["noise", "power", "gap", "deficient"])
@pytest.mark.parametrize(("m", "n"), [(60, 60), (60, 90), (150, 150), (3, 50)])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bounds_are_never_below_the_truth(kind: str, m: int, n: int, seed: int, dtype: torch.dtype) -> None:
    matrix = weight(m, n, kind, seed)
    x = starts(matrix, seed)
    top = float(torch.linalg.svdvals(matrix)[0]) * 1.0001
    true = largest(matrix, x)
    for enough, steps in ((0.99, 3), (0.5, 20), (0.0, 40)):
        question = Question(Dense(matrix.to(dtype)), x.to(dtype), enough, top)
        (bound,) = cosine_bounds([question], max_steps=steps)
        assert (bound.numpy() >= true - 1e-6).all()


def test_equal_singular_values_add_up_to_no_wrong_answer() -> None:
    matrix = weight(40, 40, "equal", 0)
    x = starts(matrix, 0)
    (bound,) = cosine_bounds([Question(Dense(matrix), x, 0.5, 1.001)])
    assert (bound.numpy() >= largest(matrix, x) - 1e-6).all()
    assert float(bound.min()) > 0.99  # any vector is a singular vector of some basis


def test_a_vector_like_none_is_told_after_ten_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    n = 512
    noise = torch.randn(n, n, generator=generator) / n**0.5
    x, y = torch.randn(n, 1, generator=generator), torch.randn(n, 1, generator=generator)
    u = torch.linalg.svd(noise + 2 * (x / x.norm()) @ (y / y.norm()).T).U[:, :1].contiguous()
    (bound,) = cosine_bounds([Question(Dense(noise), u, 0.0, 2.1)], max_steps=10)
    assert largest(noise, u)[0] < float(bound) < 0.5


def test_a_vector_that_is_one_is_known_to_be() -> None:
    matrix = weight(120, 120, "power", 1)
    u = torch.linalg.svd(matrix).U[:, :3].contiguous()
    (bound,) = cosine_bounds([Question(Dense(matrix), u, 0.5, 1.01)])
    assert (bound.numpy() >= 1 - 1e-6).all()


def test_both_sides_at_once_are_each_side_alone() -> None:
    matrix = weight(150, 150, "noise", 2)
    left, right = starts(matrix, 0), starts(matrix.T, 1)[:, :5]
    questions = [Question(Dense(matrix), left, 0.4, 2.2), Question(Dense(matrix.T), right, 0.4, 2.2)]
    both = cosine_bounds(questions)
    for question, bound in zip(questions, both, strict=True):
        (alone,) = cosine_bounds([question])
        np.testing.assert_allclose(bound.numpy(), alone.numpy(), atol=1e-8)


def test_without_its_leading_vectors_only_the_rest_is_in_question() -> None:
    matrix = weight(150, 150, "power", 3)
    u, s, vt = torch.linalg.svd(matrix)
    lead = u[:, :10] + 1e-6 * torch.randn(150, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lead = torch.linalg.qr(lead).Q
    op = sum_of([Dense(matrix), LowRank(-lead * s[:10], vt[:10])])
    x = starts(matrix, 4)
    x = x - lead @ (lead.T @ x)
    lengths = x.norm(dim=0)
    kept = lengths > 1e-2
    x = x[:, kept] / lengths[kept]
    off = float((lead.T @ u[:, 10:]).norm() * s[0]) + 1e-4
    (bound,) = cosine_bounds([Question(op, x, 0.3, float(s[10]) * 1.0001, off)])
    assert (bound.numpy() >= largest(matrix, x, below=float(s[10]) * 1.0001) - 1e-6).all()
    assert float(bound.min()) < 0.8


@pytest.mark.parametrize("links", [1, 2, 3, 8])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_the_closed_form_is_the_inverse(links: int, share: float) -> None:
    generator = torch.Generator().manual_seed(links)
    b, x, t = (
        torch.rand(3, links, 1, generator=generator, dtype=torch.float64),
        torch.tensor([0.0, 0.3, 1.0]).double(),
        0.2,
    )
    found = _first_of_inverse(b, x, t, share)
    for c in range(3):
        for g in range(3):
            rows = np.zeros((links, links + 1))
            for i in range(links):
                rows[i, i], rows[i, i + 1] = -x[g], b[c, i, 0]
                if i:
                    rows[i, i - 1] = b[c, i - 1, 0]
            weights = np.diag([share if j % 2 == 0 else 1 - share for j in range(links + 1)])
            assert float(found[c, g]) == pytest.approx(
                np.linalg.inv(weights + rows.T @ rows / (2 * t * t))[0, 0], rel=1e-9
            )


def test_tall_operators_are_refused() -> None:
    with pytest.raises(ValueError, match="taller than wide"):
        cosine_bounds([Question(Dense(torch.ones(4, 3)), torch.ones(4, 1), 0.5, 1.0)])


def test_no_question_no_answer() -> None:
    (bound,) = cosine_bounds([Question(Dense(torch.ones(3, 4)), torch.ones(3, 0), 0.5, 1.0)])
    assert bound.shape == (0,)
