"""A squeezed copy, written by `squeeze_file` as the command does, and stoppable at every target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.errors import OutputError, UsageError
from loratools.files import check_destination
from loratools.ops.squeeze import Squeeze, squeeze_file
from loratools_cli.destination import default_destination, destination

if TYPE_CHECKING:
    from loratools.adapter import Adapter
    from loratools.base_weights import BaseWeights
    from loratools.families.base import Update
    from loratools.reports.squeeze import SqueezeReport
    from loratools_cli.explorer.choice import Choice


class StoppedError(Exception):
    """Nobody wants the file any more; what was written of it is removed on the way out."""


@dataclass(frozen=True)
class Saving:
    """What to write. Targets with NaN or infinity are carried over as they are: the explorer shows which."""

    adapter: Adapter
    base: BaseWeights | None
    choice: Choice

    @property
    def proposal(self) -> Path:
        """Where `loratools squeeze` would write."""
        return default_destination(self.adapter, self.choice.tag)

    def place(self, text: str, *, force: bool) -> Path:
        """The typed destination; UsageError for none, OutputError for one that may not be written."""
        if not text.strip():
            raise UsageError("name a file or folder to write")
        wanted = Path(text.strip()).expanduser()
        place = destination(self.adapter, wanted, self.choice.tag, force=True)
        try:
            check_destination(self.adapter, place, force=force)
        except OutputError as error:
            raise OutputError(str(error).replace("pass --force", "tick the box to replace it")) from error
        return place

    def write(self, place: Path, *, force: bool, read: Callable[[], None]) -> SqueezeReport:
        """Squeeze and write; `read` is called for every target that is read, and may raise StoppedError."""

        def counted(original: Callable[[], Update]) -> Callable[[], Update]:
            def reading() -> Update:
                read()
                return original()

            return reading

        entries = {t: replace(e, read=counted(e.read)) for t, e in self.adapter.entries.items()}
        watched = replace(self.adapter, entries=entries)
        options = Squeeze(base=self.base, allow_nonfinite=True)
        return squeeze_file(watched, place, self.choice.policy, options=options, force=force)[1]
