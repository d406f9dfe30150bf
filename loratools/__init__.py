"""Probe, transcode and compress the weights of fine-tuning adapters."""

from loratools._version import __version__
from loratools.files import load, save
from loratools.ops.squeeze import squeeze

__all__ = ["__version__", "load", "save", "squeeze"]
