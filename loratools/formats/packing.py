"""How a file's tensors lie against the factors that they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from loratools.storage.base import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

# `transposed`: (n, r) and (r, m). `stacked`: one matrix for each expert, (experts, r, n) and (experts, m, r), where a
# LoRA of experts has (experts * r, n), expert-major, and (m, r * experts), expert-minor.
Packing = Literal["plain", "transposed", "stacked"]


def unpacked_spec(spec: TensorSpec, slot: str, packing: Packing) -> TensorSpec:
    """The spec of the factor that a stored tensor is."""
    shape = spec.shape
    if packing == "transposed":
        return TensorSpec(spec.dtype, shape[::-1])
    if packing == "stacked" and len(shape) == 3:
        experts, rows, columns = shape
        return TensorSpec(spec.dtype, (experts * rows, columns) if slot == "down" else (rows, columns * experts))
    return spec


def unpacked(tensor: Tensor, slot: str, packing: Packing) -> Tensor:
    """The factor that a stored tensor is."""
    if packing == "transposed" and tensor.ndim == 2:
        return tensor.T.contiguous()
    if packing == "stacked" and tensor.ndim == 3:
        return tensor.flatten(0, 1) if slot == "down" else tensor.permute(1, 2, 0).flatten(1).contiguous()
    return tensor


def packed(tensor: Tensor, slot: str, packing: Packing, experts: int) -> Tensor:
    """The tensor to store for a factor; the inverse of `unpacked`."""
    if packing == "transposed" and tensor.ndim == 2:
        return tensor.T
    if packing == "stacked" and tensor.ndim == 2:
        if slot == "down":
            return tensor.reshape(experts, -1, tensor.shape[1])
        return tensor.reshape(tensor.shape[0], -1, experts).permute(2, 0, 1)
    return tensor
