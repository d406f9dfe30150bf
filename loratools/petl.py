"""PETL-ViT's files, found with the YAML that says what is in them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from loratools.configs import read_config
from loratools.errors import AdapterError, InputError
from loratools.storage.atomic import printable
from loratools.storage.petl import METHODS, PetlModel, PetlSource

_NAME = re.compile(r"-bit\d+-dim\d+\.bin$")
_SUFFIXES = (".yaml", ".yml")
_PICKLES = (b"PK\x03\x04", b"\x80\x02\x8a\n")  # as torch.save has begun its files, in either of its ways


def open_petl(path: Path, description: str | os.PathLike[str] | None = None) -> PetlSource | None:
    """The file at `path` by its YAML: the one given, or one of its name beside it or where the authors keep theirs.

    None for a file that is none of PETL-ViT's, as far as its name and what lies beside it tell. InputError where the
    file is not what the YAML says, or has the authors' name and no YAML.
    """
    if description is not None:
        return PetlSource(path, _model(Path(description)))
    if path.suffix != ".bin" or not path.is_file() or _is_pickle(path):
        return None
    for place in _descriptions(path):
        if read_config(place).get("method") in METHODS:
            return PetlSource(path, _model(place))
    if _NAME.search(path.name):
        raise InputError(
            f"{printable(path)}: has the name of a file of PETL-ViT, which does not say what it holds; put its YAML "
            f"beside it or name it with --petl ({path.with_suffix('.yaml').name}, from configs/ of the authors' "
            "repository)"
        )
    return None


def _descriptions(path: Path) -> Iterator[Path]:
    """Files that may describe it: models_bin/lora/x.bin goes with configs/lora/x.yaml."""
    folders = [path.parent]
    if len(path.absolute().parents) > 2:
        folders.append(path.absolute().parents[2] / "configs" / path.absolute().parent.name)
    for folder in folders:
        for suffix in _SUFFIXES:
            if (place := folder / f"{path.stem}{suffix}").is_file():
                yield place


def _model(place: Path) -> PetlModel:
    try:
        return PetlModel.from_config(read_config(place))
    except AdapterError as error:
        raise InputError(f"{printable(place)}: {error}") from error


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) in _PICKLES
