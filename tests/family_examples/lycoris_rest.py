"""What LyCORIS has beside factored updates: differences, rotations, gains, and magnitudes on LoHa and LoKr."""

from __future__ import annotations

from itertools import product

import numpy as np
import torch
from family_examples.base import F64, Example, f64, rand
from torch import Tensor

from loratools.families import DoHa, DoKr, Full, GLoRA, LycorisBOFT, LycorisIA3, LycorisOFT
from loratools.families.base import Layout

ALONG_INPUTS = Layout(magnitude_axis=1)


def full() -> dict[str, Example]:
    line, conv, bias = rand(0, 5, 7), rand(1, 4, 3, 3, 2), rand(2, 6)
    return {
        "full": Example(Full, {"diff": line}, f64(line)),
        "full_of_conv1d": Example(Full, {"diff": line}, f64(line), layout=Layout(transposed=True)),
        "full_conv": Example(Full, {"diff": conv}, f64(conv)),
        "full_bias": Example(Full, {"diff": bias}, f64(bias)),
    }


def glora() -> dict[str, Example]:
    def example(base: Tensor, rank: int, scale: float, core: tuple[int, ...] = ()) -> Example:
        (m, n), kernel = base.shape[:2], tuple(base.shape[2:])
        ones = (1,) * len(kernel)
        t = {
            "glora_a1": rand(10, n, rank, *ones),
            "glora_a2": rand(11, rank, n, *ones),
            "glora_b1": rand(12, m, rank, *ones),
            "glora_b2": rand(13, rank, n, *(ones if core else kernel)),
        } | ({"glora_bm": rand(14, rank, rank, *core)} if core else {})
        a1, a2, b1 = (f64(t[f"glora_{name}"]).reshape(t[f"glora_{name}"].shape[:2]) for name in ("a1", "a2", "b1"))
        b2, weight = f64(t["glora_b2"]), f64(base)
        delta = np.zeros(base.shape)
        for tap in product(*(range(k) for k in kernel)):
            at = (slice(None), slice(None), *tap)
            down = f64(t["glora_bm"])[at] @ b2.reshape(b2.shape[:2]) if core else b2[at]
            delta[at] = scale * (b1 @ down + weight[at] @ a1 @ a2)
        return Example(GLoRA, t, delta, scale, base=base)

    return {
        "glora": example(rand(15, 9, 8), 2, 0.5),
        "glora_full_rank": example(rand(16, 5, 6), 3, -2.0),
        "glora_conv": example(rand(17, 24, 9, 3, 1), 2, 0.5),
        "glora_conv_full_rank": example(rand(17, 6, 4, 3, 3), 2, 0.5),
        "glora_core": example(rand(18, 25, 9, 3, 1), 2, 1.5, (3, 1)),
    }


def cayley(x: F64, factor: float = 1.0) -> F64:
    q = factor * (x - x.T)
    return (np.eye(len(x)) + q) @ np.linalg.inv(np.eye(len(x)) - q)


def shrink(blocks: Tensor, bound: float) -> float:
    """The factor that brings the skew parts of all blocks together to the norm `bound`, where theirs is larger."""
    x = f64(blocks).reshape(-1, *blocks.shape[-2:])
    norm = np.sqrt(sum(np.sum((b - b.T) ** 2) for b in x))
    return float(min(1.0, bound / norm))


def oft() -> dict[str, Example]:
    def example(base: Tensor, blocks: Tensor, constraint: float = 0.0, rescale: Tensor | None = None) -> Example:
        k, b, _ = blocks.shape
        factor = shrink(blocks, constraint * k * b) if constraint > 0 else 1.0
        rotation = np.zeros((k * b, k * b))
        for i in range(k):
            rotation[i * b : (i + 1) * b, i * b : (i + 1) * b] = cayley(f64(blocks[i]), factor).T
        weight = f64(base).reshape(k * b, -1)
        turned = rotation @ weight * (1.0 if rescale is None else f64(rescale).reshape(-1, 1))
        tensors = {"oft_blocks": blocks} | ({} if rescale is None else {"rescale": rescale})
        settings = {"alpha": constraint} if constraint else {}
        return Example(LycorisOFT, tensors, (turned - weight).reshape(base.shape), settings=settings, base=base)

    return {
        "oft": example(rand(30, 12, 7), rand(31, 4, 3, 3)),
        "oft_conv_rescaled": example(rand(32, 6, 4, 3, 3), rand(33, 3, 2, 2), rescale=rand(34, 6, 1, 1, 1)),
        "oft_constrained": example(rand(35, 12, 7), rand(36, 4, 3, 3), 0.05, rand(37, 12, 1)),
        "oft_within_its_constraint": example(rand(38, 12, 7), rand(39, 4, 3, 3), 9.0),
    }


def boft() -> dict[str, Example]:
    def example(base: Tensor, blocks: Tensor, constraint: float = 0.0, rescale: Tensor | None = None) -> Example:
        stages, k, b, _ = blocks.shape
        m = k * b
        factor = shrink(blocks, constraint * m) if constraint > 0 else 1.0
        weight = f64(base).reshape(m, -1)
        turned = weight
        for i in range(stages):
            apart = 2**i * b // 2
            # Within a group of 2 * apart rows, those of the two halves interleave; blocks take b in that order.
            order = [
                group + half * apart + j for group in range(0, m, 2 * apart) for j in range(apart) for half in (0, 1)
            ]
            after = np.zeros_like(turned)
            for block in range(k):
                rows = order[block * b : (block + 1) * b]
                after[rows] = cayley(f64(blocks[i, block]), factor) @ turned[rows]
            turned = after
        turned = turned * (1.0 if rescale is None else f64(rescale).reshape(-1, 1))
        tensors = {"boft_blocks": blocks} | ({} if rescale is None else {"rescale": rescale})
        settings = {"alpha": constraint} if constraint else {}
        return Example(LycorisBOFT, tensors, (turned - weight).reshape(base.shape), settings=settings, base=base)

    return {
        "boft": example(rand(50, 16, 7), rand(51, 3, 4, 4, 4)),
        "boft_conv_rescaled": example(rand(52, 12, 3, 3, 3), rand(53, 2, 6, 2, 2), rescale=rand(54, 12, 1, 1, 1)),
        "boft_constrained": example(rand(55, 32, 5), rand(56, 4, 8, 4, 4), 0.05),
    }


def ia3() -> dict[str, Example]:
    line, conv = rand(70, 6, 8), rand(71, 5, 4, 3, 2)
    outputs, inputs, per_map, per_channel = rand(72, 6), rand(73, 8), rand(74, 1, 5, 1, 1), rand(75, 1, 4, 1, 1)

    def example(base: Tensor, gains: Tensor, on_input: Tensor, delta: F64) -> Example:
        return Example(LycorisIA3, {"ia3_weight": gains, "on_input": on_input}, delta, base=base)

    return {
        "ia3_lycoris": example(line, outputs, torch.tensor(0), np.einsum("oi,o->oi", f64(line), f64(outputs))),
        "ia3_lycoris_inputs": example(line, inputs, torch.tensor(1), np.einsum("oi,i->oi", f64(line), f64(inputs))),
        "ia3_lycoris_conv": example(
            conv, per_map, torch.tensor(0), np.einsum("oikl,o->oikl", f64(conv), f64(per_map).ravel())
        ),
        "ia3_lycoris_conv_inputs": example(
            conv, per_channel, torch.tensor(1.0), np.einsum("oikl,i->oikl", f64(conv), f64(per_channel).ravel())
        ),
    }


def with_magnitude(base: Tensor, direction: F64, magnitude: Tensor, axis: int) -> F64:
    v, weight = f64(base) + direction.reshape(base.shape), f64(base)
    result = np.zeros_like(v)
    for channel, size in enumerate(f64(magnitude).ravel()):
        at = (channel,) if axis == 0 else (slice(None), channel)
        result[at] = size * v[at] / np.linalg.norm(v[at])
    return result - weight


def magnitudes() -> dict[str, Example]:
    line, conv = rand(80, 6, 8), rand(81, 6, 4, 3, 3)
    loha = {f"hada_w{i}_{side}": rand(82 + 2 * i + (side == "b"), *shape) for i in (1, 2) for side, shape in
            (("a", (6, 2)), ("b", (2, 8)))}  # fmt: skip
    haha = {**loha, "hada_w1_b": rand(90, 2, 36), "hada_w2_b": rand(91, 2, 36)}
    lokr = {"lokr_w1": rand(92, 2, 4), "lokr_w2_a": rand(93, 3, 1), "lokr_w2_b": rand(94, 1, 2)}
    kernel = {"lokr_w1": rand(95, 3, 2), "lokr_w2": rand(96, 2, 2, 3, 3)}

    def of_loha(t: dict[str, Tensor]) -> F64:
        return 0.5 * (f64(t["hada_w1_a"]) @ f64(t["hada_w1_b"])) * (f64(t["hada_w2_a"]) @ f64(t["hada_w2_b"]))

    kron = -2.0 * np.kron(f64(lokr["lokr_w1"]), f64(lokr["lokr_w2_a"]) @ f64(lokr["lokr_w2_b"]))
    kron_conv = np.zeros((6, 4, 3, 3))
    for i, j in product(range(3), range(3)):
        kron_conv[:, :, i, j] = np.kron(f64(kernel["lokr_w1"]), f64(kernel["lokr_w2"])[:, :, i, j])
    cases = {
        "doha": (DoHa, loha, of_loha(loha), line, 0.5),
        "doha_conv": (DoHa, haha, of_loha(haha), conv, 0.5),
        "dokr": (DoKr, lokr, kron, line, -2.0),
        "dokr_conv": (DoKr, kernel, kron_conv, conv, 1.0),
    }
    examples = {}
    for name, (family, tensors, direction, base, scale) in cases.items():
        ones = (1,) * (base.ndim - 2)
        outputs, inputs = rand(97, base.shape[0], 1, *ones), rand(98, 1, base.shape[1], *ones)
        examples[name] = Example(
            family, {**tensors, "magnitude": outputs}, with_magnitude(base, direction, outputs, 0), scale, base=base
        )
        examples[f"{name}_inputs"] = Example(
            family, {**tensors, "magnitude": inputs}, with_magnitude(base, direction, inputs, 1), scale, ALONG_INPUTS,
            base=base,
        )  # fmt: skip
    return examples


EXAMPLES = full() | glora() | oft() | boft() | ia3() | magnitudes()
