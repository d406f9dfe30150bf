"""MiSS, C3A, HiRA, GraLoRA, DeLoRA and RoAd, entry by entry."""

from __future__ import annotations

import math

import numpy as np
import torch
from family_examples.base import F64, Example, f64, rand

from loratools.families import C3A, DeLoRA, GraLoRA, HiRA, MiSS, RoAd
from loratools.families.base import Layout

CONV1D = Layout(transposed=True)
TABLE = Layout(transposed=True, embedding=True)


def miss() -> dict[str, Example]:
    block, small, squares, base = rand(0, 3, 8), rand(1, 3, 4), rand(2, 4, 2, 2), rand(3, 8, 10)
    plain = np.array([[f64(block)[j % 3, i] for j in range(10)] for i in range(8)])
    mini = np.array([[f64(small)[j % 3, i % 4] for j in range(10)] for i in range(8)])
    bat = np.zeros((8, 10))
    for p in range(4):
        m = f64(squares)[p]
        for q in range(5):
            w = f64(base)[2 * p : 2 * p + 2, 2 * q : 2 * q + 2]
            bat[2 * p : 2 * p + 2, 2 * q : 2 * q + 2] = w @ m + m
    return {
        "miss": Example(MiSS, {"miss_block": block}, plain, base=base),
        "miss_mini": Example(MiSS, {"miss_block": small}, mini, settings={"mini": True}, base=base),
        "miss_bat": Example(MiSS, {"miss_block": squares}, bat, base=base),
    }


def c3a() -> dict[str, Example]:
    kernel = rand(10, 2, 3, 4)
    delta = np.zeros((8, 12))
    for i in range(8):
        for j in range(12):
            delta[i, j] = f64(kernel)[i // 4, j // 4, (j % 4 - i % 4) % 4] / 12
    return {"c3a": Example(C3A, {"c3a_kernel": kernel}, delta)}


def hira() -> dict[str, Example]:
    a, b, base = rand(20, 3, 7), rand(21, 5, 3), rand(22, 5, 7)
    delta = f64(base) * (f64(b) @ f64(a))
    ca, cb, kernel = rand(23, 2, 4, 3, 3), rand(24, 6, 2, 1, 1), rand(25, 6, 4, 3, 3)
    conv = f64(kernel) * np.einsum("or,rikl->oikl", f64(cb)[:, :, 0, 0], f64(ca))
    pair = {"hira_A": a, "hira_B": b}
    table = {"hira_embedding_A": rand(26, 2, 9), "hira_embedding_B": rand(27, 5, 2)}
    words = rand(28, 9, 5)
    rows = f64(words) * (f64(table["hira_embedding_B"]) @ f64(table["hira_embedding_A"])).T
    return {
        "hira": Example(HiRA, pair, delta, base=base),
        "hira_of_conv1d": Example(HiRA, pair, delta.T, layout=CONV1D, base=base.T.contiguous()),
        "hira_conv": Example(HiRA, {"hira_A": ca, "hira_B": cb}, conv, base=kernel),
        "hira_table": Example(HiRA, table, rows, layout=TABLE, base=words),
    }


def grid(a: F64, b: F64) -> F64:
    """The blocks one after another, as the paper draws them."""
    k, part = a.shape[0], a.shape[2] // a.shape[0]
    return np.block(
        [
            [(a[q][:, p * part : (p + 1) * part] @ b[p][q * part : (q + 1) * part, :]).T for q in range(k)]
            for p in range(k)
        ]
    )


def gralora() -> dict[str, Example]:
    a, b = rand(30, 2, 10, 4), rand(31, 2, 4, 9)
    wide_a, wide_b = rand(32, 2, 3, 8), rand(33, 2, 8, 2)
    down, up = rand(34, 3, 20), rand(35, 18, 3)
    general = {"gralora_A_general": down, "gralora_B_general": up}
    dense_general = {"gralora_A_general": rand(36, 1, 6), "gralora_B_general": rand(37, 4, 1)}
    extra = f64(dense_general["gralora_B_general"]) @ f64(dense_general["gralora_A_general"])
    blocks = {"gralora_A": a, "gralora_B": b}
    wide = {"gralora_A": wide_a, "gralora_B": wide_b}
    return {
        "gralora": Example(GraLoRA, blocks, 0.5 * grid(f64(a), f64(b)), 0.5),
        "gralora_of_conv1d": Example(GraLoRA, blocks, grid(f64(a), f64(b)).T, layout=CONV1D),
        "gralora_hybrid": Example(GraLoRA, blocks | general, 2 * (grid(f64(a), f64(b)) + f64(up) @ f64(down)), 2.0),
        "gralora_full_rank": Example(GraLoRA, wide, grid(f64(wide_a), f64(wide_b))),
        "gralora_hybrid_full_rank": Example(GraLoRA, wide | dense_general, grid(f64(wide_a), f64(wide_b)) + extra),
    }


def delora() -> dict[str, Example]:
    a, b, norms = rand(40, 3, 8), rand(41, 6, 3), rand(42, 8).abs()
    a[2] *= 1e-6  # a norm that is raised to 1e-4
    delta = np.zeros((6, 8))
    for k in range(3):
        x, y = f64(a)[k], f64(b)[:, k]
        delta += 1.7 / 3 * np.outer(y, x) / (max(np.linalg.norm(x), 1e-4) * max(np.linalg.norm(y), 1e-4))
    delta *= f64(norms)
    strength = torch.tensor([1.7], dtype=torch.float64)
    tensors = {"delora_A": a, "delora_B": b, "delora_lambda": strength, "delora_w_norm": norms}
    return {"delora": Example(DeLoRA, tensors, delta)}


def rotation(angles: F64, lengths: F64, m: int, group: int, variant: int) -> F64:
    """R, two entries of a row at a time."""
    r, half = np.zeros((m, m)), group // 2
    for i in range(m):
        start, place = i - i % group, i % group
        partner = start + (place + half) % group
        if variant == 1:
            near = far = start // 2 + place % half
        elif variant == 2:
            near = far = i
        else:
            near, far = 2 * start + place, 2 * start + group + place
        r[i, i] = lengths[near] * math.cos(angles[near])
        r[i, partner] = (-1 if place < half else 1) * lengths[far] * math.sin(angles[far])
    return r


def road() -> dict[str, Example]:
    base, bias = rand(50, 12, 5), rand(51, 12)
    examples = {}
    for variant, count in ((1, 6), (2, 12), (4, 24)):
        angles, lengths = rand(52, count), rand(53, count)
        change = rotation(f64(angles), f64(lengths), 12, 4, variant) - np.eye(12)
        examples[f"road_{variant}"] = Example(
            RoAd,
            {"road_theta": angles, "road_alpha": lengths},
            change @ f64(base),
            settings={"variant": variant, "group": 4},
            base=base,
            bias=bias,
            bias_delta=change @ f64(bias),
        )
    return examples


EXAMPLES = miss() | c3a() | hira() | gralora() | delora() | road()
