"""How well texts find their adapter, what wrong choices cost, and how softmax routers collapse when they are made."""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import importlib.util
import json
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from contestants import ROOT, table

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.hub.route_quality import Losses
    from loratools.training.encoder import Encoder

DATA = ROOT.parent / "shared" / "adapters" / "data"
ADAPTERS = ("en_lora_r64", "en_lora_r8", "es_lora_r16")
MODULES = (
    "argparse",
    "ast",
    "asyncio.base_events",
    "calendar",
    "configparser",
    "csv",
    "dataclasses",
    "decimal",
    "difflib",
)
MODULES += ("email.message", "enum", "fractions", "heapq", "inspect", "json.decoder", "logging", "pathlib", "pickle")
MODULES += ("random", "shutil", "statistics", "tarfile", "textwrap", "threading", "typing", "unittest.case", "zipfile")
EXPERTS = 8
STDS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 8.0)


def main(*, quick: bool = False) -> str:
    """The page, as Markdown."""
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}  # before torch is imported
    sys.path.append(str(ROOT / "tests"))
    parts = ["# Routing", *_domains(quick=quick), *_regret(quick=quick), *_collapse(quick=quick)]
    return "\n\n".join(parts)


def _encoder() -> Encoder | str:
    from loratools.training.encoder import PACKAGE, load_encoder

    if not DATA.is_dir():
        return f"the texts are not at {DATA}"
    if importlib.util.find_spec(PACKAGE) is None:
        return "the extra route is not installed"
    return load_encoder()


def _prompts(name: str) -> Iterator[str]:
    for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        yield row["prompt"] or row["answer"]


def _code() -> Iterator[str]:
    """Functions of the standard library, without their first line's neighbours."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    for name in MODULES:
        source = (folder / f"{name.replace('.', '/')}.py").with_suffix(".py")
        source = source if source.is_file() else folder / name.replace(".", "/") / "__init__.py"
        text = source.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (found := ast.get_source_segment(text, node)):
                yield found


def _licences() -> Iterator[str]:
    """Paragraphs of the licences of installed packages, each once."""
    seen = set()
    for package in sorted(importlib.metadata.distributions(), key=lambda d: str(d.metadata["Name"])):
        for file in sorted(package.files or [], key=str):
            if file.name.upper().startswith(("LICENSE", "LICENCE", "COPYING")) and Path(str(file.locate())).is_file():
                text = Path(str(file.locate())).read_text(encoding="utf-8", errors="replace")
                for part in text.split("\n\n"):
                    paragraph = " ".join(part.split())
                    if len(paragraph) > 80 and paragraph not in seen:
                        seen.add(paragraph)
                        yield paragraph


def _readmes() -> Iterator[str]:
    """Paragraphs of what installed packages say of themselves."""
    for package in sorted(importlib.metadata.distributions(), key=lambda d: str(d.metadata["Name"])):
        text = package.metadata.get_payload()
        for part in str(text or "").split("\n\n"):
            paragraph = " ".join(part.split())
            if len(paragraph) > 80 and paragraph[0].isalpha():
                yield paragraph


def _spread(texts: Sequence[str], count: int) -> list[str]:
    """`count` of the texts, evenly spread."""
    return [texts[i * len(texts) // count] for i in range(min(count, len(texts)))]


def _all_domains(n_train: int, n_test: int) -> dict[str, tuple[list[str], list[str]]]:
    """Domain -> (examples, other texts to route)."""
    found = {}
    for name in ("numwords_en", "numwords_de", "numwords_es", "pydoc"):
        found[name] = (
            _spread(list(_prompts(f"{name}_train")), n_train),
            _spread(list(_prompts(f"{name}_eval")), n_test),
        )
    for name, texts in (("code", list(_code())), ("licences", list(_licences()))):
        chosen = _spread(texts, n_train + n_test)
        every = (n_train + n_test) // n_test
        found[name] = (
            [text for i, text in enumerate(chosen) if i % every],
            [text for i, text in enumerate(chosen) if i % every == 0],
        )
    return found


def _domains(*, quick: bool) -> list[str]:
    import torch

    from loratools.hub.route import choose
    from loratools.hub.route_fit import fit
    from loratools.hub.route_quality import quality

    title = "## Which of six domains a text is of"
    encoder = _encoder()
    if isinstance(encoder, str):
        return [title, f"Skipped: {encoder}."]
    n_train, n_test = (40, 20) if quick else (200, 100)
    texts = _all_domains(n_train, n_test)
    made = {name: tuple(encoder.encode(part)[0] for part in parts) for name, parts in texts.items()}
    others = encoder.encode(_spread(list(_readmes()), n_test))[0]

    def fitted(names: Sequence[str]) -> object:
        labels = [name for name in names for _ in made[name][0]]
        return fit(labels, torch.cat([made[name][0] for name in names]))

    def rejected(found: object, vectors: Tensor) -> str:
        choices = choose(found, vectors)  # type: ignore[arg-type]
        return f"{100 * sum(c.adapter == 'base' for c in choices) / len(choices):.1f}"

    whole = fitted(list(made))
    labels = [name for name in made for _ in made[name][1]]
    choices = choose(whole, torch.cat([made[name][1] for name in made]))  # type: ignore[arg-type]
    total = quality(choices, labels)
    rows = []
    for i, name in enumerate(made):
        own = quality(
            [c for c, label in zip(choices, labels, strict=True) if label == name], [name] * len(made[name][1])
        )
        without = fitted([other for other in made if other != name])
        threshold = whole.scenarios[sorted(made).index(name)].threshold  # type: ignore[attr-defined]
        cells = [
            f"{100 * (own.nearest or 0):.1f}",
            f"{100 * (own.accuracy or 0):.1f}",
            f"{100 * (own.rejected or 0):.1f}",
        ]
        rows.append(
            [
                name,
                str(len(made[name][0])),
                str(own.texts),
                f"{threshold:.3f}",
                *cells,
                rejected(without, made[name][1]),
            ]
        )
    accuracy = [f"{100 * (value or 0):.1f}" for value in (total.nearest, total.accuracy, total.rejected)]
    rows.append(["all", "", str(total.texts), "", *accuracy, ""])
    header = ["domain", "examples", "texts", "threshold", "nearest is right %", "routed right %", "to the base %"]
    header.append("to the base when its own examples are missing %")
    note = (
        "Centroids of examples by all-MiniLM-L6-v2, a centroid for each domain, thresholds at the 5 % quantile, "
        "margin 0.02, "
        "temperature 0.1, as `loratools hub route-fit` has them. Number words are prompts such as `Number: "
        "479146 Words:` in "
        "English, German and Spanish, which differ in little but their first word; pydoc: paragraphs of Python's own "
        "documentation; code: functions of the standard library; licences: paragraphs of those of installed packages, "
        "where examples and texts come from the same files."
    )
    last = (
        f"Texts of none of the domains ({len(others)} paragraphs of what packages say of themselves): "
        f"{rejected(whole, others)} % go to the base. Expected calibration error of the nearest one's confidence: "
        f"{total.ece:.3f}."
    )
    return [title, note, table(header, rows), last]


def _regret(*, quick: bool) -> list[str]:

    from loratools.hub.route import choose
    from loratools.hub.route_fit import fit
    from loratools.hub.route_quality import regret

    title = "## What wrong choices cost real adapters"
    sys.path.append(str(ROOT / "tests"))
    from real.smollm2 import missing

    encoder = _encoder()
    if isinstance(encoder, str) or (reason := missing()):
        return [title, f"Skipped: {encoder if isinstance(encoder, str) else reason}."]
    losses = _losses(8 if quick else 64)
    n_train, n_test = (40, 20) if quick else (200, 128)
    domains = {name: ("en_lora_r64", "base", "es_lora_r16", "base")[i] for i, name in enumerate(losses.rows)}
    labels, examples = [], []
    for name, adapter in domains.items():
        if adapter != "base":
            chosen = _spread(list(_prompts(f"{name}_train")), n_train)
            labels += [adapter] * len(chosen)
            examples += chosen
    found = fit(labels, encoder.encode(examples)[0])
    texts = {name: _spread(list(_prompts(f"{name}_eval")), n_test) for name in domains}
    scenarios = [name for name in texts for _ in texts[name]]
    choices = choose(found, encoder.encode([text for part in texts.values() for text in part])[0])
    cost = regret(choices, scenarios, losses)
    rows = []
    for name in domains:
        own = [c.adapter for c, scenario in zip(choices, scenarios, strict=True) if scenario == name]
        counts = ", ".join(f"{adapter} {own.count(adapter)}" for adapter in sorted(set(own)))
        mine = regret([c for c, s in zip(choices, scenarios, strict=True) if s == name], [name] * len(own), losses)
        rows.append([name, *(f"{value:.3f}" for value in losses.rows[name]), counts, f"{mine.mean:.3f}"])
    header = ["scenario", *losses.adapters, "texts go to", "regret"]
    note = (
        "Mean negative log-likelihood of an answer token, of SmolLM2-135M-Instruct with each adapter, on "
        "held-out rows; "
        "texts are routed by examples of English and Spanish number words alone, so that German ones and documentation "
        "should go to the base, if that is best. Regret: what a text's scenario loses beside its best choice."
    )
    base = f"{cost.of_base:.3f}" if cost.of_base is not None else "-"
    last = (
        f"Mean regret of {cost.texts} texts: **{cost.mean:.3f}** routed, {cost.single:.3f} with "
        f"{cost.single_adapter} for "
        f"all, {base} with the base alone."
    )
    return [title, note, table(header, rows), last]


def _losses(n_rows: int) -> Losses:
    """NLL of every adapter, and of none, on every domain."""
    tools = str(ROOT.parent / "shared" / "tools")
    if tools not in sys.path:
        sys.path.append(tools)
    import real_models

    from loratools import load
    from loratools.hub.route_quality import Losses
    from loratools.training.evaluate import Evaluate, evaluate, read_rows

    model, tokenizer = real_models.load_smollm2()
    how = Evaluate(match=False)
    opened = {name: load(DATA.parent / name) for name in ADAPTERS} | {"base": None}
    found = {}
    for name in ("numwords_en", "numwords_de", "numwords_es", "pydoc"):
        rows = read_rows(DATA / f"{name}_eval.jsonl", n_rows)
        found[name] = tuple(evaluate(model, tokenizer, rows, a, options=how).nll for a in opened.values())
    return Losses("measured", tuple(opened), found)


def _collapse(*, quick: bool) -> list[str]:
    import torch

    from loratools.ops.routing import effective_experts, perplexity

    count = 20_000 if quick else 1_000_000
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(count, EXPERTS, generator=generator, dtype=torch.float64)

    def shares(std: float) -> tuple[float, float, float, float]:
        p = (std * normal).softmax(dim=1)
        ess = effective_experts(p)
        return (
            float(ess.mean()),
            float((ess <= 2).double().mean()),
            float((perplexity(p) <= 2).double().mean()),
            float((ess < 1.5).double().mean()),
        )

    low, high = 0.1, 20.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if shares(middle)[1] < 0.84 else (low, middle)
    rows = [[f"{std:g}", *(f"{value:.3f}" for value in shares(std))] for std in STDS]
    header = ["std of the logits", "mean effective experts", "P(at most 2)", "the same by exp(entropy)", "P(below 1.5)"]
    note = (
        f"Softmax over {EXPERTS} independent Gaussian logits, {count} draws: effective experts (sum p)^2 / sum "
        "p^2. ReMix "
        "(arXiv 2603.10160) is summarised as saying that a softmax router of 8 LoRAs with Gaussian "
        "initialisation has at "
        "most two effective experts with probability about 84 %. Which logits that assumes we could not read; "
        "the table "
        "says what follows from each. A router x W with entries of W drawn with standard deviation s and inputs "
        "of length "
        "|x| has logits of standard deviation s |x|: with s = 1 / sqrt(d) and a normalised input (|x| = sqrt(d)) "
        "that is 1, "
        "with s = 1 it is sqrt(d), 24 or more in models of today."
    )
    last = f"84 % is what logits of standard deviation {low:.2f} give."
    return ["## Softmax routers when they are made", note, table(header, rows), last]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    sys.path.insert(0, str(ROOT))
    print(main(quick=parser.parse_args().quick))
