"""Probe, transcode and compress the weights of fine-tuning adapters."""

from loratools._version import __version__
from loratools.base_weights import load_base
from loratools.files import load, save
from loratools.ops.aurac import aurac
from loratools.ops.convert import Convert, convert, convert_file
from loratools.ops.delta import delta, delta_file
from loratools.ops.diff import diff
from loratools.ops.extract import differences, extract
from loratools.ops.fuse import fuse
from loratools.ops.hydra import hydra
from loratools.ops.info import info
from loratools.ops.initial import subtract_initial
from loratools.ops.inspect import inspect
from loratools.ops.merge import Merge, merge
from loratools.ops.squeeze import Squeeze, squeeze, squeeze_file
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
    Ratio,
    Threshold,
)

__all__ = [
    "AdapterTuneElbow",
    "Budget",
    "Convert",
    "Cumulative",
    "Elbow",
    "Energy",
    "Fixed",
    "Frobenius",
    "Limits",
    "Merge",
    "Ratio",
    "Squeeze",
    "Threshold",
    "__version__",
    "aurac",
    "convert",
    "convert_file",
    "delta",
    "delta_file",
    "diff",
    "differences",
    "extract",
    "fuse",
    "hydra",
    "info",
    "inspect",
    "load",
    "load_base",
    "merge",
    "save",
    "squeeze",
    "squeeze_file",
    "subtract_initial",
    "truncate",
    "truncate_file",
]
