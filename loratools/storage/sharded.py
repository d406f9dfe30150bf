"""Sharded safetensors: an index that says which file holds which tensor."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

from loratools.errors import InputError
from loratools.storage.atomic import printable
from loratools.storage.base import TensorSource
from loratools.storage.header import quoted, unique_pairs
from loratools.storage.safetensors import SafetensorsSource, open_regular_file

if TYPE_CHECKING:
    import torch

_MAX_INDEX: Final = 32 << 20  # the index of a 1T-parameter mixture of experts has half of that


@final
class ShardedSource(TensorSource):
    """The tensors listed by a `*.safetensors.index.json`, in its order, from the shards beside it.

    `home` maps each tensor to its shard's file name. `unlisted` names the tensors that the shards hold and the index
    does not list.
    """

    container = "sharded"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        index = _read_index(self.path)
        self.home: Mapping[str, str] = _weight_map(self.path, index)
        self._shards: dict[str, SafetensorsSource] = {}
        try:
            for shard in dict.fromkeys(self.home.values()):
                self._shards[shard] = SafetensorsSource(self.path.parent / shard)
            for name, shard in self.home.items():
                if name not in self._shards[shard].specs:
                    raise InputError(
                        f"{printable(self.path)}: lists tensor {quoted(name)} in {quoted(shard)}, which lacks it; "
                        "download index and shards again, from one revision"
                    )
        except BaseException:
            self.close()
            raise
        self.specs = {name: self._shards[shard].specs[name] for name, shard in self.home.items()}
        self.metadata = {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in index.get("metadata", {}).items()
        }
        self.nbytes = self.path.stat().st_size + sum(shard.nbytes for shard in self._shards.values())
        self.unlisted: tuple[str, ...] = tuple(
            name for shard, source in self._shards.items() for name in source.specs if self.home.get(name) != shard
        )

    def read(self, name: str) -> torch.Tensor:
        return self._shards[self.home[name]].read(name)

    def close(self) -> None:
        for shard in self._shards.values():
            shard.close()

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for shard in self._shards.values():
            shard.digest_into(digest)
        return digest.hexdigest()


def _read_index(path: Path) -> dict[str, Any]:
    with open(open_regular_file(path), "rb") as file:
        raw = file.read(_MAX_INDEX + 1)
    if len(raw) > _MAX_INDEX:
        raise InputError(f"{printable(path)}: is larger than any index ({_MAX_INDEX} bytes); name the index itself")
    try:
        index = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_pairs)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{printable(path)}: is no JSON index ({quoted(str(error))}); download it again") from None
    if not isinstance(index, dict) or not isinstance(index.get("metadata", {}), dict):
        raise InputError(f"{printable(path)}: is no index of shards; name a *.safetensors.index.json")
    return index


def _weight_map(path: Path, index: dict[str, Any]) -> dict[str, str]:
    listed = index.get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise InputError(f"{printable(path)}: has no weight_map; name a *.safetensors.index.json")
    for name, shard in listed.items():
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise InputError(
                f"{printable(path)}: places tensor {quoted(name)} in {quoted(shard)}, which is no plain file name; "
                "do not trust this index"
            )
    return listed


def _is_plain_name(name: str) -> bool:
    return name not in ("", ".", "..") and name.isprintable() and not any(mark in name for mark in "/\\:")
