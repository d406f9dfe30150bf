"""Where a file keeps nonlinear bottlenecks, h <- h + scale up(act(down h)), and what it says of them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from loratools.errors import AdapterError

if TYPE_CHECKING:
    from loratools.storage.base import TensorSpec

UNSTATED_SCALE = "the scale is not in the file: 1 is assumed, which only the linearised spectrum depends on"


@dataclass(frozen=True)
class Place:
    """The keys of one bottleneck, and its settings.

    `down` (w, d) and `up` (m, w) are keys, as are the biases (w,) and (m,) and the LayerNorm's weight and bias where
    there are any. `scale` is a number or the key of a learned one. `experts` lists, for a key that MoSA merges, those
    of the experts; it may not be in the file itself. `activation` is None where nobody says. The bottlenecks of one
    `group` are built with one width. `assumed` says what the file leaves open.
    """

    kind: str
    down: str
    up: str
    down_bias: str | None = None
    up_bias: str | None = None
    norm: tuple[str, str] | None = None
    eps: float = 1e-5
    activation: str | None = None
    scale: float | str = 1.0
    experts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    group: str = ""
    assumed: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys of the file that belong to it."""
        own = (self.down, self.down_bias, self.up, self.up_bias, *(self.norm or ()))
        scale = (self.scale,) if isinstance(self.scale, str) else ()
        merged = [key for key in (*own, *scale) if key is not None]
        return (*merged, *(key for keys in self.experts.values() for key in keys))

    def spec(self, specs: Mapping[str, TensorSpec], key: str) -> TensorSpec:
        """Of the tensor under `key`, or of the experts that it is merged from."""
        return specs[key] if key in specs else specs[self.experts[key][0]]


# Dialect of a layout -> its bottlenecks by name; a file holds those of one.
Finder = Callable[[Mapping[str, "TensorSpec"]], Mapping[str, Place]]

_ADAPTERTUNE = re.compile(r"^(?P<name>(?:.+\.)?blocks\.\d+\.adapter)\.(?P<role>down|up)\.(?P<part>weight|bias)$")
_ADAPTFORMER = re.compile(
    r"^(?P<name>.+\.adaptmlp)\.(?:(?P<role>down|up)_proj\.(?P<part>weight|bias)|(?P<scale>scale)"
    r"|adapter_layer_norm_before\.(?P<norm>weight|bias))$"
)
_MOSA = re.compile(
    r"^(?P<stem>.+\.)adapter_(?P<role>down|up)(?P<side>_attn|_ffn)?(?:(?P<merge>_merge)|\.(?P<expert>\d+))?"
    r"\.(?P<part>weight|bias)$"
)
_OF_HUB = re.compile(r"\.adapters\.[^.]+\.$")  # where adapter_down.0 is the first of a sequence
_PETL = re.compile(r"^(?P<name>blocks\.\d+\.adapter_mlp)\.adapter_(?P<role>down|up)\.weight$")
_LAYER = re.compile(r"\.(\d+)\.")


def adaptertune(specs: Mapping[str, TensorSpec]) -> dict[str, Place]:
    """`blocks.{l}.adapter.{down,up}.{weight,bias}`, with a GELU, after a whole block."""
    matches = {key: match for key in specs if (match := _ADAPTERTUNE.match(key))}
    found = _paired(((m["name"], f"{m['role']}.{m['part']}", key) for key, m in matches.items()), "AdapterTune")
    return {name: replace(place, activation="gelu", assumed=(UNSTATED_SCALE,)) for name, place in found.items()}


def adaptformer(specs: Mapping[str, TensorSpec]) -> dict[str, Place]:
    """`adaptmlp.{down,up}_proj.{weight,bias}`, with a ReLU, beside an MLP; maybe a learned scale and a LayerNorm."""
    matches = {key: match for key in specs if (match := _ADAPTFORMER.match(key))}
    pairs = ((m["name"], f"{m['role']}.{m['part']}", key) for key, m in matches.items() if m["role"])
    found = {}
    for name, place in _paired(pairs, "AdaptFormer").items():
        norm = tuple(f"{name}.adapter_layer_norm_before.{part}" for part in ("weight", "bias"))
        assumed: list[str] = []
        if set(norm) <= set(specs):
            place = replace(place, norm=(norm[0], norm[1]))
            assumed.append("a LayerNorm is taken to come before the bottleneck (adapter_layernorm_option in)")
        if f"{name}.scale" in specs:
            place = replace(place, scale=f"{name}.scale")
        else:
            assumed.append(UNSTATED_SCALE)
        found[name] = replace(place, activation="relu", assumed=tuple(assumed))
    return found


def petl(specs: Mapping[str, TensorSpec], scale: float | None) -> dict[str, Place]:
    """`blocks.{l}.adapter_mlp.adapter_{down,up}.weight`, with a ReLU and no biases, beside an MLP; the YAML's scale."""
    matches = {key: match for key in specs if (match := _PETL.match(key))}
    found = _paired(((m["name"], f"{m['role']}.weight", key) for key, m in matches.items()), "PETL-ViT AdaptFormer")
    stated = {"assumed": (UNSTATED_SCALE,)} if scale is None else {"scale": scale}
    return {name: replace(place, activation="relu", **stated) for name, place in found.items()}


def mosa(specs: Mapping[str, TensorSpec]) -> dict[str, Place]:
    """`adapter_{down,up}_merge` and experts `adapter_{down,up}.{k}`, or one of the two shared; `_attn` and `_ffn`."""
    roles: dict[str, dict[str, str]] = defaultdict(dict)
    experts: dict[str, dict[str, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))
    for key in specs:
        if (match := _MOSA.match(key)) is None or _OF_HUB.search(f".{match['stem']}"):
            continue
        name, side = f"{match['stem']}adapter{match['side'] or ''}", match["side"] or ""
        slot = f"{match['role']}.{match['part']}"
        if match["expert"] is None:
            roles[name][slot] = key
            continue
        merged = f"{match['stem']}adapter_{match['role']}{side}_merge.{match['part']}"
        experts[name][merged][int(match["expert"])] = key
        roles[name].setdefault(slot, merged)
    found = {}
    # What is shared on both sides is some other bottleneck.
    own = [n for n, slots in roles.items() if experts[n] or any("_merge." in key for key in slots.values())]
    for name, place in _paired(((n, s, key) for n in own for s, key in roles[n].items()), "MoSA").items():
        place = replace(
            place, experts={key: tuple(held[k] for k in sorted(held)) for key, held in experts[name].items()}
        )
        if name.endswith(("_attn", "_ffn")):  # of its Houlsby style, which has neither a norm nor a scale
            found[name] = replace(place, activation="silu")
            continue
        stem = name.removesuffix("adapter")
        norm, learned = (f"{stem}adapter_norm.weight", f"{stem}adapter_norm.bias"), f"{stem}adapter_scale"
        assumed = ["the activation is taken for MoSA's AdaptFormer style, gelu; its Pfeiffer style has relu"]
        found[name] = replace(
            place,
            activation="gelu",
            norm=norm if set(norm) <= set(specs) else None,
            eps=1e-6,
            scale=learned if learned in specs else 1.0,
            assumed=tuple(assumed if learned in specs else [UNSTATED_SCALE, *assumed]),
        )
    return found


def _paired(found: Iterable[tuple[str, str, str]], kind: str) -> dict[str, Place]:
    """Bottlenecks of (name, slot, key); AdapterError for one without both of its weights."""
    slots: dict[str, dict[str, str]] = defaultdict(dict)
    for name, slot, key in found:
        slots[name][slot] = key
    for name, held in slots.items():
        if missing := sorted({"down.weight", "up.weight"} - set(held)):
            raise AdapterError(f"{name}: has no {missing[0]}; load the whole checkpoint")
    return {
        name: Place(kind, s["down.weight"], s["up.weight"], s.get("down.bias"), s.get("up.bias"))
        for name, s in slots.items()
    }


LAYOUTS: tuple[Finder, ...] = (adaptertune, adaptformer, mosa)


def is_bottleneck(key: str) -> bool:
    """Whether a key is of one of the `LAYOUTS`."""
    match = _MOSA.match(key)
    of_mosa = match is not None and (match["merge"] or match["expert"]) and not _OF_HUB.search(f".{match['stem']}")
    return bool(of_mosa or _ADAPTERTUNE.match(key) or _ADAPTFORMER.match(key))


def is_hub_bottleneck(key: str) -> bool:
    """Whether a key is of a bottleneck of AdapterHub."""
    return _HUB_WEIGHT.match(key) is not None


_HUB = re.compile(r"^(?P<name>(?:.+\.)?adapters\.[^.]+)\.(?P<rest>.+)$")
_HUB_WEIGHT = re.compile(r"^(?:.+\.)?adapters\.[^.]+\.adapter_(down\.\d+|up)\.(weight|bias)$")
_HUB_DOWN = re.compile(r"^adapter_down\.(\d+)\.weight$")


def adapterhub(specs: Mapping[str, TensorSpec], config: Mapping[str, Any] | None) -> dict[str, Place]:
    """`<module>.adapters.<name>.adapter_down.{0,1}` and `.adapter_up`, by the config; PHM layers are left out."""
    stated = bottleneck_config(config)
    activation, scaling = stated.get("non_linearity"), stated.get("scaling", 1.0)
    rests: dict[str, dict[str, str]] = defaultdict(dict)
    for key in specs:
        if (match := _HUB.match(key)) is not None:
            rests[match["name"]][match["rest"]] = key
    kind = _hub_kind(stated, rests)
    found = {}
    for name, keys in rests.items():
        downs = [  # a norm in the sequence has a vector
            (int(m[1]), rest) for rest in keys if (m := _HUB_DOWN.match(rest)) and len(specs[keys[rest]].shape) == 2
        ]
        if not downs and "adapter_up.weight" not in keys:
            continue
        if not downs or "adapter_up.weight" not in keys:
            missing = "adapter_up.weight" if downs else "adapter_down.0.weight"
            raise AdapterError(f"{name}: has no {missing}; load the whole checkpoint")
        index, rest = max(downs)
        stem = rest.removesuffix(".weight")
        norms = ("adapter_norm_before", f"adapter_down.{index - 1}")  # two names of one module, if there is any
        norm = next((n for n in norms if {f"{n}.weight", f"{n}.bias"} <= set(keys)), None)
        assumed = [] if isinstance(activation, str) else ["no activation in adapter_config.json"]
        if "scaling" not in keys and not isinstance(scaling, int | float):
            assumed.append(UNSTATED_SCALE)
        found[name] = Place(
            kind,
            keys[f"{stem}.weight"],
            keys["adapter_up.weight"],
            keys.get(f"{stem}.bias"),
            keys.get("adapter_up.bias"),
            norm=None if norm is None else (keys[f"{norm}.weight"], keys[f"{norm}.bias"]),
            activation=activation.lower() if isinstance(activation, str) else None,
            scale=keys.get("scaling") or (float(scaling) if isinstance(scaling, int | float) else 1.0),
            assumed=tuple(assumed),
        )
    groups = _layers(list(found))
    return {name: replace(place, group=groups[name]) for name, place in found.items()}


def bottleneck_config(config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The fields of an AdapterHub config that describe its bottlenecks, one of several configs in a union included."""
    inner = (config or {}).get("config")
    if not isinstance(inner, Mapping):
        return {}
    parts = inner.get("configs")
    members = [p for p in parts if isinstance(p, Mapping)] if isinstance(parts, Sequence) else []
    return next((fields for fields in (inner, *members) if "non_linearity" in fields), {})


def with_reduction(config: Mapping[str, Any], places: Mapping[str, Place], widths: Mapping[str, int]) -> dict[str, Any]:
    """An AdapterHub config whose reduction_factor gives these widths: a number, or one for each layer."""
    size, stated = config.get("hidden_size"), bottleneck_config(config)
    if not stated or not isinstance(size, int):
        raise AdapterError("adapter_config.json has no hidden_size or no settings of bottlenecks; save it again")
    by_group: dict[str, int] = {}
    for name, width in widths.items():
        if by_group.setdefault(places[name].group, width) != width:
            raise AdapterError(f"{name}: its width differs from that of others in its layer, which no config states")
    factors = {group: reduction_factor(size, width) for group, width in by_group.items()}
    values = list(factors.values())
    made = values[0] if len(set(values)) == 1 else {**factors, "default": max(values, key=values.count)}
    inner = config["config"]
    changed = {**stated, "reduction_factor": made}
    if stated is inner:
        return {**config, "config": changed}
    members = [changed if fields is stated else fields for fields in inner["configs"]]
    return {**config, "config": {**inner, "configs": members}}


def reduction_factor(size: int, width: int) -> float:
    """The factor for which int(size // factor), as the library computes it, is `width`."""
    if size % width == 0:
        return size // width
    factor = size / width
    while int(size // factor) < width:
        factor -= factor * 2**-50
    return factor


def _hub_kind(stated: Mapping[str, Any], rests: Mapping[str, Any]) -> str:
    if stated.get("is_parallel"):
        return "AdapterHub, parallel"
    places = stated.get("mh_adapter"), stated.get("output_adapter")
    if not stated:
        places = any(".attention." in f".{name}" for name in rests), True
    return {(True, True): "Houlsby", (False, True): "Pfeiffer"}.get((bool(places[0]), bool(places[1])), "AdapterHub")


def _layers(names: Sequence[str]) -> dict[str, str]:
    """The number of the layer of each, as configs count them; the same for all where a model has several stacks."""
    found = {name: _LAYER.search(f".{name}") for name in names}
    stems = {f".{name}"[: match.start()] if match else None for name, match in found.items()}
    if len(stems) != 1 or None in stems:
        return dict.fromkeys(names, "")
    return {name: match[1] for name, match in found.items() if match}
