"""What can be read and written, from the tables themselves."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from difflib import get_close_matches

from loratools.errors import UsageError
from loratools.families import FAMILIES, Fittable, Update
from loratools.families.base import LowRankUpdate
from loratools.formats import FORMATS
from loratools.formats.native import Native
from loratools.reports.tables import Dialect, FamiliesReport, Family, FormatsReport


def formats() -> FormatsReport:
    """Every dialect, with the families that a conversion can write in it."""
    found: dict[str, Dialect] = {}
    for f in FORMATS:
        holds = {*f.holds, *(found[f.name].writes if f.name in found else ())}
        summary = found[f.name].summary if f.name in found else _summary(inspect.getmodule(f))
        found[f.name] = Dialect(summary, tuple(sorted(holds)))
    return FormatsReport(found)


def families(name: str | None = None) -> FamiliesReport:
    """Every family, or the one of this name, with what it needs and the dialects that it can be written in.

    UsageError for a name that no family has.
    """
    written = {dialect: d.writes for dialect, d in formats().formats.items()}
    chosen = [f for f in FAMILIES if name in (None, f.family)]
    if not chosen:
        near = get_close_matches(str(name).lower(), [f.family for f in FAMILIES], n=3)
        meant = f", perhaps {' or '.join(near)}" if near else ""
        raise UsageError(f"no family {name!r}{meant}; `loratools families` lists them")
    return FamiliesReport(
        {f.family: _family(f, tuple(d for d, holds in written.items() if f.family in holds)) for f in chosen}
    )


def _family(f: type[Update], written_by: tuple[str, ...]) -> Family:
    told = Family(
        _summary(inspect.getmodule(f)),
        tuple(sorted(f.required | f.optional)),
        f.needs_base,
        "no" if not f.needs_base else "shape" if f.needs_shape_alone else "yes",
        issubclass(f, LowRankUpdate),
        written_by,
        notes=inspect.getdoc(f) or "",
    )
    if not issubclass(f, Fittable):
        return told
    options = {o.name: str(o.default) for o in fields(f.Options)}
    return replace(
        told,
        base="fit" if f.fits_with_base and told.base == "no" else told.base,
        written_by=(*written_by, Native.name),
        guarantee=f.guarantee,
        formula=f.formula,
        count=f.count,
        paper=f.paper,
        options=options,
        most_entries=f.most,
        reconstruction=f.reconstruction,
    )


def _summary(module: object) -> str:
    return (inspect.getdoc(module) or "").partition("\n\n")[0].replace("\n", " ").rstrip(".")
