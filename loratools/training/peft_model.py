"""Any adapter that loratools reads, put into a running model as PEFT runs it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loratools.adapter import Adapter
from loratools.errors import AdapterError, UsageError
from loratools.files import load
from loratools.ops.convert import Convert, convert, write_converted
from loratools.training.models import library, without_future_warnings


def load_adapter(
    model: Any, adapter: Adapter | str | os.PathLike[str], adapter_name: str = "default", *, is_trainable: bool = False
) -> Any:
    """A PeftModel of `model` with the adapter, of any dialect or family that PEFT has a place for; packed ones too.

    `model` is a model of transformers, whose modules are wrapped in place as PEFT does it, or a PeftModel, which gets
    one adapter more. Raises AdapterError, before the model is touched, for a family that PEFT lacks or a target that
    the model does not have, by name.
    """
    peft = library("peft")
    is_wrapped = isinstance(model, peft.PeftModel)
    if is_wrapped and adapter_name in model.peft_config:
        raise UsageError(f"the model has an adapter {adapter_name!r} already; choose another adapter_name")
    opened = adapter if isinstance(adapter, Adapter) else load(adapter)
    result, report = convert(opened, "peft", Convert(metadata=False))
    kind = (result.config or {}).get("peft_type")
    if kind not in {known.value for known in peft.PeftType}:
        raise AdapterError(f"PEFT has no method {kind}; loratools convert --to peft --exact may make a LoRA of it")
    _refuse_missing(model.get_base_model() if is_wrapped else model, result)
    with tempfile.TemporaryDirectory(prefix="loratools-") as place:
        folder = Path(place) / "adapter"
        write_converted(result, report, folder)
        if opened.format.name != "peft":
            _name_in_full(folder / "adapter_config.json", result)
        with without_future_warnings():
            if is_wrapped:
                model.load_adapter(str(folder), adapter_name, is_trainable=is_trainable)
                wrapped = model
            else:
                wrapped = peft.PeftModel.from_pretrained(model, str(folder), adapter_name, is_trainable=is_trainable)
    landed = peft.get_peft_model_state_dict(wrapped, adapter_name=adapter_name, save_embedding_layers=False)
    _refuse_lost(result, landed)
    return wrapped


def save_adapter(model: Any, folder: str | os.PathLike[str]) -> None:
    """Save the adapter of a PeftModel as PEFT does, but the same files each time: PEFT writes sets in any order."""
    model.save_pretrained(folder, save_embedding_layers=False)
    config = Path(folder) / "adapter_config.json"
    fields = json.loads(config.read_text(encoding="utf-8"))
    for name in ("target_modules", "exclude_modules"):
        if isinstance(fields.get(name), list):
            fields[name] = sorted(fields[name])
    config.write_text(json.dumps(fields, indent=2, sort_keys=True), encoding="utf-8")


def _refuse_missing(model: Any, adapter: Adapter) -> None:
    """AdapterError for a target that is no module or parameter of the model."""
    # A module that has an adapter of PEFT's already lies one level down.
    names = {name.replace(".base_layer", "") for name in _names(model)}
    for target in adapter:
        if target not in names:
            raise AdapterError(f"{target}: the model has no such module; is it the base of this adapter?")


def _names(model: Any) -> Iterable[str]:
    yield from (name for name, _ in model.named_modules())
    yield from (name for name, _ in model.named_parameters())


def _name_in_full(config: Path, adapter: Adapter) -> None:
    """Name each target in the config, so that no other module with the same last name gets an adapter."""
    fields = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**fields, "target_modules": sorted(adapter)}), encoding="utf-8")


def _refuse_lost(adapter: Adapter, landed: Mapping[str, Any]) -> None:
    """AdapterError for a target that PEFT left out."""
    for target, entry in adapter.entries.items():
        for slot in entry.specs:
            key = adapter.format.spell(target, slot)
            if key not in landed:
                raise AdapterError(
                    f"{target}: PEFT did not take {key}; write the adapter with `loratools convert --to peft` and see "
                    "what PEFT says of it"
                )
