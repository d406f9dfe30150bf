"""Walsh-Hadamard transforms of any length for which a matrix is known: powers of two, and these times 12, 20, 28, ...

H_n = h_K (x) S, with S of Sylvester, in its natural order, and h_K of Paley or of Williamson: H_n H_n^T = n I, entries
-1 and 1. K is the first of `CORES` that divides n and leaves a power of two, as in the code of QWHA, else 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final, final

from loratools._lazy import torch
from loratools.errors import AdapterError
from loratools.operators import Transform

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

CORES: Final = (172, 156, 140, 108, 60, 52, 36, 28, 40, 20, 12)  # in this order, for several may divide a length
_PALEY: Final = (12, 20, 60, 108, 140)  # K - 1 is a prime, 3 modulo 4
_CONFERENCE: Final = (28, 36)  # K / 2 - 1 is a prime, 1 modulo 4
# The first rows of four symmetric circulants.
_WILLIAMSON: Final[Mapping[int, tuple[str, str, str, str]]] = {
    52: ("+-+--++++--+-", "+---++++++---", "++-+--++--+-+", "+----+--+----"),
    156: (
        "+++--+-+-----+--++----++--+-----+-+--++",
        "++++---+--++----+-+--+-+----++--+---+++",
        "+++--++-+---+-+--+----+--+-+---+-++--++",
        "+---++-+-+-----+++-++-+++-----+-+-++---",
    ),
    172: (
        "+---++--++++-+-+++-++--++-+++-+-++++--++---",
        "++-++++++----+-+--++-++-++--+-+----++++++-+",
        "+++-+-++--+-+-++++-+----+-++++-+-+--++-+-++",
        "++---++++-+--+--++--------++--+--+-++++---+",
    ),
}
_CHUNK = 2**18  # numbers that are transformed at a time: they stay in the cache between the steps
_RADIX = 5  # a step multiplies by a Sylvester matrix of about 2^5 rows or fewer


def core_of(n: int) -> int:
    """K; AdapterError for a length that has no matrix here."""
    for k in CORES:
        if n % k == 0 and _is_power(n // k):
            return k
    if not _is_power(n):
        known = ", ".join(map(str, sorted(CORES)))
        raise AdapterError(f"no Hadamard matrix of {n} rows is known here; there are 2^p, and 2^p times {known}")
    return 1


def _is_power(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def core(k: int) -> Tensor:
    """h_K, float64."""
    if k == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if k in _WILLIAMSON:
        return _williamson(_WILLIAMSON[k])
    if k in _CONFERENCE:
        return _of_conference(k)
    return _paley(k) if k in _PALEY else torch.kron(sylvester(1), core(k // 2))


def sylvester(power: int) -> Tensor:
    """S of 2^power rows, float64."""
    whole, two = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    for _ in range(power):
        whole = torch.kron(two, whole)
    return whole


def hadamard(n: int) -> Tensor:
    """H_n, float64, whole."""
    k = core_of(n)
    return torch.kron(core(k), sylvester((n // k).bit_length() - 1))


def _character(q: int) -> Tensor:
    """chi of 0 to q - 1: 1 for squares modulo the prime q, -1 for the others, 0 for 0."""
    chi = torch.full((q,), -1.0, dtype=torch.float64)
    chi[torch.arange(1, q) ** 2 % q] = 1.0
    chi[0] = 0.0
    return chi


def _differences(q: int) -> Tensor:
    """j - i modulo q at (i, j)."""
    places = torch.arange(q)
    return (places[None, :] - places[:, None]) % q


def _paley(k: int) -> Tensor:
    """Paley's first construction."""
    whole = torch.ones(k, k, dtype=torch.float64)
    whole[0, 1:] = -1.0
    whole[1:, 1:] = torch.eye(k - 1, dtype=torch.float64) - _character(k - 1)[_differences(k - 1)]
    return whole


def _of_conference(k: int) -> Tensor:
    """Paley's second construction, from a symmetric conference matrix of K / 2 rows."""
    half = k // 2
    conference = torch.ones(half, half, dtype=torch.float64)
    conference[0, 0] = 0.0
    conference[1:, 1:] = _character(half - 1)[_differences(half - 1)]
    one = torch.eye(half, dtype=torch.float64)
    plus, minus = conference + one, conference - one
    return torch.cat([torch.cat([plus, minus], 1), torch.cat([minus, -plus], 1)])


def _williamson(rows: tuple[str, str, str, str]) -> Tensor:
    a, b, c, d = (
        torch.tensor([1.0 if sign == "+" else -1.0 for sign in row], dtype=torch.float64)[_differences(len(row))]
        for row in rows
    )
    blocks = ((a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a))
    return torch.cat([torch.cat(row, dim=1) for row in blocks])


@lru_cache(maxsize=16)
def _factors(n: int, dtype: torch.dtype, *, transposed: bool) -> tuple[Tensor, ...]:
    """Matrices whose Kronecker product is H_n, or its transpose."""
    k = core_of(n)
    first = core(k).T if transposed else core(k)
    found = ([first] if k > 1 else []) + [sylvester(power) for power in _steps((n // k).bit_length() - 1)]
    return tuple(f.to(dtype).contiguous() for f in found) or (torch.ones(1, 1, dtype=dtype),)


def _steps(power: int) -> list[int]:
    """Powers of two of the steps, the last the largest: it is one product of tall matrices, the others are many."""
    count = -(-power // _RADIX)
    sizes = [power // count + (i >= count - power % count) for i in range(count)] if count else []
    if count > 2:
        sizes[0], sizes[-1] = sizes[0] - 1, sizes[-1] + 1
    return sizes


def walsh_hadamard(x: Tensor, *, transposed: bool = False, out: Tensor | None = None) -> Tensor:
    """x @ H_n^T, or x @ H_n with `transposed`, for x (rows, n); in O(n log n) for each row, in the dtype of x.

    `out`, contiguous, is another tensor. AdapterError where no H_n is known.
    """
    rows, n = x.shape
    factors = tuple(f.to(x.device) for f in _factors(n, x.dtype, transposed=transposed))
    out = torch.empty(rows, n, dtype=x.dtype, device=x.device) if out is None else out
    step = max(1, min(rows, _CHUNK // n))
    buffers = [torch.empty(step, n, dtype=x.dtype, device=x.device) for _ in factors[1:3]]
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        _transformed(x[start:stop], factors, [b[: stop - start] for b in buffers], out[start:stop])
    return out


def _transformed(x: Tensor, factors: tuple[Tensor, ...], buffers: list[Tensor], out: Tensor) -> None:
    """out = x @ kron(*factors)^T: each factor works on an axis of its own, from the last one on."""
    after, whole = 1, x.numel()
    for position, factor in enumerate(reversed(factors)):
        k = len(factor)
        into = out if position == len(factors) - 1 else buffers[position % len(buffers)]
        if after == 1:
            torch.mm(x.reshape(-1, k), factor.T, out=into.view(-1, k))
        else:
            parts = whole // (k * after)
            torch.bmm(factor.expand(parts, k, k), x.reshape(parts, k, after), out=into.view(parts, k, after))
        x, after = into, after * k


@final
@dataclass(frozen=True)
class Hadamard(Transform):
    """H_n / sqrt(n): orthogonal."""

    length: int

    @property
    def size(self) -> int:
        return self.length

    @property
    def count(self) -> int:
        return self.length

    def analyse(self, x: Tensor) -> Tensor:
        return walsh_hadamard(x.T).T / self.length**0.5

    def synthesise(self, coefficients: Tensor) -> Tensor:
        return walsh_hadamard(coefficients.T, transposed=True).T / self.length**0.5
