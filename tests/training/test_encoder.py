"""Sentence encoders: pooling, cutting and names, of a tiny random BERT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.errors import InputError, MissingExtraError, UsageError
from loratools.training import encoder as module
from loratools.training.encoder import load_encoder
from loratools.training.texts import Labelled, read_labelled

transformers = pytest.importorskip("transformers", reason="runs a model: pip install 'loratools[models]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers that reads characters, at most 20 of them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    place = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=127,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    transformers.BertModel(config).eval().save_pretrained(place)
    vocabulary = {"?": 0} | {chr(code): code for code in range(32, 127) if chr(code) != "?"}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="?").save_pretrained(place)
    (place / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    return place


TEXTS = ["one", "two", "a text of more", "x", "one"]


def naive(folder: Path, text: str) -> torch.Tensor:
    """The mean of the last hidden states, one text at a time."""
    model = transformers.BertModel.from_pretrained(folder).eval()
    ids = torch.tensor([[0 if c == "?" else ord(c) for c in text[:20]]])
    with torch.no_grad():
        states: Any = model(input_ids=ids).last_hidden_state[0].double()
    mean: torch.Tensor = sum(states) / len(states)
    return mean / mean.norm()


def test_a_text_is_the_mean_of_its_hidden_states(folder: Path) -> None:
    steps = []
    found, cut = load_encoder(folder).encode(TEXTS, step=lambda: steps.append(1))
    assert (found.shape, found.dtype, cut, len(steps)) == ((5, 16), torch.float32, 0, 5)
    for row, text in zip(found, TEXTS, strict=True):
        assert torch.allclose(row.double(), naive(folder, text), atol=1e-6)
    assert torch.equal(found, load_encoder(folder).encode(TEXTS)[0])


def test_long_texts_are_cut_and_counted(folder: Path) -> None:
    found, cut = load_encoder(folder).encode(["y" * 20, "z" * 21])
    assert cut == 1
    assert torch.allclose(found[1].double(), naive(folder, "z" * 20), atol=1e-6)


def test_pooling_by_the_first_token_or_refused(folder: Path, tmp_path: Path) -> None:
    import shutil

    place = tmp_path / "cls"
    shutil.copytree(folder, place)
    (place / "1_Pooling").mkdir()
    pooling = place / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    model = transformers.BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        first = model(input_ids=torch.tensor([[ord("x")]])).last_hidden_state[0, 0]
    found = load_encoder(place)
    assert torch.allclose(found.encode(["x"])[0][0], first / first.norm(), atol=1e-6)
    pooling.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(InputError, match="pools by pooling_mode_max_tokens"):
        load_encoder(place)


def test_the_name_tells_the_weights(folder: Path, tmp_path: Path) -> None:
    import shutil

    place = tmp_path / folder.name
    shutil.copytree(folder, place)
    assert load_encoder(place).name == load_encoder(folder).name
    torch.manual_seed(1)
    transformers.BertModel(transformers.BertConfig.from_pretrained(folder)).save_pretrained(place)
    assert load_encoder(place).name != load_encoder(folder).name


def test_nothing_to_encode_and_no_encoder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = load_encoder(folder)
    with pytest.raises(UsageError, match="no texts"):
        found.encode([])
    with pytest.raises(UsageError, match="text 2 is empty"):
        found.encode(["a", " \n"])
    with pytest.raises(InputError, match="no folder of a Hugging Face model"):
        load_encoder(tmp_path)
    monkeypatch.setattr(module, "PACKAGE", "no_such_package_at_all")
    with pytest.raises(MissingExtraError, match=r"loratools\[route\]"):
        load_encoder()


def test_labelled_texts(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"adapter": "a", "text": "one"}\n\n{"adapter": "b", "prompt": "two", "answer": "three"}\n')
    assert read_labelled(path) == [Labelled("one", "a"), Labelled("two", "b")]
    path.write_text('{"text": "one"}\n')
    assert read_labelled(path, required=False) == [Labelled("one")]
    (tmp_path / "rows.txt").write_text("one\ntwo\n")
    assert read_labelled(tmp_path / "rows.txt", required=False) == [Labelled("one"), Labelled("two")]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2: is not JSON"),
        ("3", "line 2: is no JSON object"),
        ('{"adapter": "a"}', "line 2: has no text"),
        ('{"adapter": "a", "text": " "}', "line 2: has no text, or an empty one"),
        ('{"adapter": "a", "text": 3}', "line 2: has no text"),
        ('{"text": "a"}', "line 2: names no adapter"),
        ('{"adapter": 3, "text": "a"}', "line 2: names no adapter"),
    ],
)
def test_what_is_no_labelled_text(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"adapter": "a", "text": "fine"}}\n{line}\n')
    with pytest.raises(InputError, match=says):
        read_labelled(path)
