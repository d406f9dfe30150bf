"""The config files that lie beside weights: JSON, and YAML as far as a flat list of settings goes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratools.errors import InputError
from loratools.storage.atomic import printable

CONFIG_NAME = "adapter_config.json"
# All that the dialects look for beside weights.
BESIDE = (CONFIG_NAME, "config.json", "hyperparameters.yaml", "model_config.yaml", "thresholds.json")
_MAX_BYTES = 64 << 20
_SETTING = re.compile(r"^([A-Za-z_]\w*):(?:\s+(.*))?$")
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$")
_WORDS: Mapping[str, Any] = {"true": True, "false": False, "null": None, "~": None, "": None}


def read_config(path: Path) -> dict[str, Any]:
    """The fields of a config, JSON or YAML by its suffix; InputError where it cannot be read.

    Of YAML, the settings that are one word, number or text at the outermost level; what is nested is left out.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InputError(f"{printable(path)}: too large for a config")
        text = path.read_text(encoding="utf-8")
        if path.suffix in (".yaml", ".yml"):
            return dict(_settings(text))
        config = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{printable(path)}: cannot be read as {_kind(path)}: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{printable(path)}: holds no JSON object")
    return config


def config_beside(folder: Path, name: str) -> dict[str, Any] | None:
    """The config of this name in `folder`, None where there is none."""
    path = folder / name
    return read_config(path) if path.is_file() else None


def _kind(path: Path) -> str:
    return "YAML" if path.suffix in (".yaml", ".yml") else "JSON"


def _settings(text: str) -> dict[str, Any]:
    found = {}
    for line in text.splitlines():
        match = _SETTING.match(line)
        if match is not None:
            found[match[1]] = _value(re.sub(r"(^|\s)#.*$", "", match[2] or "").strip())
    return found


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _NUMBER.match(text):
        return float(text) if re.search(r"[.eE]", text) else int(text)
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text
