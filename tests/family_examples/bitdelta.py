"""BitDelta: single bits of single words."""

from __future__ import annotations

import numpy as np
import torch
from family_examples.base import F64, Example

from loratools.families import BitDelta


def unpacked(mask: torch.Tensor) -> F64:
    """(m, n): bit i of word k of column j is the sign from input 32 k + i to output j."""
    words, rows = mask.shape
    out = np.zeros((rows, 32 * words))
    for k in range(words):
        for j in range(rows):
            word = int(mask[k, j]) % 2**32
            for i in range(32):
                out[j, 32 * k + i] = 1.0 if word >> i & 1 else -1.0
    return out


def examples() -> dict[str, Example]:
    generator = torch.Generator().manual_seed(60)
    mask = torch.randint(-(2**31), 2**31 - 1, (3, 5), generator=generator).to(torch.int32)
    mask[0, 0], mask[1, 1] = -1, 0  # all plus, all minus
    coeff = torch.tensor(0.0125)
    tensors = {"mask": mask, "coeff": coeff}
    return {
        "bitdelta": Example(BitDelta, tensors, float(coeff) * unpacked(mask)),
        "bitdelta_scaled": Example(BitDelta, tensors, -3 * float(coeff) * unpacked(mask), -3.0),
        "bitdelta_vector": Example(BitDelta, {**tensors, "coeff": coeff[None]}, float(coeff) * unpacked(mask)),
    }


EXAMPLES = examples()
