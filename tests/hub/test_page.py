"""The page of a catalog: a file that nothing in it can break out of, with spectra of a few bytes."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loratools.errors import InputError, OutputError, UsageError
from loratools.hub.catalog import CatalogRow, write_catalog
from loratools.hub.page import write_page

pytest.importorskip("pyarrow")

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    "<!--<script>",
    "line\u2028separator \u2029 \u202eoverridden\n\0",
    "' onmouseover=alert(3) \" $script ${data}",
    "half \ud800",
)


def made(tmp_path: Path, rows: list[CatalogRow]) -> tuple[str, dict[str, Any]]:
    write_catalog(rows, tmp_path / "c.parquet")
    text = write_page(tmp_path / "c.parquet", tmp_path / "c.html", force=True).read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return text, json.loads(data)


def test_hostile_texts_stay_data(tmp_path: Path) -> None:
    rows = [
        CatalogRow(
            text, "found", dialect=text, families=(text,), base_model=text, warnings=(text,), reason=text, path=text
        )
        for text in HOSTILE
    ]
    text, data = made(tmp_path, rows)
    plain, _ = made(tmp_path, [CatalogRow("a", "found")])
    assert text.count("<script") == plain.count("<script") == 2
    assert text.count("</script>") == plain.count("</script>") == 2
    assert text.count("<!--") == plain.count("<!--")
    assert "<img" not in text
    assert not set("\u2028\u2029\u202e\0") & set(text)
    assert data["columns"]["name"][:2] == list(HOSTILE[:2])
    assert "\\u202eoverridden\\n\\x00" in data["columns"]["name"][3]
    assert data["texts"]["base"][4] == HOSTILE[4]


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    text, _ = made(tmp_path, [CatalogRow("a", "found")])
    assert "default-src 'none'; script-src 'sha256-" in text
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", text)
    assert "eval(" not in text
    assert "innerHTML" not in text


def test_spectra_are_pooled_and_coarse(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    rows, truths = [], []
    for number in range(30):
        spectra: list[np.ndarray | None] = [None]
        for _ in range(int(rng.integers(1, 5))):
            values = np.sort(10.0 ** rng.uniform(-3, 1, int(rng.integers(1, 90))))[::-1].astype(np.float32)
            spectra.append(np.append(values, np.float32(0)) if number % 3 else values)
        whole = [s.astype(float) for s in spectra if s is not None]
        padded = np.array([np.pad(s, (0, 100 - len(s))) for s in whole])
        truths.append(np.sqrt((padded**2).mean(0))[: min(64, max(map(len, whole)))])
        norms = tuple(None if s is None else float(np.linalg.norm(s)) for s in spectra)
        names = tuple(map(str, range(len(spectra))))
        rows.append(
            CatalogRow(f"{number:02}", "found", targets=names, singular_values=tuple(spectra), target_norms=norms)
        )
    _, data = made(
        tmp_path, [*rows, CatalogRow("none", "failed"), CatalogRow("zero", "found", singular_values=(np.zeros(2),))]
    )
    assert data["most"] == 64
    step = data["decades"] / (data["levels"] - 1)
    for truth, top, coded in zip(truths, data["columns"]["top"], data["columns"]["spectrum"], strict=False):
        levels = np.frombuffer(base64.b64decode(coded), np.uint8)
        assert len(levels) == len(truth) <= 64
        assert top == pytest.approx(truth[0], rel=1e-5)
        read = top * 10.0 ** (step * (levels.astype(float) - data["levels"]))  # as page_catalog.js does
        sound = (levels > 1) & (truth > 0)
        assert sound.sum() > 0
        assert np.abs(np.log10(read[sound] / truth[sound])).max() <= step / 2 + 1e-5
        assert (levels[truth == 0] == 0).all()
        assert (truth[levels == 1] <= truth[0] * 10.0 ** (-data["decades"] + step)).all()
    for row, norm in zip(rows, data["columns"]["norm"], strict=False):
        assert norm == pytest.approx(np.sqrt(sum(n * n for n in row.target_norms if n is not None)), rel=1e-5)
    assert (data["columns"]["top"][-2:], data["columns"]["norm"][-2]) == ([None, 0], None)
    assert base64.b64decode(data["columns"]["spectrum"][-1]) == b"\0\0"


def test_the_same_catalog_gives_the_same_bytes_and_few(tmp_path: Path) -> None:
    spectrum = np.linspace(2, 1, 64).astype(np.float32)
    row = CatalogRow("n" * 40, "found", targets=("t",) * 200, singular_values=(spectrum,) * 200)
    one, _ = made(tmp_path, [row])
    hundred, _ = made(tmp_path, [row] * 100)
    assert (len(hundred) - len(one)) / 99 < 250  # bytes for each adapter
    assert made(tmp_path, [row])[0] == one


def test_what_is_refused(tmp_path: Path) -> None:
    write_catalog([], tmp_path / "c.parquet")
    with pytest.raises(UsageError, match=r"\.html"):
        write_page(tmp_path / "c.parquet", tmp_path / "c.txt")
    write_page(tmp_path / "c.parquet", tmp_path / "c.html")
    with pytest.raises(OutputError, match="--force"):
        write_page(tmp_path / "c.parquet", tmp_path / "c.html")
    (tmp_path / "d.parquet").write_text("no")
    with pytest.raises(InputError, match="no catalog"):
        write_page(tmp_path / "d.parquet", tmp_path / "d.html")
    assert not (tmp_path / "d.html").exists()
