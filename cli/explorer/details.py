"""Numbers of the selected target or group, beside those of the other adapter if there is one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import wrap
from typing import TYPE_CHECKING

from textual.content import Content
from textual.geometry import Size
from textual.widget import Widget

from loratools.reports.inspect import Group, TargetNumbers, group
from loratools_cli.explorer.figures import dtypes, figure, fitted, joined, share, size
from loratools_cli.text import plain, span

if TYPE_CHECKING:
    from loratools_cli.explorer.grouping import Branch
    from loratools_cli.explorer.measuring import Compared
    from loratools_cli.explorer.session import Session

_LABEL = 10  # columns
_VALUE = 10
_NAME = 9


class Details(Widget):
    """As many lines as there is to say."""

    DEFAULT_CSS = """
    Details { height: auto; padding: 0 1; }
    """

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def render(self) -> Content:
        return Content("\n").join(list(lines(self.session, self.size.width)))

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        return len(list(lines(self.session, width)))


def lines(session: Session, width: int) -> Iterator[Content]:
    """All that is known of the selection, in lines of `width`."""
    branch = session.selected
    yield Content.styled(fitted(branch.target or branch.name, width), "bold $primary")
    if not branch.targets:
        yield Content.styled("no target matches", "$secondary")
        return
    for fact in [_target_facts(session, branch.target) if branch.target else _group_facts(session, branch)]:
        yield Content.styled(fact, "$secondary").truncate(width, ellipsis=True)
    mine, other = _Column.of_selection(session)
    right = list(_right(session, branch))
    if mine is not None:
        for index, (label, value) in enumerate(mine.rows()):
            cells: list[Content | tuple[str, str]] = [
                (f"{label:<{_LABEL}}", "$secondary"),
                (f"{value:<{_VALUE}}", "bold"),
            ]
            if session.other is not None:
                beside = "–" if other is None else other.rows()[index][1]
                cells.append((f"{beside:<{_VALUE}}", "$other"))
            if index < len(right):
                name, number = right[index]
                cells += [(f"{name:<{_NAME}}", "$secondary"), (number, "bold")]
            yield Content.assemble(*cells).truncate(width, ellipsis=True)
    for note in _notes(session, branch):
        for line in wrap(note, max(1, width)):
            yield Content.styled(line, "$warning").truncate(width, ellipsis=True)


@dataclass(frozen=True)
class _Column:
    """The numbers of one adapter."""

    rank: str
    norm: float
    effective: float
    stable: float

    @classmethod
    def of_selection(cls, session: Session) -> tuple[_Column | None, _Column | None]:
        targets = session.selected.targets
        others = [c.numbers for t in targets if (c := session.compared.get(t)) is not None and c.numbers is not None]
        mine = [session.numbers[t] for t in targets if t in session.numbers]
        return cls.of(mine), cls.of(others)

    @classmethod
    def of(cls, numbers: list[TargetNumbers]) -> _Column | None:
        if not numbers:
            return None
        if len(numbers) == 1:
            one = numbers[0]
            return cls(str(one.rank), one.norm, one.effective_rank, one.stable_rank)
        whole = group(numbers)
        rank = span([whole.rank_min, whole.rank_max])
        return cls(rank, whole.norm, whole.mean_effective_rank, whole.mean_stable_rank)

    def rows(self) -> list[tuple[str, str]]:
        return [
            ("rank", self.rank),
            ("norm", figure(self.norm)),
            ("effective", figure(self.effective)),
            ("stable", figure(self.stable)),
        ]


def _target_facts(session: Session, target: str) -> str:
    entry = session.adapter.entries[target]
    shape = entry.base_shape or (session.numbers[target].shape if target in session.numbers else ())
    return joined([
        entry.family.family,
        "×".join(map(str, shape)),
        dtypes(spec.dtype for spec in entry.specs.values()),
        size(entry.nbytes),
        f"scale {entry.scale:.4g}",
    ])  # fmt: skip


def _group_facts(session: Session, branch: Branch) -> str:
    entries = [session.adapter.entries[t] for t in branch.targets]
    families = dict.fromkeys(e.family.family for e in entries)
    count = len(entries)
    return joined([
        f"{count} target{'s' * (count != 1)}",
        ", ".join(families),
        size(sum(e.nbytes for e in entries)),
        "mean ranks",
    ])  # fmt: skip


def _right(session: Session, branch: Branch) -> Iterator[tuple[str, str]]:
    """What stands beside the first rows."""
    if session.other is not None and branch.target is not None:
        compared: Compared | None = session.compared.get(branch.target)
        row = None if compared is None else compared.row
        yield "cosine", figure(None if row is None else row.cosine)
        yield "error", figure(None if row is None else row.relative_error)
        yield "outputs", figure(None if row is None else row.output_overlap)
        yield "inputs", figure(None if row is None else row.input_overlap)
        return
    numbers = session.numbers.get(branch.target) if branch.target else session.group(branch.targets)
    if numbers is None:
        return
    relative = numbers.mean_relative_norm if isinstance(numbers, Group) else numbers.relative_norm
    r95 = numbers.mean_compressible_rank_95 if isinstance(numbers, Group) else numbers.compressible_rank_95
    if relative is not None:
        yield "of base", share(relative)
    yield "95 % at", f"rank {r95:.1f}" if isinstance(numbers, Group) else f"rank {r95}"
    if isinstance(numbers, TargetNumbers):
        yield "largest", figure(numbers.spectral_norm)
        if numbers.blocks > 1:
            yield "blocks", str(numbers.blocks)


def _notes(session: Session, branch: Branch) -> Iterator[str]:
    """What one should know before one believes the numbers."""
    bad = [t for t in branch.targets if t in session.problems]
    if branch.target is None:
        if bad:
            first = plain(session.problems[bad[0]])
            yield f"{len(bad)} of {len(branch.targets)} not measured, or not wholly; the first: {first}"
        return
    if bad:
        yield plain(session.problems[branch.target])
    numbers = session.numbers.get(branch.target)
    if numbers is not None and numbers.of == "direction":
        yield f"{numbers.family}: spectrum of the direction; open with a BASE for the delta, and to save"
    if numbers is not None and numbers.of == "low-rank part":
        yield f"{numbers.family}: norm of the whole delta, spectrum of its low-rank part"
    if session.other is not None:
        compared = session.compared.get(branch.target)
        if branch.target not in session.pairs:
            yield "the other adapter lacks this target"
        elif compared is not None and compared.problem is not None:
            yield plain(compared.problem)
