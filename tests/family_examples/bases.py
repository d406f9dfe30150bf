"""TeRA, entry by entry of the tensor, and S2-LoRA, Block-LoRA and LoRA-XS, term by term."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import torch
from family_examples.base import Example, f64, rand

from loratools.families import BlockLoRA, LatentLoRA, LoRAXS, S2LoRA, TeRA
from loratools.families.base import Layout


def tera(outputs: tuple[int, ...], inputs: tuple[int, ...], ranks: tuple[int, ...], scale: float) -> Example:
    sizes = outputs + inputs
    generator = torch.Generator().manual_seed(11)
    uniform = [torch.rand(shape, generator=generator) for shape in (ranks, *zip(sizes, ranks, strict=True))]
    core, *factors = [(2 * u.double().numpy() - 1) * 3**0.5 for u in uniform]
    d = torch.randn(sum(ranks), generator=torch.Generator().manual_seed(1))
    pieces = np.split(d.double().numpy(), np.cumsum(ranks)[:-1])
    tensor = np.zeros(sizes)
    for place in itertools.product(*(range(r) for r in ranks)):
        term = np.array(core[place])
        for factor, piece, r in zip(factors, pieces, place, strict=True):
            term = np.multiply.outer(term, factor[:, r] / len(piece) ** 0.5 * piece[r])
        tensor += term
    shape = (int(np.prod(outputs)), int(np.prod(inputs)))
    checksum = hashlib.sha256(b"".join(u.numpy().tobytes() for u in uniform)).hexdigest()[:16]
    settings = {"seed": 11, "outputs": outputs, "inputs": inputs, "ranks": ranks, "checksum": checksum}
    return Example(
        TeRA, {"tera_d": d}, scale * tensor.reshape(shape), scale, layout=Layout(shape=shape), settings=settings
    )


def s2lora() -> dict[str, Example]:
    left, right, s = rand(20, 6, 4), rand(21, 4, 9), rand(22, 4)
    shared = {"s2lora_P": left, "s2lora_Q": right}
    whole = sum(float(s[k]) * np.outer(f64(left)[:, k], f64(right)[k]) for k in range(4))
    some = -3 * sum(float(s[i]) * np.outer(f64(left)[:, k], f64(right)[k]) for i, k in enumerate((3, 1)))
    places = torch.tensor([3, 1], dtype=torch.int16)
    return {
        "s2lora": Example(S2LoRA, {"s2lora_s": s, **shared}, whole, layout=Layout(shape=(6, 9))),
        "s2lora_sparse": Example(
            S2LoRA, {"s2lora_s": s[:2], "s2lora_places": places, **shared}, some, -3.0, layout=Layout(shape=(6, 9))
        ),
    }


def blocklora() -> dict[str, Example]:
    a, b = rand(30, 2, 7), rand(31, 3, 5, 2)
    delta = sum(f64(b)[k] @ f64(a) for k in range(3))
    tensors = {"blocklora_A": a, "blocklora_B": b}
    return {
        "blocklora": Example(BlockLoRA, tensors, delta),
        "blocklora_of_conv1d": Example(BlockLoRA, tensors, -0.5 * delta.T, -0.5, layout=Layout(transposed=True)),
    }


def latent() -> dict[str, Example]:
    a, b, r, base = rand(40, 3, 7), rand(41, 5, 3), rand(42, 3, 3), rand(43, 5, 7)
    folded = sum(float(r[i, j]) * np.outer(f64(b)[:, i], f64(a)[j]) for i in range(3) for j in range(3))
    u, s, vt = np.linalg.svd(f64(base))
    of_base = np.zeros((5, 7))
    for i in range(3):
        for j in range(3):
            signs = [np.sign(u[np.abs(u[:, k]).argmax(), k]) for k in (i, j)]  # the largest entry of u is positive
            of_base += float(r[i, j]) * signs[0] * signs[1] * s[j] * np.outer(u[:, i], vt[j])
    return {
        "latent": Example(LatentLoRA, {"latent_A": a, "latent_B": b, "latent_R": r}, 0.5 * folded, 0.5),
        "xs": Example(LoRAXS, {"loraxs_R": r}, -2 * of_base, -2.0, base=base),
        "xs_of_conv1d": Example(
            LoRAXS, {"loraxs_R": r}, of_base.T, layout=Layout(transposed=True), base=base.T.contiguous()
        ),
    }


TERA = {
    "tera": tera((2, 3), (2, 4), (2, 1, 2, 3), 1.0),
    "tera_low_rank": tera((5, 6), (4, 7), (2, 1, 2, 2), -0.5),
    "tera_one_side_whole": tera((7,), (2, 2, 3), (3, 2, 2, 1), 2.0),
}
EXAMPLES = TERA | s2lora() | blocklora() | latent()
