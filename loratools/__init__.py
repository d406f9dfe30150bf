"""Probe, transcode and compress the weights of fine-tuning adapters."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from loratools._version import __version__

if TYPE_CHECKING:
    from loratools.base_weights import load_base
    from loratools.cache import Cache, default_cache
    from loratools.files import load, save
    from loratools.ops.activations import Activations, load_activations
    from loratools.ops.aurac import aurac
    from loratools.ops.bakeoff import Bakeoff, bakeoff
    from loratools.ops.base_spectra import Search
    from loratools.ops.bitdelta import extract_bitdelta
    from loratools.ops.check import check
    from loratools.ops.compare import compare
    from loratools.ops.convert import Convert, convert, convert_file
    from loratools.ops.delta import delta, delta_file
    from loratools.ops.diff import diff
    from loratools.ops.extract import differences, extract
    from loratools.ops.fine_tunes import open_fine_tune
    from loratools.ops.fuse import fuse
    from loratools.ops.hydra import hydra, hydra_branches
    from loratools.ops.info import info
    from loratools.ops.initial import subtract_initial
    from loratools.ops.inspect import inspect
    from loratools.ops.intruders import intruders, mitigate
    from loratools.ops.merge import Merge, merge
    from loratools.ops.mixture import Mixture, merge_route_set, mixture
    from loratools.ops.mosa import assemble, merge_experts
    from loratools.ops.neurons import neurons
    from loratools.ops.pareto import pareto
    from loratools.ops.pissa import pissa_state, subtract_principal, subtract_residual
    from loratools.ops.prune_neurons import PruneNeurons, prune_neurons, prune_neurons_file
    from loratools.ops.prune_plan import Heads, PrunePlan, read_plan
    from loratools.ops.quantize import Quantize, quantize, quantize_file
    from loratools.ops.reparameterize import Reparameterize, reparameterize, reparameterize_file
    from loratools.ops.resize import expand, restrict
    from loratools.ops.routing import Routing, load_routing, routing
    from loratools.ops.squeeze import Squeeze, squeeze, squeeze_file
    from loratools.ops.statistics import Statistics, load_statistics
    from loratools.ops.truncate import truncate, truncate_file
    from loratools.ranks import (
        AdapterTuneElbow,
        Budget,
        Cumulative,
        Elbow,
        Energy,
        Fixed,
        Frobenius,
        Limits,
        PerTarget,
        Ratio,
        Threshold,
    )
    from loratools.training.calibrate import Calibrate, calibrate
    from loratools.training.data_free import data_free_statistics
    from loratools.training.switch import Switch, switched

__all__ = [
    "Activations",
    "AdapterTuneElbow",
    "Bakeoff",
    "Budget",
    "Cache",
    "Calibrate",
    "Convert",
    "Cumulative",
    "Elbow",
    "Energy",
    "Fixed",
    "Frobenius",
    "Heads",
    "Limits",
    "Merge",
    "Mixture",
    "PerTarget",
    "PruneNeurons",
    "PrunePlan",
    "Quantize",
    "Ratio",
    "Reparameterize",
    "Routing",
    "Search",
    "Squeeze",
    "Statistics",
    "Switch",
    "Threshold",
    "__version__",
    "assemble",
    "aurac",
    "bakeoff",
    "calibrate",
    "check",
    "compare",
    "convert",
    "convert_file",
    "data_free_statistics",
    "default_cache",
    "delta",
    "delta_file",
    "diff",
    "differences",
    "expand",
    "extract",
    "extract_bitdelta",
    "fuse",
    "hydra",
    "hydra_branches",
    "info",
    "inspect",
    "intruders",
    "load",
    "load_activations",
    "load_base",
    "load_routing",
    "load_statistics",
    "merge",
    "merge_experts",
    "merge_route_set",
    "mitigate",
    "mixture",
    "neurons",
    "open_fine_tune",
    "pareto",
    "pissa_state",
    "prune_neurons",
    "prune_neurons_file",
    "quantize",
    "quantize_file",
    "read_plan",
    "reparameterize",
    "reparameterize_file",
    "restrict",
    "routing",
    "save",
    "squeeze",
    "squeeze_file",
    "subtract_initial",
    "subtract_principal",
    "subtract_residual",
    "switched",
    "truncate",
    "truncate_file",
]

# Where each name lives: a command line that needs one verb does not wait for the others to be imported.
_HOMES = {
    "loratools.base_weights": ("load_base",),
    "loratools.cache": ("Cache", "default_cache"),
    "loratools.files": ("load", "save"),
    "loratools.ops.activations": ("Activations", "load_activations"),
    "loratools.ops.aurac": ("aurac",),
    "loratools.ops.bakeoff": ("Bakeoff", "bakeoff"),
    "loratools.ops.bitdelta": ("extract_bitdelta",),
    "loratools.ops.base_spectra": ("Search",),
    "loratools.ops.check": ("check",),
    "loratools.ops.compare": ("compare",),
    "loratools.ops.convert": ("Convert", "convert", "convert_file"),
    "loratools.ops.delta": ("delta", "delta_file"),
    "loratools.ops.diff": ("diff",),
    "loratools.ops.extract": ("differences", "extract"),
    "loratools.ops.fine_tunes": ("open_fine_tune",),
    "loratools.ops.fuse": ("fuse",),
    "loratools.ops.hydra": ("hydra", "hydra_branches"),
    "loratools.ops.info": ("info",),
    "loratools.ops.initial": ("subtract_initial",),
    "loratools.ops.inspect": ("inspect",),
    "loratools.ops.intruders": ("intruders", "mitigate"),
    "loratools.ops.merge": ("Merge", "merge"),
    "loratools.ops.neurons": ("neurons",),
    "loratools.ops.mixture": ("Mixture", "merge_route_set", "mixture"),
    "loratools.ops.mosa": ("assemble", "merge_experts"),
    "loratools.ops.pareto": ("pareto",),
    "loratools.ops.prune_neurons": ("PruneNeurons", "prune_neurons", "prune_neurons_file"),
    "loratools.ops.pissa": ("pissa_state", "subtract_principal", "subtract_residual"),
    "loratools.ops.prune_plan": ("Heads", "PrunePlan", "read_plan"),
    "loratools.ops.resize": ("expand", "restrict"),
    "loratools.ops.quantize": ("Quantize", "quantize", "quantize_file"),
    "loratools.ops.reparameterize": ("Reparameterize", "reparameterize", "reparameterize_file"),
    "loratools.ops.routing": ("Routing", "load_routing", "routing"),
    "loratools.ops.squeeze": ("Squeeze", "squeeze", "squeeze_file"),
    "loratools.ops.statistics": ("Statistics", "load_statistics"),
    "loratools.ops.truncate": ("truncate", "truncate_file"),
    "loratools.ranks": (
        "AdapterTuneElbow",
        "Budget",
        "Cumulative",
        "Elbow",
        "Energy",
        "Fixed",
        "Frobenius",
        "Limits",
        "PerTarget",
        "Ratio",
        "Threshold",
    ),
    "loratools.training.calibrate": ("Calibrate", "calibrate"),
    "loratools.training.data_free": ("data_free_statistics",),
    "loratools.training.switch": ("Switch", "switched"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__]
