"""Serving plans: the memory of both servers from shapes, who is left out, and the same from a hub and its catalog."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub.conftest import write_kohya
from safetensors.torch import save_file

from loratools.errors import AdapterError, InputError, UsageError
from loratools.files import load
from loratools.hub.plan import Plan, plan
from loratools.ops.check import check
from loratools.reports.frames import write_table

LAYERS, HIDDEN = 3, 16
QKVO = tuple(f"self_attn.{p}_proj" for p in "qkvo")
CELL = 2 * LAYERS * HIDDEN * 2  # both buffers, 2 bytes
SLORA = Plan("slora", memory=10_000_000)
VLLM = Plan("vllm", memory=10_000_000)


def write(
    hub: Path,
    name: str,
    rank: int,
    *,
    modules: Sequence[str] = QKVO,
    layers: int = LAYERS,
    hidden: int = HIDDEN,
    grouped: int | None = None,
    decay: float = 1.0,
    base: str = "org/base",
    ranks: dict[str, int] | None = None,
    more: dict[str, torch.Tensor] | None = None,
    **config: Any,
) -> Path:
    """A PEFT adapter; the singular values of its factors fall by about `decay`."""
    generator = torch.Generator().manual_seed(sum(name.encode()) + rank)
    tensors = dict(more or {})
    for i in range(layers):
        for module in modules:
            r = (ranks or {}).get(module.rpartition(".")[2], rank)
            outputs = grouped if grouped and module[-6] in "kv" else hidden
            stem = f"base_model.model.model.layers.{i}.{module}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(r, hidden, generator=generator)
            falling = decay ** torch.arange(r)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(outputs, r, generator=generator) * falling
    folder = hub / name
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    leaves = sorted({m.rpartition(".")[2] for m in modules})
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": leaves}
    (folder / "adapter_config.json").write_text(
        json.dumps(fields | {"base_model_name_or_path": base, "rank_pattern": ranks or {}} | config)
    )
    return folder


RANKS = {"a": 2, "b": 3, "c": 4, "d": 8, "e": 8, "f": 16}


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    for name, rank in RANKS.items():
        write(tmp_path / "hub", name, rank, decay=0.4 if name in "ef" else 1.0)
    return tmp_path / "hub"


@pytest.fixture
def mixed(hub: Path) -> Path:
    """With everything that cannot be served beside the others."""
    magnitude = {f"base_model.model.model.layers.0.{QKVO[0]}.lora_magnitude_vector": torch.ones(HIDDEN)}
    write(hub, "deep", 4, layers=LAYERS + 1)
    write(hub, "dora", 4, modules=QKVO[:1], layers=1, more=magnitude, use_dora=True)
    write(hub, "elsewhere", 4, base="org/another")
    write(hub, "grouped", 4, grouped=8)
    write(hub, "mixed-ranks", 4, ranks={"q_proj": 2})
    write(hub, "mlp", 4, modules=(*QKVO, "mlp.up_proj"))
    write(hub, "qv", 4, modules=QKVO[::2])
    write(hub, "wide", 4, hidden=24)
    write_kohya(hub / "kohya.safetensors", 0)
    (hub / "torn.safetensors").write_bytes(b"no adapter")
    return hub


def by_name(report: Any) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in report.rows()}


def catalogued(hub: Path, tmp_path: Path) -> Path:
    pytest.importorskip("pyarrow")
    from loratools.hub.cataloguing import Catalog, catalog

    catalog(hub, tmp_path / "catalog.parquet", Catalog(executor=lambda: ThreadPoolExecutor(1)))
    return tmp_path / "catalog.parquet"


def test_s_lora_counts_cells(hub: Path) -> None:
    report = plan(hub, replace(SLORA, memory=CELL * 100 + 1, reserve_tokens=12, zipf=0))
    assert report.unit_bytes == CELL
    assert report.capacity == 88
    rows = by_name(report)
    # In both buffers 4 r vectors of H numbers for each layer: 16 L r H bytes.
    assert {n: row["bytes"] for n, row in rows.items()} == {n: 16 * LAYERS * r * HIDDEN for n, r in RANKS.items()}
    assert report.host_bytes == sum(16 * LAYERS * r * HIDDEN for r in RANKS.values())
    # All alike: the small ones first. 8 + 12 + 16 + 32 cells are taken, and neither 32 nor 64 more fit.
    assert {n for n, row in rows.items() if row["resident"]} == {"a", "b", "c", "d"}
    assert (report.used, report.displaced_tokens) == (68, 68)
    static, lru = report.policies
    assert static.expected == pytest.approx(4 / 6)
    assert report.bound == pytest.approx(4 / 6 + (20 / 32) / 6)
    assert static.loads == report.requests - round(static.hit_rate * report.requests)
    assert static.evictions == 0 < lru.evictions
    assert report.settings == ("--max_total_token_num 12 --pool-size-lora 88 --swap",)


def test_vllm_pads_every_slot(hub: Path) -> None:
    numbers = LAYERS * 4 * 2 * HIDDEN  # for each rank, of all modules
    report = plan(hub, replace(VLLM, buckets=1, memory=16 * numbers * 2 * 2 + 1))
    (bucket,) = report.buckets
    assert (bucket.rank, bucket.adapters, bucket.resident) == (16, 6, 2)
    assert {row["bytes"] for row in report.rows()} == {16 * numbers * 2}
    assert bucket.bytes == 6 * 16 * numbers * 2
    assert bucket.waste == report.waste == pytest.approx(1 - sum(RANKS.values()) / (6 * 16))
    assert report.settings == ("--max-lora-rank 16 --max-loras 2 --max-cpu-loras 6",)
    for name in RANKS:  # as `check` tells for one adapter
        single = check(load(hub / name), "vllm").setting
        assert single is not None
        assert int(single.rpartition(" ")[2]) <= bucket.rank


def test_slots_hold_the_modules_that_any_adapter_has(hub: Path) -> None:
    write(hub, "mlp", 8, modules=("mlp.up_proj",))
    report = plan(hub, VLLM)
    assert report.fit == 7
    assert report.facts["numbers_per_rank"] == LAYERS * 5 * 2 * HIDDEN
    assert {b.rank for b in report.buckets} <= {1, 8, 16, 32, 64, 128, 256, 320, 512}
    write(hub, "steep", 513, modules=QKVO[:1], layers=1)
    assert by_name(plan(hub, VLLM))["steep"]["reason"].startswith("rank-at-most-512")


def test_everything_that_cannot_be_served_has_its_reason(mixed: Path) -> None:
    report = plan(mixed, SLORA)
    reasons = {n: row["reason"].partition(":")[0] for n, row in by_name(report).items() if row["action"] == "unfit"}
    assert reasons == {
        "deep": "its layers or shapes are not those of most adapters of this base",
        "dora": "no-dora",
        "elsewhere": "it is of another base model; choose with --base",
        "grouped": "square",
        "kohya.safetensors": "peft-dialect",
        "mlp": "attention-only",
        "qv": "all-projections",
        "torn.safetensors": "cannot be read",
        "wide": "its layers or shapes are not those of most adapters of this base",
    }
    assert (report.adapters, report.fit, report.mended) == (16, 7, 1)
    assert sum(u.count for u in report.unfit) == 9
    for name in ("dora", "grouped", "kohya.safetensors", "mlp", "qv"):
        assert not check(load(mixed / name), "slora").loads
    for name in (*RANKS, "elsewhere", "deep", "wide"):
        assert check(load(mixed / name), "slora").loads
    assert report.commands == (
        f"loratools hub run {mixed} OUT --step 'convert to=peft portable=true' --only mixed-ranks",
    )
    other = plan(mixed, replace(SLORA, base="*/another"))
    assert [n for n, row in by_name(other).items() if row["action"] != "unfit"] == ["elsewhere"]


@pytest.mark.parametrize("server", ["slora", "vllm"])
def test_a_catalog_tells_the_same(mixed: Path, tmp_path: Path, server: str) -> None:
    how = Plan(server, memory=30_000)
    headers, catalog = plan(mixed, how), plan(catalogued(mixed, tmp_path), how)
    assert list(catalog.rows()) == list(headers.rows())
    same = headers.to_dict() | {"source": catalog.source, "warnings": list(catalog.warnings)}
    same["commands"] = [text.replace(str(mixed), "HUB") for text in same["commands"]]
    assert catalog.to_dict() == same
    assert json.dumps(same)


def test_batches_do_not_mix_up_their_dictionaries(mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratools.hub.catalog._GROUP_ROWS", 2)
    monkeypatch.setattr("loratools.hub.catalog._BATCH_ROWS", 3)
    catalog = catalogued(mixed, tmp_path)
    assert list(plan(catalog, SLORA).rows()) == list(plan(mixed, SLORA).rows())
    how = replace(SLORA, largest_error=0.3)
    assert {n for n, row in by_name(plan(catalog, how)).items() if row["action"] == "squeeze"} >= {"e", "f"}


def dense_error(path: Path, rank: int) -> float:
    """Of all deltas at a rank, by dense decompositions."""
    lost = whole = 0.0
    for update in load(path).values():
        delta = update.delta().double().numpy()
        values = np.linalg.svd(delta, compute_uv=False)
        whole += float((delta**2).sum())
        lost += float((values[rank:] ** 2).sum())
    return float(np.sqrt(lost / whole))


@pytest.mark.parametrize("largest", [0.0, 0.05, 0.3])
def test_squeezing_to_a_lower_bucket_keeps_the_error(hub: Path, tmp_path: Path, largest: float) -> None:
    report = plan(catalogued(hub, tmp_path), replace(SLORA, largest_error=largest, buckets=3))
    rows = by_name(report)
    squeezed = {n for n, row in rows.items() if row["action"] == "squeeze"}
    assert squeezed >= ({"e", "f"} if largest == 0.3 else set())
    assert largest > 0 or not squeezed
    for name, row in rows.items():
        assert row["error"] <= largest
        if name in squeezed:
            assert row["error"] == pytest.approx(dense_error(hub / name, row["bucket"]), rel=1e-4)
            assert row["bytes"] == 16 * LAYERS * HIDDEN * row["bucket"]
        else:
            assert row["bucket"] >= RANKS[name]
            assert row["error"] == 0
            # No lower bucket would have been within the error.
            lower = [b.rank for b in report.buckets if b.rank < RANKS[name]]
            assert all(dense_error(hub / name, rank) > largest for rank in lower)
    saved = sum((RANKS[n] - rows[n]["bucket"]) * 16 * LAYERS * HIDDEN for n in squeezed)
    assert sum(b.saved_bytes for b in report.buckets) == saved
    errors = [rows[n]["error"] for n in squeezed]
    assert max((b.largest_error or 0 for b in report.buckets), default=0) == max(errors, default=0)


def test_a_log_decides_who_stays(hub: Path, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("name,count\nf,90\nb,8\nnobody,2\n")
    how = replace(SLORA, memory=CELL * 76, log=tmp_path / "log.csv", buckets=2)
    report = plan(hub, how)
    rows = by_name(report)
    assert {n for n, row in rows.items() if row["resident"]} == {"b", "f"}
    assert (report.unknown, report.unknown_names, report.elsewhere) == (0.02, ("nobody",), 0)
    assert [(row.name, row.popularity) for row in report.top] == [("f", 0.9), ("b", 0.08)]
    assert report.policies[0].expected == 1
    by_requests = plan(hub, replace(how, by_popularity=True))
    assert [b.rank for b in by_requests.buckets] == [3, 16]
    (tmp_path / "log.csv").write_text("f\nb\nf\nqq\nf\n")
    replayed = plan(hub, replace(how, memory=CELL * 64))
    assert (replayed.requests, replayed.trace, replayed.policies[0].loads) == (4, "as the log has them", 1)
    assert replayed.policies[1].evictions == 2  # f for b, and b for f
    (tmp_path / "log.csv").write_text("nobody\n")
    with pytest.raises(AdapterError, match="no request"):
        plan(hub, how)


def test_the_same_seed_gives_the_same_plan(hub: Path) -> None:
    first, again = plan(hub, SLORA), plan(hub, SLORA)
    assert first.to_dict() == again.to_dict()
    assert plan(hub, replace(SLORA, seed=1)).to_dict() != first.to_dict()


def test_the_table_has_a_row_for_each(mixed: Path, tmp_path: Path) -> None:
    write_table(plan(mixed, SLORA), tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    assert {row["action"] for row in rows} == {"keep", "pad", "unfit"}


def test_a_catalog_with_targets_that_are_not_known(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from loratools.hub.catalog import CatalogRow, write_catalog

    targets = tuple(f"model.layers.0.{m}" for m in QKVO)
    good = CatalogRow(
        "good", "done", dialect="peft", families=("lora",), rank=4, targets=targets, target_families=("lora",) * 4,
        target_rows=(16,) * 4, target_columns=(16,) * 4, target_ranks=(4,) * 4, target_reasons=("",) * 4,
        singular_values=(np.array([4, 3, 2, 1], np.float32),) * 4,
    )  # fmt: skip
    odd = replace(
        good, name="odd", targets=(*targets, "x"), target_families=("lora",) * 4 + ("",), target_ranks=(4,) * 4 + (0,),
        target_rows=(16,) * 4 + (None,), target_columns=(16,) * 4 + (None,), target_reasons=("",) * 4 + ("unknown",),
        singular_values=(*good.singular_values, None),
    )  # fmt: skip
    blind = replace(good, name="blind", singular_values=(*good.singular_values[:3], None))
    zero = replace(good, name="zero", singular_values=(np.zeros(4, np.float32),) * 4)
    prompt = CatalogRow("prompt", "done", dialect="peft", targets=("p",), target_families=("",), target_ranks=(0,),
                        target_rows=(None,), target_columns=(None,), target_reasons=("a prompt",),
                        singular_values=(None,))  # fmt: skip
    write_catalog([good, odd, blind, zero, prompt], tmp_path / "c.parquet")
    rows = by_name(plan(tmp_path / "c.parquet", replace(SLORA, largest_error=0.6)))
    assert rows["odd"]["reason"].startswith("no-other-tensors")
    assert rows["prompt"]["reason"] == "it has no targets"
    assert (rows["blind"]["action"], rows["blind"]["bucket"]) == ("keep", 4)
    # 5 of 30 of the energy beyond the second value: 0.41; 14 beyond the first: 0.68.
    assert (rows["good"]["bucket"], rows["good"]["error"]) == (2, pytest.approx((5 / 30) ** 0.5))
    assert (rows["zero"]["bucket"], rows["zero"]["error"]) == (1, 0)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("target_rows", (32,), "target_rows does not go with the targets"),
        ("target_columns", (32,) * 9, "target_columns does not go with the targets"),
        ("target_ranks", (), "target_ranks does not go with the targets"),
        ("rank", -4, "rank holds numbers below 0"),
        ("rank", 2**62, "or above"),
        ("target_rows", (2**62,) * 12, "or above"),
        ("target_columns", (-1,) * 12, "below 0"),
    ],
)
@pytest.mark.parametrize("server", ["slora", "vllm"])
def test_a_catalog_that_no_hub_has_is_an_error(
    hub: Path, tmp_path: Path, server: str, field: str, value: Any, says: str
) -> None:
    from loratools.hub.catalog import catalog_rows, write_catalog

    rows = list(catalog_rows(catalogued(hub, tmp_path)))
    assert len(rows[0].targets) == 12
    write_catalog([replace(rows[0], **{field: value}), *rows[1:]], tmp_path / "bad.parquet")
    with pytest.raises(InputError, match=says):
        plan(tmp_path / "bad.parquet", Plan(server, 10**9))


def test_memory_beyond_all_bounds_holds_all(hub: Path) -> None:
    report = plan(hub, replace(SLORA, memory=10**30))
    assert (report.resident, report.bound) == (6, pytest.approx(1))
    assert {policy.hit_rate for policy in report.policies} == {1.0}


def test_what_cannot_be_planned_is_an_error(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="hold no adapter: one of rank 2 takes"):
        plan(hub, replace(SLORA, memory=CELL * 7))
    with pytest.raises(UsageError, match="all of them reserved"):
        plan(hub, replace(SLORA, memory=CELL * 7, reserve_tokens=7))
    with pytest.raises(UsageError, match="catalog"):
        plan(hub, replace(SLORA, largest_error=0.1))
    with pytest.raises(UsageError, match="no adapter has a base"):
        plan(hub, replace(SLORA, base="none*"))
    with pytest.raises(UsageError, match="buckets"):
        plan(hub, replace(SLORA, buckets=0))
    write(tmp_path / "bare", "x", 4, modules=QKVO[:1])
    with pytest.raises(AdapterError, match=r"S-LoRA can serve none of 1 adapters.*all-projections"):
        plan(tmp_path / "bare", SLORA)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match="none of 0"):
        plan(tmp_path / "empty", SLORA)
    with pytest.raises(InputError, match="no such file"):
        plan(tmp_path / "nowhere", SLORA)
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="no catalog"):
        plan(tmp_path / "torn.parquet", SLORA)
    for wrong in (
        {"server": "sglang"}, {"largest_error": 1.0}, {"largest_error": float("nan")}, {"reserve_tokens": -1},
        {"server": "vllm", "reserve_tokens": 5}, {"requests": 0}, {"requests": 10**9},
    ):  # fmt: skip
        with pytest.raises(UsageError):
            replace(SLORA, **wrong)
