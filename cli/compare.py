"""`loratools compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from loratools_cli import options


def compare(
    base: Annotated[Path, Argument(metavar="BASE", help="Base model: its folder, index or weights file.")],
    paths: Annotated[
        list[Path], Argument(metavar="TUNED_OR_ADAPTER", help="Adapters of it, and models tuned whole from it.")
    ],
    top_k: Annotated[int, Option(metavar="K", help="How many leading singular vectors of the base count.")] = 10,
    epsilon: Annotated[float, Option(metavar="E", help="Intruders have no cosine of E with any vector.")] = 0.5,
    target: options.Target = None,
    name: Annotated[
        list[str] | None, Option("--name", metavar="NAME", help="What to call each of them, in their order.")
    ] = None,
    page: options.ReportPath = None,
    figure: options.FigurePath = None,
    table: options.TablePath = None,
    alpha: options.Alpha = None,
    initial_adapter: options.InitialAdapter = None,
    method: options.VerdictMethod = "auto",
    cached: options.Cached = True,
    device: options.Device = "cpu",
    force: Annotated[bool, Option("--force", help="Replace existing pages, figures and tables.")] = False,
    everything: options.Everything = False,
    as_json: options.Json = False,
) -> None:
    """Compare what fine-tunes did to their base.

    Norms, spectra, intruders, how alike they are and where in the model they lie. Of a model that was tuned whole: what
    each adapter misses, and what the best of its rank would.

    \b
    Examples:
      loratools compare llama my_lora my_dora --report compared.html
      loratools compare llama llama-tuned my_lora --top-k 20 --all
    """
    import loratools
    from loratools.errors import UsageError
    from loratools.ops.fine_tunes import names_of
    from loratools_cli.exports import check_exports, write_exports
    from loratools_cli.output import Output
    from loratools_cli.progress import Progress

    shown = Output(as_json=as_json, everything=everything)
    options.check_device(device)
    check_exports(page=page, figure=figure, table=table, force=force)
    if initial_adapter is not None and len(paths) > 1:
        raise UsageError("--initial-adapter goes with one adapter; convert it first: loratools convert")
    names = names_of(paths) if name is None else tuple(name)
    if len(names) != len(paths) or len(set(names)) < len(names):
        raise UsageError(f"--name was given {len(names)} times for {len(paths)} fine-tunes; name each, differently")
    with Progress() as progress:
        weights = loratools.load_base(base)
        fine_tunes = {
            name: loratools.open_fine_tune(path, weights, alpha=alpha, initial=initial_adapter, steps=progress.steps)
            for name, path in zip(names, paths, strict=True)
        }
        step = progress.steps(sum(len(f.adapter) for f in fine_tunes.values()), "updates compared")
        search = loratools.Search(method, loratools.default_cache() if cached else None, device)
        report = loratools.compare(
            weights, fine_tunes, top_k=top_k, epsilon=epsilon, target=target, search=search, step=step
        )
        write_exports(report, page=page, figure=figure, table=table, force=force)
    shown.show(report)
