"""What the exit status says."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Every status that the command line ends with, and what it means."""

    meaning: str

    def __new__(cls, value: int, meaning: str) -> ExitCode:
        code = int.__new__(cls, value)
        code._value_ = value
        code.meaning = meaning
        return code

    OK = 0, "done; for diff: the adapters are the same"
    DIFFERENT = 1, "diff only: the adapters differ"
    USAGE = 2, "the arguments are wrong or contradict each other"
    INPUT = 3, "an input cannot be read, or some adapters of a hub cannot be done"
    ADAPTER = 4, "what was read cannot be used: shapes, NaN, no base, no memory"
    OUTPUT = 5, "the output exists already or cannot be written"
    UNCHANGED = 6, "nothing would change, so nothing was written"
    INTERNAL = 70, "an error in loratools itself; please report it"
    INTERRUPTED = 130, "stopped by Ctrl-C or a signal; nothing is left half-written"


def exit_code_lines() -> list[str]:
    """One line for each code."""
    return [f"{code.value:>4}  {code.meaning}" for code in ExitCode]
