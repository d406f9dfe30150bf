"""What a dialect promises: keys to (target, slot) and back, the scale convention, and its config."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from loratools.errors import AdapterError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Set
    from pathlib import Path

    from typing_extensions import Self

    from loratools.families.base import Layout
    from loratools.formats.bottlenecks import Place
    from loratools.formats.layouts import Model
    from loratools.formats.modules import Module, Placement
    from loratools.formats.packing import Packing
    from loratools.storage.base import TensorSpec

ScaleMode = Literal["fold", "keep"]


def _no_file(name: str) -> None:
    return None


@dataclass(frozen=True)
class Header:
    """All that is known of an adapter before a tensor is read.

    `config` is the adapter_config.json beside the weights; `beside` reads another JSON or YAML file there by its name,
    and gives None where there is none.
    """

    path: Path
    specs: Mapping[str, TensorSpec]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None = None
    beside: Callable[[str], Mapping[str, Any] | None] = _no_file


NestedScaling = Literal["none", "rank", "sqrt"]


@dataclass(frozen=True)
class Hints:
    """What the user knows and a file may not state.

    alpha; how MatryoshkaLoRA scaled each rank; which of the projections that a parameter fuses are updated; of the base
    model the shapes of its parameters by name, and its config; and the shares of entries that SNELL drops, one for all
    targets or one for each.
    """

    alpha: float | None = None
    scaling: NestedScaling | None = None
    base_shape: Callable[[str], tuple[int, ...] | None] | None = None
    base_config: Mapping[str, Any] | None = None
    enable_lora: tuple[bool, ...] | None = None
    thresholds: float | Mapping[str, float] | None = None


@dataclass(frozen=True)
class Written:
    """Rank and scale with which a target's factors were written.

    `alpha` is the number that the file stated, which counts for families whose scale it does not make.
    """

    rank: int
    scale: float
    alpha: float | None = None


@dataclass(frozen=True)
class Declaration:
    """What a dialect states beside the factors: config fields, metadata, and the number stored under each scale key."""

    config: Mapping[str, Any] | None
    metadata: Mapping[str, str]
    scalars: Mapping[str, tuple[float, TensorSpec]] = field(default_factory=dict)


@dataclass(frozen=True)
class Order:
    """What is asked of a file that is to be written, beside its targets.

    `config`: fields to keep, of the dialect's own config; `metadata`: whether the file may carry any; `model_config`:
    the base model's own; `quantised`: blocks of 8 bits, where the container has them.
    """

    model: Model | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: bool = True
    model_config: Mapping[str, Any] = field(default_factory=dict)
    quantised: bool = False


@dataclass(frozen=True)
class Part:
    """One target of an adapter that is to be written in a dialect."""

    slots: tuple[str, ...]
    layout: Layout
    shape: tuple[int, ...] | None  # of the base parameter
    rank: int = 0
    scale: float = 1.0
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # of the factors, by slot
    settings: Mapping[str, Any] = field(default_factory=dict)  # that the family keeps in a config


def check_plain(parts: Mapping[str, Part], dialect: str) -> None:
    """AdapterError for a target that is an embedding or a stack of experts, where a dialect has neither."""
    for target, part in parts.items():
        if part.layout.embedding or part.layout.experts > 1:
            kind = "an embedding" if part.layout.embedding else "a stack of experts"
            raise AdapterError(f"{target}: {kind}, which the dialect {dialect} cannot hold; write PEFT instead")


class Format(ABC):
    """A dialect bound to one file: it has sorted that file's keys and remembers how the scale was spelt."""

    name: ClassVar[str]
    writable: ClassVar[bool] = True  # whether a changed file can be written in the dialect of the one that was read
    weights_name: ClassVar[str] = "adapter_model.safetensors"  # in the folder of an adapter with a config
    framework: ClassVar[str] = "pt"  # `format` in the metadata of a file beside a config, for readers that ask for it
    holds: ClassVar[frozenset[str]] = frozenset()  # families that it can be asked to write; none for one that is read
    kindred: ClassVar[Mapping[str, str]] = {}  # families that seem to have a place, and do not: why
    slots: ClassVar[frozenset[str]] = frozenset({"down", "up", "magnitude"})  # of LoRA and DoRA, where they are held
    container: ClassVar[str] = "safetensors"  # in which it is written
    biases: ClassVar[bool] = False  # whether a bias may be a target of its own
    uniform: ClassVar[bool] = False  # whether all targets of a file have one rank
    quantised: bool = False  # whether a container that can is to pack its tensors in blocks of 8 bits
    stale: ClassVar[tuple[str, ...]] = ()  # metadata that is false once a tensor changes
    flat: ClassVar[bool] = False  # whether dots in module paths are written as underscores
    keys: Mapping[str, Mapping[str, str]]  # target -> slot -> key
    extras: tuple[str, ...]
    unsupported: Mapping[str, str]  # target -> why it is carried along but cannot be worked on
    warnings: tuple[str, ...]
    bottlenecks: Mapping[str, Place] = MappingProxyType({})  # nonlinear ones among the extras, by name

    def place(self, target: str) -> Placement | None:
        """The modules that the target changes; None where its name does not tell."""
        return None

    def packing(self, target: str, slot: str) -> Packing:
        """How a stored tensor lies against the factor that it is."""
        return "transposed" if slot in self.transposed_slots(target) else "plain"

    def references(self, target: str) -> Mapping[str, str]:
        """Slot -> extra key, for tensors that the target shares with others."""
        return {}

    def copies(self) -> Mapping[str, str]:
        """Extra key -> the extra key of the same tensor, which is all that a reader needs."""
        return {}

    def settings(self, target: str) -> Mapping[str, Any]:
        """The numbers that the target's family keeps in a config."""
        return {}

    @classmethod
    def arrange(cls, modules: Mapping[Module, tuple[int, ...] | None], order: Order) -> Mapping[str, Placement]:
        """The targets of a new file for these modules with the shapes of their weights.

        UnmappedModuleError names a module that the dialect has no name for.
        """
        raise NotImplementedError(f"{cls.name} is not written")

    @classmethod
    def compose(cls, parts: Mapping[str, Part], order: Order) -> Self:
        """The dialect bound to a file that is yet to be written."""
        raise NotImplementedError(f"{cls.name} is not written")

    @classmethod
    def lacks(cls, layout: Layout, slots: Set[str]) -> str | None:
        """What about a LoRA or DoRA of this layout the dialect has no place for, or None."""
        for wrong, what in (
            (layout.embedding, "an embedding"),
            (layout.experts > 1, "a stack of experts"),
            (layout.transposed and not layout.embedding, "a transposed weight"),
        ):
            if wrong:
                return what
        return None

    @classmethod
    def fresh_metadata(cls, order: Order) -> dict[str, str]:
        """Fields of a new file, beside those that `declare` makes true."""
        return {}

    def carried_config(self) -> Mapping[str, Any]:
        """What a file in another dialect has to keep of the config, so that a conversion back restores it."""
        return {}

    def kept_config(self, targets: Set[str], *, portable: bool, without_extras: bool) -> Mapping[str, Any]:
        """What of the config stays true in a new file of this dialect with these targets."""
        return self.carried_config()

    @classmethod
    def magnitude_shape(cls, part: Part, count: int) -> tuple[int, ...]:
        """The shape in which a DoRA magnitude of `count` numbers is stored."""
        return (count,)

    @classmethod
    @abstractmethod
    def recognises(cls, header: Header) -> bool:
        """Whether the file is in this dialect."""

    @classmethod
    @abstractmethod
    def bind(cls, header: Header, hints: Hints = Hints()) -> Self:
        """Sort the keys of a recognised file; `hints` stand in for what it does not state."""

    def as_lora(self, parts: Mapping[str, Part], extras: tuple[str, ...]) -> Format:
        """This file's dialect and settings for other updates, all of them LoRA.

        Here for dialects whose names of new targets take more than a suffix: AdapterError for a target that the file
        lacks, or one that is more than two factors.
        """
        check_plain(parts, self.name)
        for target, part in parts.items():
            if target not in self.keys or not set(part.slots) <= {"down", "up"}:
                why = "is in other adapters alone" if target not in self.keys else "is more than two factors"
                raise AdapterError(
                    f"{target}: {why}, which the dialect {self.name} cannot take over; convert the first adapter: "
                    "loratools convert --to peft"
                )
        keys = {target: {slot: self.spell(target, slot) for slot in part.slots} for target, part in parts.items()}
        return cast("Format", replace(cast("Any", self), keys=keys, extras=extras))

    @abstractmethod
    def spell(self, target: str, slot: str) -> str:
        """The key of a slot: the one read, where there was one."""

    @abstractmethod
    def layout(self, target: str) -> Layout:
        """How the target's operator lies in the base parameter."""

    @abstractmethod
    def scale_key(self, target: str) -> str | None:
        """The key of the tensor that states the target's alpha, where the dialect has such tensors."""

    @abstractmethod
    def scale(self, target: str, rank: int, stored_alpha: float | None) -> float:
        """The multiplier of up @ down; `stored_alpha` is the number under `scale_key`."""

    @abstractmethod
    def writable_scale(self, target: str, rank: int, scale: float, mode: ScaleMode) -> float:
        """The scale to write factors of `rank` with, for an update read with `scale`.

        1 for `fold`, `scale` for `keep`, unless the file has no place for one: then what its readers will assume.
        """

    @abstractmethod
    def declare(self, written: Mapping[str, Written], metadata: Mapping[str, str]) -> Declaration:
        """Rank and alpha fields, made true for tensors that changed."""

    @abstractmethod
    def parameter(self, target: str) -> str:
        """Name of the base parameter that the target changes."""

    @property
    @abstractmethod
    def nested_scaling(self) -> NestedScaling | None:
        """How the file's own method scales each rank, where it says; `none` where no scale is stored at all."""

    @abstractmethod
    def is_stored_transposed(self, target: str) -> bool:
        """Whether the file keeps the factors as (n, r) and (r, m), to be transposed on the way in and out."""

    def transposed_slots(self, target: str) -> frozenset[str]:
        """The slots that the file keeps transposed: all of them, or none, unless a dialect says otherwise."""
        return frozenset(self.keys[target]) if self.is_stored_transposed(target) else frozenset()

    def resized(self, widths: Mapping[str, int]) -> Format:
        """The same dialect for bottlenecks of these widths, each merged from its experts."""
        raise NotImplementedError(f"{self.name} has no bottlenecks")

    @property
    def mutated_init(self) -> str | None:
        """The initialisation that took the first factors out of the base weight, where the file says so."""
        return None

    @abstractmethod
    def without_mutation(self) -> Self:
        """The same dialect for factors that are relative to the original base weight again."""

    @abstractmethod
    def replacements(self) -> Mapping[str, str]:
        """Extra keys that replace a base parameter outright: key -> parameter name."""
