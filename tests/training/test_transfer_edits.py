"""What a transfer makes of work folders that people have had their hands in, and what it leaves alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from training.test_transfer import HOW, KilledError, killing, moved, result
from training.tiny_task import Places

from loratools.errors import InputError, OutputError, UsageError
from loratools.training.training_run import TrainingRun
from loratools.training.transfer import data_stages, generate, label
from loratools.training.transfer.discriminator import read_discriminator
from loratools.training.transfer.job import Job
from loratools.training.transfer.models_in_turn import ModelsInTurn
from loratools.training.transfer.prompt_frame import PromptFrame
from loratools.training.transfer.run import kit_of, save_kit, transfer
from loratools.training.transfer.seed_inputs import Seed, read_seeds
from loratools.training.transfer.stage_files import StageFiles


@pytest.fixture(scope="module")
def done(places: Places, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("done") / "moved"
    moved(places, out, rows=())
    return out


@pytest.fixture
def out(done: Path, tmp_path: Path) -> Path:
    """A finished transfer of one's own."""
    shutil.copytree(done.parent, tmp_path / "own")
    return tmp_path / "own" / "moved"


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[int]:
    calls: list[int] = []
    original: Callable[..., Any] = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    return calls


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("generated", {"p": "abc"}, r'"p" is no number from 0 to 1'),
        ("generated", {"p": 2.0}, r'"p" is no number'),
        ("generated", {"flaw": 5}, '"flaw" is no text'),
        ("inputs", {"id": [1]}, '"id" is no number or text'),
        ("inputs", {"prompt": " "}, "its prompt is empty"),
        ("inputs", {"prompt": "a\ud800"}, "half of a surrogate pair"),
        ("labelled", {"confidence": "high"}, '"confidence" is no finite number'),
        ("labelled", {"confidence": float("nan")}, '"confidence" is no finite number'),
        ("labelled", {"confidence": -1}, '"confidence" is no finite number'),
        ("labelled", {"ended": "yes"}, '"ended" is no true or false'),
        ("labelled", {"answer": "a\ud800"}, "half of a surrogate pair"),
        ("labelled", {"answer": None}, "has no answer"),
    ],
)
def test_an_edit_that_no_stage_can_use_is_named(
    places: Places, out: Path, file: str, fields: dict[str, Any], message: str
) -> None:
    path = out.with_name("moved.transfer") / f"{file}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1] |= fields
    path.write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows))  # a blank line is one of the file's
    with pytest.raises(InputError, match=rf"{file}\.jsonl, line 3: .*{message}.*; mend or remove it"):
        moved(places, out, rows=(), resume=True)


def test_null_is_as_if_it_was_not_there_and_a_mark_no_text(places: Places, out: Path) -> None:
    path = out.with_name("moved.transfer") / "labelled.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0] |= {"confidence": None, "id": None}
    path.write_bytes(b"\xef\xbb\xbf" + "".join(json.dumps(row) + "\r\n" for row in rows).encode())
    assert moved(places, out, rows=(), resume=True).samples[0].confidence is None


def test_a_smaller_batch_keeps_what_was_made(places: Places, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the error for too little memory promises."""
    made = [counted(monkeypatch, module, "said") for module in (generate, label)]
    before = result(out)
    moved(places, out, replace(HOW, batch=3), rows=(), resume=True)
    assert made == [[], []]
    assert {**result(out), "receipt": []} == {**before, "receipt": []}


def test_labels_of_another_teacher_are_none(places: Places, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where it was killed before it had said a word."""
    other = replace(HOW, max_answer_tokens=9)
    calls = counted(monkeypatch, label, "said")
    with monkeypatch.context() as patch:
        patch.setattr(StageFiles, "note", killing(StageFiles.note, 1, before_the_work=True))
        with pytest.raises(KilledError):
            moved(places, out, other, rows=(), resume=True)
    moved(places, out, other, rows=(), resume=True)
    assert calls


def test_a_batch_of_which_some_is_known_is_asked_as_a_whole(
    places: Places, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Second answers are drawn for a batch: rows of a torn one get those that they would have had."""
    robust = replace(HOW, weighing="robust")
    moved(places, out, robust, rows=(), resume=True)
    work = out.with_name("moved.transfer")
    whole = (work / "labelled.jsonl").read_bytes()
    for lost in (1, 5):
        (work / "labelled.jsonl").write_bytes(b"".join(whole.splitlines(keepends=True)[lost:]))
        record = json.loads((work / "stages.json").read_text())
        record["label"]["done"] = False
        (work / "stages.json").write_text(json.dumps(record))
        moved(places, out, robust, rows=(), resume=True)
        assert (work / "labelled.jsonl").read_bytes() == whole


def test_another_adapter_at_the_same_place_is_asked_anew(places: Places, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter, out = tmp_path / "adapter", tmp_path / "moved"
    shutil.copytree(places.adapter, adapter)
    mine = replace(places, adapter=adapter)
    moved(mine, out, rows=())
    before = result(out)
    weights = load_file(adapter / "adapter_model.safetensors")
    same = {key: t * 2 if "lora_B" in key else t for key, t in weights.items()}
    save_file(same, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    moved(mine, out, rows=(), resume=True)
    assert result(out)["labelled"] != before["labelled"]
    assert result(out)["generated"] == before["generated"]


def test_what_is_not_the_transfers_is_left_alone(places: Places, tmp_path: Path) -> None:
    out, work = tmp_path / "moved", tmp_path / "work"
    out.mkdir()
    (out / "mine").write_text("mine")
    with pytest.raises(OutputError, match="exists"):  # no run has begun that could be gone on with
        moved(places, out, rows=(), resume=True)
    shutil.rmtree(out)
    moved(places, out, rows=(), work=work)
    for name in ("package.json", "seeds.jsonl"):
        (work / name).write_text("{}")
    moved(places, out, replace(HOW, samples=10), rows=(), work=work, force=True)
    assert (work / "package.json").exists()
    assert (work / "seeds.jsonl").exists()
    with pytest.raises(InputError):
        save_kit(tmp_path / "nothing", places.first, read_seeds(places.seeds), options=HOW)
    assert not (tmp_path / "nothing").exists()


def test_a_folder_may_be_named_by_dots(places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "save", killing(TrainingRun.save, 1, before_the_work=True))
        with pytest.raises(KilledError):
            moved(places, Path(), rows=(), force=True)
    assert (tmp_path / "here.transfer" / "labelled.jsonl").is_file()


def test_a_squeeze_to_more_is_none() -> None:
    with pytest.raises(UsageError, match="squeeze"):
        replace(HOW, squeeze_to=5)


def test_one_place_is_one_model(places: Places) -> None:
    first = str(places.first)
    models = ModelsInTurn(str(places.adapter), {"source": first, "target": first, "generator": first})
    assert models.take("generator")[0] is models.take("source", keep=("generator",))[0]
    assert models.take("teacher")[0] is not models.take("source", keep=("teacher",))[0]


def test_a_chat_template_is_missed_before_anything_is_made(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the two that answer; who makes up inputs needs none."""
    chat, out, seeds = replace(HOW, chat=True), tmp_path / "moved", read_seeds(places.seeds)
    with pytest.raises(UsageError, match=r"second: .*no chat template"):
        transfer(places.adapter, places.chatty, places.second, seeds, out, chat, generator=places.chatty)
    with pytest.raises(UsageError, match="without seeds the source makes up inputs itself"):
        transfer(places.adapter, places.first, places.second, [], out, HOW, generator=places.second)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(label, "said", killing(label.said, 1, before_the_work=True))
    with pytest.raises(KilledError):
        transfer(places.adapter, places.chatty, places.chatty, seeds, out, chat, generator=places.second)


def test_a_kit_of_other_inputs_is_another(places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(places.adapter, adapter)
    seeds = [Seed(f"No: {n}\nW:") for n in range(10, 300, 9)]
    with monkeypatch.context() as patch:  # killed with half of the probes made, by another seed
        patch.setattr(StageFiles, "append", killing(StageFiles.append, 2, before_the_work=False))
        with pytest.raises(KilledError):
            save_kit(adapter, places.first, seeds, options=replace(HOW, seed=5))
    save_kit(adapter, places.first, seeds, options=HOW)
    save_kit(adapter, places.first, seeds, tmp_path / "kit", HOW)
    made = (adapter / "transfer_kit" / "discriminator.json").read_bytes()
    assert made == (tmp_path / "kit" / "discriminator.json").read_bytes()
    told = transfer(places.adapter, places.first, places.second, [], tmp_path / "named", HOW, kit=tmp_path / "kit")
    assert (told.synthesis.discriminator, told.synthesis.seeds) == ("kit", 5)
    assert made == (tmp_path / "named.transfer" / "discriminator.json").read_bytes()
    with pytest.raises(InputError, match=r"adapter: holds no discriminator\.json"):
        transfer(adapter, places.first, places.second, [], tmp_path / "other", HOW, kit=adapter)
    moved(replace(places, adapter=adapter), tmp_path / "moved", seeds=[], rows=())
    save_kit(adapter, places.first, seeds[:25], options=HOW, force=True)
    moved(replace(places, adapter=adapter), tmp_path / "moved", seeds=[], rows=(), resume=True)
    used = (tmp_path / "moved.transfer" / "discriminator.json").read_bytes()
    assert used != made
    assert used == (adapter / "transfer_kit" / "discriminator.json").read_bytes()


def test_a_kit_of_a_single_file_lies_next_to_it(places: Places, tmp_path: Path) -> None:
    file = tmp_path / "adapter.safetensors"
    file.touch()
    assert kit_of(file) == tmp_path / "adapter.safetensors.transfer_kit"
    assert kit_of(places.adapter) == places.adapter / "transfer_kit"


def test_a_discriminator_sees_inputs_as_it_learnt_them(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever more a few seeds happen to share."""
    adapter = tmp_path / "adapter"
    shutil.copytree(places.adapter, adapter)
    save_kit(adapter, places.first, [Seed(f"No: {n}.\nW:") for n in range(10, 99, 9)] + [Seed("No: 7!\nW:")], None, HOW)
    frame = PromptFrame("No: ", "\nW:")
    assert read_discriminator(adapter / "transfer_kit" / "discriminator.json").frame == frame
    seen: list[PromptFrame] = []
    original = data_stages.features_of
    monkeypatch.setattr(
        data_stages, "features_of", lambda m, t, p, frame, **k: (seen.append(frame), original(m, t, p, frame, **k))[1]
    )
    few = [Seed("No: 12.\nW:"), Seed("No: 34.\nW:")]
    assert Job(None, None, HOW, tuple(few)).frame.after == ".\nW:"  # type: ignore[arg-type]
    moved(replace(places, adapter=adapter), tmp_path / "moved", replace(HOW, passing="ratio"), seeds=few, rows=())
    assert seen[0] == frame
