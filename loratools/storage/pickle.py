"""Pickled checkpoints: tensors and plain values only, no code is ever run."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Final, cast, final

from loratools._lazy import torch
from loratools.errors import InputError, OutputError
from loratools.storage.atomic import AtomicFile, printable, refuse_existing
from loratools.storage.base import TensorSource, TensorSpec
from loratools.storage.header import quoted, spec_of
from loratools.storage.safetensors import open_regular_file

_NESTS: Final = ("state_dict", "model", "module")
_CHUNK: Final = 8 << 20
_LARGEST_VIEW: Final = 1 << 30  # a stride of 0 makes a tensor of any size out of four bytes


@final
class PickleSource(TensorSource):
    """The tensors of a `torch.save` file: a flat dictionary, or one under `state_dict`, `model` or `module`.

    `skipped` names the entries that are no tensors. A zip file is memory-mapped, a legacy one is loaded whole.
    """

    container = "pickle"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.nbytes = 0
        tree = self._load()
        table = _state_dict(tree)
        if not table:
            raise InputError(f"{printable(self.path)}: holds no dictionary of tensors; export the state dict itself")
        self._tensors: dict[str, torch.Tensor] = {
            name: value for name, value in table.items() if _is_named_tensor(name, value)
        }
        self.specs = {name: self._spec(name, tensor) for name, tensor in self._tensors.items()}
        self.metadata = {}
        outside = () if table is tree else (name for name, value in tree.items() if value is not table)
        inside = (name for name in table if name not in self._tensors)
        self.skipped: tuple[str, ...] = tuple(str(name) for name in (*outside, *inside))

    def read(self, name: str) -> torch.Tensor:
        if name not in self._tensors and name in self.specs:
            raise InputError(f"{printable(self.path)}: is closed; open it again")
        return self._tensors[name].detach().clone(memory_format=torch.contiguous_format)

    def close(self) -> None:
        self._tensors = {}

    def sha256(self) -> str:
        digest = hashlib.sha256()
        with open(open_regular_file(self.path), "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    def _load(self) -> Any:
        with open(open_regular_file(self.path), "rb") as file:
            self.nbytes = os.fstat(file.fileno()).st_size
            is_zip = file.read(4) == b"PK\x03\x04"
        try:
            if is_zip:
                self._refuse_compressed()
            return torch.load(self.path, map_location="cpu", weights_only=True, mmap=is_zip)
        except pickle.UnpicklingError as error:
            text = str(error)
            if "Unsupported operand" in text:
                problem = "this pickle is damaged or of a protocol above 3, which cannot be read without executing it"
            elif "Weights only" in text:
                problem = "this pickle holds code or objects besides tensors, which are not executed"
            else:
                raise self._damaged(error) from None
            raise InputError(
                f"{printable(self.path)}: {problem}; convert it to safetensors with the tool that wrote it"
            ) from None
        except InputError:
            raise
        except Exception as error:  # noqa: BLE001 - bytes from strangers make this loader raise nearly anything
            raise self._damaged(error) from None

    def _spec(self, name: str, tensor: torch.Tensor) -> TensorSpec:
        try:
            spec = spec_of(tensor)
        except ValueError as error:
            raise InputError(
                f"{printable(self.path)}: tensor {quoted(name)}: {error}; export it as a plain tensor"
            ) from None
        if spec.nbytes > max(self.nbytes, _LARGEST_VIEW):
            raise InputError(
                f"{printable(self.path)}: tensor {quoted(name)} claims {spec.nbytes} bytes in a file of {self.nbytes}; "
                "convert it to safetensors with the tool that wrote it"
            )
        return spec

    def _refuse_compressed(self) -> None:
        with zipfile.ZipFile(self.path) as archive:
            unpacked = sum(record.file_size for record in archive.infolist())
        if unpacked > self.nbytes:
            raise InputError(
                f"{printable(self.path)}: unpacks to {unpacked} bytes from {self.nbytes}, more than torch.save writes; "
                "do not trust it"
            )

    def _damaged(self, error: Exception) -> InputError:
        return InputError(
            f"{printable(self.path)}: is no readable torch.save file ({type(error).__name__}: {quoted(str(error))}); "
            "download or export it again"
        )


def _state_dict(tree: object) -> Mapping[Any, Any]:
    """The dictionary that holds the tensors: `tree` itself, or else one of its nests; empty where there is none."""
    if isinstance(tree, Mapping):
        for candidate in (tree, *(tree.get(nest) for nest in _NESTS)):
            if isinstance(candidate, Mapping) and any(_is_named_tensor(*item) for item in candidate.items()):
                return candidate
    return {}


def _is_named_tensor(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, torch.Tensor)


def write_pickle(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], *, force: bool = False) -> int:
    """A `torch.save` file of one flat dictionary, complete or not at all; its size in bytes.

    For formats whose readers want a pickle. OutputError where it exists and `force` is not given, or cannot be written.
    """
    place = Path(path)
    refuse_existing(place, force=force)
    out = AtomicFile(place)
    try:
        stream = _Stream(out)
        try:
            held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            torch.save(held, cast("IO[bytes]", stream))
        except RuntimeError:  # torch says only that its writer failed
            if stream.error is not None:
                raise stream.error from None
            raise
        out.commit(stream.size)
    finally:
        out.abort()
    return stream.size


class _Stream(io.RawIOBase):
    """What torch.save writes to: one byte after another, into a file that is not in place yet."""

    def __init__(self, out: AtomicFile) -> None:
        self._out, self.size = out, 0
        self.error: OutputError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            self._out.write_at(self.size, view)
        except OutputError as error:
            self.error = error
            raise
        self.size += len(view)
        return len(view)
