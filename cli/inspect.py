"""`loratools inspect`."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from loratools_cli import options


def inspect(
    path: options.AdapterPath,
    target: options.Target = None,
    base: options.Base = None,
    nested: Annotated[bool, Option("--nested", help="Compare the first components with the best ones.")] = False,
    plot: options.FigurePath = None,
    alpha: options.Alpha = None,
    snell_threshold: options.SnellThreshold = None,
    enable_lora: options.EnableLora = None,
    scaling: options.Scaling = None,
    device: options.Device = "cpu",
    allow_nonfinite: Annotated[
        bool, Option("--allow-nonfinite", help="Leave out targets with NaN or infinity.")
    ] = False,
    force: Annotated[bool, Option("--force", help="Replace an existing plot.")] = False,
    everything: options.Everything = False,
    as_json: options.Json = False,
) -> None:
    """Measure updates: norms, spectra, effective ranks.

    Example: loratools inspect my_lora.safetensors --target 'q_proj' --plot spectra.png
    """
    from loratools.ops.inspect import inspect as inspect_adapter
    from loratools_cli.exports import check_exports
    from loratools_cli.opening import open_adapter, open_base
    from loratools_cli.output import Output
    from loratools_cli.progress import Progress

    shown = Output(as_json=as_json, everything=everything)
    options.check_device(device)
    check_exports(figure=plot, force=force)
    weights = open_base(base)
    adapter = open_adapter(
        path, alpha=alpha, enable_lora=enable_lora, scaling=scaling, base=weights, thresholds=snell_threshold
    )
    with Progress() as progress:
        report = inspect_adapter(
            progress.watch(adapter),
            target=target,
            base=weights,
            nested=nested,
            device=device,
            allow_nonfinite=allow_nonfinite,
        )
    if plot is not None:
        from loratools.reports.plot_inspect import plot_spectra

        plot_spectra(report, plot, force=force)
    shown.show(report)
