"""Transfers between two tiny bases: what comes out, the same after a kill at any point, and what is edited."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training.tiny_task import Places, answer

from loratools.errors import AdapterError, InputError, UsageError
from loratools.reports.transfer import TransferReport
from loratools.training.distil import Train
from loratools.training.evaluate import Row, answer_nll
from loratools.training.models import load_model
from loratools.training.new_adapter import NewAdapter
from loratools.training.training_run import TrainingRun
from loratools.training.transfer import generate, label, run
from loratools.training.transfer.run import save_kit, transfer
from loratools.training.transfer.seed_inputs import read_seeds
from loratools.training.transfer.settings import Transfer
from loratools.training.transfer.stage_files import StageFiles

HOW = Transfer(
    samples=24,
    max_input_tokens=8,
    max_answer_tokens=12,
    batch=8,
    adapter=NewAdapter(rank=4),
    train=Train(steps=12, learning_rate=2e-2, batch=4, every=3),
)
ROWS = [Row("No: 44\nW:", " low"), Row("No: 81\nW:", " high")]
FILES = ("probes", "generated", "inputs", "rejected", "labelled")


def moved(places: Places, out: Path, how: Transfer = HOW, **keywords: Any) -> TransferReport:
    keywords = {"rows": ROWS, **keywords}
    seeds = keywords.pop("seeds", read_seeds(places.seeds))
    return transfer(places.adapter, places.first, keywords.pop("to", places.second), seeds, out, how, **keywords)


def result(out: Path) -> dict[str, list[str]]:
    """All that a transfer leaves, but for what it says of time and place."""
    work = out.with_name(f"{out.name}.transfer")
    found: dict[str, list[str]] = {name: (work / f"{name}.jsonl").read_text().splitlines() for name in FILES}
    found["training"] = (work / "training.json").read_text().splitlines()
    found["weights"] = [(out / "adapter_model.safetensors").read_bytes().hex()]
    receipt = json.loads((out / "transfer.json").read_text())
    for key in ("stages", "work", "output"):
        del receipt[key]
    found["receipt"] = json.dumps(receipt, indent=1).splitlines()
    return found


@pytest.fixture(scope="module")
def expected(places: Places, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    out = tmp_path_factory.mktemp("expected") / "moved"
    moved(places, out)
    return result(out)


def test_a_transfer_from_beginning_to_end(places: Places, tmp_path: Path) -> None:
    report = moved(places, tmp_path / "moved")
    work = tmp_path / "moved.transfer"
    made = [json.loads(line) for line in (work / "labelled.jsonl").read_text().splitlines()]
    assert len(made) == report.synthesis.kept == 24
    assert len({row["prompt"] for row in made}) == 24
    assert {row["prompt"] for row in made}.isdisjoint({seed.prompt for seed in read_seeds(places.seeds)})
    assert all(row["prompt"].startswith("No: ") and row["prompt"].endswith("\nW:") for row in made)
    sifted = report.synthesis
    rejected = len((work / "rejected.jsonl").read_text().splitlines())
    assert sifted.generated == sifted.kept + rejected
    assert rejected == sifted.empty + sifted.unfinished + sifted.duplicate + sifted.similar + sifted.improbable
    assert sifted.acceptance == 24 / sifted.generated
    assert (report.distillation.rows, report.distillation.held_out) == (22, 2)
    looks = report.distillation.looks
    assert (report.agreement_before, report.agreement) == (looks[0].answers, max(look.answers for look in looks))
    assert min(look.nll for look in looks) < looks[0].nll - 0.3
    assert report.evaluations["transferred"].nll < report.evaluations["target"].nll
    assert set(report.evaluations) == {"target", "transferred", "teacher"}
    assert [stage.stage for stage in report.stages] == ["prepare", "generate", "filter", "label", "train", "evaluate"]
    receipt = json.loads((tmp_path / "moved" / "transfer.json").read_text())
    assert receipt["synthesis"]["kept"] == 24
    assert {"loratools": receipt["loratools"], **json.loads(json.dumps(report.to_dict()))} == receipt
    import peft

    model, tokenizer = load_model(places.second)
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "moved")
    nll, tokens = answer_nll(wrapped, tokenizer, ROWS)
    assert report.evaluations["transferred"].nll == pytest.approx(nll, rel=1e-4)
    assert report.evaluations["transferred"].tokens == tokens


def test_labels_are_the_teachers_greedy_answers(places: Places, expected: dict[str, list[str]]) -> None:
    """By PEFT's own way of running the adapter, one token after another."""
    import peft

    model, tokenizer = load_model(places.first)
    teacher = peft.PeftModel.from_pretrained(model, places.adapter)
    rows = [json.loads(line) for line in expected["labelled"]]
    for row in rows[:6]:
        ids = tokenizer(row["prompt"]).input_ids
        start, logs, ended = len(ids), [], False
        while len(ids) - start < 12 and not ended:
            with torch.no_grad():
                logits = teacher(input_ids=torch.tensor([ids])).logits[0, -1].double()
            ids.append(int(logits.argmax()))
            logs.append(float(torch.log_softmax(logits, 0).max()))
            ended = ids[-1] == tokenizer.eos_token_id
        said_by_hand = tokenizer.decode(ids[start:], skip_special_tokens=True)
        assert (row["answer"], row["ended"]) == (said_by_hand, ended)
        assert row["confidence"] == pytest.approx(float(torch.tensor(logs).mean().exp()), rel=1e-3)
    right = sum(row["answer"] == answer(row["prompt"][4:-3]) for row in rows)
    assert right > len(rows) / 2


def test_the_same_seed_gives_the_same_and_another_another(
    places: Places, tmp_path: Path, expected: dict[str, list[str]]
) -> None:
    moved(places, tmp_path / "again")
    assert result(tmp_path / "again") == expected
    moved(places, tmp_path / "other", replace(HOW, seed=1))
    other = result(tmp_path / "other")
    assert all(other[name] != expected[name] for name in ("generated", "inputs", "labelled", "weights"))


class KilledError(BaseException):
    """As sudden as a signal: nothing catches it."""


def killing(original: Callable[..., Any], after: int, *, before_the_work: bool) -> Callable[..., Any]:
    calls = 0

    def patched(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if before_the_work and calls == after:
            raise KilledError
        found = original(*arguments, **keywords)
        if calls == after:
            raise KilledError
        return found

    return patched


POINTS = [
    *((StageFiles, "append", n, False) for n in (2, 5, 9)),  # in prepare, generate and label
    *((StageFiles, "note", n, True) for n in (2, 3, 6, 8, 10, 12)),  # at ends and beginnings of stages
    *((TrainingRun, "save", n, False) for n in (1, 3)),
    (run, "save", 1, False),  # the output is there, its receipt is not
]


@pytest.mark.parametrize(("where", "name", "after", "before"), POINTS)
def test_a_killed_transfer_goes_on_to_the_same_result(
    places: Places,
    tmp_path: Path,
    expected: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    where: Any,
    name: str,
    after: int,
    before: bool,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(where, name, killing(getattr(where, name), after, before_the_work=before))
        with pytest.raises(KilledError):
            moved(places, tmp_path / "moved")
    with pytest.raises(UsageError if not (tmp_path / "moved").exists() else Exception, match=r"--resume|exists"):
        moved(places, tmp_path / "moved")
    moved(places, tmp_path / "moved", resume=True)
    assert result(tmp_path / "moved") == expected


@pytest.mark.parametrize("call", [5, 9])
def test_after_a_real_kill(places: Places, tmp_path: Path, expected: dict[str, list[str]], call: int) -> None:
    """kill -9 of another process, in the middle of a line that it writes."""
    code = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from training.test_transfer import moved
from training.tiny_task import Places
from loratools.training.transfer.stage_files import StageFiles
calls, whole = 0, StageFiles.append
def torn(files, name, rows):
    global calls
    calls += 1
    whole(files, name, rows)
    if calls == {call}:
        path = files.folder / name
        path.write_bytes(path.read_bytes()[:-9])
        os.kill(os.getpid(), signal.SIGKILL)
StageFiles.append = torn
places = Places(*map(Path, {[str(path) for path in vars(places).values()]!r}))
moved(places, Path({str(tmp_path / "moved")!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == -9, done.stderr
    moved(places, tmp_path / "moved", resume=True)
    for name, lines in result(tmp_path / "moved").items():
        assert [line for line in lines if line not in expected[name]] == [], name
        assert lines == expected[name]


def test_edited_files_are_honoured(places: Places, tmp_path: Path) -> None:
    out, work = tmp_path / "moved", tmp_path / "moved.transfer"
    moved(places, out, rows=())
    before = (out / "adapter_model.safetensors").read_bytes()
    lines = (work / "labelled.jsonl").read_text().splitlines()
    first = {**json.loads(lines[0]), "answer": " edited"}
    (work / "labelled.jsonl").write_text(
        "\n".join([json.dumps(first), *lines[1:-2]])
    )  # two rows less, no last line end
    report = moved(places, out, rows=(), resume=True)
    assert report.samples[0].answer == " edited"
    assert report.labelling.used == 22
    assert (out / "adapter_model.safetensors").read_bytes() != before
    kept = (work / "inputs.jsonl").read_text().splitlines()
    new = {"id": 1000, "prompt": "No: 4321\nW:"}
    (work / "inputs.jsonl").write_text("\n".join([kept[0], *kept[5:], json.dumps(new)]) + "\n")
    report = moved(places, out, rows=(), resume=True)
    rows = [json.loads(line) for line in (work / "labelled.jsonl").read_text().splitlines()]
    assert rows[0]["answer"] == " edited"  # the label that somebody wrote belongs to an input that is still there
    assert rows[-1]["prompt"] == "No: 4321\nW:"
    assert rows[-1]["answer"]
    assert len(rows) == 21
    with (work / "generated.jsonl").open("a") as file:
        file.write(json.dumps({"id": 2000, "prompt": "No: 1\nW:"}) + "\n")
    (work / "generated.jsonl").write_text("\n".join((work / "generated.jsonl").read_text().splitlines()[-1:]) + "\n")
    report = moved(places, out, rows=(), resume=True)
    assert [sample.prompt for sample in report.samples] == ["No: 1\nW:"]
    (work / "labelled.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(InputError, match="line 1: has no answer"):
        moved(places, out, rows=(), resume=True)


def test_other_settings_redo_what_they_concern(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, list[str]]
) -> None:
    out = tmp_path / "moved"
    moved(places, out, replace(HOW, samples=10, adapter=NewAdapter("dora", 2)))
    calls = []
    original = label.said
    monkeypatch.setattr(label, "said", lambda *a, **k: (calls.append(len(a[2])), original(*a, **k))[1])
    moved(places, out, replace(HOW, samples=10), resume=True)
    assert not calls
    assert json.loads((out / "adapter_config.json").read_text())["use_dora"] is False
    moved(places, out, resume=True)
    assert 14 <= sum(calls) < 24  # the first ten were answered already
    assert result(out)["inputs"] == expected["inputs"]


def test_another_filter_takes_the_same_inputs(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, list[str]]
) -> None:
    """Nothing is generated a second time but what the discriminator learns from, and what is missing."""
    out, made = tmp_path / "moved", tmp_path / "moved.transfer" / "generated.jsonl"
    moved(places, out, replace(HOW, passing="none"))
    first = [json.loads(line) for line in made.read_text().splitlines()]
    assert not any("p" in row for row in first)
    rows = 0
    original = generate.said

    def counted(model: Any, tokenizer: Any, prompts: list[Any], *arguments: Any, **keywords: Any) -> Any:
        nonlocal rows
        rows += len(prompts)
        return original(model, tokenizer, prompts, *arguments, **keywords)

    monkeypatch.setattr(generate, "said", counted)
    moved(places, out, resume=True)
    assert result(out) == expected
    assert rows == len(expected["probes"]) + len(expected["generated"]) - len(first)
    moved(places, out, replace(HOW, passing="none"), resume=True)
    assert rows == len(expected["probes"]) + len(expected["generated"]) - len(first)
    assert not any("p" in json.loads(line) for line in made.read_text().splitlines())


@pytest.mark.parametrize("weighing", ["confidence", "robust"])
def test_weights(places: Places, tmp_path: Path, weighing: Any) -> None:
    report = moved(places, tmp_path / "moved", replace(HOW, weighing=weighing), rows=())
    rows = [json.loads(line) for line in (tmp_path / "moved.transfer" / "labelled.jsonl").read_text().splitlines()]
    assert all(("disagreement" in row) == (weighing == "robust") for row in rows)
    assert report.distillation.steps > 0


@pytest.mark.parametrize("method", ["rslora", "dora"])
def test_other_targets_and_a_squeeze(places: Places, tmp_path: Path, method: Any) -> None:
    how = replace(HOW, adapter=NewAdapter(method, 4), squeeze_to=2)
    report = moved(places, tmp_path / "moved", how)
    assert report.squeezed is not None
    assert 0 < report.squeezed < 1
    assert json.loads((tmp_path / "moved" / "adapter_config.json").read_text())["r"] == 2
    assert json.loads((tmp_path / "moved.transfer" / "adapter" / "adapter_config.json").read_text())["r"] == 4


def test_losses_of_probabilities(places: Places, tmp_path: Path) -> None:
    kl = replace(HOW, train=replace(HOW.train, loss="kl"))
    with pytest.raises(UsageError, match="vocabularies differ"):
        moved(places, tmp_path / "moved", kl)
    assert not (tmp_path / "moved.transfer").exists()
    same = moved(places, tmp_path / "same", kl, to=places.first, rows=())
    assert same.distillation.steps > 0
    alike, other = (moved(places, tmp_path / to.name, HOW, to=to, rows=()) for to in (places.first, places.second))
    assert (alike.settings["train"]["loss"], other.settings["train"]["loss"]) == ("kl", "ce")
    assert alike.distillation.losses == same.distillation.losses
    uld = replace(HOW, train=replace(HOW.train, loss="uld"))
    assert moved(places, tmp_path / "uld", uld, rows=()).distillation.steps > 0


def test_without_seeds_the_source_begins_by_itself(places: Places, tmp_path: Path) -> None:
    report = moved(places, tmp_path / "moved", replace(HOW, samples=4, max_input_tokens=40), seeds=[], rows=())
    assert report.synthesis.inputs == "self-prompted"
    assert "no seeds" in report.warnings[0]
    assert report.synthesis.discriminator == "none"


def test_a_kit_saved_with_the_adapter_is_used(places: Places, tmp_path: Path) -> None:
    import shutil

    adapter = tmp_path / "adapter"
    shutil.copytree(places.adapter, adapter)
    every = tmp_path / "all.jsonl"
    every.write_text("".join(json.dumps({"prompt": f"No: {n}\nW:"}) + "\n" for n in range(10, 900, 9)))
    kit = save_kit(adapter, places.first, read_seeds(every), options=HOW)
    assert (kit.real, kit.seeds) == (99, 5)
    assert sorted(path.name for path in (adapter / "transfer_kit").iterdir()) == ["discriminator.json", "seeds.jsonl"]
    report = transfer(adapter, places.first, places.second, [], tmp_path / "moved", HOW)
    assert report.synthesis.discriminator == "kit"
    assert (report.synthesis.inputs, report.synthesis.seeds) == ("few-shot", 5)
    with pytest.raises(Exception, match="exists"):
        save_kit(adapter, places.first, read_seeds(every), options=HOW)


def test_what_cannot_be_moved(places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "moved"
    with pytest.raises(UsageError, match="no chat template"):
        moved(places, out, replace(HOW, chat=True), force=True)
    with pytest.raises(InputError, match="allow-download"):
        moved(places, out, to="nobody/nothing", force=True)
    with pytest.raises(InputError, match=r"config\.json"):
        moved(places, out, to=tmp_path, force=True)
    strict = replace(HOW, passing="threshold", threshold=1.0, candidates=1)
    monkeypatch.setattr("loratools.training.transfer.discriminator._FEW", 0)
    with pytest.raises(AdapterError, match=r"none of 24 generated inputs is kept \(.*2\d improbable\)"):
        moved(places, out, strict, force=True)
    short = replace(HOW, max_answer_tokens=2)
    with pytest.raises(AdapterError, match="max-answer-tokens"):
        moved(places, out, short, force=True)
    assert not out.exists()
    silent = label.said
    monkeypatch.setattr(label, "said", lambda *a, **k: [replace(s, text="", ids=()) for s in silent(*a, **k)])
    with pytest.raises(AdapterError, match="answers nothing"):
        moved(places, out, force=True)

    def full(*_: Any, **__: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(label, "said", full)
    with pytest.raises(AdapterError, match=r"label: out of memory.*--resume"):
        moved(places, out, force=True)
    assert StageFiles(tmp_path / "moved.transfer").stages()[:3] == ("prepare", "generate", "filter")


def test_chat_templates(places: Places, tmp_path: Path) -> None:
    report = transfer(
        places.adapter,
        places.chatty,
        places.chatty,
        [],
        tmp_path / "moved",
        replace(HOW, chat=True, samples=4, max_input_tokens=30, max_answer_tokens=40, candidates=20),
    )
    assert report.synthesis.inputs == "self-prompted"
