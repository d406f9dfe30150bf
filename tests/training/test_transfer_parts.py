"""What a transfer is made of, each part against a naive way to the same."""

from __future__ import annotations

import errno
import fcntl
import json
import math
from pathlib import Path

import pytest
import torch

from loratools.errors import InputError, UsageError
from loratools.training.transfer.confidence import confidence_weights, edit_share, robust_weights
from loratools.training.transfer.discriminator import Discriminator, fit_discriminator, read_discriminator
from loratools.training.transfer.duplicates import Duplicates, distinct
from loratools.training.transfer.features import N_PLAIN, plain
from loratools.training.transfer.likeness import mean_discrepancy
from loratools.training.transfer.prompt_frame import Listing, PromptFrame, few_shot
from loratools.training.transfer.seed_inputs import Seed, read_seeds
from loratools.training.transfer.settings import Transfer
from loratools.training.transfer.sieve import Sieve
from loratools.training.transfer.stage_files import StageFiles

NUMBERS = ["Number: 45\nWords:", "Number: 512214\nWords:", "Number: 4668\nWords:"]


def test_what_prompts_share_is_their_frame() -> None:
    frame = PromptFrame.of(NUMBERS)
    assert frame == PromptFrame("Number: ", "\nWords:")
    assert [frame.inside(prompt) for prompt in NUMBERS] == ["45", "512214", "4668"]
    assert frame.around("7") == "Number: 7\nWords:"
    assert frame.inside("another") == "another"
    same_digits = PromptFrame.of(["Number: 451\nWords:", "Number: 421\nWords:"])
    assert same_digits == frame  # a digit that few seeds share is none of the frame's
    assert PromptFrame.of(["one only"]) == PromptFrame("", "")
    assert PromptFrame.of(["a b", "c d"]) == PromptFrame("", "")
    overlapping = PromptFrame.of(["xx--", "xx----"])
    assert [overlapping.around(overlapping.inside(p)) for p in ("xx--", "xx----")] == ["xx--", "xx----"]


def test_inputs_are_shown_as_lines() -> None:
    frame = PromptFrame.of(NUMBERS)
    lines = Listing.of(frame, NUMBERS)
    assert few_shot(frame, lines, NUMBERS) == "Number: 45\nNumber: 512214\nNumber: 4668\nNumber:"
    assert lines.stop == "\n"
    pairs = NUMBERS[:2], [" forty-five", " many"]
    paired = few_shot(frame, Listing.of(frame, *pairs), *pairs)
    assert paired == "Number: 45\nWords: forty-five\n\nNumber: 512214\nWords: many\n\nNumber:"
    long = ["two\nlines", "and\n\nthree"]
    apart = Listing.of(PromptFrame("", ""), long)
    assert apart.stop == "\n\n###\n\n"
    shown = few_shot(PromptFrame("", ""), apart, long)
    assert shown == "Input: two\nlines\n\n###\n\nInput: and\n\nthree\n\n###\n\nInput:"


def test_an_input_ends_where_the_frame_goes_on() -> None:
    frame = PromptFrame("Number: ", "\nWords:")
    assert frame.said(" 45\nWords: forty-five", amid=False) == "45"
    sentences = PromptFrame.of(["One. Two.", "Three, four. Five.", "Six."])
    assert sentences.after == "."
    assert sentences.said(" Seven. Eight.", amid=True) == "Seven. Eight"
    assert sentences.said(" Seven. Eight", amid=True) == "Seven. Eight"
    assert PromptFrame("", "").said(" x ", amid=True) == "x"


def test_seeds_are_read_in_several_forms(tmp_path: Path) -> None:
    path = tmp_path / "seeds.jsonl"
    rows = [
        '{"prompt": "a", "answer": "b"}',
        '{"input": "c", "output": "d"}',
        '{"text": "e"}',
        '"f"',
        '{"prompt": "a"}',
    ]
    path.write_text("\n".join(rows))
    assert read_seeds(path) == [Seed("a", "b"), Seed("c", "d"), Seed("e"), Seed("f")]
    for bad in ("", '{"prompt": ""}', "[1]", "{"):
        path.write_text(bad)
        with pytest.raises(InputError, match="prompt"):
            read_seeds(path)


def test_duplicates() -> None:
    seen = Duplicates(0.7)
    assert seen.is_new("123456")
    assert not seen.is_new(" 123456 ")
    assert seen.is_new("123457")  # short ones differ where they differ at all
    text = "one two three four five six seven eight nine ten eleven twelve"
    assert seen.is_new(text)
    assert not seen.is_new(text.replace("twelve", "thirteen"))  # 9 of 11 triples are common
    assert seen.is_new(text.replace("six", "6"))  # 7 of 13
    assert not seen.is_new(text.upper())
    assert seen.likeness(text.upper()) == "duplicate"
    assert seen.likeness(text.replace("twelve", "thirteen")) == "similar"
    assert seen.likeness("something else") == ""


def test_jaccard_is_that_of_sets() -> None:
    generator = torch.Generator().manual_seed(0)
    texts = [" ".join(map(str, torch.randint(0, 3, (9,), generator=generator).tolist())) for _ in range(150)]
    kept: list[set[tuple[str, ...]]] = []
    seen = Duplicates(0.4)
    for text in texts:
        words = text.split()
        grams = {tuple(words[i : i + 3]) for i in range(len(words) - 2)}
        new = all(len(grams & other) / len(grams | other) <= 0.4 for other in kept)
        assert seen.is_new(text) == new
        if new:
            kept.append(grams)
    assert 10 < len(kept) < 140


def test_distinct() -> None:
    assert distinct(["a b a", "b a"], 1) == pytest.approx(2 / 5)
    assert distinct(["a b a", "b a"], 2) == pytest.approx(2 / 3)
    assert distinct(["a"], 2) is None


def test_robust_weights_minimise_their_loss() -> None:
    """w e + mu (sqrt(w) - sqrt(c))^2, by search; then a mean of 1, and nothing below the 20th percentile."""
    sure, differ = [0.9, 0.5, 0.8, 0.3, 1.0], [0.0, 0.2, 0.4, 0.1, 0.9]
    mu = 0.2
    best = []
    for c, e in zip(sure, differ, strict=True):
        grid = [i / 20000 for i in range(20001)]
        best.append(min(grid, key=lambda w: w * e + mu * (math.sqrt(w) - math.sqrt(c)) ** 2))
    best[best.index(min(best))] = 0.0
    found = robust_weights(sure, differ)
    assert found == pytest.approx([w * 5 / sum(best) for w in best], abs=2e-3)
    assert robust_weights([0.5, 0.5], [0.0, 0.0]) == [1.0, 1.0]
    assert robust_weights([], []) == []
    assert confidence_weights([0.2, 0.6]) == pytest.approx([0.5, 1.5])
    assert confidence_weights([0.0, 0.0]) == [1.0, 1.0]


def test_edit_share() -> None:
    def slow(a: tuple[int, ...], b: tuple[int, ...]) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(slow(a[1:], b) + 1, slow(a, b[1:]) + 1, slow(a[1:], b[1:]) + (a[0] != b[0]))

    for a, b in [((1, 2, 3), (1, 3)), ((), (4,)), ((1, 2, 3, 4), (2, 1, 4, 3)), ((5, 5), (5, 5))]:
        assert edit_share(a, b) == slow(a, b) / max(len(a), len(b))
    assert edit_share((), ()) == 0


def test_mean_discrepancy() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(4, 3, generator=generator, dtype=torch.float64) + 1
    rows = [*x.tolist(), *y.tolist()]
    square = [[sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) for q in rows] for p in rows]
    apart = sorted(square[i][j] for i in range(9) for j in range(9) if i != j)
    width = apart[(len(apart) - 1) // 2]
    k = [[math.exp(-s / width) for s in row] for row in square]
    within = sum(k[i][j] for i in range(5) for j in range(5) if i != j) / 20
    beside = sum(k[i][j] for i in range(5, 9) for j in range(5, 9) if i != j) / 12
    across = sum(k[i][j] for i in range(5) for j in range(5, 9)) / 20
    assert mean_discrepancy(x, y) == pytest.approx(within + beside - 2 * across, rel=1e-9)


def features(insides: list[str], seed: int = 0) -> torch.Tensor:
    """With hidden states that say nothing."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(len(insides), 8, generator=generator, dtype=torch.float64)
    return torch.cat([hidden, plain(insides)], 1)


def numbers(count: int, low: int, high: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    return [str(n) for n in torch.randint(low, high, (count,), generator=generator).tolist()]


def test_a_discriminator_tells_numbers_from_words(tmp_path: Path) -> None:
    real, made_up = numbers(60, 10, 10**6, 0), [*numbers(30, 10, 10**6, 1), *["Of course! Here is one"] * 30]
    found = fit_discriminator(features(real), features(made_up, 1), reads="source")
    assert found.floor == 1.0
    odd = found.probabilities(features(["Sure, here is another one", "12 34 abc"], 2))
    fine = found.probabilities(features(numbers(40, 10, 10**6, 3), 3))
    assert max(odd) < 0.4
    assert min(fine) > 0.5
    found.save(tmp_path / "d.json")
    again = read_discriminator(tmp_path / "d.json")
    assert len(found.unseen) == 60
    assert again.unseen == found.unseen
    known = found.probabilities(features(real))
    assert sum(found.unseen) < sum(known)  # what was learnt from looks more real than what was not
    old = json.loads((tmp_path / "d.json").read_text())
    del old["unseen"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert read_discriminator(tmp_path / "old.json").unseen == ()
    assert again.probabilities(features(real)) == found.probabilities(features(real))
    with pytest.raises(InputError, match="wide"):
        found.probabilities(torch.zeros(1, N_PLAIN + 9, dtype=torch.float64))


def test_a_discriminator_of_like_things_lets_all_pass() -> None:
    same = fit_discriminator(
        features(numbers(40, 10, 10**6, 0)), features(numbers(40, 10, 10**6, 1), 1), reads="source"
    )
    assert math.isinf(same.strength)
    assert same.loss == pytest.approx(math.log(2))
    assert same.probabilities(features(["anything"])) == [0.5]


def test_few_seeds_do_not_rule_out_what_they_lack() -> None:
    """Five numbers are no reason to refuse most numbers of other lengths; words are refused all the same."""
    made_up = [*numbers(24, 10, 10**6, 1), *["I am a language model"] * 12]
    found = fit_discriminator(features(["12", "345", "7", "90817", "22"]), features(made_up, 1), reads="generator")
    assert found.floor == min(found.unseen)
    sieve = Sieve(Transfer(), PromptFrame("", ""), [], found.floor)
    some = numbers(100, 10, 10**6, 5)
    rows = [
        {"id": i, "prompt": x, "p": p}
        for i, (x, p) in enumerate(zip(some, found.probabilities(features(some, 4)), strict=True))
    ]
    assert sum(not sieve.reason(row) for row in rows) > 50
    (p,) = found.probabilities(features(["I am one language model"], 6))
    assert sieve.reason({"id": 1, "prompt": "I am one language model", "p": p}) == "improbable"


def test_the_weights_are_where_the_gradient_vanishes() -> None:
    """Of the balanced mean loss plus strength / 2 |w|^2, by autograd, on more rows than features and on fewer."""
    for n in (200, 30):
        x, z = features(numbers(n, 10, 10**6, 0)), features(["Sure: " + s for s in numbers(n // 2, 10, 99, 1)], 1)
        found = fit_discriminator(x, z, reads="source")
        assert not math.isinf(found.strength)
        both = (torch.cat([x, z]) - found.mean) / found.unit
        w = found.weights.clone().requires_grad_()
        b = torch.tensor(found.bias, dtype=torch.float64, requires_grad=True)
        scores = both @ w + b
        losses = [
            torch.nn.functional.softplus(-scores[: len(x)]).mean(),
            torch.nn.functional.softplus(scores[len(x) :]).mean(),
        ]
        (sum(losses) / 2 + found.strength / 2 * (w @ w)).backward()
        assert w.grad is not None
        assert b.grad is not None
        assert float(w.grad.abs().max()) < 1e-8
        assert float(b.grad.abs()) < 1e-6


def test_what_is_no_discriminator(tmp_path: Path) -> None:
    made = fit_discriminator(features(numbers(9, 1, 99, 0)), features(["x y"] * 9, 1), reads="source")
    made.save(tmp_path / "d.json")
    fields = json.loads((tmp_path / "d.json").read_text())
    for change in (
        {"version": 2},
        {"unit": [0.0]},
        {"mean": "x"},
        {"reads": "both"},
        {"unseen": [2.0]},
        {"weights": fields["weights"][:-1]},
    ):
        (tmp_path / "bad.json").write_text(json.dumps({**fields, **change}))
        with pytest.raises(InputError, match="no discriminator"):
            read_discriminator(tmp_path / "bad.json")
    with pytest.raises(InputError, match="prepare-only"):
        read_discriminator(tmp_path / "missing.json")
    with pytest.raises(UsageError, match="one kind"):
        fit_discriminator(features([]), features(["x"]), reads="source")
    assert isinstance(made, Discriminator)


def test_the_sieve_says_why() -> None:
    frame = PromptFrame("No: ", "\nW:")
    sieve = Sieve(Transfer(threshold=0.6), frame, ["No: 1\nW:"])
    rows = [
        ("2", 0.9, None),
        ("2", 0.9, None),
        ("1", 0.9, None),
        ("3", 0.59, None),
        (" ", 0.9, None),
        ("4", None, None),
    ]
    said = [sieve.reason({"id": i, "prompt": frame.around(x), "p": p, "flaw": f}) for i, (x, p, f) in enumerate(rows)]
    assert said == ["", "duplicate", "duplicate", "improbable", "empty", ""]
    assert sieve.reason({"id": 9, "prompt": "No: 5\nW:", "flaw": "unfinished"}) == "unfinished"
    assert sieve.counts == {"kept": 2, "duplicate": 2, "improbable": 1, "empty": 1, "unfinished": 1}


def test_by_their_odds_a_share_of_p_over_its_rest_passes() -> None:
    sieve = Sieve(Transfer(passing="ratio"), PromptFrame("", ""), [])
    for p in (0.2, 0.5, 0.9):
        kept = [not sieve.reason({"id": i, "prompt": f"{i} {p}", "p": p}) for i in range(2000)]
        assert sum(kept) / 2000 == pytest.approx(min(1, p / (1 - p)), abs=0.03)
    assert not Sieve(Transfer(passing="none"), PromptFrame("", ""), []).reason({"id": 0, "prompt": "x", "p": 0.0})


def test_rows_survive_a_torn_last_line(tmp_path: Path) -> None:
    files = StageFiles(tmp_path / "work")
    with (
        files.open(resume=False),
        pytest.raises(UsageError, match="another run is at work here"),
        files.open(resume=True),
    ):
        pass
    with files.open(resume=True):
        pass
    files.append("a.jsonl", [{"prompt": "x\u2028y"}, {"prompt": "z"}])
    path = tmp_path / "work" / "a.jsonl"
    whole = path.read_bytes()
    for cut in range(1, 12):
        path.write_bytes(whole[:-cut])
        found = [row["prompt"] for row in files.rows("a.jsonl")]
        assert found == (["x\u2028y", "z"] if cut == 1 else ["x\u2028y"])
        files.append("a.jsonl", [{"prompt": "new"}])
        assert [row["prompt"] for row in files.rows("a.jsonl")] == [*found, "new"]
        path.write_bytes(whole)
    path.write_text('{"prompt": "x"}\nno row\n')
    with pytest.raises(InputError, match="line 2"):
        files.rows("a.jsonl")


def test_a_new_beginning_waits_for_the_run_that_is_at_work(tmp_path: Path) -> None:
    files = StageFiles(tmp_path / "work")
    with files.open(resume=False):
        files.note("next", "x", done=True)
        with pytest.raises(UsageError, match="at work here"), files.open(resume=False, force=True):
            pass
        assert files.stages() == ("next",)
    with files.open(resume=False, force=True):
        assert files.stages() == ()


def test_a_file_system_without_locks_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    files = StageFiles(tmp_path / "work")
    with files.open(resume=False):
        files.note("next", "x", done=True)
    assert files.stages() == ("next",)


def test_a_stage_is_done_again_when_what_it_was_made_of_changed(tmp_path: Path) -> None:
    files = StageFiles(tmp_path)
    files.write("a.jsonl", [{"prompt": "x"}])
    before = files.digest("a.jsonl", settings={"n": 1})
    files.note("next", before, done=True)
    assert files.is_done("next", files.digest("a.jsonl", settings={"n": 1}))
    assert not files.is_done("next", files.digest("a.jsonl", settings={"n": 2}))
    files.append("a.jsonl", [{"prompt": "y"}])
    assert not files.is_done("next", files.digest("a.jsonl", settings={"n": 1}))
    assert len({before, files.digest(settings={"n": 1}), files.digest("b.jsonl", settings={"n": 1})}) == 3
    with pytest.raises(UsageError, match="--resume"), files.open(resume=False):
        pass
    (tmp_path / "stages.json").write_text("[")
    with pytest.raises(InputError, match="--force"):
        files.is_done("next", before)


def test_settings_are_checked() -> None:
    for name, value in {"samples": 0, "shots": 0, "threshold": 1.5, "held_out": -0.1, "squeeze_to": 0}.items():
        with pytest.raises(UsageError, match=name):
            Transfer(**{name: value})  # type: ignore[arg-type]
