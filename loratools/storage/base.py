"""What a container promises: named tensors, described from the header alone and read one at a time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Final, final

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

# Name in a safetensors header -> (torch attribute, bits per element).
DTYPES: Final[Mapping[str, tuple[str, int]]] = {
    "BOOL": ("bool", 8),
    "U8": ("uint8", 8),
    "I8": ("int8", 8),
    "F8_E4M3": ("float8_e4m3fn", 8),
    "F8_E5M2": ("float8_e5m2", 8),
    "I16": ("int16", 16),
    "U16": ("uint16", 16),
    "F16": ("float16", 16),
    "BF16": ("bfloat16", 16),
    "I32": ("int32", 32),
    "U32": ("uint32", 32),
    "F32": ("float32", 32),
    "I64": ("int64", 64),
    "U64": ("uint64", 64),
    "F64": ("float64", 64),
    "C64": ("complex64", 64),
}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a stored tensor; `dtype` is the safetensors name, a key of `DTYPES`."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype][1] // 8


class TensorSource(ABC):
    """A readable container. Names are never interpreted here.

    `specs` keeps the order of the file. `read` is safe to call from several threads at once.
    """

    container: ClassVar[str]
    path: Path
    specs: Mapping[str, TensorSpec]
    metadata: Mapping[str, str]
    nbytes: int  # of all its files
    codings: Mapping[str, int] = MappingProxyType({})  # how many tensors are in codes, by what these are

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, on the CPU, in its stored dtype and shape, owned by the caller.

        Raises KeyError for an unknown name and InputError where the bytes cannot be read.
        """

    def read_scalar(self, name: str) -> float:
        """The number in a tensor of one real element; ValueError for any other."""
        tensor = self.read(name)
        if tensor.numel() != 1 or tensor.is_complex():
            raise ValueError(f"a {tensor.dtype} tensor of {tensor.numel()} elements is not one number")
        return float(tensor.item())

    @abstractmethod
    def close(self) -> None:
        """Release the file; reading afterwards is an error."""

    @abstractmethod
    def sha256(self) -> str:
        """Hex digest of the container's bytes (of the shards in index order, where there are several)."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


@final
class NoTensors(TensorSource):
    """A container of nothing: a model of which only the config is at hand."""

    container = "none"

    def __init__(self, path: Path) -> None:
        self.path, self.specs, self.metadata, self.nbytes = path, {}, {}, 0

    def read(self, name: str) -> torch.Tensor:
        raise KeyError(name)

    def close(self) -> None:
        return

    def sha256(self) -> str:
        return ""


class TensorSink(ABC):
    """A container being written: nothing exists at the destination before `commit`.

    Used as a context manager: leaving the block without `commit`, for whatever reason, removes every trace.
    """

    @abstractmethod
    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append one tensor. Raises ValueError for a name written before, OutputError where writing fails."""

    @abstractmethod
    def commit(self, metadata: Mapping[str, str]) -> int:
        """Finish, fsync and put the file in place atomically; the size in bytes of the container.

        Raises OutputError (full disk, no permission); the destination is then untouched.
        """

    @abstractmethod
    def abort(self) -> None:
        """Remove every trace; safe to call twice and after `commit` (then it does nothing)."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.abort()
