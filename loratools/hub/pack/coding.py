"""What an adapter of a pack stores of one target, written and read."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.errors import InputError
from loratools.hub.pack.layout import NORM, Numbers, PackTarget, Part, Shared
from loratools.linalg.diagonal import RIDGE, solved
from loratools.linalg.joint_diagonal import shrunk
from loratools.linalg.svd import truncate
from loratools.operators import LowRank, sum_of

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.hub.pack.members import Delta


@dataclass(frozen=True, eq=False)
class Pair:
    """One pair of bases as it is stored: vectors as rows, float64; atoms as rows, none for other methods."""

    left: Tensor  # (c, m)
    right: Tensor  # (c, n)
    atoms: Tensor | None = None  # (k, c * c)


def pair_of(data: Tensor, shared: Shared, shape: tuple[int, int], numbers: Numbers) -> Pair:
    """The bases in their bytes; ValueError where these are not those of such bases."""
    sizes = [numbers.size(*part) for part in shared.parts(shape)]
    if data.numel() != sum(sizes):
        raise ValueError(f"{data.numel()} bytes are not the {sum(sizes)} of such bases")
    pieces = data.split(sizes)
    return Pair(*(numbers.decode(d, *part) for d, part in zip(pieces, shared.parts(shape), strict=True)))


def encoded(
    delta: Delta, target: PackTarget, part: Part, pair: Pair | None, numbers: Numbers, penalty: float
) -> Tensor:
    """The bytes of one adapter's part of a target, `Part.size` of them: the best on these bases as they are stored.

    Coefficients are by least squares on the rounded bases, a core of factors the best of its rank on them; components
    of its own are the largest singular ones of what the rounded coefficients leave.
    """
    parts = [_bytes(struct.pack("<f", delta.norm))]
    whole = LowRank(delta.u * delta.s, delta.vt)
    known: LowRank | None = None
    if part.group >= 0:
        assert target.shared is not None
        assert pair is not None
        core = _core(delta, target.shared, part, pair, numbers, penalty)
        parts.append(core)
        known = _known(core, target.shared, part, pair, numbers)
    if part.rank:
        rest = whole if known is None else sum_of([whole, -known])
        assert isinstance(rest, LowRank)
        found = truncate(rest, min(part.rank, *rest.shape, rest.rank)).operator if rest.rank else rest
        assert isinstance(found, LowRank)
        for rows in (found.left.T, found.right):
            padded = torch.nn.functional.pad(rows, (0, 0, 0, part.rank - len(rows)))
            parts.append(numbers.encode(padded))
    return torch.cat(parts)


def decoded(data: Tensor, target: PackTarget, part: Part, pair: Pair | None, numbers: Numbers) -> LowRank:
    """The delta that `encoded` wrote, of rank `Part.width`; ValueError where the bytes are not such a part's."""
    if data.numel() != part.size(target.shape, target.shared, numbers):
        raise ValueError(f"{data.numel()} bytes are not those of such a part")
    (norm,) = struct.unpack("<f", data[:NORM].numpy().tobytes())
    own = data[NORM:]
    m, n = target.shape
    lefts, rights = [], []
    if part.group >= 0:
        assert target.shared is not None
        assert pair is not None
        size = target.shared.core_size(numbers, part.kept)
        known = _known(own[:size], target.shared, part, pair, numbers)
        own = own[size:]
        lefts.append(known.left)
        rights.append(known.right)
    if part.rank:
        split = numbers.size(part.rank, m)
        lefts.append(numbers.decode(own[:split], part.rank, m).T)
        rights.append(numbers.decode(own[split:], part.rank, n))
    if part.width(target.shared) > sum(x.shape[1] for x in lefts):  # nothing is left of it
        lefts.append(torch.zeros(m, 1, dtype=torch.float64))
        rights.append(torch.zeros(1, n, dtype=torch.float64))
    return LowRank(torch.cat(lefts, dim=1), torch.cat(rights), norm)


def _core(delta: Delta, shared: Shared, part: Part, pair: Pair, numbers: Numbers, penalty: float) -> Tensor:
    sides = pair.left @ (delta.u * delta.s), pair.right @ delta.vt.T  # (c, r) each
    seen = sides[0] @ sides[1].T  # (c, c)
    grams = pair.left @ pair.left.T, pair.right @ pair.right.T
    if shared.method in ("joint", "cluster"):
        if part.kept:
            return torch.cat([numbers.encode(rows) for rows in _factors(sides, grams, part.kept)])
        return numbers.encode(solved(grams[1], solved(grams[0], seen.T).T))
    if shared.method == "atoms":
        assert pair.atoms is not None
        cores = pair.atoms.reshape(-1, shared.width, shared.width)
        gram = pair.atoms @ (grams[0] @ cores @ grams[1]).flatten(1).T
        return numbers.plain().encode(solved(gram, (cores * seen).sum((1, 2)).unsqueeze(0)))
    gram, side = grams[0] * grams[1], seen.diagonal().unsqueeze(0)
    s = solved(gram, side)
    if shared.method == "diag":
        return numbers.plain().encode(s)
    s = shrunk(gram, side, s, penalty, passes=8)[0]
    places = s.abs().argsort(descending=True, stable=True)[: part.kept].sort().values
    fitted = solved(gram[places][:, places], side[:, places])
    values = numbers.plain().encode(fitted)
    return torch.cat([places.to(torch.int16).view(torch.uint8), values])


def _factors(sides: tuple[Tensor, Tensor], grams: tuple[Tensor, Tensor], rank: int) -> list[Tensor]:
    """Rows (rank, c) of both factors of the core of that rank whose delta is nearest to the one that bases saw so.

    Stored bases are only nearly orthonormal: singular values are taken along orthonormal bases of their spans.
    """
    whitened, back = [], []
    for side, gram in zip(sides, grams, strict=True):
        values, vectors = torch.linalg.eigh(gram)
        live = values > RIDGE * values[-1]
        inverse = vectors * torch.where(live, 1 / values.clamp_min(1e-300).sqrt(), 0.0)  # (c, c): gram^-1/2, turned
        whitened.append(inverse.T @ side)
        back.append(inverse)
    core = LowRank(whitened[0], whitened[1].T)
    best = truncate(core, min(rank, *core.shape, core.rank)).operator if core.rank else core
    assert isinstance(best, LowRank)
    found = (back[0] @ best.left).T, (back[1] @ best.right.T).T
    return [torch.nn.functional.pad(rows, (0, 0, 0, rank - len(rows))) for rows in found]


def _known(core: Tensor, shared: Shared, part: Part, pair: Pair, numbers: Numbers) -> LowRank:
    c = shared.width
    if shared.method in ("joint", "cluster"):
        if part.kept:
            left, right = (numbers.decode(half, part.kept, c) for half in core.split(len(core) // 2))
            return LowRank(pair.left.T @ left.T, right @ pair.right)
        return LowRank(pair.left.T @ numbers.decode(core, c, c), pair.right)
    if shared.method == "atoms":
        assert pair.atoms is not None
        weights = numbers.plain().decode(core, 1, shared.count)
        return LowRank(pair.left.T @ (weights @ pair.atoms).reshape(c, c), pair.right)
    if shared.method == "diag":
        return LowRank(pair.left.T * numbers.plain().decode(core, 1, c), pair.right)
    split = 2 * part.kept
    places = core[:split].clone().view(torch.int16).long()
    if bool(((places < 0) | (places >= c)).any()):
        raise ValueError(f"coefficients of a basis of {c} vectors at other places")
    s = numbers.plain().decode(core[split:], 1, part.kept)
    return LowRank(pair.left[places].T * s, pair.right[places])


def _bytes(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def damaged(what: str, error: Exception) -> InputError:
    """The error for a pack whose bytes do not fit together."""
    return InputError(f"{what}: is damaged ({error}); unpack it from a copy")
