"""Where a changed adapter goes unless the user says so: beside the input, with a tag in its name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from loratools.adapter import Adapter

_SUFFIXES: Final = (".safetensors.index.json", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")

# Names that every adapter of a library with a config has: its folder has the telling one.
_ANONYMOUS: Final = ("adapter_model", "adapters", "adapter", "pytorch_adapter")


def destination(adapter: Adapter, output: Path | None, tag: str, *, force: bool) -> Path:
    """`output`, or in it where that is a folder and the adapter a lone file, or else the default.

    OutputError for one that exists, unless `force`: known now, it costs no computing.
    """
    from loratools.files import check_destination, is_folder_adapter

    default = default_destination(adapter, tag)
    place = output or default
    if place.is_dir() and not is_folder_adapter(adapter):
        place /= default.name
    check_destination(adapter, place, force=force)
    return place


def packed_destination(adapter: Adapter, output: Path | None, tag: str) -> Path:
    """Where a packed file goes, which is one file in any dialect."""
    assert adapter.origin is not None
    default = default_destination(adapter, tag)
    default = default if default.suffix == ".safetensors" else default.with_name(f"{default.name}.safetensors")
    if output is None:
        return default
    return output / default.name if output.is_dir() else output


def default_destination(adapter: Adapter, tag: str) -> Path:
    """`in.safetensors` -> `in.TAG.safetensors`; a PEFT adapter with its config is a folder: `name/` -> `name.TAG/`."""
    from loratools.files import is_folder_adapter

    assert adapter.origin is not None
    weights = adapter.origin.path
    place, stem = weights, next((weights.name.removesuffix(s) for s in _SUFFIXES if weights.name.endswith(s)), "")
    converted = stem == "adapter_model" and adapter.format.name != "peft"
    if converted or (stem in _ANONYMOUS and is_folder_adapter(adapter)):
        folder = weights.parent
        place = folder if folder.name and folder.name != ".." else folder.resolve()
        stem = place.name
    stem = stem or weights.name
    container = adapter.format.container
    return place.with_name(
        f"{stem}.{tag}" if is_folder_adapter(adapter) else f"{stem}.{tag}.{container}".replace(".gguf.gguf", ".gguf")
    )
