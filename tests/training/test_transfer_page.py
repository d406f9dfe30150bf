"""The page of a transfer: what it says is in the files, nothing in it can break out, and it is the same again."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from training.transfer_run import EQUAL, IMPROBABLE, KEPT, NEAR, UNSEEN, transfer_report

from loratools.errors import InputError, OutputError, UsageError
from loratools.reports import weight_transfer_page
from loratools.reports.transfer import StageTime, TransferReport
from loratools.reports.weight_transfer import CarriedTarget, WeightTransferReport
from loratools.training.transfer.diversity import diversity
from loratools.training.transfer.page import write_page

HOSTILE = (
    "<script>alert(1)</script>",
    "]]><img src=x onerror=alert(2)>",
    "</script><!--<script>",
    "\x1b[31mred\x1b[0m \x9b2J",
    "line\u2028separator \u202eoverridden\n\0",
    "' onmouseover=alert(3) \" $script ${data}",
    "half \ud800",
)


def made(report: TransferReport, tmp_path: Path) -> tuple[str, dict[str, Any]]:
    return read(write_page(report, tmp_path / "a.html", force=True))


def read(path: Path) -> tuple[str, dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return text, json.loads(data)


def blocks(data: dict[str, Any], section: str, kind: str) -> list[dict[str, Any]]:
    (found,) = [one for one in data["sections"] if one["id"] == section]
    inner = [part for block in found["blocks"] for part in block.get("blocks", [block])]
    return [block for block in inner if block["kind"] == kind]


def test_what_the_files_say(tmp_path: Path) -> None:
    report = transfer_report(tmp_path / "work")
    _, data = made(report, tmp_path)
    assert data["title"] == "my-adapter, moved to base2"
    assert data["tags"] == []
    counts = {row[0]: row[1] for row in blocks(data, "acceptance", "table")[0]["rows"]}
    assert counts["accepted"] == KEPT
    assert counts["passed the discriminator"] == KEPT + EQUAL + NEAR
    assert counts["generated"] == sum(n for name, n in counts.items() if name.startswith("–")) + KEPT
    (scores,) = blocks(data, "acceptance", "histograms")
    assert scores["threshold"] == 0.5
    found = {row["name"]: row["counts"] for row in scores["rows"]}
    assert found["real inputs, unseen"] == [sum(i / 20 <= p < (i + 1) / 20 for p in UNSEEN) for i in range(20)]
    assert {name: sum(some) for name, some in found.items()} == {
        "real inputs, unseen": 5, "accepted": KEPT, "duplicates": EQUAL + NEAR, "rejected as improbable": IMPROBABLE
    }  # fmt: skip
    assert not any(found["rejected as improbable"][10:])
    assert not any(found["accepted"][:10])
    loss, agreed = blocks(data, "curves", "curves")
    assert [line["points"] for line in loss["lines"]] == [
        [[i + 1, pytest.approx(loss, rel=1e-5)] for i, loss in enumerate(report.distillation.losses)],
        [[look.step, pytest.approx(look.nll, rel=1e-5)] for look in report.distillation.looks],
    ]
    assert (agreed["kept"], agreed["share"], agreed["lines"][0]["points"][8]) == (80, True, [80, 0.8])
    before, after = blocks(data, "agreement", "table")[0]["rows"]
    assert (before[1], after[1]) == (0.02, 0.8)
    accepted, rejected = blocks(data, "samples", "table")
    files = {name: lines(tmp_path / "work" / f"{name}.jsonl") for name in ("inputs", "labelled", "rejected")}
    answers = {row["prompt"].replace("\n", "\\n"): row for row in files["labelled"]}
    assert len(accepted["rows"]) == len({row[0] for row in accepted["rows"]}) == 20
    for prompt, answer, score, confidence in accepted["rows"]:
        label = answers[prompt]
        assert answer == label["answer"] + ("" if label["ended"] else " (did not end)")
        assert score == pytest.approx(0.5 + label["id"] / (2 * KEPT), abs=1e-5)
        assert confidence == 0.9
    assert len(rejected["rows"]) == 20
    odd = {row["prompt"]: row for row in files["rejected"]}
    whys = {"duplicate": "the same again", "similar": "nearly the same", "unfinished": "did not end"}
    for prompt, why, score in rejected["rows"]:
        row = odd[prompt]
        assert (score, why) == (row.get("p"), whys.get(row["reason"], row["reason"]))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_self_prompted_inputs_and_no_held_out_rows(tmp_path: Path) -> None:
    report = transfer_report(tmp_path / "work", seeds=0)
    alone = replace(report.distillation, looks=(), held_out=0, best_step=100)
    report = replace(report, distillation=alone, agreement=None, agreement_before=None, evaluations={})
    _, data = made(report, tmp_path)
    assert data["tags"] == ["self-prompted"]
    assert not blocks(data, "acceptance", "histograms")
    assert "no discriminator" in blocks(data, "acceptance", "paragraph")[0]["text"]
    assert [one["kept"] for one in blocks(data, "curves", "curves")] == [None]
    assert "not known" in blocks(data, "agreement", "paragraph")[0]["text"]
    assert data["cards"][2]["figure"] == "–"
    assert "passed the discriminator" not in {row[0] for row in blocks(data, "acceptance", "table")[0]["rows"]}


def test_a_squeezed_one_and_single_words(tmp_path: Path) -> None:
    report = transfer_report(tmp_path / "work", squeezed=0.125)
    few = replace(report.synthesis, distinct_2=None, least=0.34)
    _, data = made(replace(report, synthesis=few), tmp_path)
    assert (data["cards"][1]["title"], data["cards"][1]["figure"]) == ("Different words", "75 %")
    assert "before it was squeezed" in data["cards"][2]["more"]
    assert "from 0.34 on" in blocks(data, "acceptance", "paragraph")[1]["text"]
    assert ["squeezed", "to rank 16, with a relative error of 12.5 %"] in blocks(data, "moved", "facts")[0]["rows"]


def test_hostile_texts_stay_data(tmp_path: Path) -> None:
    text, data = made(transfer_report(tmp_path / "work", HOSTILE), tmp_path)
    plain, _ = made(transfer_report(tmp_path / "work2"), tmp_path)
    assert text.count("<script") == plain.count("<script") == 2
    assert text.count("</script>") == plain.count("</script>") == 2
    assert text.count("<!--") == plain.count("<!--")
    assert "<img" not in text
    assert "]]>" not in text
    assert not set("\x1b\x9b\u2028\u202e\0") & set(text)
    assert {row[0] for row in blocks(data, "samples", "table")[0]["rows"]} >= set(HOSTILE[:3])
    assert "\\x1b[31mred" in json.dumps(data["notes"]).replace("\\\\", "\\")


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    text, _ = made(transfer_report(tmp_path / "work"), tmp_path)
    assert "default-src 'none'; script-src 'sha256-" in text
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", text)
    assert "eval(" not in text
    assert "innerHTML" not in text


def test_the_same_bytes_but_for_the_time(tmp_path: Path) -> None:
    report = transfer_report(tmp_path / "work")
    one, first = made(report, tmp_path)
    assert made(report, tmp_path)[0] == one
    slower = replace(report, stages=tuple(StageTime(s.stage, 9 * s.seconds, s.tokens) for s in report.stages))
    _, second = made(slower, tmp_path)
    assert [s for s in first["sections"] if s["id"] != "time"] == [s for s in second["sections"] if s["id"] != "time"]
    assert {**first, "sections": 0} == {**second, "sections": 0}
    rows = blocks(second, "time", "table")[0]["rows"]
    assert rows[1] == ["generate", 121.5, 2000, pytest.approx(2000 / 121.5, rel=1e-5)]
    assert rows[-1][1] == sum(row[1] for row in rows[:-1])


def test_edited_rows_that_are_odd(tmp_path: Path) -> None:
    report = transfer_report(tmp_path / "work")
    odd = (
        '{"prompt": "by hand", "id": [], "p": "x"}',
        f'{{"prompt": "two", "p": 1{"0" * 400}}}',
        '{"prompt": "3", "p": NaN}',
    )
    (tmp_path / "work" / "inputs.jsonl").write_text("\n".join(odd))
    (tmp_path / "work" / "labelled.jsonl").write_text(
        '{"prompt": "by hand", "id": [], "answer": 5, "confidence": true}\n'
    )
    (tmp_path / "work" / "rejected.jsonl").write_text('{"prompt": "%s", "reason": {"a": 1}}\n' % ("y" * 3000))
    _, data = made(report, tmp_path)
    accepted, rejected = blocks(data, "samples", "table")
    assert accepted["rows"] == [["by hand", None, None, None], ["two", None, None, None], ["3", None, None, None]]
    assert rejected["rows"][0][0] == "y" * 1000 + "… (3,000 characters)"
    (tmp_path / "work" / "inputs.jsonl").write_text("[1]\n")
    with pytest.raises(InputError, match="line 1"):
        write_page(report, tmp_path / "b.html")
    assert not (tmp_path / "b.html").exists()


def test_long_curves_are_thinned(tmp_path: Path) -> None:
    report = transfer_report(tmp_path / "work")
    losses = tuple(float(i) for i in range(2500))
    _, data = made(replace(report, distillation=replace(report.distillation, losses=losses)), tmp_path)
    points = blocks(data, "curves", "curves")[0]["lines"][0]["points"]
    assert (len(points), points[0], points[-1]) == (834, [2, 1], [2500, 2499])


def test_what_is_refused(tmp_path: Path) -> None:
    report = transfer_report(tmp_path / "work")
    with pytest.raises(UsageError, match=r"\.html"):
        write_page(report, tmp_path / "a.txt")
    write_page(report, tmp_path / "a.html")
    with pytest.raises(OutputError, match="--force"):
        write_page(report, tmp_path / "a.html")


def test_diversity() -> None:
    """Against counting runs one by one, and the definition of quartiles."""
    rng = random.Random(2)
    texts = [" ".join(rng.choices("abc", k=rng.randint(1, 6))) for _ in range(23)]
    found = diversity(texts, 5)

    def naive(some: list[str], n: int) -> float:
        runs = [tuple(t.split()[i : i + n]) for t in some for i in range(len(t.split()) - n + 1)]
        return len(set(runs)) / len(runs)

    assert [found.distinct_1, found.distinct_2, found.distinct_3] == [naive(texts, n) for n in (1, 2, 3)]
    groups = [texts[i : i + 5] for i in (0, 5, 10, 15)]  # three are left over
    assert found.distinct_2_few == pytest.approx(sum(naive(some, 2) for some in groups) / 4)
    assert found.inputs == 23
    lengths = sorted(len(text) for text in texts)
    quartile = [
        lengths[i] + (lengths[min(i + 1, 22)] - lengths[i]) * part for i, part in ((5, 0.5), (11, 0), (16, 0.5))
    ]
    assert found.characters == (lengths[0], *quartile, lengths[-1])
    alone = diversity(["one two"], 0)
    assert (alone.distinct_2_few, alone.words, alone.distinct_3) == (None, (2, 2, 2, 2, 2), None)


def carried() -> WeightTransferReport:
    row = CarriedTarget({"a.q_proj": 1.0}, "bases", 8, (4, 4), (6, 6), 0.5, 0.25, 0.01, 0.02)
    names = ("a.q_proj", *HOSTILE)
    return WeightTransferReport(
        "bases", dict.fromkeys(names, row), {text: text for text in HOSTILE}, 1000, HOSTILE, "out", *HOSTILE[:3]
    )


def test_weights_only(tmp_path: Path) -> None:
    text, data = read(weight_transfer_page.write_page(carried(), tmp_path / "a.html"))
    assert data["tags"] == ["weights only"]
    targets, left_out = blocks(data, "targets", "table")
    assert targets["rows"][0] == ["a.q_proj", "a.q_proj", "bases", 8, 0.25, 0.5, 0.01, 0.02]
    assert len(left_out["rows"]) == len(HOSTILE)
    assert data["cards"][1]["figure"] == "25 %"
    assert text.count("<script") == 2
    assert not set("\x1b\u2028\0") & set(text)
    with pytest.raises(OutputError, match="--force"):
        weight_transfer_page.write_page(carried(), tmp_path / "a.html")
