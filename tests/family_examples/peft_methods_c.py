"""FourierFT, WaveFT, VB-LoRA, Uni-LoRA, TinyLoRA and RandLoRA, by sums over single entries and places."""

from __future__ import annotations

import math

import numpy as np
import torch
from family_examples.base import F64, Example, f64, rand

from loratools.families import FourierFT, RandLoRA, TinyLoRA, UniLoRA, VBLoRA, WaveFT
from loratools.families.base import Layout

CONV1D = Layout(transposed=True)


def places(entries: int, count: int, seed: int) -> list[int]:
    return torch.randperm(entries, generator=torch.Generator().manual_seed(seed))[:count].tolist()


def fourier() -> dict[str, Example]:
    (m, n), spectrum = (6, 5), rand(0, 4)
    delta = np.zeros((m, n))
    for value, place in zip(f64(spectrum), places(m * n, 4, 9), strict=True):
        u, v = divmod(place, n)
        for i in range(m):
            for j in range(n):
                delta[i, j] += value * math.cos(2 * math.pi * (u * i / m + v * j / n)) / (m * n)
    tensors, settings, base = {"fourierft_spectrum": spectrum}, {"seed": 9}, rand(1, m, n)
    return {
        "fourierft": Example(FourierFT, tensors, 3 * delta, 3.0, settings=settings, base=base),
        "fourierft_of_conv1d": Example(
            FourierFT, tensors, delta.T, layout=CONV1D, settings=settings, base=base.T.contiguous()
        ),
    }


def haar() -> dict[str, Example]:
    (m, n), spectrum = (6, 7), rand(10, 9)  # an odd side: one column of padding, which is cut off
    found, bands = places(m * n, 9, 4), np.zeros((6, 8))
    raw = np.zeros((m, n))
    for value, place in zip(f64(spectrum), found, strict=True):
        bands[place // n, place % n] = raw[place // n, place % n] = value
    signs = {(0, 0): (1, 1, 1, 1), (0, 1): (1, 1, -1, -1), (1, 0): (1, -1, 1, -1), (1, 1): (1, -1, -1, 1)}
    delta = np.zeros((6, 8))
    for i in range(6):
        for j in range(8):
            a, h, v, d = (bands[i // 2 + 3 * x, j // 2 + 4 * y] for x, y in ((0, 0), (0, 1), (1, 0), (1, 1)))
            delta[i, j] = np.dot(signs[i % 2, j % 2], (a, h, v, d)) / 2
    tensors, base = {"waveft_spectrum": spectrum}, rand(11, m, n)
    return {
        "waveft": Example(WaveFT, tensors, 2 * delta[:, :7], 2.0, settings={"seed": 4, "wavelet": "db1"}, base=base),
        "waveft_untransformed": Example(WaveFT, tensors, raw, settings={"seed": 4, "wavelet": None}, base=base),
    }


def mixed(logits: F64, bank: F64, k: int) -> F64:
    """(rows, columns, v)"""
    found = np.zeros((*logits.shape[:2], bank.shape[1]))
    for i in range(logits.shape[0]):
        for j in range(logits.shape[1]):
            top = np.argsort(-logits[i, j])[:k]
            weights = np.exp(logits[i, j, top]) / np.exp(logits[i, j, top]).sum()
            found[i, j] = sum(w * bank[t] for w, t in zip(weights, top, strict=True))
    return found


def vblora() -> dict[str, Example]:
    logits_a, logits_b, bank = rand(20, 3, 4, 9), rand(21, 2, 3, 9), rand(22, 9, 5)
    a = mixed(f64(logits_a), f64(bank), 2).reshape(3, 20)
    b = np.concatenate([block.T for block in mixed(f64(logits_b), f64(bank), 2)])
    whole = {"vblora_logits_A": logits_a, "vblora_logits_B": logits_b, "vblora_vector_bank": bank}
    top: dict[str, torch.Tensor] = {"vblora_vector_bank": bank}
    for side, logits in (("A", logits_a), ("B", logits_b)):
        values, indices = logits.double().topk(2)
        top[f"vblora_logits_{side}_topk_indices"] = indices.to(torch.uint8)
        top[f"vblora_logits_{side}_topk_weights"] = values.softmax(-1)[..., :-1].contiguous()
    base = rand(23, 10, 20)
    return {
        "vblora": Example(VBLoRA, whole, b @ a, settings={"topk": 2}, base=base),
        "vblora_largest_alone": Example(VBLoRA, top, b @ a, settings={"topk": 2}, base=base),
    }


def unilora() -> dict[str, Example]:
    theta, scales_a, scales_b = rand(30, 6), rand(31, 2, 7), rand(32, 5, 2)
    draw = torch.Generator().manual_seed(33)
    index_a, index_b = (torch.randint(0, 6, shape, generator=draw) for shape in ((2, 7), (5, 2)))
    a = np.array([[f64(theta)[index_a[i, j]] * f64(scales_a)[i, j] for j in range(7)] for i in range(2)])
    b = np.array([[f64(theta)[index_b[i, j]] * f64(scales_b)[i, j] for j in range(2)] for i in range(5)])
    tensors = {
        "unilora_indices_A": index_a,
        "unilora_indices_B": index_b,
        "unilora_scales_A": scales_a,
        "unilora_scales_B": scales_b,
        "unilora_theta_d": theta,
    }
    chosen = np.repeat(np.arange(6), 7)  # of 45 entries, 10 of which belong to other targets
    generator = np.random.default_rng(8)
    chosen = np.concatenate([chosen, generator.choice(6, size=3, replace=False)])
    generator.shuffle(chosen)
    entries = [float(theta[i]) / math.sqrt((chosen == i).sum()) for i in chosen]
    drawn_a = np.array([[entries[10 + 7 * i + j] for j in range(7)] for i in range(2)])
    drawn_b = np.array([[entries[24 + 2 * i + j] for j in range(2)] for i in range(5)])
    return {
        "unilora": Example(UniLoRA, tensors, b @ a),
        "unilora_drawn_again": Example(
            UniLoRA,
            {"unilora_place": torch.tensor([10, 2]), "unilora_theta_d": theta},
            -2 * drawn_b @ drawn_a,
            -2.0,
            layout=Layout(shape=(5, 7)),
            settings={"seed": 8, "length": 6, "total": 45},
        ),
    }


def tinylora() -> dict[str, Example]:
    a, b, v = rand(40, 3, 8), rand(41, 6, 3), rand(42, 5)
    drawn = torch.normal(0.0, 3**-0.5, size=(5, 3, 3), generator=torch.Generator().manual_seed(77))
    core = sum(float(v[u]) * f64(drawn[u]) for u in range(5))
    tensors = {"tinylora_A": a, "tinylora_B": b, "tinylora_v": v}
    delta = f64(b) @ core @ f64(a)
    return {
        "tinylora": Example(TinyLoRA, tensors | {"tinylora_P": drawn}, delta, settings={"seed": 77}),
        "tinylora_drawn_again": Example(TinyLoRA, tensors, delta, settings={"seed": 77}),
    }


def randlora() -> dict[str, Example]:
    left, right, shared_a, shared_b = rand(50, 3, 2), rand(51, 2, 5), rand(52, 3, 1, 6), rand(53, 9, 3, 3)
    tall = np.zeros((8, 5))
    for p in range(6):  # columns of B by base and rank, rows of A by rank and base
        column = f64(shared_b)[:8, p // 3, p % 3]
        row = f64(left)[p // 2, p % 2] * f64(shared_a)[p // 2, 0, :5] * f64(right)[p % 2]
        tall += np.outer(column, row)
    tensors = {"randlora_lambda": left, "randlora_gamma": right, "randlora_A": shared_a, "randlora_B": shared_b}
    return {
        "randlora_tall": Example(RandLoRA, tensors, 0.5 * tall, 0.5, base=rand(54, 8, 5)),
        "randlora_wide": Example(RandLoRA, tensors, tall.T, base=rand(54, 5, 8)),
    }


EXAMPLES = fourier() | haar() | vblora() | unilora() | tinylora() | randlora()
