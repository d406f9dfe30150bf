"""The first line: which file this is, and how far the measuring is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.cells import cell_len
from textual.content import Content
from textual.widget import Widget

from loratools_cli.explorer.figures import fitted, joined, size
from loratools_cli.text import counted, plain

if TYPE_CHECKING:
    from loratools.adapter import Adapter
    from loratools_cli.explorer.session import Session

_BAR = 12  # columns


class Header(Widget):
    """Name and facts on the left; on the right the progress, until all is measured."""

    DEFAULT_CSS = """
    Header { height: 1; padding: 0 1; background: $panel; }
    """

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def render(self) -> Content:
        right = self._progress()
        room = self.size.width - right.cell_length - 2
        name = fitted(name_of(self.session.adapter), max(8, room))
        facts = [(name, "bold $primary")]
        if self.session.other is not None:
            facts.append((f"  beside {fitted(name_of(self.session.other), 24)}", "$other"))
        facts.append((f"  {joined(self._facts())}", "$secondary"))
        left = Content.assemble(*facts).truncate(max(0, room), ellipsis=True, pad=True)
        return Content.assemble(left, "  ", right)

    def _facts(self) -> list[str]:
        adapter = self.session.adapter
        families: dict[str, int] = {}
        for entry in adapter.entries.values():
            families[entry.family.family] = families.get(entry.family.family, 0) + 1
        targets = len(adapter.entries)
        return [
            plain(adapter.format.name),
            counted(families, 2) if families else "",
            f"{targets} target{'s' * (targets != 1)}",
            size(adapter.file_nbytes),
        ]

    def _progress(self) -> Content:
        total, done = self.session.work, self.session.done
        if done >= total:
            return Content.assemble((f"{len(self.session.numbers)} measured", "$success"))
        filled = _BAR * done // max(1, total)
        bar = (("━" * filled, "$accent"), ("━" * (_BAR - filled), "$faint"))
        return Content.assemble(("measuring ", "$secondary"), *bar, (f" {done}/{total}", "$secondary"))


def name_of(adapter: Adapter) -> str:
    """The folder of an adapter that is one, else its file."""
    path = adapter.origin.path if adapter.origin else Path("adapter")
    folder = path.parent if path.parent.name else path.resolve().parent
    name = folder.name if path.stem in ("adapter_model", "adapters", "adapter") else path.name
    return plain(name) if cell_len(name) else "adapter"
