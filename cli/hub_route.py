"""`loratools hub route` and `loratools hub route-fit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from loratools_cli import options

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from loratools.reports.route import Choice
    from loratools.training.texts import Labelled
    from loratools_cli.progress import Progress

HubPath = Annotated[Path, Argument(metavar="HUB", help="Folder with adapters in it, at any depth.")]
EncoderFolder = Annotated[
    Path | None,
    Option("--encoder", metavar="FOLDER", help="Sentence encoder, instead of the MiniLM of loratools[route]."),
]
Centroids = Annotated[int, Option(metavar="N", help="Centroids for each adapter.")]
Temperature = Annotated[float, Option(metavar="T", help="Of the softmax that makes cosines confidences.")]
Margin = Annotated[float, Option(metavar="M", help="To the base where the second is nearer to the first than this.")]
LossesPath = Annotated[
    Path | None,
    Option("--losses", metavar="FILE.csv", help="scenario,adapter,...: what each adapter loses there, for the regret."),
]


def route(
    path: HubPath,
    text: Annotated[list[str] | None, Option(metavar="TEXT", help="A text to route; repeated.")] = None,
    file: Annotated[
        Path | None, Option(metavar="FILE", help='Rows {"text": ...}, with "adapter" to be measured; or a .txt file.')
    ] = None,
    scenarios: Annotated[
        Path | None, Option("--set", metavar="FILE", help="What route-fit wrote, if not HUB/route.json.")
    ] = None,
    examples: Annotated[
        Path | None, Option(metavar="FILE", help='Fit now, from rows {"adapter": ..., "text": ...}; nothing is kept.')
    ] = None,
    features: Annotated[
        Path | None, Option(metavar="FILE.npy", help="Features of your own, a row for each text.")
    ] = None,
    encoder: EncoderFolder = None,
    top: Annotated[int, Option(metavar="N", help="Candidates to show of each text.")] = 3,
    losses: LossesPath = None,
    mix: Annotated[
        int | None, Option(metavar="K", help="Merge the best K adapters of one text, by their confidence; with -o.")
    ] = None,
    output: Annotated[Path | None, Option("--output", "-o", metavar="PATH", help="Where to write that.")] = None,
    rank: options.Rank = None,
    table: options.TablePath = None,
    force: options.Force = False,
    everything: options.Everything = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Tell which adapter of a hub a text is for.

    The adapter whose example texts are nearest, or "base" where none is near enough. Offline.

    \b
    Examples:
      loratools hub route adapters/ --text "How is 17 spelt in Spanish?"
      loratools hub route adapters/ --file queries.jsonl --json
    """
    from dataclasses import replace

    from loratools.errors import UsageError
    from loratools.hub.adapter_set import FILE, load_adapter_set, require_in_hub
    from loratools.hub.route import choose
    from loratools.hub.route_fit import fit
    from loratools.hub.route_quality import quality, read_losses
    from loratools.reports.route import Routed, RouteReport
    from loratools_cli.exports import check_exports, write_exports
    from loratools_cli.output import Output
    from loratools_cli.progress import Progress

    shown = Output(as_json=as_json, quiet=quiet, everything=everything)
    if examples is not None and (scenarios is not None or features is not None):
        raise UsageError("--examples fits with the encoder, now; it goes neither with --set nor with --features")
    if features is not None and encoder is not None:
        raise UsageError("--features and --encoder exclude each other; give one of them")
    if top < 1:
        raise UsageError(f"--top {top} is below 1")
    check_exports(table=table, force=force)
    there = _adapters(path)
    with Progress() as progress:
        queries = _queries(text or [], file, features)
        if (mix is None) != (output is None) or (mix is not None and (mix < 1 or len(queries) != 1)):
            raise UsageError("--mix K -o PATH merges adapters for one text; give both, and one text")
        if examples is not None:
            rows, made, fitted_with, _ = _examples(examples, there, None, encoder, progress)
            found = fit(rows, made, encoder=fitted_with)
        else:
            place = path / FILE if scenarios is None else scenarios
            found = load_adapter_set(place)
            require_in_hub(found.names, there, where=str(place))
        vectors, name, warnings = _features([q.text for q in queries], features, encoder, progress)
        found.require_encoder(name)
        choices = choose(found, vectors)
        labels = [q.adapter for q in queries]
        measured = None
        if all(label is not None for label in labels):
            costs = None if losses is None else read_losses(losses)
            measured = quality(choices, [str(label) for label in labels], costs)
        elif losses is not None:
            raise UsageError('--losses needs to know what each text is for; give rows with "adapter"')
        written = None
        if mix is not None and output is not None:
            written = _mixed(choices[0], there, mix, rank, output, force=force)
    cut = [replace(choice, candidates=choice.candidates[:top]) for choice in choices]
    routed = tuple(Routed(q.text, choice, q.adapter) for q, choice in zip(queries, cut, strict=True))
    report = RouteReport(str(path), routed, measured, tuple(warnings), written)
    write_exports(report, table=table, force=force)
    shown.show(report)


def route_fit(
    path: HubPath,
    examples: Annotated[
        Path, Argument(metavar="EXAMPLES", help='Rows {"adapter": ..., "text": ...}; "base" for what is for none.')
    ],
    output: Annotated[
        Path | None, Option("--output", "-o", metavar="FILE", help="Where to write, if not HUB/route.json.")
    ] = None,
    features: Annotated[
        Path | None, Option(metavar="FILE.npy", help="Features of your own, a row for each example.")
    ] = None,
    encoder: EncoderFolder = None,
    centroids: Centroids = 1,
    quantile: Annotated[
        float, Option(metavar="Q", help="Share of its own examples that an adapter's threshold turns away.")
    ] = 0.05,
    temperature: Temperature = 0.1,
    margin: Margin = 0.02,
    losses: LossesPath = None,
    force: options.Force = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Learn from example texts which adapter of a hub is for what.

    One example in five is held out to tell how well it works; what is written is fitted on all.

    Example: loratools hub route-fit adapters/ examples.jsonl
    """
    from loratools.errors import UsageError
    from loratools.hub.adapter_set import FILE
    from loratools.hub.route_fit import Fit, fit_measured
    from loratools.hub.route_quality import read_losses
    from loratools.reports.route import RouteFitReport
    from loratools.storage.atomic import refuse_existing
    from loratools_cli.output import Output
    from loratools_cli.progress import Progress

    shown = Output(as_json=as_json, quiet=quiet)
    if features is not None and encoder is not None:
        raise UsageError("--features and --encoder exclude each other; give one of them")
    how = Fit(centroids, quantile, temperature, margin)
    place = path / FILE if output is None else output
    refuse_existing(place, force=force)
    costs = None if losses is None else read_losses(losses)
    there = _adapters(path)
    with Progress() as progress:
        labels, vectors, name, warnings = _examples(examples, there, features, encoder, progress)
    found, adapters, measured = fit_measured(labels, vectors, encoder=name, options=how, losses=costs)
    report = RouteFitReport(str(found.save(place, force=force)), name, adapters, measured, tuple(warnings))
    shown.show(report)


def _adapters(hub: Path) -> dict[str, Path]:
    """The adapters of a hub by the names that `hub ls` gives them."""
    from loratools.hub.discover import Found, discover

    return {found.name: found.path for found in discover(hub) if isinstance(found, Found)}


def _queries(texts: Sequence[str], file: Path | None, features: Path | None) -> list[Labelled]:
    """The texts to route; rows of features alone are named by their number."""
    from loratools.errors import UsageError
    from loratools.ops.routing import read_array
    from loratools.training.lines import is_unicode
    from loratools.training.texts import Labelled, read_labelled

    if texts and file is not None:
        raise UsageError("--text and --file exclude each other; give one of them")
    if file is not None:
        return read_labelled(file, required=False)
    if any(not text.strip() for text in texts):
        raise UsageError("--text is empty; there is nothing to route by")
    if not all(map(is_unicode, texts)):
        raise UsageError("--text is no UTF-8; give it in that encoding")
    if texts:
        return [Labelled(text) for text in texts]
    if features is None:
        raise UsageError("what is to be routed? give --text, --file or --features")
    return [Labelled(f"row {i + 1}") for i in range(len(read_array(features)))]


def _examples(
    path: Path, there: Mapping[str, Path], features: Path | None, encoder: Path | None, progress: Progress
) -> tuple[list[str], Tensor, str | None, list[str]]:
    """The adapter and the features of each example, the encoder's name, and what to warn of."""
    from loratools.hub.adapter_set import FALLBACK, require_in_hub
    from loratools.training.texts import read_labelled

    rows = read_labelled(path)
    labels = [str(row.adapter) for row in rows]
    require_in_hub([label for label in labels if label != FALLBACK], there, where=str(path))
    vectors, name, warnings = _features([row.text for row in rows], features, encoder, progress)
    if repeated := len(rows) - len(set(rows)):
        warnings.append(f"{repeated} examples are there twice, so that what is held out may have been seen")
    return labels, vectors, name, warnings


def _features(
    texts: Sequence[str], features: Path | None, encoder: Path | None, progress: Progress
) -> tuple[Tensor, str | None, list[str]]:
    from loratools.errors import AdapterError
    from loratools.hub.route import unit_rows
    from loratools.ops.routing import read_array
    from loratools.storage.atomic import printable
    from loratools.training.encoder import load_encoder

    if features is not None:
        try:
            return unit_rows(read_array(features), len(texts)), None, []
        except AdapterError as error:
            raise AdapterError(f"{printable(features)}: {error}") from None
    found = load_encoder(encoder)
    vectors, cut = found.encode(texts, step=progress.steps(len(texts), "texts"))
    warnings = [f"{cut} texts were cut to {found.limit} tokens, which is what the encoder reads"] if cut else []
    return vectors, found.name, warnings


def _mixed(
    choice: Choice, there: Mapping[str, Path], count: int, rank: int | None, output: Path, *, force: bool
) -> str:
    """Write the best `count` adapters of one text as one, weighed by their confidence; where it was written."""
    import loratools
    from loratools.errors import UnchangedError
    from loratools.hub.adapter_set import FALLBACK
    from loratools_cli.destination import destination
    from loratools_cli.opening import open_adapter

    if choice.adapter == FALLBACK and choice.reason == "threshold":
        raise UnchangedError("the text goes to the base, for which there is nothing to merge")
    best = choice.candidates[:count]
    total = sum(candidate.confidence for candidate in best)
    opened = [(open_adapter(there[c.adapter]), c.confidence / total) for c in best]
    place = destination(opened[0][0], output, "mixture", force=force)
    pairs = opened if len(opened) > 1 else [*opened, (opened[0][0], 0.0)]  # a merge takes two
    merged, _ = loratools.merge(pairs, rank)
    return str(loratools.save(merged, place, force=force).path)
