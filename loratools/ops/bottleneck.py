"""One nonlinear bottleneck, h <- h + scale up(act(down h + b) + c): its tensors, read from a file, and its formula."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from loratools._lazy import torch
from loratools.errors import AdapterError, NotAWeightDeltaError, UsageError
from loratools.storage.header import spec_of

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.adapter import Adapter
    from loratools.formats.bottlenecks import Place

Experts = Literal["stored", "assembled", "mean"]

# By the names that configs use: a function of torch, with its settings.
_FUNCTIONS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "relu": ("relu", {}),
    "relu6": ("relu6", {}),
    "leakyrelu": ("leaky_relu", {}),
    "gelu": ("gelu", {}),
    "gelu_new": ("gelu", {"approximate": "tanh"}),
    "gelu_pytorch_tanh": ("gelu", {"approximate": "tanh"}),
    "silu": ("silu", {}),
    "swish": ("silu", {}),
    "mish": ("mish", {}),
    "tanh": ("tanh", {}),
    "sigmoid": ("sigmoid", {}),
}
ACTIVATIONS = (*_FUNCTIONS, "quick_gelu", "linear")


def activated(name: str, z: Tensor) -> Tensor:
    """One of the `ACTIVATIONS`, elementwise."""
    if name == "linear":
        return z
    if name == "quick_gelu":
        return z * torch.sigmoid(1.702 * z)
    function, settings = _FUNCTIONS[name]
    made: Tensor = getattr(torch.nn.functional, function)(z, **settings)
    return made


@dataclass(frozen=True, eq=False)
class Bottleneck:
    """The tensors of one bottleneck as stored; all computing is in float64.

    `down` (w, d), `down_bias` (w,), `up` (m, w), `up_bias` (m,), `norm` the weight and bias (d,) of a LayerNorm of the
    input, `scale` () or (m,). Inputs are what enters the module, before the norm.
    """

    down: Tensor
    up: Tensor
    down_bias: Tensor | None
    up_bias: Tensor | None
    activation: str
    scale: Tensor
    norm: tuple[Tensor, Tensor] | None = None
    eps: float = 1e-5

    @property
    def width(self) -> int:
        """How many hidden units there are."""
        return self.down.shape[0]

    def act(self, z: Tensor) -> Tensor:
        """The activation, elementwise."""
        return activated(self.activation, z)

    def before(self, inputs: Tensor) -> Tensor:
        """What the activation is applied to: (t, d) -> (t, w) float64."""
        h = inputs.double()
        if self.norm is not None:
            weight, bias = (t.double() for t in self.norm)
            h = torch.nn.functional.layer_norm(h, h.shape[-1:], weight, bias, self.eps)
        z = h @ self.down.double().T
        return z if self.down_bias is None else z + self.down_bias.double()

    def outputs(self, inputs: Tensor) -> Tensor:
        """What is added to the residual stream: (t, d) -> (t, m) float64."""
        out = self.act(self.before(inputs)) @ self.up.double().T
        return (out if self.up_bias is None else out + self.up_bias.double()) * self.scale.double()

    def kept(self, units: Tensor, up: Tensor, up_bias: Tensor | None) -> Bottleneck:
        """The hidden units of these indices, with a new `up` (m, len(units)) and bias, rounded to the stored dtypes."""
        rounded = None if self.up_bias is None or up_bias is None else up_bias.to(self.up_bias.dtype)
        down_bias = None if self.down_bias is None else self.down_bias[units]
        up = up.to(self.up.dtype)
        return replace(self, down=self.down[units], down_bias=down_bias, up=up, up_bias=rounded)


def named_bottlenecks(adapter: Adapter) -> Mapping[str, Place]:
    """The bottlenecks of a file; NotAWeightDeltaError or AdapterError where it has none that can be worked on."""
    if found := adapter.format.bottlenecks:
        return found
    where = f"{adapter.origin.path}: " if adapter.origin else ""
    if adapter.unsupported:
        key, why = next(iter(adapter.unsupported.items()))
        raise NotAWeightDeltaError(f"{where}holds no bottlenecks of plain matrices, but {key}: {why}")
    raise AdapterError(f"{where}holds updates of weights, no nonlinear bottlenecks; use loratools inspect or squeeze")


def read_bottleneck(
    adapter: Adapter, name: str, *, activation: str | None = None, experts: Experts | None = None
) -> Bottleneck:
    """One bottleneck of a file, `activation` standing in for the one that is stated or assumed.

    `experts` says what the layers that MoSA splits are: `stored` as merged in the file, `assembled` from the experts'
    disjoint changes, their `mean`; None is stored where the file has them merged, unless those are still the start of
    training, and else assembled. AdapterError names what is missing, mismatched or not finite.
    """
    place = named_bottlenecks(adapter)[name]
    chosen = activation or place.activation
    if chosen is None:
        raise UsageError(f"{name}: its activation is not in the file; pass --activation, one of {_known()}")
    if chosen not in ACTIVATIONS:
        raise UsageError(f"{name}: activation {chosen!r} is not known; {_known()} are")

    def read(key: str) -> Tensor:
        tensor = _merged(adapter, place, key, experts)
        if not tensor.is_floating_point():
            raise AdapterError(f"{key}: is {spec_of(tensor).dtype}, not a floating-point tensor")
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{key}: holds NaN or infinity; train or download it again")
        return tensor

    down, up = read(place.down), read(place.up)
    made = Bottleneck(
        down,
        up,
        None if place.down_bias is None else read(place.down_bias),
        None if place.up_bias is None else read(place.up_bias),
        chosen,
        read(place.scale).squeeze() if isinstance(place.scale, str) else torch.tensor(place.scale, dtype=torch.float64),
        None if place.norm is None else (read(place.norm[0]), read(place.norm[1])),
        place.eps,
    )
    _check(name, made)
    return made


def _check(name: str, b: Bottleneck) -> None:
    if b.down.ndim != 2 or b.up.ndim != 2 or b.up.shape[1] != b.down.shape[0] or 0 in (*b.down.shape, *b.up.shape):
        raise AdapterError(
            f"{name}: down {tuple(b.down.shape)} and up {tuple(b.up.shape)} are no pair (w, d) and (m, w)"
        )
    (width, size), outputs = b.down.shape, b.up.shape[0]
    wanted = [("bias of down", b.down_bias, (width,)), ("bias of up", b.up_bias, (outputs,))]
    wanted += [("norm", part, (size,)) for part in b.norm or ()]
    for what, tensor, shape in wanted:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise AdapterError(f"{name}: {what} has the shape {tuple(tensor.shape)}, not {shape}")
    if not bool(torch.isfinite(b.scale).all()):
        raise AdapterError(f"{name}: its scale is not finite; mend the config")
    if b.scale.ndim > 1 or (b.scale.ndim == 1 and len(b.scale) != outputs):
        raise AdapterError(f"{name}: scale has the shape {tuple(b.scale.shape)}, neither one number nor ({outputs},)")


def _merged(adapter: Adapter, place: Place, key: str, experts: Experts | None) -> Tensor:
    """The tensor under `key`, or what it is to be merged to from the experts."""
    stored = adapter.extras[key].read() if key in adapter.extras else None
    if key not in place.experts or (experts == "stored" and stored is not None):
        assert stored is not None  # the dialect found it
        return stored
    if experts == "stored":
        raise AdapterError(f"{key}: is not in the file, only its experts; choose assembled or mean")
    held = [adapter.extras[each].read() for each in place.experts[key]]
    if len({t.shape for t in held}) > 1 or (stored is not None and stored.shape != held[0].shape):
        raise AdapterError(f"{key}: its experts differ in shape")
    stack = torch.stack(held)
    if experts is None and stored is not None and not _is_start(stored, stack):
        return stored
    mean = stack.double().mean(0).to(stack.dtype)
    if experts == "mean":
        return mean
    return assembled(key, stack)


def _is_start(stored: Tensor, stack: Tensor) -> bool:
    """Whether a merged tensor is what the experts, (n, ...), started from, while they have moved on."""
    moved = stack != stored
    return bool(moved.any()) and int(moved.sum(0).max()) <= 1


def assembled(key: str, stack: Tensor) -> Tensor:
    """W0 + sum of the changes of n experts (n, ...), of which at most one changed each number; AdapterError otherwise.

    W0 is the number that all others have, so it takes three experts to tell. Exact: every number is one that is stored.
    """
    start = stack.median(0).values
    moved = stack != start
    if not bool(moved.any()):
        return start
    if len(stack) < 3:
        raise AdapterError(f"{key}: two experts do not tell what they started from; pass --experts mean or stored")
    if int(moved.sum(0).max()) > 1:
        raise AdapterError(f"{key}: several experts changed one number, so they do not add up; pass --experts mean")
    return torch.where(moved.any(0), torch.where(moved, stack, torch.zeros_like(stack)).sum(0), start)


def _known() -> str:
    return ", ".join(ACTIVATIONS)
