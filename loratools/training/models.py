"""Models that run: loaded from a local folder with transformers, and their modules by the names that adapters use."""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools._lazy import torch
from loratools.errors import AdapterError, InputError, MissingExtraError
from loratools.storage.atomic import printable

if TYPE_CHECKING:
    from torch.nn import Module

    from loratools.adapter import Adapter


_TOLD = 200  # characters of what transformers says
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def library(name: str) -> Any:
    """transformers or peft; MissingExtraError with the install line where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(f"running a model needs {name}: pip install 'loratools[models]'") from error


def load_model(
    place: str | os.PathLike[str], device: str = "cpu", *, allow_download: bool = False, dtype: str | None = None
) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder in Hugging Face's layout, a GGUF file, or a name on the hub.

    Nothing is downloaded unless `allow_download`; a name that transformers has in its cache is found there. `dtype` as
    torch calls it, by default what the files hold. InputError where there is no such model, or it is not complete.
    """
    return load_pretrained(place, "AutoModelForCausalLM", device, allow_download=allow_download, dtype=dtype)


def load_pretrained(
    place: str | os.PathLike[str],
    kind: str,
    device: str = "cpu",
    *,
    allow_download: bool = False,
    dtype: str | None = None,
) -> tuple[Any, Any]:
    """As `load_model`, for another of transformers' automatic classes, such as AutoModel."""
    tokenizer = load_tokenizer(place, allow_download=allow_download)
    stated = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    model, told = _from_pretrained(kind, Path(place), allow_download=allow_download, output_loading_info=True, **stated)
    # an encoder without its pooler is whole; a model without a layer would run on random numbers
    if kind == "AutoModelForCausalLM" and (missing := sorted(told["missing_keys"])):
        raise InputError(
            f"{printable(Path(place))}: lacks {len(missing)} weights of the model that its config describes; first: "
            f"{missing[0]}; is the folder complete?"
        )
    return model.to(device).eval(), tokenizer


def load_tokenizer(place: str | os.PathLike[str], *, allow_download: bool = False) -> Any:
    """The tokenizer of a model, named as for `load_model`."""
    return _from_pretrained("AutoTokenizer", Path(place), allow_download=allow_download)


def _from_pretrained(kind: str, path: Path, *, allow_download: bool, **stated: Any) -> Any:
    name = printable(path)
    found, keywords = _located(path, name, allow_download=allow_download)
    transformers = library("transformers")
    try:
        with _quiet(transformers.utils.logging):
            return getattr(transformers, kind).from_pretrained(found, **keywords, **stated)
    except MemoryError:
        raise
    except Exception as error:  # the tokenizers library raises nothing more exact for a file that it cannot read
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise
        reason = " ".join(str(error).split())[:_TOLD] or type(error).__name__
        advice = "is the folder complete?" if path.exists() else "give a local folder, or pass --allow-download"
        raise InputError(f"{name}: transformers cannot load it: {reason}; {advice}") from error


def _located(path: Path, name: str, *, allow_download: bool) -> tuple[str, dict[str, Any]]:
    """What transformers is told: a folder or a name, and how to read it."""
    if path.suffix == ".gguf" and path.is_file():
        if importlib.util.find_spec("gguf") is None:
            raise MissingExtraError(f"{name}: GGUF files need the package gguf: pip install 'loratools[gguf]'")
        return str(path.parent), {"gguf_file": path.name, "local_files_only": True}
    if (path / "config.json").is_file():
        return str(path), {"local_files_only": True}
    if path.exists() or not _HUB_NAME.fullmatch(str(path)):
        raise InputError(
            f"{name}: is no folder of a Hugging Face model; give one that holds config.json, or a .gguf file"
        )
    return str(path), {"local_files_only": not allow_download}


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Without transformers' own progress bars and its tables of what is missing, which is told in an error of our own.

    The bars of its GGUF reader cannot be turned off, only sent elsewhere.
    """
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


@contextmanager
def without_future_warnings() -> Iterator[None]:
    """Without PEFT's, about names of transformers that will change: no user of ours can do anything about them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def working_dtype(device: str) -> str:
    """What models compute in: bfloat16 where the accelerator has it, half the memory and several times the speed."""
    return "bfloat16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "float32"


def room(model: Any) -> int:
    """How many tokens a model has room for, by its config; no limit where that states none."""
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    stated = getattr(core.config.get_text_config(), "max_position_embeddings", None)
    return stated if isinstance(stated, int) and stated > 0 else sys.maxsize


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
    return module_at(model, placement.pieces[0].module.path, target)


def module_at(model: Module, path: str, target: str) -> Module:
    """The module of that path, or the only one that ends like it; AdapterError otherwise."""
    modules = dict(model.named_modules())
    if path in modules:
        return modules[path]
    near = [name for name in modules if name and (name.endswith(f".{path}") or path.endswith(f".{name}"))]
    if len(near) != 1:
        raise AdapterError(f"{target}: the model has no module {path}; is it the base of this adapter?")
    return modules[near[0]]
