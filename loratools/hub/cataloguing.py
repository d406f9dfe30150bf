"""A hub into its catalog: what receipts say and what the files hold, each adapter measured once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from loratools._version import __version__
from loratools.configs import CONFIG_NAME
from loratools.errors import UsageError
from loratools.hub.catalog import CatalogRow, catalog_rows, catalog_version, write_catalog
from loratools.hub.discover import Found, Refused, discover
from loratools.hub.engines import in_order, local_executor
from loratools.hub.listing import names_of, stated_run
from loratools.hub.measuring import Place, given_up, measured, ready
from loratools.hub.receipts import RUN, Receipt, place_of, read_receipt, receipt_stems
from loratools.reports.hub import CatalogReport
from loratools.reports.output import require
from loratools.storage.atomic import refuse_existing


@dataclass(frozen=True)
class Catalog:
    """How to go about it: `resume` takes over the rows of adapters that are the same, `force` measures all again."""

    workers: int = 1
    resume: bool = False
    force: bool = False
    executor: Callable[[], Executor] | None = None

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UsageError(f"{self.workers} workers: give at least 1")


def catalog(
    hub: Path,
    path: Path,
    how: Catalog = Catalog(),
    *,
    steps: Callable[[int, str], Callable[[], None]] | None = None,
) -> CatalogReport:
    """Write the catalog of `hub` to `path`: a row for each receipt, or each place in a hub where no run has been.

    The rows are in the order of names without suffix; the same hub gives the same bytes, resumed or not. A failure is
    a row with its reason. Raises InputError for a hub that cannot be read, MissingExtraError without pyarrow, and
    OutputError where there is a file at `path` and neither `resume` nor `force` is given, or it cannot be written.
    """
    refuse_existing(path, force=how.resume or how.force)
    require("pyarrow", extra="hub", what="catalogs")
    earlier: Iterator[CatalogRow] = iter(())
    if how.resume and not how.force and path.exists() and catalog_version(path) == __version__:
        earlier = catalog_rows(path)
    stated = stated_run(hub) if (hub / RUN).is_file() else None
    waiting = sorted(discover(hub) if stated is None else receipt_stems(hub), key=_order)
    step = steps(len(waiting), "adapters") if steps else lambda: None
    counts: Counter[str] = Counter()
    failures: list[tuple[str, str]] = []
    names: set[str] = set()
    before = after = 0

    def counted(rows: Iterable[CatalogRow]) -> Iterator[CatalogRow]:
        nonlocal before, after
        for row in rows:
            names.add(row.name)
            counts[row.status] += 1
            if row.status == "failed":
                failures.append((row.name, row.reason))
            before, after = before + (row.bytes_before or 0), after + row.bytes
            yield row
            step()

    make = how.executor or (lambda: local_executor(min(how.workers, max(1, len(waiting)))))
    places = _joined((place for each in waiting if (place := _place(hub, each)) is not None), earlier)
    rows = in_order(make, measured, places, workers=how.workers, given_up=given_up, ready=ready)
    write_catalog(counted(rows), path)
    missing = 0 if stated is None else sum(name not in names for name in names_of(stated, hub)[0])
    return CatalogReport(str(path), str(hub), dict(counts), before, after, tuple(failures), missing)


def _order(place: Found | Refused | str) -> tuple[str, str]:
    """Of names without suffix: what receipts are called by, too."""
    return _key(place if isinstance(place, str) else place.name)


def _key(name: str) -> tuple[str, str]:
    return name.removesuffix(".safetensors"), name


def _place(hub: Path, place: Found | Refused | str) -> Place | None:
    """A place with what is stated of it; None for one that is being done again: its receipt is stale, or gone."""
    if isinstance(place, Refused):
        return Place(CatalogRow(place.name, "failed", place.reason), hub, hub)
    if isinstance(place, Found):
        return Place(CatalogRow(place.name, "found"), hub, place.path)
    receipt = read_receipt(place_of(hub, place))
    return None if receipt is None or receipt.status == "stale" else _of_receipt(hub, receipt)


def _of_receipt(hub: Path, receipt: Receipt) -> Place:
    row = CatalogRow(
        receipt.name,
        "done" if receipt.status == "done" else "failed",
        receipt.reason,
        recipe=receipt.recipe,
        version=receipt.version,
        bytes_before=receipt.bytes_before if receipt.status == "done" else None,
        relative_error=receipt.relative_error,
        seconds=receipt.seconds,
        warnings=receipt.warnings,
    )
    weights = [name for name in receipt.outputs if PurePosixPath(name).name != CONFIG_NAME]
    if row.status == "done" and (len(weights) != 1 or not _is_inside(weights[0])):
        row = replace(row, status="failed", reason="its receipt names no weights file within the hub; do it again")
    return Place(row, hub, hub / weights[0] if row.status == "done" else hub, receipt.outputs)


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _joined(places: Iterable[Place], earlier: Iterator[CatalogRow]) -> Iterator[Place]:
    """Places with their rows in an earlier catalog, which is in the same order."""
    row = next(earlier, None)
    for place in places:
        while row is not None and _key(row.name) < _key(place.stated.name):
            row = next(earlier, None)
        yield replace(place, known=row) if row is not None and row.name == place.stated.name else place
