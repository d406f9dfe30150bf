"""Recipes, from files and from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub.conftest import write_peft
from safetensors.torch import load_file, save_file

from loratools.errors import AdapterError, InputError, LoratoolsError, UsageError
from loratools.files import load
from loratools.hub.recipe import Recipe, Step, parse_steps, read_recipe

TOML = """
[[step]]
verb = "squeeze"
rank = 2

[[step]]
verb = "quantize"
bits = 4
group = 32
"""


def test_a_file_and_words_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(TOML)
    read = read_recipe(tmp_path / "recipe.toml")
    assert read == parse_steps(["squeeze rank=2", "quantize bits=4 group=32"])
    assert read.digest == parse_steps(read.spelt()).digest
    assert read.digest != parse_steps(["squeeze rank=3", "quantize bits=4 group=32"]).digest


def test_values_have_the_types_that_they_look_like() -> None:
    squeezed, quantized = parse_steps(["squeeze energy=0.5 uniform=true max-rank=8", "quantize budget=4MB"]).steps
    assert squeezed.options == {"energy": 0.5, "uniform": True, "max_rank": 8}
    assert quantized.options == {"budget": "4MB"}


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ([], "no steps"),
        ([""], "not known"),
        (["nonsense"], "there are squeeze"),
        (["squeeze rank"], "NAME=VALUE"),
        (["squeeze depth=2"], "no option 'depth'"),
        (["squeeze worked=2"], "no option 'worked'"),
        (["quantize bits=4", "quantize bits=2"], "twice"),
        (["squeeze uniform=2"], "give true or false"),
        (["quantize bits=few"], "give a number"),
        (["convert to=true"], "give a word"),
    ],
)
def test_wrong_words_are_refused(texts: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_steps(texts)


@pytest.mark.parametrize(
    "text",
    [
        *("[[step]", "x = 1", "step = 5", "step = [1]", "[[step]]\nrank = 2", ""),
        *(f'[[step]]\nverb = "squeeze"\n{option}' for option in ("ranks = [1]", "rank = [1]", "rank = 2020-01-01")),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(LoratoolsError, match=r"recipe\.toml|no steps"):
        read_recipe(tmp_path / "recipe.toml")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"recipe\.toml"):
        read_recipe(tmp_path / "recipe.toml")


@pytest.mark.parametrize(
    ("steps", "rank", "packed"),
    [
        (["squeeze rank=2"], 2, False),
        (["truncate rank=1"], 1, False),
        (["squeeze rank=2", "convert to=peft dtype=bf16"], 2, False),
        (["quantize bits=3", "convert to=peft"], 4, True),
        (["reparameterize to=ldu"], 4, False),
        (["squeeze energy=0.0001"], 1, False),
    ],
)
def test_verbs_do_what_they_do_alone(tmp_path: Path, steps: list[str], rank: int, packed: bool) -> None:
    adapter = load(write_peft(tmp_path / "a", 0))
    worked = parse_steps(steps).run(adapter)
    assert {entry.rank for entry in worked.adapter.entries.values()} == {rank}
    assert (worked.packing is not None) == packed


def test_a_step_that_contradicts_itself_says_so() -> None:
    for text in ("squeeze rank=2 energy=0.5", "squeeze", "quantize", "quantize bits=2 ratio=4"):
        with pytest.raises(UsageError, match="give one of"):
            parse_steps([text])
    with pytest.raises(UsageError, match="nowhere"):
        parse_steps(["convert to=nowhere"])
    with pytest.raises(UsageError, match="a number, a word or a flag"):
        Recipe((Step("squeeze", {"rank": [1]}),))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("squeeze rank=x", "rank is 'x'; give a whole number"),
        ("squeeze rank=2.5", "a whole number"),
        ("squeeze rank=true", "a whole number"),
        ("squeeze rank=0", "below 1"),
        ("squeeze energy=2", "0, 1"),
        ("squeeze energy=nan", "0, 1"),
        ("squeeze budget=20%", "not a size"),
        ("squeeze elbow=maybe", "true or false"),
        ("squeeze rank=2 min-rank=0", "at least 1"),
        ("truncate", "rank is missing"),
        ("truncate nested=keep", "rank is missing"),
        ("truncate rank=2 nested=other", "dylora"),
        ("convert", "to is missing"),
        ("convert to=peft drop=all", "can be dropped"),
        ("reparameterize to=nothing", "not known"),
        ("reparameterize to=ldu dtype=f8", "dtype"),
        ("quantize bits=99", "16 at most"),
        ("quantize bits=4 method=other", "there are grid"),
        ("quantize ratio=0", "ratio"),
    ],
)
def test_what_would_be_wrong_for_every_adapter_is_refused_at_once(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_steps([text])


def test_a_squeeze_leaves_what_is_not_finite_if_told_so(tmp_path: Path) -> None:
    source = write_peft(tmp_path / "a", 0) / "adapter_model.safetensors"
    tensors = load_file(source)
    first = sorted(tensors)[0]
    tensors[first][0, 0] = float("nan")
    save_file(tensors, source)
    with pytest.raises(AdapterError, match="NaN"):
        parse_steps(["squeeze rank=2"]).run(load(source))
    worked = parse_steps(["squeeze rank=2 allow-nonfinite=true"]).run(load(source))
    assert sorted(entry.rank for entry in worked.adapter.entries.values()) == [2, 4]
