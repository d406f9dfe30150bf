"""The model of a GGUF file as a folder, which loads in a second: its tokenizer alone takes most of a minute."""

from __future__ import annotations

from pathlib import Path

from loratools.training.models import load_model


def save_as_folder(file: Path, place: Path) -> Path:
    """Write the dequantised model, float32, and its tokenizer."""
    model, tokenizer = load_model(file, dtype="float32")
    model.hf_quantizer = None  # of plain numbers by now; with it transformers refuses to write them
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place
