"""What killed processes left of outputs that they were writing."""

from __future__ import annotations

import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from loratools.hub.receipts import RECEIPTS
from loratools.storage.atomic import explained, temporary_mark

_TEMPORARY: Final = re.compile(r"\.(.+)\.[0-9a-f]{8}\.(?:tmp|old)", re.DOTALL)
_ENDINGS: Final = ("", ".safetensors", ".gguf")  # of the folder or file of an output


def clear_leftovers(out: Path, stems: Iterable[str]) -> None:
    """Remove temporary files of these outputs and of their receipts, and no others, for those may be at work.

    Each folder is looked through once, however many outputs lie in it. OutputError where that is not allowed.
    """
    known = list(stems)
    left: defaultdict[tuple[str, str], list[Path]] = defaultdict(list)
    with explained(out):
        for folder in {stem.rpartition("/")[0] for stem in known}:
            for top in ("", RECEIPTS):
                for mark, path in _temporaries(out / top / folder):
                    left[os.path.join(top, folder), mark].append(path)
        for stem in known if left else ():
            folder, _, leaf = stem.rpartition("/")
            names = [("", f"{leaf}{ending}") for ending in _ENDINGS] + [(RECEIPTS, f"{leaf}.json")]
            for top, name in names:
                for path in left.pop((os.path.join(top, folder), temporary_mark(name)), ()):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _temporaries(folder: Path) -> Iterator[tuple[str, Path]]:
    """The temporary files and folders that lie there, by what tells whose they are."""
    try:
        with os.scandir(folder) as entries:
            yield from ((found[1], Path(e.path)) for e in entries if (found := _TEMPORARY.fullmatch(e.name)))
    except (FileNotFoundError, NotADirectoryError):
        return
