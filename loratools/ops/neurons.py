"""Look at the hidden units of nonlinear bottlenecks, and at their linearisation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loratools._lazy import torch
from loratools.linalg.standard_normal import mean_slope
from loratools.linalg.svd import spectrum
from loratools.operators import LowRank
from loratools.ops.bottleneck import named_bottlenecks, read_bottleneck
from loratools.ops.exact_pruning import pruned_exactly
from loratools.reports.neurons import NeuronsReport, NeuronsTarget

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.adapter import Adapter
    from loratools.ops.activations import Activations
    from loratools.ops.bottleneck import Bottleneck, Experts

CHUNK = 4096  # tokens at once


def neurons(
    adapter: Adapter,
    *,
    activations: Activations | None = None,
    activation: str | None = None,
    experts: Experts | None = None,
) -> NeuronsReport:
    """Width, activation and removable units of every bottleneck, and the singular values of its linearisation.

    J = scale * up diag(E act'(z)) down is the mean Jacobian of what the bottleneck adds, by its (normalised) input; the
    mean is over `activations`, or else for a standard normal z, which is an assumption. J says nothing of how far from
    linear the bottleneck is. `activation` stands in for what the file does not state. Raises NotAWeightDeltaError and
    AdapterError as `read_bottleneck` does.
    """
    targets: dict[str, NeuronsTarget] = {}
    assumed: dict[str, None] = {}
    for name, place in named_bottlenecks(adapter).items():
        b = read_bottleneck(adapter, name, activation=activation, experts=experts)
        inputs = None if activations is None else activations.inputs(name, b.down.shape[1])
        targets[name] = _target(place.kind, b, slopes(b, inputs))
        assumed |= dict.fromkeys(place.assumed)
    return NeuronsReport(
        str(adapter.origin.path) if adapter.origin else "",
        "standard normal" if activations is None else "activations",
        targets,
        sum(t.parameters for t in targets.values()),
        (*adapter.warnings, *assumed),
    )


def slopes(b: Bottleneck, inputs: Tensor | None) -> Tensor:
    """E act'(z) of each hidden unit, (w,) float64: over the inputs, or for a standard normal z."""
    if inputs is None:
        return torch.full((b.width,), mean_slope(b.act), dtype=torch.float64)
    total = torch.zeros(b.width, dtype=torch.float64)
    for rows in inputs.split(CHUNK):
        with torch.enable_grad():
            z = b.before(rows).detach().requires_grad_()
            (slope,) = torch.autograd.grad(b.act(z).sum(), z)
        total += slope.sum(0)
    return total / len(inputs)


def linearised(b: Bottleneck, slope: Tensor) -> LowRank:
    """J = scale * up diag(slope) down, in factors."""
    left = b.up.double() * slope * b.scale.double().reshape(-1, 1)
    return LowRank(left, b.down.double())


def _target(kind: str, b: Bottleneck, slope: Tensor) -> NeuronsTarget:
    values = spectrum(linearised(b, slope))
    energy = values.square()
    total = float(energy.sum())
    removed = pruned_exactly(b).removed
    tensors = (b.down, b.up, b.down_bias, b.up_bias, *(b.norm or ()))
    return NeuronsTarget(
        kind=kind,
        width=b.width,
        inputs=b.down.shape[1],
        outputs=b.up.shape[0],
        activation=b.activation,
        scale=float(b.scale) if b.scale.numel() == 1 else None,
        parameters=sum(t.numel() for t in tensors if t is not None),
        constant=removed.constant,
        duplicates=removed.duplicates,
        zero=removed.zero,
        gain=float(slope.mean()),
        norm=total**0.5,
        stable_rank=total / float(energy[0]) if total else 0.0,
        rank_99=int((energy.cumsum(0) < 0.99 * total).sum()) + 1 if total else 0,
        singular_values=tuple(values.tolist()),
    )
