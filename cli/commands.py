"""How the help of the program lists its commands: by what one wants to do."""

from __future__ import annotations

from typing import Any

import typer.core


class Grouped(typer.core.TyperGroup):
    """Lists commands under the panels that they were added with, in the order in which they were added."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each panel, with the names of all sections in one column."""
        sections: dict[str, list[Any]] = {}
        for command in self.commands.values():
            panel = getattr(command, "rich_help_panel", None)
            sections.setdefault(panel if isinstance(panel, str) else "Commands", []).append(command)
        width = max(len(name) for name in self.commands)
        for title, members in sections.items():
            with formatter.section(title):
                formatter.write_dl(
                    [(str(c.name).ljust(width), c.get_short_help_str(formatter.width - width - 4)) for c in members]
                )
