"""A fresh adapter in a model, for training, as PEFT makes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from loratools.errors import AdapterError, UsageError
from loratools.training.models import library, without_future_warnings
from loratools.training.seeds import seeded

Method = Literal["lora", "rslora", "dora"]


@dataclass(frozen=True)
class NewAdapter:
    """The adapter to train: `alpha` is twice the rank by default, `targets` all linear layers but the head."""

    method: Method = "lora"
    rank: int = 16
    alpha: float | None = None
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"the rank must be at least 1, not {self.rank}")


def new_adapter(model: Any, settings: NewAdapter, *, seed: int = 0) -> Any:
    """A PeftModel of `model` with a fresh adapter, the same for the same seed."""
    peft = library("peft")
    alpha = 2 * settings.rank if settings.alpha is None else settings.alpha
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=alpha,
        target_modules=list(settings.targets) or "all-linear",
        use_rslora=settings.method == "rslora",
        use_dora=settings.method == "dora",
        task_type="CAUSAL_LM",
    )
    with seeded(seed, "adapter"), without_future_warnings():
        try:
            return peft.get_peft_model(model, config)
        except ValueError as error:
            raise AdapterError(f"PEFT makes no adapter for this model: {' '.join(str(error).split())}") from error
