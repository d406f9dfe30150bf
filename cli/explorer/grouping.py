"""The tree's branches: targets by layer or by module type, filtered, and named as shortly as is unambiguous."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from loratools.ops.inspect import depth
from loratools_cli.text import plain

By = Literal["layer", "module"]


@dataclass(frozen=True)
class Branch:
    """A line of the tree: the whole adapter, a group or one target, with a name that a terminal may show."""

    kind: Literal["all", "group", "target"]
    name: str
    targets: tuple[str, ...]

    @property
    def target(self) -> str | None:
        """The only target of a leaf."""
        return self.targets[0] if self.kind == "target" else None


def matching(targets: Iterable[str], pattern: str) -> list[str]:
    """Targets that hold `pattern`; one with wildcards matches the whole name, or its end at a dot."""
    if not re.search(r"[*?]|\[.+\]", pattern):
        return [t for t in targets if pattern.lower() in t.lower()]
    return [t for t in targets if fnmatchcase(t, pattern) or fnmatchcase(t, f"*.{pattern}")]


def branches(
    targets: Iterable[str], places: Mapping[str, tuple[str, str]], by: By
) -> list[tuple[Branch, list[Branch]]]:
    """Each group with its leaves. Layers come in the order of the model, modules in that of the file."""
    side = 0 if by == "layer" else 1
    members: dict[str, list[str]] = {}
    for target in targets:
        members.setdefault(places[target][side], []).append(target)
    names = sorted(members, key=depth) if by == "layer" else list(members)
    made = []
    for name in names:
        inside = members[name] if by == "layer" else sorted(members[name], key=lambda t: depth(places[t][0]))
        title = f"layer {plain(name)}" if by == "layer" and name[:1].isdecimal() else plain(name)
        made.append((Branch("group", title, tuple(inside)), _leaves(inside, places, by)))
    return made


def _leaves(targets: list[str], places: Mapping[str, tuple[str, str]], by: By) -> list[Branch]:
    """A leaf is named by the other side of its place, or by its whole name where two would be named alike."""
    short = {t: places[t][1] if by == "layer" else places[t][0] for t in targets}
    counts = Counter(short.values())
    titles = {t: f"layer {short[t]}" if by == "module" and short[t][:1].isdecimal() else short[t] for t in targets}
    return [Branch("target", plain(titles[t] if counts[short[t]] == 1 else t), (t,)) for t in targets]
