"""Statistics of what enters each target, by one pass of texts through the model with the adapter at work in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools._lazy import torch
from loratools.errors import AdapterError, UsageError
from loratools.ops.statistics import Statistics, fingerprint, weighed_targets
from loratools.reports.calibrate import CalibratedTarget, CalibrateReport
from loratools.training.applied import applied, apply
from loratools.training.models import load_model, module_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from loratools.adapter import Adapter
    from loratools.families.base import Update


@dataclass(frozen=True)
class Calibrate:
    """How many of the texts, how many tokens of each, and how many texts at once.

    `bare`: the model runs as it is, for one that has the adapter inside already.
    """

    max_texts: int = 256
    max_tokens: int = 512
    batch: int = 8
    device: str = "cpu"
    bare: bool = False

    def __post_init__(self) -> None:
        for name in ("max_texts", "max_tokens", "batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")


def calibrate(
    base: Any,
    adapter: Adapter,
    texts: Sequence[str],
    *,
    tokenizer: Any = None,
    options: Calibrate = Calibrate(),
    step: Callable[[], None] | None = None,
) -> Statistics:
    """Second moments of the inputs of every LoRA and DoRA target, over the tokens of `texts`; padding does not count.

    `base` is a folder of a Hugging Face model, or a model, which then needs its `tokenizer` (texts to `input_ids`). It
    runs with the adapter added to its weights, unless `options.bare`, so that inputs are those that occur in use; the
    weights of a model are then what they were, bit by bit. `step` is called after each batch. Raises AdapterError
    naming a target that the model has no module for, or whose update does not fit it.
    """
    targets = weighed_targets(adapter)
    model, given = base, not isinstance(base, str | os.PathLike)
    if not given:
        model, own = load_model(Path(base), options.device)
        tokenizer = own if tokenizer is None else tokenizer
    if tokenizer is None:
        raise UsageError("a model in memory needs its tokenizer: calibrate(model, adapter, texts, tokenizer=...)")
    rows = token_rows(tokenizer, texts, options)
    meters = {target: _Meter.of(target, adapter[target], options.device) for target in targets}
    modules = {target: module_of(model, adapter, target) for target in targets}
    with ExitStack() as stack:
        if given and not options.bare:
            stack.enter_context(applied(model, adapter))
        elif not options.bare:
            apply(model, adapter)
        core = stack.enter_context(_metered(model, modules, meters))
        for ids, mask in _batches(rows, options):
            for meter in meters.values():
                meter.mask = mask
            core(input_ids=ids, attention_mask=mask, **({"use_cache": False} if hasattr(core, "config") else {}))
            if step is not None:
                step()
    return Statistics(
        {t: m.mean(m.moment) for t, m in meters.items()},
        {t: m.mean(m.squares) for t, m in meters.items()},
        sum(len(row) for row in rows),
        {t: m.fingerprint for t, m in meters.items()},
    )


def token_rows(tokenizer: Any, texts: Sequence[str], options: Calibrate) -> list[list[int]]:
    """Token ids of the first texts, longest first, so that a batch that is too large fails at once."""
    if isinstance(texts, str):
        raise UsageError("texts are a list of strings, not one string")
    encoded = (list(tokenizer(text).input_ids)[: options.max_tokens] for text in texts[: options.max_texts])
    rows = sorted((ids for ids in encoded if ids), key=len, reverse=True)
    if not rows:
        raise UsageError("there are no texts to run the model on; give some that are not empty")
    return rows


def n_batches(n_texts: int, options: Calibrate) -> int:
    """How many steps `calibrate` takes for that many texts."""
    return -(-min(n_texts, options.max_texts) // options.batch)


def summarised(statistics: Statistics, *, texts: int, output: Path, bare: bool = False) -> CalibrateReport:
    """What is known of the inputs of each target."""
    rows = {}
    for target, moment in statistics.moments.items():
        energies = torch.linalg.eigvalsh(moment).clamp(min=0)
        total, squares = float(energies.sum()), float(energies.square().sum())
        means = statistics.channels(target)
        spread = total**2 / squares if squares else 0.0
        rows[target] = CalibratedTarget(len(moment), len(means), float(means.mean()), spread)
    return CalibrateReport(rows, texts, statistics.tokens, output.stat().st_size, str(output), bare=bare)


def _batches(rows: Sequence[Sequence[int]], options: Calibrate) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and mask, (texts, tokens) each, padded on the right."""
    for start in range(0, len(rows), options.batch):
        part = [torch.tensor(row) for row in rows[start : start + options.batch]]
        ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
        lengths = torch.tensor([len(row) for row in part]).unsqueeze(1)
        mask = (torch.arange(ids.shape[1]) < lengths).long()
        yield ids.to(options.device), mask.to(options.device)


@contextmanager
def _metered(model: Any, modules: dict[str, Module], meters: dict[str, _Meter]) -> Iterator[Any]:
    """What is to be called of the model, with a hook before each module; it is then as it was."""
    core = getattr(model, "base_model", model)  # without the head, which costs as much as all layers of a small model
    inside = {id(module) for module in core.modules()}
    core = core if all(id(module) in inside for module in modules.values()) else model
    was_training = model.training
    with ExitStack() as stack, torch.no_grad():
        for target, module in modules.items():
            handle = module.register_forward_pre_hook(meters[target], with_kwargs=True)
            stack.callback(handle.remove)
        stack.callback(model.train, was_training)
        model.eval()
        yield core


@dataclass(eq=False)
class _Meter:
    """Sums over the inputs of one module; a forward hook."""

    target: str
    down: Tensor  # (r, n) float32
    embedding: bool
    fingerprint: str
    moment: Tensor = field(init=False)  # (r, r) float64
    squares: Tensor = field(init=False)  # (n,) float64
    count: int = 0
    mask: Tensor | None = None  # (texts, tokens) of the batch that runs

    @classmethod
    def of(cls, target: str, update: Update, device: str) -> _Meter:
        stored = update.parameters()["down"]
        return cls(target, stored.to(device, torch.float32), update.layout.embedding, fingerprint(update))

    def __post_init__(self) -> None:
        rank, inputs = self.down.shape
        self.moment = torch.zeros(rank, rank, dtype=torch.float64, device=self.down.device)
        self.squares = torch.zeros(inputs, dtype=torch.float64, device=self.down.device)

    def __call__(self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered = args[0] if args else next(iter(kwargs.values()))
        rows = self._rows(entered)
        if self.embedding:
            low = self.down[:, rows.flatten()].T
            self.squares += torch.bincount(rows.flatten(), minlength=len(self.squares)).double()
        else:
            rows = rows.float()
            low = rows @ self.down.T
            self.squares += rows.square().sum(0).double()
        low = low.double()
        self.moment += low.T @ low
        self.count += len(low)

    def _rows(self, entered: Tensor) -> Tensor:
        """(tokens, n) of the input, or (tokens,) of ids, without padding."""
        assert self.mask is not None  # set before the model is called
        lead = entered.shape if self.embedding else entered.shape[:-1]
        fits = lead.numel() == self.mask.numel()
        if not fits or (not self.embedding and entered.shape[-1] != self.down.shape[1]):
            raise AdapterError(
                f"{self.target}: its module takes {tuple(entered.shape)} where {tuple(self.mask.shape)} tokens of "
                f"{self.down.shape[1]} channels were expected; is it the base of this adapter?"
            )
        flat = entered.reshape(-1) if self.embedding else entered.reshape(-1, entered.shape[-1])
        return flat[self.mask.flatten().bool()]

    def mean(self, total: Tensor) -> Tensor:
        """A sum as a mean over the tokens, on the CPU; AdapterError where the module was never called."""
        if not self.count:
            raise AdapterError(f"{self.target}: the model did not call its module; is it the base of this adapter?")
        return (total / self.count).cpu()
