"""Will it load there? An adapter against the requirements of a server, and the conversion that meets them."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from loratools.errors import UnchangedError, UnsupportedInTargetError, UsageError
from loratools.files import load
from loratools.ops.convert import Convert, convert, write_converted
from loratools.ops.servers import SERVERS, Server
from loratools.reports.check import CheckReport, Finding

if TYPE_CHECKING:
    from loratools.adapter import Adapter
    from loratools.reports.convert import ConvertReport

_LISTED = 5


def server_named(name: str) -> Server:
    """The row of the table; UsageError for a server that is not in it."""
    if name not in SERVERS:
        raise UsageError(f"no server {name!r} is known; there are {', '.join(SERVERS)}")
    return SERVERS[name]


def check(adapter: Adapter, server: str) -> CheckReport:
    """Which requirements of `server` the adapter does not meet, from its headers alone; UsageError for no known one."""
    row = server_named(server)
    adapter.require_weights()
    findings = []
    met = []
    for requirement in row.requirements:
        offenders = tuple(requirement.broken_by(adapter))
        if not offenders:
            met.append(requirement.name)
            continue
        findings.append(
            Finding(
                requirement.name,
                requirement.severity,
                offenders[:_LISTED],
                len(offenders),
                requirement.reason,
                requirement.source,
                requirement.fix,
            )
        )
    rank = max((e.rank for e in adapter.entries.values()), default=0)
    allowed = [r for r in row.max_ranks if r >= rank]
    return CheckReport(
        path=str(adapter.origin.path) if adapter.origin else "",
        server=server,
        title=row.title,
        loads=all(f.severity == "old" for f in findings),
        findings=tuple(findings),
        met=tuple(met),
        setting=f"{row.max_rank_setting} {allowed[0]}" if allowed else None,
        warnings=adapter.warnings,
    )


def fitted(adapter: Adapter, server: str, options: Convert = Convert()) -> tuple[Adapter, ConvertReport]:
    """The same updates as `server` takes them: in its dialect, with one rank and scale 1 where it wants that.

    Raises UnchangedError where there is nothing to change, UnsupportedInTargetError for what no conversion mends.
    """
    row = server_named(server)
    if not check(adapter, server).findings:
        raise UnchangedError(f"{row.title} takes it as it is; there is nothing to fix")
    result, report = convert(adapter, row.dialect, _options(row, options))
    left = [f for f in check(result, server).findings if f.severity != "old"]
    if left:
        name, where, fix = left[0].requirement, ", ".join(left[0].where), left[0].fix
        raise UnsupportedInTargetError(f"{row.title} would still not take it: {name}, because of {where}; {fix}")
    return result, report


def fitted_file(
    adapter: Adapter,
    path: str | os.PathLike[str],
    server: str,
    options: Convert = Convert(),
    *,
    force: bool = False,
) -> CheckReport:
    """As `fitted`, written to `path`; the check of what was written."""
    return write_fitted(*fitted(adapter, server, options), path, server, force=force)


def write_fitted(
    result: Adapter, converted: ConvertReport, path: str | os.PathLike[str], server: str, *, force: bool = False
) -> CheckReport:
    """Write what `fitted` returned to `path`; the check of what was written."""
    saved, converted = write_converted(result, converted, path, force=force)
    with load(saved.path) as written:
        return replace(check(written, server), warnings=converted.warnings, output=str(saved.path))


def _options(row: Server, options: Convert) -> Convert:
    return replace(options, portable=row.portable)
