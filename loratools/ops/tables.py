"""What can be read and written, from the tables themselves."""

from __future__ import annotations

import inspect

from loratools.families import FAMILIES
from loratools.families.base import LowRankUpdate
from loratools.formats import FORMATS
from loratools.reports.tables import Dialect, FamiliesReport, Family, FormatsReport


def formats() -> FormatsReport:
    """Every dialect, with the families that a conversion can write in it."""
    found: dict[str, Dialect] = {}
    for f in FORMATS:
        holds = {*f.holds, *(found[f.name].writes if f.name in found else ())}
        summary = found[f.name].summary if f.name in found else _summary(inspect.getmodule(f))
        found[f.name] = Dialect(summary, tuple(sorted(holds)))
    return FormatsReport(found)


def families() -> FamiliesReport:
    """Every family, with what it needs and the dialects that it can be written in."""
    written = {name: d.writes for name, d in formats().formats.items()}
    return FamiliesReport(
        {
            f.family: Family(
                _summary(inspect.getmodule(f)),
                tuple(sorted(f.required | f.optional)),
                f.needs_base,
                issubclass(f, LowRankUpdate),
                tuple(name for name, holds in written.items() if f.family in holds),
            )
            for f in FAMILIES
        }
    )


def _summary(module: object) -> str:
    return (inspect.getdoc(module) or "").partition("\n\n")[0].replace("\n", " ").rstrip(".")
