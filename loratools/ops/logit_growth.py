"""How much an update may raise what enters the logits of attention, as far as weights alone can tell.

After a norm with gain g, |x_i| = |g_i z_i| with ||z|| <= sqrt(n), so that output j of a projection is at most
sqrt(n) ||W_j * g||. The greatest of these bounds, after the update and before, is the growth. A heuristic: it says
nothing of the data, and theory names no threshold for a finite model (arXiv 2406.03136).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.linalg.row_norms import row_norms
from loratools.operators import LowRank

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.base_weights import BaseWeights
    from loratools.operators import Operator

# Module names -> which of the three projections they are; those that fuse several are left alone.
_PROJECTIONS = {
    **dict.fromkeys(("q_proj", "query", "to_q", "wq", "attn_q", "q_lin", "q"), "q"),
    **dict.fromkeys(("k_proj", "key", "to_k", "wk", "attn_k", "k_lin", "k"), "k"),
    **dict.fromkeys(("v_proj", "value", "to_v", "wv", "attn_v", "v_lin", "v"), "v"),
}
# Norms of a block's input, under the names that models give them.
_NORMS = (
    "input_layernorm",
    "attention_norm",
    "attn_norm",
    "ln_1",
    "input_norm",
    "self_attn_layer_norm",
    "layernorm_before",
    "layer_norm1",
    "norm_1",
)
_RENORMALISED = ("{}_norm", "{}_layernorm", "norm_{}", "attn_{}_norm")  # beside the projection of that letter
_ONE_PLUS = ("gemma", "gemma2", "gemma3", "gemma3_text", "recurrent_gemma", "qwen3_next", "nemotron")


@dataclass(frozen=True, eq=False)
class InputNorm:
    """The norm before a projection: x = gain * z + offset; `centred` where the entries of z add up to zero."""

    gain: Tensor | None  # (n,) float64; None for 1
    centred: bool

    def scaled(self, rows: Tensor) -> Tensor:
        """What rows (., n) do to z, in float64."""
        rows = rows.double() if self.gain is None else rows.double() * self.gain.to(rows.device)
        return rows - rows.mean(1, keepdim=True) if self.centred else rows


def projection_of(parameter: str) -> str | None:
    """Whether a parameter is a query, key or value projection: "q", "k", "v", or None."""
    module = parameter.removesuffix(".weight").rpartition(".")[2]
    return _PROJECTIONS.get(module)


def is_renormalised(base: BaseWeights, parameter: str) -> bool:
    """Whether a norm of the queries or keys that a parameter makes follows, which takes any growth away again."""
    beside = parameter.removesuffix(".weight").rpartition(".")[0]
    words = {"q": ("q", "query"), "k": ("k", "key")}.get(projection_of(parameter) or "", ())
    names = [form.format(word) for form in _RENORMALISED for word in words]
    return any(f"{beside}.{name}.weight" in base.source.specs for name in names)


def norm_before(base: BaseWeights, parameter: str, width: int) -> InputNorm:
    """The norm before a projection of `width` inputs, by the usual names in its block; of gain 1 for none."""
    path = parameter.split(".")
    numbers = [i for i, word in enumerate(path) if word.isdecimal()]
    block = ".".join(path[: numbers[-1] + 1]) if numbers else ""
    for name in _NORMS:
        norm = f"{block}.{name}.weight"
        if block and norm in base.source.specs and base.source.specs[norm].shape == (width,):
            gain = base.source.read(norm).double()
            gain = gain + 1 if base.config.get("model_type") in _ONE_PLUS else gain
            return InputNorm(gain, f"{block}.{name}.bias" in base.source.specs)
    return InputNorm(None, False)


def logit_growth(weight: Tensor, change: Operator, norm: InputNorm) -> float | None:
    """The greatest bound after the update over that before; None for a weight of zeros.

    Low-rank changes stay factored.
    """
    before = norm.scaled(weight)
    if isinstance(change, LowRank):
        after = row_norms(before, LowRank(change.left.double(), norm.scaled(change.right), change.scale))
    else:
        after = (before + norm.scaled(change.dense())).norm(dim=1)
    greatest = float(torch.linalg.vector_norm(before, dim=1).max())
    return float(after.max()) / greatest if greatest else None
