"""Names and numbers as a terminal may show them: adapters come from strangers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def plain(text: object) -> str:
    """The text on one line, with everything that a terminal could act upon spelt out as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))


def shortened(text: object, limit: int) -> str:
    """`plain`, cut to `limit` characters."""
    whole = plain(text)
    return whole if len(whole) <= limit else f"{whole[: limit - 3]}..."


def percent(share: float) -> str:
    """A share as a percentage that says 100 only where it is all, and 0 only where it is nothing."""
    share = round(share, 12)  # sums of shares are off by their rounding
    for digits in range(1, 9):
        text = f"{100 * share:.{digits}f}"
        if (share >= 1 or float(text) < 100) and (share <= 0 or float(text) > 0):
            return text
    return f"{100 * share!r}"


def span(values: Iterable[float | int], spell: object = None) -> str:
    """The least and the greatest value, or the only one."""
    numbers = list(values)
    shown = spell if callable(spell) else str
    low, high = shown(min(numbers)), shown(max(numbers))
    return low if low == high else f"{low}-{high}"


def number(value: float | None) -> str:
    """Three digits, or a dash for what is not defined."""
    return "-" if value is None else f"{value:#.3g}".removesuffix(".")


def sizes(before: int, after: int) -> str:
    """What became of a size."""
    from loratools.sizes import format_size

    return f"{format_size(before)} -> {format_size(after)}"


def counted_things(count: int, one: str, many: str = "") -> str:
    """`1 adapter`, `2 adapters`; `many` where it is not `one` with an s."""
    return f"{count} {one if count == 1 else many or f'{one}s'}"


def counted(counts: Mapping[str, int], limit: int) -> str:
    """`q_proj 30, k_proj 30`, the most frequent first, or the value alone where there is one only."""
    if len(counts) == 1:
        return plain(next(iter(counts)))
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    shown = [f"{plain(name)} x{count}" for name, count in ordered[:limit]]
    return ", ".join([*shown, f"and {len(ordered) - limit} more"] if len(ordered) > limit else shown)
