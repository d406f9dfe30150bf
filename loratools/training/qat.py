"""Fine-tuning a LoRA while it is quantised: gradients go straight through the rounding to weights of full precision.

At one or two bits a trained adapter does not survive plain rounding; one that is trained rounded does (Jie, Wang and
Deng 2023, arXiv 2307.16867). Any quantiser will do, on any model whose factors are called lora_A and lora_B, as PEFT
calls them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from loratools._lazy import torch
from loratools.errors import AdapterError, UsageError, naming
from loratools.ops.coders import Direct, Plain, Scales
from loratools.ops.gridding import rounded
from loratools.quant.grid import unit_of_rows
from loratools.training.schedule import share_of_rate

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module, Parameter

Quantiser: TypeAlias = "Callable[[Tensor], Tensor]"  # (rank, numbers of a component) float32, to the same shape


@dataclass(frozen=True)
class Grid:
    """Whole multiples of a unit for each component, which factors on a grid have: those of a packed file.

    For `quantization_aware` in place of a quantiser. The weights behind the rounded ones are then in units, so that a
    step of the optimizer moves all numbers alike, whatever their component: learning rates are of the order of 0.01.
    `loratools quantize --method exact` packs what was trained without loss.
    """


_FACTORS = {"lora_A": False, "lora_B": True}  # whether rank components run along the last axis
_LONGEST = 1.0  # norm of a gradient


def rounding(method: Direct, bits: int, scales: Scales = "component", *, group: int = 64) -> Quantiser:
    """The rounding of `loratools quantize` by this method, which then packs what was trained.

    Packing loses nothing more where rounding twice is rounding once: for `sign`, not for `petl`.
    """
    plain = Plain(method, bits, scales, group)
    return lambda rows: plain.tensor(rows, components_last=False).decode()


@contextmanager
def quantization_aware(model: Module, quantise: Quantiser | Grid) -> Iterator[Mapping[str, Parameter]]:
    """Within the block the trainable lora_A and lora_B of `model` are what `quantise` makes of them; afterwards too.

    `quantise` gets a matrix in float32 with a row for each rank component. Yields the weights behind the rounded ones,
    by name, in float32: make the optimizer inside the block, and save the model after it. Where the block raises, the
    weights are as they were. AdapterError where no factor is trainable, or `quantise` changes a shape or makes NaN.
    """
    factors = _factors(model)
    before = {name: module.weight.detach().clone() for name, (module, _) in factors.items()}
    final: Mapping[str, Tensor] = before
    parametrize = torch.nn.utils.parametrize
    try:
        latent = {}
        for name, (module, last) in factors.items():
            with naming(name):
                layer, behind = _rounded_by(quantise, module.weight.detach(), components_last=last)
                _check(layer, behind)
            module.weight.data = behind
            parametrize.register_parametrization(module, "weight", layer, unsafe=True)
            latent[name] = module.parametrizations.weight.original
        yield latent
        with torch.no_grad():
            final = {name: module.weight.detach().clone() for name, (module, _) in factors.items()}
    finally:
        for name, (module, _) in factors.items():
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
            module.weight.grad = None
            module.weight.data = final[name]


@dataclass(frozen=True)
class QuantizationAwareSteps:
    """What `quantization_aware_steps` did: the loss of each step, and the factors that are quantised now."""

    losses: tuple[float, ...]
    factors: tuple[str, ...]


def quantization_aware_steps(
    model: Module,
    batches: Iterable[Any],
    quantise: Quantiser | Grid,
    *,
    steps: int,
    learning_rate: float = 1e-3,
    loss: Callable[[Module, Any], Tensor] | None = None,
    seed: int = 0,
) -> QuantizationAwareSteps:
    """Fine-tune what is trainable in `model` for `steps` batches, its LoRA factors quantised, and leave them so.

    AdamW without decay, gradients cut to norm 1, a short warm-up and a cosine to zero. `batches` are gone through again
    where they are too few; each goes to the model as keywords, which returns a loss, unless `loss` takes it. Steps are
    the same for the same `seed`. AdapterError where the loss is no longer finite; the factors are then as they were.
    """
    if steps < 1 or not learning_rate > 0:
        raise UsageError(f"{steps} steps at a learning rate of {learning_rate:g}: give at least one, at more than 0")
    measured = _model_loss if loss is None else loss
    was_training = model.training
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    losses = []
    try:
        with torch.random.fork_rng(devices), quantization_aware(model, quantise) as latent:
            torch.manual_seed(seed)
            model.train()
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
            for step, batch in enumerate(_repeated(batches, steps)):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * share_of_rate(step, steps)
                with torch.nn.utils.parametrize.cached():  # one rounding a step, however often a weight is looked at
                    value = measured(model, batch)
                    value.backward()
                losses.append(float(value.detach()))
                if not math.isfinite(losses[-1]):
                    raise AdapterError(f"the loss of step {step + 1} is {losses[-1]}; choose a lower learning rate")
                torch.nn.utils.clip_grad_norm_(trained, _LONGEST)
                optimizer.step()
                optimizer.zero_grad()
    finally:
        model.train(was_training)
    return QuantizationAwareSteps(tuple(losses), tuple(latent))


def _factors(model: Module) -> dict[str, tuple[Any, bool]]:
    """Name of the weight -> its module, and whether rank components run along its last axis."""
    found: dict[str, tuple[Any, bool]] = {}
    for name, parameter in model.named_parameters():
        *path, leaf = name.split(".")
        kind = next((part for part in reversed(path) if part in _FACTORS), None)
        if any(part.startswith("lora_embedding_") for part in path) and parameter.requires_grad:
            raise AdapterError(f"{name}: factors of an embedding are not trained quantised; freeze it, or leave it out")
        if kind is None or leaf != "weight" or not parameter.requires_grad:
            continue
        found[name] = model.get_submodule(".".join(path)), _FACTORS[kind]
    if not found:
        raise AdapterError(
            "the model has no trainable lora_A and lora_B; load the adapter with PeftModel.from_pretrained(..., "
            "is_trainable=True)"
        )
    return found


def _rounded_by(quantise: Quantiser | Grid, weight: Tensor, *, components_last: bool) -> tuple[Module, Tensor]:
    """The module that rounds, and the weight that it is to round, in float32."""
    behind = weight.float()
    if not isinstance(quantise, Grid):
        return _straight_through(quantise, weight.dtype, components_last=components_last), behind
    rows = behind.flatten(1).T if components_last else behind.flatten(1)
    try:
        unit = unit_of_rows(rows).float()
    except ValueError as error:
        raise AdapterError(f"lies on no grid ({error}); load what `loratools quantize` wrote, in float32") from error
    axes = [1] * weight.ndim
    axes[1 if components_last else 0] = -1
    unit = unit.reshape(axes)
    layer = _straight_through(rounded, weight.dtype, components_last=components_last, unit=unit)
    return layer, torch.where(unit > 0, behind / unit, 0.0)


def _straight_through(
    quantise: Quantiser, dtype: torch.dtype, *, components_last: bool, unit: Tensor | None = None
) -> Module:
    """The module that turns a weight into its rounded form, times `unit`, and passes gradients through the rounding."""

    class StraightThrough(torch.nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            with torch.no_grad():
                matrix = weight.detach().float().flatten(1)
                if components_last:  # (m, r): a kernel of 1 at most lies behind
                    matrix = matrix.T.contiguous()
                made = quantise(matrix)
                if made.shape != matrix.shape:
                    raise AdapterError(f"the quantiser makes {tuple(made.shape)} of {tuple(matrix.shape)}")
                made = (made.T if components_last else made).reshape(weight.shape)
            # not weight + (made - weight): that would round once more
            through = made + (weight - weight.detach())
            return (through if unit is None else through * unit).to(dtype)

    return StraightThrough()


def _check(layer: Module, weight: Tensor) -> None:
    if not bool(torch.isfinite(weight).all()):
        raise AdapterError("holds NaN or infinity; train it without quantising first")
    if not bool(torch.isfinite(layer(weight)).all()):
        raise AdapterError("the quantiser makes NaN or infinity of it")


def _model_loss(model: Module, batch: Any) -> Tensor:
    found = getattr(model(**batch), "loss", None)
    if found is None:
        raise UsageError("the model returns no loss for a batch; give it labels, or pass loss=")
    return found


def _repeated(batches: Iterable[Any], steps: int) -> Iterator[Any]:
    count = 0
    while count < steps:
        before = count
        for batch in batches:
            yield batch
            count += 1
            if count == steps:
                return
        if count == before:
            raise UsageError(
                f"the batches end after {count} of {steps} steps; give a list, which can be gone through again"
            )
