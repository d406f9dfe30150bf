"""Models that run: loaded from a local folder with transformers, and their modules by the names that adapters use."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.errors import AdapterError, InputError, MissingExtraError
from loratools.storage.atomic import printable

if TYPE_CHECKING:
    from torch.nn import Module

    from loratools.adapter import Adapter


def library(name: str) -> Any:
    """transformers or peft; MissingExtraError with the install line where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(f"running a model needs {name}: pip install 'loratools[models]'") from error


def load_model(folder: str | os.PathLike[str], device: str = "cpu") -> tuple[Any, Any]:
    """(model, tokenizer) of a folder in Hugging Face's layout; nothing is downloaded."""
    return load_pretrained(folder, "AutoModelForCausalLM", device)


def load_pretrained(folder: str | os.PathLike[str], kind: str, device: str = "cpu") -> tuple[Any, Any]:
    """As `load_model`, for another of transformers' automatic classes, such as AutoModel."""
    place = Path(folder)
    name = printable(place)
    if not (place / "config.json").is_file():
        raise InputError(f"{name}: is no folder of a Hugging Face model; give one that holds config.json")
    transformers = library("transformers")
    try:
        with _quiet(transformers.utils.logging):
            tokenizer = transformers.AutoTokenizer.from_pretrained(place, local_files_only=True)
            model = getattr(transformers, kind).from_pretrained(place, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{name}: transformers cannot load it: {reason}; is the folder complete?") from error
    return model.to(device).eval(), tokenizer


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Without transformers' own progress bars."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def module_of(model: Module, adapter: Adapter, target: str) -> Module:
    """The module whose input is that of `target`; of fused projections, which share it, the first.

    AdapterError where the target's name does not tell, or the model has no such module.
    """
    placement = adapter.format.place(target)
    if placement is None or not placement.pieces:
        raise AdapterError(
            f"{target}: its name does not tell which module of the model it changes; convert the adapter first: "
            "loratools convert --to peft"
        )
    path = placement.pieces[0].module.path
    modules = dict(model.named_modules())
    if path in modules:
        return modules[path]
    near = [name for name in modules if name and (name.endswith(f".{path}") or path.endswith(f".{name}"))]
    if len(near) != 1:
        raise AdapterError(f"{target}: the model has no module {path}; is it the base of this adapter?")
    return modules[near[0]]
