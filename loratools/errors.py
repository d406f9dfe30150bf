"""What can go wrong: each error says what was wrong, where, and what would work, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar


class LoratoolsError(Exception):
    """Any failure that loratools can explain; the command line prints it and exits with `exit_code`."""

    exit_code: ClassVar[int] = 4


class UsageError(LoratoolsError):
    """The arguments contradict each other or lie outside their range."""

    exit_code: ClassVar[int] = 2


class InputError(LoratoolsError):
    """A file cannot be read: missing, truncated, malformed, hostile, or of no known dialect."""

    exit_code: ClassVar[int] = 3


class AdapterError(LoratoolsError):
    """The file was read, but what it holds cannot be used: a missing pair, a shape mismatch, NaN."""

    exit_code: ClassVar[int] = 4


class NeedsBaseError(AdapterError):
    """The answer depends on the base weight, and none was given."""


class OutputError(LoratoolsError):
    """The result cannot be written: it exists, the disk is full, the folder is read-only."""

    exit_code: ClassVar[int] = 5


class UnchangedError(LoratoolsError):
    """The run finished but changed nothing, which is hardly ever what was wanted."""

    exit_code: ClassVar[int] = 6


class MissingExtraError(LoratoolsError):
    """An optional dependency is not installed; the message holds the install line."""


class UnmappedModuleError(AdapterError):
    """A target whose name does not tell which module of the model it is."""


class UnsupportedInTargetError(AdapterError):
    """Something that the dialect to be written has no place for."""


class MutatedBaseError(AdapterError):
    """Factors that are relative to a base weight which the initialisation changed."""


class NotAWeightDeltaError(AdapterError):
    """An adapter that is no update of weights: prompts, routers, nonlinear bottlenecks."""


class TiedEmbeddingError(UnsupportedInTargetError):
    """An update of one of two tied embeddings, which the target cannot tell apart."""


@contextmanager
def naming(target: str) -> Iterator[None]:
    """Put `target` in front of what an AdapterError says."""
    try:
        yield
    except AdapterError as error:
        raise type(error)(f"{target}: {error}") from error
