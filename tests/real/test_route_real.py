"""Routing by the MiniLM of the extra `route`, on texts of tasks that real adapters were trained for."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from real.smollm2 import ADAPTERS

from loratools.hub.route import choose
from loratools.hub.route_fit import fit
from loratools.hub.route_quality import quality
from loratools.training.encoder import PACKAGE, Encoder, load_encoder

pytestmark = pytest.mark.real
DOMAINS = ("numwords_en", "numwords_es", "pydoc")


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    if importlib.util.find_spec(PACKAGE) is None:
        pytest.skip(f"the package {PACKAGE} is not installed; `make test-real` installs it")
    return load_encoder()


def texts(name: str, count: int) -> list[str]:
    place = ADAPTERS / "data" / f"{name}.jsonl"
    if not place.is_file():
        pytest.skip(f"no texts at {place}")
    rows = [json.loads(line) for line in place.read_text(encoding="utf-8").splitlines()[:count]]
    return [row["prompt"] or row["answer"] for row in rows]


def test_minilm_is_a_sentence_encoder(encoder: Encoder) -> None:
    said = ["A man is eating food.", "Someone eats a meal.", "The share price fell on Monday."]
    found, _ = encoder.encode(said)
    assert found.shape == (3, 384)
    assert float(found[0] @ found[1]) > 0.5 > 0.2 > float(found[0] @ found[2])
    assert torch.equal(found, encoder.encode(said)[0])
    assert encoder.limit == 256


def test_texts_find_their_domain_and_others_do_not(encoder: Encoder) -> None:
    labels = [name for name in DOMAINS for _ in range(60)]
    found = fit(labels, encoder.encode([t for name in DOMAINS for t in texts(f"{name}_train", 60)])[0])
    asked = [t for name in DOMAINS for t in texts(f"{name}_eval", 40)]
    told = quality(choose(found, encoder.encode(asked)[0]), [name for name in DOMAINS for _ in range(40)])
    assert told.nearest is not None
    assert told.accuracy is not None
    assert told.nearest >= 0.95
    assert told.accuracy >= 0.85
    others = choose(found, encoder.encode(texts("numwords_de_eval", 40))[0])
    assert sum(choice.adapter == "base" for choice in others) >= 36
