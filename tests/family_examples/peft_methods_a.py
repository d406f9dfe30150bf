"""AdaLoRA, VeRA, PVeRA, (IA)^3, OFT, BOFT, HRA, SHiRA and trainable tokens, by formulas as the papers write them."""

from __future__ import annotations

import numpy as np
import torch
from family_examples.base import F64, Example, f64, rand

from loratools.families import BOFT, HRA, IA3, OFT, AdaLoRA, PVeRA, SHiRA, TrainableTokens, VeRA
from loratools.families.base import Layout

CONV1D = Layout(transposed=True)


def adalora() -> dict[str, Example]:
    down, singular, up = rand(0, 3, 9), rand(1, 3, 1), rand(2, 7, 3)
    delta = 0.7 * f64(up) @ np.diag(f64(singular)[:, 0]) @ f64(down)
    tensors = {"down": down, "singular": singular, "up": up}
    return {
        "adalora": Example(AdaLoRA, tensors, delta, 0.7),
        "adalora_of_conv1d": Example(AdaLoRA, tensors, delta.T, 0.7, CONV1D),
    }


def vera() -> dict[str, Example]:
    b, d, big_a, big_b = rand(10, 6), rand(11, 3), rand(12, 3, 12), rand(13, 10, 3)
    delta = np.diag(f64(b)) @ f64(big_b)[:6] @ np.diag(f64(d)) @ f64(big_a)[:, :8]
    tensors = {"vera_lambda_b": b, "vera_lambda_d": d, "vera_A": big_a, "vera_B": big_b}
    d2, a2 = rand(14, 6), rand(15, 6, 12)
    mean = np.diag(f64(b)) @ f64(big_b)[:6] @ np.diag(f64(d2)[:3]) @ f64(a2)[:3, :8]
    noisy = {"pvera_lambda_b": b, "pvera_lambda_d": d2, "pvera_A": a2, "pvera_B": big_b}
    return {
        "vera": Example(VeRA, tensors, delta, base=rand(16, 6, 8)),
        "vera_of_conv1d": Example(VeRA, tensors, delta.T, layout=CONV1D, base=rand(16, 8, 6)),
        "pvera": Example(PVeRA, noisy, mean, base=rand(16, 6, 8)),
    }


def ia3() -> dict[str, Example]:
    base, outputs, inputs, bias = rand(20, 5, 4), rand(21, 5, 1), rand(22, 1, 4), rand(23, 5)
    on_outputs, on_inputs = (np.diag(f64(v).ravel() - 1) for v in (outputs, inputs))
    kernel, channels, halves = rand(24, 6, 4, 3, 3), rand(25, 1, 6, 1, 1), rand(26, 1, 8, 1, 1)
    grouped = f64(kernel).copy()
    for group in range(2):
        for channel in range(4):
            grouped[3 * group : 3 * group + 3, channel] *= f64(halves)[0, 4 * group + channel, 0, 0] - 1
    return {
        "ia3": Example(IA3, {"ia3_l": outputs}, on_outputs @ f64(base), base=base),
        "ia3_bias": Example(
            IA3,
            {"ia3_l": outputs},
            on_outputs @ f64(base),
            base=base,
            bias=bias,
            bias_delta=on_outputs @ f64(bias),
        ),
        "ia3_feedforward": Example(IA3, {"ia3_l": inputs}, f64(base) @ on_inputs, base=base, bias=bias),
        "ia3_of_conv1d": Example(
            IA3,
            {"ia3_l": outputs},
            (on_outputs @ f64(base)).T,
            layout=CONV1D,
            base=base.T.contiguous(),
            bias=bias,
            bias_delta=on_outputs @ f64(bias),
        ),
        "ia3_feedforward_of_conv1d": Example(
            IA3, {"ia3_l": inputs}, (f64(base) @ on_inputs).T, layout=CONV1D, base=base.T.contiguous()
        ),
        "ia3_conv": Example(
            IA3,
            {"ia3_l": channels},
            f64(kernel) * (f64(channels).reshape(6, 1, 1, 1) - 1),
            base=kernel,
            settings={"feedforward": False},
        ),
        "ia3_grouped_conv_feedforward": Example(
            IA3, {"ia3_l": halves}, grouped, base=kernel, settings={"feedforward": True}
        ),
    }


def skew(upper: F64, size: int) -> F64:
    q, k = np.zeros((size, size)), 0
    for i in range(size):
        for j in range(i + 1, size):
            q[i, j], q[j, i], k = upper[k], -upper[k], k + 1
    return q


def exact(q: F64) -> F64:
    return (np.eye(len(q)) - q) @ np.linalg.inv(np.eye(len(q)) + q)


def block_diagonal(blocks: list[F64]) -> F64:
    n = sum(len(block) for block in blocks)
    whole, start = np.zeros((n, n)), 0
    for block in blocks:
        whole[start : start + len(block), start : start + len(block)] = block
        start += len(block)
    return whole


def oft() -> dict[str, Example]:
    base, triangles, shared = rand(30, 5, 8), 0.3 * rand(31, 2, 6), 0.3 * rand(32, 1, 6)
    q = [skew(row, 4) for row in f64(triangles)]
    series = {
        1: lambda q: np.eye(4),
        2: lambda q: np.eye(4) + 2 * q,
        3: lambda q: np.eye(4) + 2 * q + 2 * q @ q + q @ q @ q,
        4: lambda q: np.eye(4) + 2 * q + 2 * q @ q + q @ q @ q,
        6: lambda q: np.eye(4) + 2 * (q + q @ q + q @ q @ q + q @ q @ q @ q) + q @ q @ q @ q @ q,
    }
    radius = 0.5 / np.sqrt(2)
    tight = [m * min(1.0, radius / np.linalg.norm(m)) for m in q]
    kernel, one = rand(33, 3, 2, 2, 2), skew(f64(shared)[0], 4)

    def example(blocks: list[F64], tensors: torch.Tensor, **settings: object) -> Example:
        settings = {"terms": None, "radius": None, "shared": False} | settings
        delta = f64(base) @ block_diagonal(blocks).T - f64(base)
        return Example(OFT, {"oft_R": tensors}, delta, base=base, settings=settings)

    turn = block_diagonal([exact(m) for m in q])
    return {
        "oft": example([exact(m) for m in q], triangles),
        "oft_shared": example([exact(one)] * 2, shared, shared=True),
        "oft_constrained": example([exact(m) for m in tight], triangles, radius=0.5),
        "oft_loosely_constrained": example([exact(m) for m in q], triangles, radius=100.0),
        **{f"oft_neumann_{n}": example([f(m) for m in q], triangles, terms=n) for n, f in series.items() if n > 1},
        "oft_conv": Example(
            OFT,
            {"oft_R": triangles},
            (f64(kernel).reshape(3, 8) @ turn.T).reshape(3, 2, 2, 2) - f64(kernel),
            base=kernel,
            settings={"terms": None},
        ),
        "oft_of_conv1d": Example(
            OFT, {"oft_R": triangles}, turn @ f64(base).T - f64(base).T, layout=CONV1D, base=base.T.contiguous()
        ),
        "oft_embedding": Example(
            OFT,
            {"oft_embedding_R": triangles},
            f64(base) @ turn - f64(base),
            layout=Layout(transposed=True, embedding=True),
            base=base,
        ),
    }


def butterfly(blocks: F64) -> F64:
    """The product of all factors, with the permutations spelt out entry by entry."""
    factors, count, size, _ = blocks.shape
    n = count * size
    product = np.eye(n)
    for level in range(factors):
        order = list(range(n))
        if factors > 1:
            order = []
            for start in range(0, n, size * 2**level):
                halves = [list(range(h, h + size // 2)) for h in range(start, start + size * 2**level, size // 2)]
                order += [i for half in halves[0::2] + halves[1::2] for i in half]
        p = np.zeros((n, n))
        for row, column in enumerate(order):
            p[row, column] = 1
        turns = [exact(0.5 * (block - block.T)) for block in blocks[level]]
        product = p @ block_diagonal(turns) @ p.T @ product
    return product


def boft() -> dict[str, Example]:
    base, gains, kernel = rand(40, 5, 16), rand(41, 5, 1), rand(44, 5, 4, 2, 2)
    one, three = 0.5 * rand(42, 1, 4, 4, 4), 0.5 * rand(43, 3, 4, 4, 4)

    def delta(blocks: torch.Tensor) -> F64:
        return np.diag(f64(gains)[:, 0]) @ f64(base) @ butterfly(f64(blocks)).T - f64(base)

    turned = f64(kernel).reshape(5, 16) @ butterfly(f64(one)).T
    return {
        "boft": Example(BOFT, {"boft_R": one, "boft_s": gains}, delta(one), base=base),
        "boft_two_factors": Example(BOFT, {"boft_R": three[:2], "boft_s": gains}, delta(three[:2]), base=base),
        "boft_three_factors": Example(BOFT, {"boft_R": three, "boft_s": gains}, delta(three), base=base),
        "boft_of_conv1d": Example(
            BOFT, {"boft_R": one, "boft_s": gains}, delta(one).T, layout=CONV1D, base=base.T.contiguous()
        ),
        "boft_conv": Example(
            BOFT,
            {"boft_R": one, "boft_s": gains.T.contiguous()},
            (np.diag(f64(gains)[:, 0]) @ turned).reshape(5, 4, 2, 2) - f64(kernel),
            base=kernel,
        ),
    }


def hra() -> dict[str, Example]:
    base, u, kernel = rand(50, 5, 8), rand(51, 8, 3), rand(52, 3, 2, 2, 2)
    reflected = np.eye(8)
    for k in range(3):
        v = f64(u)[:, k] / np.linalg.norm(f64(u)[:, k])
        reflected = reflected @ (np.eye(8) - 2 * np.outer(v, v))
    basis = np.linalg.qr(f64(u))[0]
    mirrored = np.eye(8) - 2 * basis @ basis.T
    return {
        "hra": Example(HRA, {"hra_u": u}, f64(base) @ reflected - f64(base), base=base),
        "hra_orthogonal": Example(
            HRA, {"hra_u": u}, f64(base) @ mirrored - f64(base), base=base, settings={"orthogonal": True}
        ),
        "hra_conv": Example(
            HRA,
            {"hra_u": u},
            (f64(kernel).reshape(3, 8) @ reflected).reshape(3, 2, 2, 2) - f64(kernel),
            base=kernel,
        ),
    }


def shira() -> dict[str, Example]:
    values, places = rand(60, 4), torch.tensor([[0, 4, 2, 4], [7, 0, 3, 0]])
    delta = np.zeros((5, 8))
    for value, (row, column) in zip(f64(values), places.T.tolist(), strict=True):
        delta[row, column] += value  # the same place twice counts twice
    tensors = {"shira_weight": values, "shira_indices": places.int()}
    return {
        "shira": Example(SHiRA, tensors, delta, base=rand(61, 5, 8)),
        "shira_float_places": Example(SHiRA, tensors | {"shira_indices": places.float()}, delta, base=rand(61, 5, 8)),
    }


def tokens() -> dict[str, Example]:
    table, rows = rand(70, 9, 4), rand(71, 2, 4)
    delta = np.zeros((9, 4))
    many, all_new = rand(72, 5, 4), np.zeros((9, 4))
    for row, token in zip(f64(many), (8, 0, 3, 1, 6), strict=True):
        all_new[token] = row - f64(table)[token]
    delta[7], delta[2] = f64(rows)[0] - f64(table)[7], f64(rows)[1] - f64(table)[2]
    return {
        "trainable_tokens": Example(
            TrainableTokens,
            {"token_rows": rows},
            delta,
            layout=Layout(transposed=True, embedding=True),
            base=table,
            settings={"tokens": (7, 2)},
        ),
        "trainable_tokens_as_many_as_columns": Example(
            TrainableTokens,
            {"token_rows": many},
            all_new,
            layout=Layout(transposed=True, embedding=True),
            base=table,
            settings={"tokens": (8, 0, 3, 1, 6)},
        ),
    }


EXAMPLES = adalora() | vera() | ia3() | oft() | boft() | hra() | shira() | tokens()
