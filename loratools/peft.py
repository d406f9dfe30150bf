"""Any adapter that loratools reads, put into a running model as PEFT runs it."""

from loratools.training.peft_model import load_adapter

__all__ = ["load_adapter"]
