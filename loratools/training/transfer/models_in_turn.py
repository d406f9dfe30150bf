"""The models of a transfer, each loaded when a stage needs it, and let go when another takes its place."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from loratools.errors import LoratoolsError
from loratools.files import load
from loratools.training.applied import apply
from loratools.training.models import load_model, load_tokenizer, working_dtype

Role = Literal["source", "teacher", "target", "generator"]
_ROLES: Final[tuple[Role, ...]] = ("source", "target", "generator")


@dataclass(eq=False)
class ModelsInTurn:
    """`teacher` is the source with the adapter in its weights; the generator is often the target or the source."""

    adapter: str
    places: dict[Role, str]
    device: str = "cpu"
    allow_download: bool = False
    _held: dict[Role, tuple[Any, Any]] = field(default_factory=dict)

    def take(self, role: Role, *, keep: Sequence[Role] = ()) -> tuple[Any, Any]:
        """(model, tokenizer); of what was taken before, only `keep` stays in memory."""
        kept = {self._role(one) for one in keep}
        role = self._role(role)
        if role not in self._held:
            for other in [one for one in self._held if one not in kept]:
                del self._held[other]
            gc.collect()
            self._held[role] = self._loaded(role)
        return self._held[role]

    def tokenizer(self, role: Literal["source", "target"]) -> Any:
        """The tokenizer alone, which takes no time."""
        return load_tokenizer(self.places[role], allow_download=self.allow_download)

    def drop(self) -> None:
        """Hold no model any more."""
        self._held.clear()
        gc.collect()

    def _role(self, role: Role) -> Role:
        """Of roles that one model at one place plays, the first."""
        if role == "teacher":
            return role
        return next(one for one in _ROLES if self.places[one] == self.places[role])

    def _loaded(self, role: Role) -> tuple[Any, Any]:
        place = self.places["source" if role == "teacher" else role]
        model, tokenizer = load_model(
            Path(place), self.device, allow_download=self.allow_download, dtype=working_dtype(self.device)
        )
        if role == "teacher":
            with load(self.adapter) as adapter:
                try:
                    apply(model, adapter)
                except LoratoolsError as error:
                    raise type(error)(f"{self.adapter} on {place}: {error}") from error
        return model.requires_grad_(False), tokenizer
