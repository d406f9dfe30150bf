"""What two models compute at the same places of the same texts, and the maps that turn the one into the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loratools._lazy import torch
from loratools.errors import AdapterError, UsageError
from loratools.linalg.alignment import Isometry, held_out_cosine, procrustes
from loratools.ops.weight_space import Maps
from loratools.training.models import module_at

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

_BUDGET = 1 << 30  # bytes of activations that are held at once
_KEPT = 8  # maps that are at hand for the next modules
# Modules whose outputs go, channel by channel, to what enters another: one space, which each of them shows a part of.
_LEADS_TO = {"gate_proj": "down_proj", "up_proj": "down_proj", "fc1": "fc2", "c_fc": "c_proj", "wi": "wo"}


_Caught = tuple["Tensor", "Tensor"]  # (N, n) what enters a module, and (N, m) what leaves it


@dataclass(frozen=True, eq=False)
class Side:
    """A model and its tokenizer."""

    model: Any
    tokenizer: Any
    name: str


@dataclass(frozen=True)
class PairedText:
    """Token ids of one text for both models, and the places at which the same characters have been read."""

    ids: tuple[tuple[int, ...], tuple[int, ...]]
    places: tuple[tuple[int, ...], tuple[int, ...]]


def paired_texts(one: Side, other: Side, texts: Sequence[str], *, max_tokens: int = 256) -> list[PairedText]:
    """The texts with places in both models: ends of tokens of either tokenizer that fall on the same character.

    UsageError where there are none, or a tokenizer cannot tell where its tokens lie.
    """
    found = []
    for text in texts:
        (ids, ends), (other_ids, other_ends) = (_tokens(side, text, max_tokens) for side in (one, other))
        shared = [end for end in ends if end in other_ends]
        if shared:
            places = tuple(ends[end] for end in shared), tuple(other_ends[end] for end in shared)
            found.append(PairedText((tuple(ids), tuple(other_ids)), places))
    if not found:
        raise UsageError("the tokens of the two models end at the same character nowhere; give longer texts")
    return found


def _tokens(side: Side, text: str, max_tokens: int) -> tuple[list[int], dict[int, int]]:
    """Ids, and the last token that ends at each character; special tokens, of no characters, end nowhere."""
    try:
        encoded = side.tokenizer(text, return_offsets_mapping=True)
    except (NotImplementedError, TypeError) as error:
        raise UsageError(
            f"the tokenizer of {side.name} does not tell where its tokens lie; use a model with a tokenizer.json"
        ) from error
    ids = list(encoded["input_ids"])[:max_tokens]
    spans = list(encoded["offset_mapping"])[:max_tokens]
    return ids, {end: place for place, (start, end) in enumerate(spans) if end > start}


@dataclass(eq=False)
class PairedActivations:
    """Maps of modules, each pair by the activations of both models; they are computed for many pairs in one pass.

    As many pairs, in the order of `pairs`, as fit a gigabyte; the texts run once for each such group.
    """

    one: Side
    other: Side
    texts: Sequence[PairedText]
    pairs: Sequence[tuple[str, str]]
    device: str = "cpu"
    budget: int = _BUDGET
    _known: list[tuple[Tensor, Tensor, tuple[Isometry, float]]] = field(default_factory=list, init=False)
    _held: dict[tuple[str, str], tuple[_Caught, _Caught]] = field(default_factory=dict, init=False)

    @property
    def rows(self) -> int:
        """How many places there are in all texts."""
        return sum(len(text.places[0]) for text in self.texts)

    def __call__(self, module: str, other: str) -> Maps:
        """How outputs and inputs of a module turn into those of another; AdapterError where a model lacks it."""
        pair = module, other
        if pair not in self._held:
            self._held = self._run(self._group(pair))
        (x, y), (other_x, other_y) = self._held[pair]
        inputs, fits_in = self._fitted(x, other_x)
        outputs, fits_out = self._fitted(y, other_y)
        return Maps(outputs, inputs, min(fits_in, fits_out))

    def _fitted(self, x: Tensor, y: Tensor) -> tuple[Isometry, float]:
        """The map and how well it foretells; the last few are kept, for modules often read the same."""
        for known_x, known_y, found in self._known:
            if known_x is x and known_y is y:
                return found
        found = procrustes(x, y), held_out_cosine(x, y)
        self._known = [(x, y, found), *self._known[: _KEPT - 1]]
        return found

    def _group(self, first: tuple[str, str]) -> list[tuple[str, str]]:
        """The pair and those after it, as many as may be held."""
        group: list[tuple[str, str]] = []
        used = 0
        for pair in self.pairs[self.pairs.index(first) :]:
            sides = zip(self._sides, pair, strict=True)
            weights: list[Any] = [getattr(module_at(side.model, path, path), "weight", None) for side, path in sides]
            used += 4 * self.rows * sum(sum(weight.shape) for weight in weights if weight is not None)
            if group and used > self.budget:
                break
            group.append(pair)
        return group

    def _run(self, group: Sequence[tuple[str, str]]) -> dict[tuple[str, str], tuple[_Caught, _Caught]]:
        paths = [dict.fromkeys(pair[which] for pair in group) for which in (0, 1)]
        inner = [
            {path: _inner_space(side.model, path) for path in found}
            for side, found in zip(self._sides, paths, strict=True)
        ]
        caught = [
            _caught(side, dict.fromkeys((*found, *(p for s in spaces.values() for p in s))), self.texts, i, self.device)
            for i, (side, found, spaces) in enumerate(zip(self._sides, paths, inner, strict=True))
        ]
        joined: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}
        found = {}
        for a, b in group:
            sides = [caught[0][a], caught[1][b]]
            spaces = inner[0][a], inner[1][b]
            if spaces[0] and [_leaf(path) for path in spaces[0]] == [_leaf(path) for path in spaces[1]]:
                key = spaces[0] + spaces[1]
                if key not in joined:
                    one, other = (_rows_of(caught[i], spaces[i]) for i in (0, 1))
                    joined[key] = one, other
                ends = a == spaces[0][-1], b == spaces[1][-1]
                if ends[0] == ends[1]:
                    sides = [
                        (rows, y) if ends[0] else (x, rows) for rows, (x, y) in zip(joined[key], sides, strict=True)
                    ]
            found[a, b] = sides[0], sides[1]
        return found

    @property
    def _sides(self) -> tuple[Side, Side]:
        return self.one, self.other


def _inner_space(model: Any, path: str) -> tuple[str, ...]:
    """The modules whose outputs go, channel by channel, to what enters the last one, if `path` is one of them.

    None of them where the names tell none, or the shapes are others.
    """
    parent, _, leaf = path.rpartition(".")
    last = _LEADS_TO.get(leaf, leaf)
    modules = dict(model.named_modules())
    found = [f"{parent}.{name}" for name, end in _LEADS_TO.items() if end == last and f"{parent}.{name}" in modules]
    weights = [getattr(modules.get(name), "weight", None) for name in (*found, f"{parent}.{last}")]
    if not found or any(w is None or w.ndim != 2 for w in weights):
        return ()
    if any(isinstance(modules[name], torch.nn.Embedding) for name in found):
        return ()
    return (*found, f"{parent}.{last}")


def _rows_of(caught: dict[str, _Caught], space: tuple[str, ...]) -> Tensor:
    """What leaves all modules but the last and enters that one, each of norm 1, so that none outweighs another."""
    *before, last = space
    parts = [*(caught[path][1] for path in before), caught[last][0]]
    return torch.cat([part / (float(part.norm()) or 1.0) for part in parts])


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _caught(
    side: Side, paths: dict[str, None], texts: Sequence[PairedText], which: int, device: str
) -> dict[str, _Caught]:
    """(N, n) inputs and (N, m) outputs of each module at the places of all texts, float32 on the CPU."""
    catch = _Catch()
    nets = {path: _Net(catch) for path in paths}
    run = _without_head(side.model, paths)
    with _netted(side.model, nets):
        for text in texts:
            catch.begin(text.places[which])
            run(input_ids=torch.tensor([text.ids[which]], device=device))
    found = {}
    joined: dict[tuple[int, ...], Tensor] = {}  # what several modules read is held once
    for path, net in nets.items():
        if len(net.inputs) != len(texts):
            raise AdapterError(
                f"{path}: {side.name} calls it {len(net.inputs)} times for {len(texts)} texts, not once each"
            )
        shared = tuple(id(part) for part in net.inputs)
        if shared not in joined:
            joined[shared] = torch.cat(net.inputs)
        found[path] = joined[shared], torch.cat(net.outputs)
    return found


def _without_head(model: Any, paths: dict[str, None]) -> Any:
    """What runs all these modules; the logits of a large vocabulary take longer than all layers of a small model."""
    inner = getattr(model, "base_model", model)
    within = set(inner.modules())
    return inner if all(module_at(model, path, path) in within for path in paths) else model


class _Catch:
    """The rows at some places of the tensors of one pass, each taken once."""

    def __init__(self) -> None:
        self._places = torch.zeros(0, dtype=torch.long)
        self._taken: dict[int, tuple[Tensor, Tensor]] = {}  # the tensors are held, so that no other has their number

    def begin(self, places: Sequence[int]) -> None:
        """For the next pass."""
        self._places, self._taken = torch.tensor(places), {}

    def take(self, tensor: Tensor) -> Tensor:
        """(N, k) float32 on the CPU."""
        if id(tensor) not in self._taken:
            rows = tensor.reshape(-1, tensor.shape[-1])[self._places.to(tensor.device)]
            self._taken[id(tensor)] = tensor, rows.float().cpu()
        return self._taken[id(tensor)][1]


class _Net:
    """A forward hook that keeps what enters and leaves a module at some places."""

    def __init__(self, catch: _Catch) -> None:
        self._catch = catch
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def __call__(self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        entered = args[0] if args else next(iter(kwargs.values()))
        self.inputs.append(self._catch.take(entered))
        self.outputs.append(self._catch.take(output))


@contextmanager
def _netted(model: Any, nets: dict[str, _Net]) -> Iterator[None]:
    was_training = model.training
    with ExitStack() as stack, torch.no_grad():
        for path, net in nets.items():
            handle = module_at(model, path, path).register_forward_hook(net, with_kwargs=True)
            stack.callback(handle.remove)
        stack.callback(model.train, was_training)
        model.eval()
        yield
