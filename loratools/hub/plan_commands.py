"""What to run on a hub so that a server takes it as planned: one command for all adapters that need the same."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from loratools.errors import OutputError
from loratools.hub.only import fits_a_line, glob_of, written_names
from loratools.hub.population import UNREADABLE
from loratools.storage.atomic import printable, write_whole

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loratools.hub.plan import Plan
    from loratools.hub.population import Population

_NAMED = 5  # adapters that a command names itself
_PORTABLE = "convert to=peft portable=true"
_PLACEHOLDER = "HUB"  # of a catalog whose hub nobody named
_LISTS = Path("lists")  # where the files with names go, if nobody says
_OPTIONS = {"log": "--popularity", "largest_error": "--max-error"}


@dataclass(frozen=True)
class Group:
    """Adapters that go through the same steps; `everything` where the hub has no others that could."""

    title: str
    steps: tuple[str, ...]
    names: tuple[str, ...]
    everything: bool


def groups_of(
    population: Population, fit: NDArray[np.int64], ends: NDArray[np.int64], reasons: NDArray[np.int64]
) -> tuple[Group, ...]:
    """What is to be squeezed to each rank, and converted, of those at `fit`, which are served at the ranks `ends`."""
    squeezed = np.where(ends < population.ranks[fit], ends, 0)
    mended = population.mended[fit]
    texts = population.reason_texts
    others = sum(int(i) >= len(texts) or texts[i] != UNREADABLE for i in reasons[reasons >= 0].tolist())
    groups = []
    for rank in np.unique(squeezed).tolist():
        for converted in (False, True):
            if not (rank or converted):
                continue
            chosen = fit[(squeezed == rank) & (mended == converted)]
            if not len(chosen):
                continue
            steps = ((f"squeeze rank={rank}",) if rank else ()) + ((_PORTABLE,) if converted else ())
            title = "-".join(([f"rank-{rank}"] if rank else []) + (["portable"] if converted else []))
            names = tuple(population.name(int(i)) for i in chosen)
            groups.append(Group(title, steps, names, len(chosen) == len(fit) and not others))
    return tuple(groups)


def commands_of(groups: tuple[Group, ...], source: str, hub: Path | None, how: Plan) -> Iterator[str]:
    """Lines for the shell, one after the other: one for each group, those that go on in the same output `--resume`.

    Where commands read names from files that `how` does not write, the plan that writes them comes first.
    """
    lists = _LISTS if how.lists is None else how.lists
    if how.lists is None and any(not group.everything and len(group.names) > _NAMED for group in groups):
        yield _planning(source, how)
    place = _PLACEHOLDER if hub is None else shlex.quote(str(hub))
    more = " --resume" if len(groups) > 1 else ""
    for group in groups:
        steps = "".join(f" --step {shlex.quote(step)}" for step in group.steps)
        yield f"loratools hub run {place} OUT{steps}{''.join(_chosen(group, lists))}{more}"


def _planning(source: str, how: Plan) -> str:
    """The command of the same plan, which writes lists."""
    said = []
    for field in fields(how):
        value, option = getattr(how, field.name), _OPTIONS.get(field.name, f"--{field.name.replace('_', '-')}")
        if field.name in ("server", "memory") or (value != field.default and value is not True):
            said += [option, shlex.quote(str(value))]
        elif value is True:
            said.append(option)
    return " ".join(["loratools hub plan", shlex.quote(source), *said, "--lists", str(_LISTS)])


def _chosen(group: Group, lists: Path) -> Iterator[str]:
    if group.everything:
        return
    lines = [name for name in group.names if fits_a_line(name)]
    if len(group.names) <= _NAMED or not lines:
        alone = group.names
    else:
        alone = tuple(name for name in group.names if not fits_a_line(name))
        yield f" --only-from {shlex.quote(str(lists / _file_name(group)))}"
    for name in alone:
        yield f" --only {shlex.quote(glob_of(name))}"


def write_lists(groups: tuple[Group, ...], lists: Path, *, force: bool) -> tuple[Path, ...]:
    """A file of names for each group in the folder `lists`; OutputError where one is there and `force` is not given."""
    files = {lists / _file_name(group): group for group in groups}
    if not force and (there := next((file for file in files if file.exists()), None)):
        raise OutputError(f"{printable(there)}: exists already; choose another folder or pass --force")
    for file, group in files.items():
        write_whole(file, written_names(name for name in group.names if fits_a_line(name)))
    return tuple(files)


def _file_name(group: Group) -> str:
    return f"{group.title}.txt"
