"""`loratools info`."""

from __future__ import annotations

from loratools_cli import options
from loratools_cli.output import Output


def info(
    path: options.AdapterPath,
    enable_lora: options.EnableLora = None,
    petl: options.Petl = None,
    everything: options.Everything = False,
    as_json: options.Json = False,
) -> None:
    """Tell format, base, ranks and sizes of an adapter.

    Reads the header alone, whatever the size.

    Example: loratools info my_lora.safetensors
    """
    import loratools
    from loratools_cli.opening import open_adapter

    output = Output(as_json=as_json, everything=everything)
    output.show(loratools.info(open_adapter(path, enable_lora=enable_lora, petl=petl, weights=False)))
