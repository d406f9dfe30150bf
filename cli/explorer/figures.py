"""How the explorer writes numbers and shortens names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from rich.cells import cell_len

from loratools.sizes import format_size
from loratools_cli.text import percent, plain

_BAR: Final = "▏▎▍▌▋▊▉█"


def fitted(text: str, width: int) -> str:
    """A name on one line, at most `width` columns: shortened at its start, for its end says what the module is."""
    text = plain(text)
    if cell_len(text) <= width:
        return text
    while text and cell_len(text) > width - 1:
        text = text[1:]
    return f"…{text}" if width > 0 else ""


def figure(value: float | None) -> str:
    """Three digits, or a dash for what is not known."""
    if value is None:
        return "–"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:#.3g}".rstrip(".")


def share(value: float | None) -> str:
    """A percentage with one digit after the point, or more where it would seem to be all or nothing."""
    return "–" if value is None else f"{percent(value)} %"


def size(value: int | None) -> str:
    """Bytes, or an ellipsis while they are not known."""
    return "…" if value is None else format_size(value)


def bar(value: float, width: int) -> str:
    """`value` between 0 and 1 as a bar in eighths of a column, `width` columns with its blanks."""
    eighths = round(max(0.0, min(1.0, value)) * width * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_BAR[rest - 1] if rest else "")).ljust(width)


def energy_style(value: float) -> str:
    """The colour variable for a share of energy that is kept."""
    return "success" if value >= 0.95 else "primary" if value >= 0.8 else "warning" if value >= 0.5 else "error"


def dtypes(names: Iterable[str]) -> str:
    """The dtypes of a target's tensors, each once."""
    return ", ".join(dict.fromkeys(name.lower() for name in names))


def joined(parts: Iterable[str]) -> str:
    """Facts on one line."""
    return " · ".join(part for part in parts if part)
