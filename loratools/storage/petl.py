"""PETL-ViT's binary adapters: records in the order of the modules, and not a word on what they are.

What a file holds is in the YAML that the authors keep for it: the method, the bits, the width of the bottleneck, the
number of classes and the scale. Its size must be that of this description, to the byte.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

from loratools._lazy import torch
from loratools.errors import AdapterError, InputError
from loratools.quant.petl import FILE_BITS, PetlCodes, encode, from_bytes, record_size
from loratools.storage.atomic import printable, refuse_existing, write_whole
from loratools.storage.base import TensorSource, TensorSpec
from loratools.storage.header import quoted
from loratools.storage.safetensors import open_regular_file

if TYPE_CHECKING:
    from torch import Tensor

METHODS: Final = ("adaptformer", "adaptformer-bihead", "lora", "lora-bihead")
_STATED: Final = {"method": "method", "bit": "bits", "dim": "dim", "num_class": "classes"}  # in the YAML -> here
_LARGEST: Final = 1 << 20  # of any size in a description


@dataclass(frozen=True)
class PetlModel:
    """What a file holds, as its YAML has it.

    `dim`: the width of the bottleneck. `width` and `blocks` are those of the ViT-B that the authors have throughout.
    A method that ends in `-bihead` has its head in codes, of one bit whatever `bits` is, and without a bias.
    """

    method: str
    bits: int
    dim: int
    classes: int
    scale: float = 1.0
    dataset: str = ""
    backbone: str = "vit_base_patch16_224_in21k"
    width: int = 768
    blocks: int = 12

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise AdapterError(f"method {quoted(self.method)} is none of PETL-ViT's: {', '.join(METHODS)}")
        if self.bits not in FILE_BITS:
            some = "; with 32 the file holds the head alone" if self.bits == 32 else ""
            raise AdapterError(f"bit: {self.bits} is not one of {', '.join(map(str, FILE_BITS))}{some}")
        for field in ("dim", "classes", "width", "blocks"):
            if not 0 < getattr(self, field) <= _LARGEST:
                raise AdapterError(f"{field} is {getattr(self, field)}; give 1 to {_LARGEST}")
        if not math.isfinite(self.scale):
            raise AdapterError(f"scale is {self.scale}; give a finite number")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PetlModel:
        """From the fields of the YAML; AdapterError names what is missing or no number."""
        if missing := [name for name in (*_STATED, "scale") if config.get(name) is None]:
            raise AdapterError(f"states no {', '.join(missing)}, so that it describes no file of PETL-ViT")
        numbers: dict[str, Any] = {}
        for name in ("bit", "dim", "num_class", "scale"):
            value = config[name]
            whole = name != "scale"
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                raise AdapterError(f"{name} is {quoted(str(value))}, not a {'whole ' if whole else ''}number")
            numbers[_STATED.get(name, name)] = value
        numbers["scale"] = float(numbers["scale"])
        texts = {name: str(config[name]) for name in ("dataset", "backbone") if config.get(name) is not None}
        return cls(str(config["method"]), **(numbers | texts))

    def to_config(self) -> dict[str, str | int | float]:
        """The fields of the YAML, in the order in which the authors write them."""
        return {
            "backbone": self.backbone,
            "bit": self.bits,
            "dataset": self.dataset,
            "dim": self.dim,
            "method": self.method,
            "num_class": self.classes,
            "scale": self.scale,
        }

    @property
    def is_coded_head(self) -> bool:
        """Whether the head is in codes."""
        return self.method.endswith("-bihead")

    def coded(self) -> Iterator[tuple[str, tuple[int, int], int]]:
        """(name, shape, bits) of each record, in the order of the file; names are those of the authors' modules."""
        modules = ("attn.lora_q", "attn.lora_v") if self.method.startswith("lora") else ("adapter_mlp",)
        for block in range(self.blocks):
            for module in modules:
                stem = f"blocks.{block}.{module}.adapter"
                yield f"{stem}_down.weight", (self.dim, self.width), self.bits
                yield f"{stem}_up.weight", (self.width, self.dim), self.bits
        if self.is_coded_head:
            yield "head.weight", (self.classes, self.width), 1

    def whole(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the float32 tensors after the records."""
        return {} if self.is_coded_head else {"head.weight": (self.classes, self.width), "head.bias": (self.classes,)}

    @property
    def file_size(self) -> int:
        """Bytes of the file, which is nothing but the records and the head."""
        records = sum(record_size(math.prod(shape), bits) for _, shape, bits in self.coded())
        return records + 4 * sum(math.prod(shape) for shape in self.whole().values())


@final
class PetlSource(TensorSource):
    """A file of PETL-ViT beside its description; tensors are decoded when read, as the authors' loader decodes them."""

    container = "petl-vit"

    def __init__(self, path: str | os.PathLike[str], model: PetlModel) -> None:
        self.path, self.model = Path(path), model
        with open(open_regular_file(self.path), "rb") as file:
            self.nbytes = os.fstat(file.fileno()).st_size
            if self.nbytes != model.file_size:
                raise InputError(
                    f"{printable(self.path)}: has {self.nbytes} bytes, and {model.method} with bit {model.bits}, dim "
                    f"{model.dim} and {model.classes} classes has {model.file_size}; is it the right YAML?"
                )
            self._data = file.read(self.nbytes)
        self._places: dict[str, tuple[int, int, int]] = {}  # name -> start, end, bits
        self.specs, end = {}, 0
        for name, shape, bits in (*model.coded(), *((n, s, 32) for n, s in model.whole().items())):
            count = math.prod(shape)
            start, end = end, end + (4 * count if bits == 32 else record_size(count, bits))
            self._places[name] = start, end, bits
            self.specs[name] = TensorSpec("F32", shape)
        self.codings = Counter(f"{bits}-bit petl" for _, _, bits in self._places.values() if bits != 32)
        self.metadata = {name: str(value) for name, value in model.to_config().items()}

    def read(self, name: str) -> Tensor:
        record = self.record(name)
        return record.decode() if isinstance(record, PetlCodes) else record

    def record(self, name: str) -> PetlCodes | Tensor:
        """The tensor as it is stored, to be written again to the byte; KeyError for an unknown name."""
        start, end, bits = self._places[name]
        if not self._data:
            raise InputError(f"{printable(self.path)}: is closed; open it again")
        data, shape = memoryview(self._data)[start:end], self.specs[name].shape
        if bits != 32:
            return from_bytes(data, bits, shape)
        return torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(shape)

    def close(self) -> None:
        self._data = b""

    def sha256(self) -> str:
        with open(open_regular_file(self.path), "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()


def write_petl(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor | PetlCodes], model: PetlModel, *, force: bool = False
) -> int:
    """Write a file that the authors' loader reads, and its YAML beside it; the size of the file in bytes.

    `tensors` has the names of `model`: whole ones are put in codes here, codes are written as they are. AdapterError
    for a tensor that is missing, too many or of another shape.
    """
    place = Path(path)
    description = place.with_suffix(".yaml")
    for taken in (place, description):
        refuse_existing(taken, force=force)
    data = b"".join(_records(tensors, model))
    text = "".join(f"{name}: {value if value != '' else chr(39) * 2}\n" for name, value in model.to_config().items())
    for file, content in ((description, text.encode()), (place, data)):
        write_whole(file, content)
    return len(data)


def _records(tensors: Mapping[str, Tensor | PetlCodes], model: PetlModel) -> Iterator[bytes]:
    wanted: dict[str, tuple[tuple[int, ...], int]] = {name: (shape, bits) for name, shape, bits in model.coded()}
    wanted |= {name: (shape, 32) for name, shape in model.whole().items()}
    if unknown := sorted(set(tensors) - set(wanted)):
        raise AdapterError(f"{unknown[0]}: {model.method} has no such tensor; leave it out")
    for name, (shape, bits) in wanted.items():
        if name not in tensors:
            raise AdapterError(f"{name}: is missing, and {model.method} has it")
        tensor = tensors[name]
        found = tensor.codes if isinstance(tensor, PetlCodes) else tensor
        if tuple(found.shape) != shape or (isinstance(tensor, PetlCodes) and tensor.bits != bits):
            kind = f"{tensor.bits} bits" if isinstance(tensor, PetlCodes) else "a tensor"
            raise AdapterError(f"{name}: is {kind} of shape {tuple(found.shape)}, where {model.method} has {shape}")
        if bits == 32:
            if isinstance(tensor, PetlCodes):
                raise AdapterError(f"{name}: is in codes, which {model.method} has not for its head")
            yield tensor.detach().float().contiguous().cpu().numpy().astype("<f4").tobytes()
            continue
        try:
            codes = tensor if isinstance(tensor, PetlCodes) else encode(tensor, bits)
            yield codes.to_bytes()
        except AdapterError as error:
            raise AdapterError(f"{name}: {error}") from error
