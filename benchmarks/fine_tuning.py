"""What fine-tuning did to one model: adapters of several ranks and kinds against tuning it whole, on the same rows."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from contestants import ROOT, table
from train_runs import BASE, HELD_OUT, RUNS

if TYPE_CHECKING:
    from real.smollm2 import RealModel

    from loratools.adapter import Adapter
    from loratools.base_weights import BaseWeights
    from loratools.reports.compare import CompareReport, FineTune
    from loratools.reports.intruders import IntrudersReport

FOLDER = Path(os.environ.get("LORATOOLS_RUNS", ROOT.parent / "runs"))
FULL = "full"
HOT = "lora_r8_hot"
SHARED_HOT = "en_lora_r8_hot"  # its name among the shared adapters
TOP_K = 10
THRESHOLDS = ("0.4", "0.5", "0.6", "0.8")
BY_MODULE = "0.6"  # the threshold at which dense SVDs counted by module
STRENGTH = 0.75

Scores = Mapping[str, float]  # of each of HELD_OUT


def main(*, quick: bool = False) -> str:
    """The tables, as Markdown."""
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}  # before torch is imported
    sys.path.append(str(ROOT / "tests"))
    from real.smollm2 import missing

    title = "# What fine-tuning did\n\n"
    if reason := missing() or _no_runs():
        return f"{title}Skipped: {reason}."
    with tempfile.TemporaryDirectory() as folder:
        return title + _measured(Path(folder), quick=quick)


def _no_runs() -> str | None:
    absent = [name for name in (BASE, *RUNS) if not (FOLDER / name).is_dir()]
    if not absent:
        return None
    make = f"`python benchmarks/train_runs.py {FOLDER}` makes them; LORATOOLS_RUNS names another folder"
    return f"{FOLDER} lacks the runs {', '.join(absent)}; {make}"


def _measured(folder: Path, *, quick: bool) -> str:
    from real.smollm2 import ADAPTERS, load_real_model, recorded

    from loratools import compare, differences, intruders, load, load_base

    trained = json.loads((FOLDER / "metrics.json").read_text(encoding="utf-8"))
    base = load_base(FOLDER / BASE)
    evaluations = _Evaluations(load_real_model(folder, n_rows=32 if quick else 256), n_texts=16 if quick else None)
    fine_tunes = {name: load(FOLDER / name) for name in RUNS if name != FULL}
    fine_tunes[HOT] = load(ADAPTERS / SHARED_HOT)
    fine_tunes[FULL] = differences(base, load_base(FOLDER / FULL)).adapter
    report = compare(base, fine_tunes, top_k=TOP_K)
    counts = {name: intruders(adapter, base, top_k=TOP_K, sweep=True) for name, adapter in fine_tunes.items()}
    hot = recorded("metrics.json")["trained"][SHARED_HOT]
    parameters = {name: run["trainable"] for name, run in trained.items() if name != BASE}
    parameters[HOT] = hot["trainable_params"]
    scores = {name: run["eval"] for name, run in trained.items()} | {HOT: evaluations.of(fine_tunes[HOT])}
    dense = recorded("measure_intruder.json")[SHARED_HOT]
    parts = [
        _introduction(trained[FULL], hot),
        "## What each run did",
        _what_each_did(report, counts, parameters, scores),
        "## What an adapter misses of the full fine-tune",
        _missed(report),
        "## How alike two runs are",
        _alike(report),
        "## An adapter with intruder dimensions",
        _counted(counts[HOT], dense),
        _mitigated(fine_tunes[HOT], base, evaluations, scores[HOT]),
        "## What this says and what it does not",
        _limits(),
    ]
    return "\n\n".join(parts)


class _Evaluations:
    """The real model's scores on held-out rows of the task, and on text that nothing was trained on."""

    def __init__(self, real: RealModel, n_texts: int | None) -> None:
        import evaluate
        from real.smollm2 import ADAPTERS

        texts = evaluate.read_rows(ADAPTERS / "data" / HELD_OUT["pydoc"], n_texts)
        self._real = {"numwords_en": real, "pydoc": replace(real, rows=texts)}

    def of(self, adapter: Adapter) -> Scores:
        return {name: real.nll(adapter) for name, real in self._real.items()}


def _introduction(full: Mapping[str, Any], hot: Mapping[str, Any]) -> str:
    return (
        "The comparison of [LoRA vs full fine-tuning](https://arxiv.org/abs/2410.21228), small: SmolLM2-135M-Instruct "
        "learns to write numbers as English words, whole and with adapters on all 210 linear layers; "
        f"{full['steps']} steps of {full['batch']} rows, the same rows in the same order, one seed. {HOT} is the same, "
        f"trained hard on purpose: alpha {hot['lora_alpha']}, learning rate {hot['lr']:g}. All numbers but the NLL are "
        "those of `loratools.compare` and `loratools.intruders`."
    )


def _what_each_did(
    report: CompareReport,
    counts: Mapping[str, IntrudersReport],
    parameters: Mapping[str, int],
    scores: Mapping[str, Scores],
) -> str:
    learnt = [["base", "", *_nlls(scores[BASE]), *[""] * 3]]
    where = []
    for name in _in_order(report):
        tune = report.fine_tunes[name]
        norms = [f"{tune.relative_norm:.4f}", f"{tune.mean_effective_rank:.1f}", f"{tune.mean_stable_rank:.1f}"]
        learnt.append([name, f"{parameters[name] / 1e6:.2f} M", *_nlls(scores[name]), *norms])
        energies = [_number(tune.mean_energy_left), _number(tune.mean_energy_right)]
        intruders = [str(counts[name].sweep[epsilon]["left"]) for epsilon in THRESHOLDS]
        where.append([name, *energies, *intruders])
    where.append(["random", *map(_number, _random(report, report.top_k)), *[""] * len(THRESHOLDS)])
    header = ["run", "trained", "task NLL", "text NLL", "norm / base", "effective rank", "stable rank"]
    header_where = ["run", "left energy", "right energy", *[f"intruders {epsilon}" for epsilon in THRESHOLDS]]
    examined = max(found.total["examined"] for found in counts.values())
    about = (
        "NLL: mean negative log-likelihood of a token, of 256 held-out answers (task) and of Python's documentation "
        "(text), which no run was trained on: what that rises by was forgotten. Norm: of the update, relative to the "
        "matrices that it changes. Effective and stable rank: means over these."
    )
    about_where = (
        f"Where the update lies: its share of energy in the first {report.top_k} singular directions of each base "
        f"matrix, random at the bottom. Intruders: of the first {report.top_k} left singular vectors of "
        f"each tuned matrix, {examined} in all, those with no such cosine with any of the base:"
    )
    return "\n\n".join([about, table(header, learnt), about_where, table(header_where, where)])


def _missed(report: CompareReport) -> str:
    cosines = {frozenset((pair.a, pair.b)): pair.cosine for pair in report.pairs}
    rows = []
    for name in _in_order(report):
        if missed := report.fine_tunes[name].missed:
            errors = [f"{error:.3f}" for error in (missed.error, missed.best_error, missed.space_error)]
            rows.append([name, str(missed.rank), *errors, _number(cosines[frozenset((name, FULL))])])
    header = ["run", "rank", "error", "best of that rank", "best in its spaces", "cosine with full"]
    about = (
        "What is missing of the full update of the linear layers, relative to its norm. Error: what the run itself "
        "misses, above 1 where no update at all would be nearer. Best of that rank: what the truncated SVD of the full "
        "update misses. Best in its spaces: what the nearest update with the run's own row and column spaces "
        "misses."
    )
    return f"{about}\n\n{table(header, rows)}"


def _alike(report: CompareReport) -> str:
    pairs = {frozenset((pair.a, pair.b)): pair for pair in report.pairs}
    rows = []
    for a, b in combinations(_in_order(report), 2):
        pair = pairs[frozenset((a, b))]
        rank = min(_directions(report.fine_tunes[name]) or report.max_overlap_rank for name in (a, b))
        rank = min(rank, report.max_overlap_rank)
        overlaps = [pair.cosine, pair.output_overlap, pair.input_overlap, *_random(report, rank)]
        rows.append([f"{a}, {b}", str(rank), *map(_number, overlaps)])
    header = ["runs", "directions", "cosine", "output overlap", "input overlap", "output, random", "input, random"]
    about = (
        "Overlap: mean squared cosine of the principal angles between the leading directions of two updates, and what "
        "random directions would have. Adapters of one rank start from the same random input directions, and "
        "keep much of them."
    )
    return f"{about}\n\n{table(header, rows)}"


def _counted(hot: IntrudersReport, dense: Mapping[str, Any]) -> str:
    rows = []
    for epsilon in sorted(set(hot.sweep) & set(dense["left"])):
        own, known = hot.sweep[epsilon], [dense[side][epsilon] for side in ("left", "right")]
        rows.append([epsilon, str(own["left"]), str(known[0]), str(own["right"]), str(known[1])])
    modules = Counter[str]()
    for parameter, target in hot.targets.items():
        modules[_module(parameter)] += sum(cosine < float(BY_MODULE) for cosine in target.left.max_cosine)
    known_modules = dense[f"by_type_left_eps{BY_MODULE}"]
    by_module = [[name, str(modules[name]), str(count)] for name, count in known_modules.items()]
    about = (
        f"{HOT}, of {hot.total['examined']} singular vectors on each side. Dense: counted when the adapter was made, "
        "by code that shares nothing with loratools."
    )
    counts = table(["epsilon", "left", "left, dense", "right", "right, dense"], rows)
    modules_counts = table(["module", "intruders", "dense"], by_module)
    return "\n\n".join([about, counts, f"Left, at {BY_MODULE}, by module:", modules_counts])


def _mitigated(hot: Adapter, base: BaseWeights, evaluations: _Evaluations, before: Scores) -> str:
    """The scores after a mitigation, and after a shrink of everything that changes the norm as much."""
    from loratools import mitigate

    rows = [["as trained", "1", *_nlls(before)]]
    for keep_rank, label in ((False, "exact"), (True, "at the old rank")):
        calmer, report = mitigate(hot, base, STRENGTH, top_k=TOP_K, keep_rank=keep_rank)
        factor = report.uniform_shrink
        assert factor is not None  # it was mitigated
        rows.append([f"mitigated, {label}", f"{factor:.4f}", *_nlls(evaluations.of(calmer))])
        rows.append([f"all updates times {factor:.4f}", f"{factor:.4f}", *_nlls(evaluations.of(_shrunk(hot, factor)))])
    about = (
        f"Mitigated: left intruders at 0.5 keep {STRENGTH:g} of their singular values. Each mitigation is followed by "
        "its control, a shrink of everything to the same norm:"
    )
    return f"{about}\n\n{table(['', 'norm / trained', 'task NLL', 'text NLL'], rows)}"


def _shrunk(adapter: Adapter, factor: float) -> Adapter:
    return adapter.map(lambda _, update: replace(update, scale=update.scale * factor))


def _limits() -> str:
    return (
        "One model of 135M parameters, one narrow task, one short run of each, one seed. Learning rates are fixed "
        "for each run, not searched for, and the norm of an update depends on them; so do forgetting and intruders. "
        "The runs did not learn the task equally well, so that nothing here compares them at equal quality. The full "
        "run also trained the embeddings and norms, which count in its NLL and nowhere else. The tables say what was "
        "done to these weights; that low ranks cause intruders, or intruders forgetting, they cannot say."
    )


def _random(report: CompareReport, directions: int) -> list[float]:
    """The share that a random update has in so many directions of the outputs, and of the inputs: a mean."""
    return [fmean(directions / target.shape[side] for target in report.targets.values()) for side in (0, 1)]


def _in_order(report: CompareReport) -> list[str]:
    """By rank, the full fine-tune first."""
    return sorted(report.fine_tunes, key=lambda name: (name != FULL, name == HOT, _directions(report.fine_tunes[name])))


def _directions(tune: FineTune) -> int:
    """The rank; 0 of a fine-tune that has none."""
    return 0 if tune.kind == "full" else tune.rank_max


def _module(parameter: str) -> str:
    return parameter.removesuffix(".weight").rpartition(".")[2]


def _nlls(scores: Scores) -> list[str]:
    return [f"{scores[name]:.4f}" for name in HELD_OUT]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    sys.path.insert(0, str(ROOT))
    print(main(quick=parser.parse_args().quick))
