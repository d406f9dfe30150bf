"""GGUF, llama.cpp's container, through the `gguf` package: typed key-values, reversed dimensions, packed blocks."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

from loratools._lazy import torch
from loratools.errors import InputError, MissingExtraError
from loratools.storage.atomic import AtomicFile, printable
from loratools.storage.base import TensorSink, TensorSource, TensorSpec
from loratools.storage.header import quoted
from loratools.storage.safetensors import open_regular_file

if TYPE_CHECKING:
    from types import ModuleType

MAGIC: Final = b"GGUF"
_CHUNK: Final = 8 << 20
_PLAIN: Final = {"F32": "F32", "F16": "F16", "BF16": "BF16", "F64": "F64", "I8": "I8", "I16": "I16", "I32": "I32"}
# Everything else that loratools writes is text.
_FLOATS: Final = ("adapter.lora.alpha",)
_UNSIGNED: Final = ("general.quantization_version", "general.file_type")
_TOKENS: Final = "adapter.alora.invocation_tokens"
Q8_BLOCK: Final = 32


def _gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("GGUF files need the package gguf: pip install 'loratools[gguf]'") from error
    return gguf


@final
class GGUFSource(TensorSource):
    """Tensors by name in torch's order of dimensions; quantised ones are read as float32.

    `metadata` holds the key-values, text as it is and everything else as JSON.
    """

    container = "gguf"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        gguf = _gguf()
        os.close(open_regular_file(self.path))
        self.nbytes = self.path.stat().st_size
        try:
            reader = gguf.GGUFReader(str(self.path), "r")
            fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
            self._tensors: dict[str, Any] = {}
            specs: dict[str, TensorSpec] = {}
            for tensor in reader.tensors:
                if tensor.name in specs:
                    raise ValueError(f"two tensors are named {quoted(tensor.name)}")
                kind = tensor.tensor_type.name
                specs[tensor.name] = TensorSpec(_PLAIN.get(kind, "F32"), tuple(int(n) for n in tensor.shape[::-1]))
                self._tensors[tensor.name] = tensor
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - bytes from strangers make this reader raise nearly anything
            raise InputError(
                f"{printable(self.path)}: is no readable GGUF file ({type(error).__name__}: {quoted(str(error))}); "
                "download or convert it again"
            ) from None
        self.specs = specs
        self.metadata = {
            name: value if isinstance(value, str) else json.dumps(value, default=str) for name, value in fields.items()
        }

    def read(self, name: str) -> torch.Tensor:
        if not self._tensors and name in self.specs:
            raise InputError(f"{printable(self.path)}: is closed; open it again")
        tensor, spec = self._tensors[name], self.specs[name]
        kind = tensor.tensor_type.name
        if kind == "BF16":
            raw = torch.from_numpy(tensor.data.copy().reshape(-1).view("int16"))
            return raw.view(torch.bfloat16).reshape(spec.shape)
        if kind in _PLAIN:
            return torch.from_numpy(tensor.data.copy()).reshape(spec.shape)
        try:
            values = _gguf().quants.dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise InputError(f"{printable(self.path)}: {name} is quantised as {kind}: {error}") from error
        return torch.from_numpy(values.copy()).reshape(spec.shape)

    def close(self) -> None:
        self._tensors = {}

    def sha256(self) -> str:
        digest = hashlib.sha256()
        with open(open_regular_file(self.path), "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        return digest.hexdigest()


@final
class GGUFSink(TensorSink):
    """A GGUF file; tensors are spooled beside it, for their descriptions come first in the file.

    With `q8`, tensors whose rows come in whole blocks are quantised to q8_0 and the others stored as float16.
    """

    def __init__(self, path: str | os.PathLike[str], *, q8: bool = False) -> None:
        self._gguf = _gguf()
        self._q8 = q8
        self._names: set[str] = set()
        self._tensors: list[tuple[str, Any, Any]] = []
        self._file = AtomicFile(Path(path))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        if self._file.closed:
            raise ValueError(f"{printable(self._file.path)}: was committed or aborted already")
        if name in self._names:
            raise ValueError(f"tensor {quoted(name)} was written before")
        self._names.add(name)
        types = self._gguf.GGMLQuantizationType
        tensor = tensor.detach().cpu().contiguous()
        if self._q8:
            if tensor.shape[-1] % Q8_BLOCK == 0:
                packed = self._gguf.quants.quantize(tensor.float().numpy(), types.Q8_0)
                self._tensors.append((name, packed, types.Q8_0))
            else:
                self._tensors.append((name, tensor.half().numpy(), None))
        elif tensor.dtype == torch.bfloat16:
            self._tensors.append((name, tensor.view(torch.int16).numpy().view("uint8"), types.BF16))
        else:
            self._tensors.append((name, tensor.numpy(), None))

    def commit(self, metadata: Mapping[str, str]) -> int:
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / "adapter.gguf"
            writer = self._gguf.GGUFWriter(whole, metadata.get("general.architecture", "llama"))
            for key, value in metadata.items():
                if key == "general.architecture":
                    continue
                if key in _FLOATS:
                    writer.add_float32(key, float(value))
                elif key in _UNSIGNED:
                    writer.add_uint32(key, int(value))
                elif key == _TOKENS:
                    writer.add_array(key, json.loads(value))
                else:
                    writer.add_string(key, value)
            for name, array, kind in self._tensors:
                writer.add_tensor(name, array, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            end = 0
            with whole.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    self._file.write_at(end, chunk)
                    end += len(chunk)
        self._file.commit(end)
        return end

    def abort(self) -> None:
        self._file.abort()
