"""The tree of targets: groups and leaves, each with its rank and the energy that the preview keeps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Final

from rich.style import Style
from rich.text import Text
from textual.binding import Binding, BindingType
from textual.widgets import Tree
from textual.widgets.tree import TreeNode

from loratools.reports.preview import TargetPreview, energy_kept
from loratools_cli.explorer.figures import energy_style, fitted
from loratools_cli.render_inspect import sparkline

if TYPE_CHECKING:
    from loratools_cli.explorer.grouping import Branch
    from loratools_cli.explorer.session import Session

_OPEN_ALL: Final = 48  # targets, up to which every group starts open
_SPARK: Final = 8
_ROOM_FOR_SPARK: Final = 40
_ENERGY: Final = 5
_TOGGLE: Final = Style(meta={"toggle": True})  # what a click on it does, as Tree reads it


class TargetTree(Tree["Branch"], inherit_bindings=False):
    """Moves with the arrows up and down alone: left and right belong to the rank."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "cursor_up", show=False),
        Binding("down,j", "cursor_down", show=False),
        Binding("pageup", "page_up", show=False),
        Binding("pagedown", "page_down", show=False),
        Binding("home", "scroll_home", show=False),
        Binding("end", "scroll_end", show=False),
        Binding("enter", "select_cursor", show=False),
        Binding("space", "toggle_node", show=False),
    ]
    DEFAULT_CSS = """
    TargetTree {
        background: $surface; padding: 0; overflow-x: hidden;
        scrollbar-size-vertical: 1; scrollbar-color: $border; scrollbar-background: $surface;
    }
    TargetTree:focus { background-tint: transparent; }
    TargetTree > .tree--guides { color: $border; }
    TargetTree > .tree--guides-hover { color: $border; }
    TargetTree > .tree--guides-selected { color: $border; }
    """

    def __init__(self, session: Session) -> None:
        super().__init__(Text(session.root.name), session.root)
        self.session = session
        self.guide_depth = 2
        self.auto_expand = True

    def on_mount(self) -> None:
        self.rebuild()
        self.cursor_line = 0

    def rebuild(self) -> None:
        """The tree anew after another grouping or filter, with the same line selected if it is still there."""
        before = self.session.selected
        root, groups = self.session.root, self.session.branches()
        opened = len(root.targets) <= _OPEN_ALL
        self.reset(Text(root.name), root)
        self.root.expand()
        found: TreeNode[Branch] | None = None
        for index, (branch, leaves) in enumerate(groups):
            here = any(before.target == leaf.target for leaf in leaves) and before.target is not None
            node = self.root.add(Text(branch.name), branch, expand=opened or here or index == 0)
            found = node if branch == before else found
            for leaf in leaves:
                line = node.add_leaf(Text(leaf.name), leaf)
                found = line if here and leaf.target == before.target else found
        chosen = self.root if found is None else found
        assert chosen.data is not None
        self.session.selected = chosen.data
        if self.last_line >= 0:  # asking for it lays the lines out
            self.move_cursor(chosen)
            self.scroll_to_node(chosen, animate=False)

    def relabel(self) -> None:
        """Numbers have changed."""
        self.root.refresh()  # every line hangs on it
        self.refresh()

    def get_label_width(self, node: TreeNode[Branch]) -> int:
        return 1  # a label takes the room that there is: nothing to scroll to

    def render_label(self, node: TreeNode[Branch], base_style: Style, style: Style) -> Text:
        branch = node.data
        assert branch is not None
        depth = 0 if branch.kind == "all" else 1 if branch.kind == "group" else 2
        width = self.scrollable_content_region.width - depth * self.guide_depth
        previews = self.session.previews(branch.targets)
        icon = "" if branch.kind == "target" else "▾ " if node.is_expanded else "▸ "
        spark = self._spark(branch) if width >= _ROOM_FOR_SPARK else None
        ranks = _ranks(previews)
        fixed = len(icon) + len(ranks) + 1 + _ENERGY + (0 if spark is None else _SPARK + 1)
        room = max(1, width - fixed)
        own = branch.target in self.session.choice.own
        text = Text(no_wrap=True, end="")
        text.append(icon, base_style + _TOGGLE)
        name = Text(fitted(branch.name, room), style)
        if branch.kind != "target":
            name.stylize("bold")
        name.pad_right(max(0, room - name.cell_len))
        text.append_text(name)
        if spark is not None:
            text.append(f"{spark:<{_SPARK}} ", style + self._colour("faint"))
        text.append(f" {ranks}", style + self._colour("accent" if own else "secondary"))
        text.append_text(self._energy(branch, previews, style))
        return text

    def _energy(self, branch: Branch, previews: list[TargetPreview], style: Style) -> Text:
        """Per cent of the energy that is kept, rounded down so that 100 means all of it."""
        kept = energy_kept(previews)
        if kept is None:
            broken = all(target in self.session.problems for target in branch.targets) and bool(branch.targets)
            return Text(f"{'!' if broken else '·':>{_ENERGY}}", style + self._colour("error" if broken else "faint"))
        return Text(f"{math.floor(100 * kept + 1e-9):>{_ENERGY - 1}}%", style + self._colour(energy_style(kept)))

    def _spark(self, branch: Branch) -> str:
        if branch.target is None or branch.target not in self.session.numbers:
            return ""
        return sparkline(self.session.numbers[branch.target].spectrum)

    def _colour(self, variable: str) -> Style:
        return Style(color=self.app.theme_variables[variable])


def _ranks(previews: list[TargetPreview]) -> str:
    """`64→8`, with ranges for a group; nothing for families without ranks."""
    factored = [one for one in previews if one.rank_before]
    if not factored:
        return ""
    before = _range([one.rank_before for one in factored])
    if any(one.rank_after is None for one in factored):
        return before
    after = _range([one.rank_after or 0 for one in factored])
    return before if all(one.unchanged for one in factored) else f"{before}→{after}"


def _range(ranks: list[int]) -> str:
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low}–{high}"
