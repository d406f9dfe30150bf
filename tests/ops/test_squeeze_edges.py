"""Squeezing at its edges: NaN, zeros, unknown alpha, budgets to the byte, records, and the same bytes every time."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import loratools.ops.spectra as spectra_module
import loratools.ops.squeeze as module
from loratools._version import __version__
from loratools.adapter import Adapter
from loratools.base_weights import load_base
from loratools.errors import AdapterError, MutatedBaseError, UnchangedError, UsageError
from loratools.files import load, save
from loratools.ops.delta import delta
from loratools.ops.diff import diff
from loratools.ops.squeeze import Squeeze, squeeze, squeeze_file
from loratools.ops.truncate import truncate_file
from loratools.ranks import Budget, Energy, Limits, Policy

PREFIX = "base_model.model."
Shapes = dict[str, tuple[int, int, int]]  # target -> (out, in, rank)
SHAPES: Shapes = {f"layers.{i}.{name}": (20 + 4 * i, 30, 8) for i in range(3) for name in ("q", "v")}


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors(shapes: Shapes, dtype: torch.dtype = torch.float32) -> dict[str, tuple[Tensor, Tensor]]:
    """(down, up) by target, with spectra that fall at different speeds."""
    found = {}
    for i, (target, (m, n, r)) in enumerate(shapes.items()):
        fall = torch.arange(1, r + 1) ** -(0.2 + 0.3 * i)
        found[target] = (rand(2 * i, r, n).to(dtype), (rand(2 * i + 1, m, r) * fall).to(dtype))
    return found


def peft(folder: Path, pairs: dict[str, tuple[Tensor, Tensor]], config: dict[str, object] | None = None) -> Path:
    folder.mkdir()
    tensors = {f"{PREFIX}{t}.lora_{side}.weight": x for t, (a, b) in pairs.items() for side, x in (("A", a), ("B", b))}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    fields = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q", "v"]} | (config or {})
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def kohya(path: Path, pairs: dict[str, tuple[Tensor, Tensor]], alpha: Tensor | None, **metadata: str) -> Path:
    tensors = {}
    for target, (a, b) in pairs.items():
        name = "lora_unet_" + target.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
        if alpha is not None:
            tensors[f"{name}.alpha"] = alpha.clone()
    save_file(tensors, path, metadata)
    return path


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as opened:
        return dict(opened.metadata() or {})


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / a.double().norm())


class TestNonFinite:
    @pytest.fixture
    def broken(self, tmp_path: Path) -> Adapter:
        pairs = factors(SHAPES)
        pairs["layers.1.v"][1][3, 2] = float("nan")
        return load(peft(tmp_path / "in", pairs))

    @pytest.mark.parametrize("policy", [2, Energy(0.5), Budget(9000)], ids=repr)
    @pytest.mark.parametrize("method", ["auto", "rsvd"])
    def test_the_target_is_named(self, broken: Adapter, tmp_path: Path, policy: int | Policy, method: str) -> None:
        with pytest.raises(AdapterError, match=r"^layers\.1\.v: holds NaN or infinity.*--allow-nonfinite"):
            squeeze_file(broken, tmp_path / "out", policy, options=Squeeze(method=method))
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("policy", [2, Energy(0.5), Budget(9000)], ids=repr)
    @pytest.mark.parametrize("method", ["auto", "rsvd"])
    def test_or_carried_over(self, broken: Adapter, tmp_path: Path, policy: int | Policy, method: str) -> None:
        options = Squeeze(method=method, allow_nonfinite=True)
        saved, report = squeeze_file(broken, tmp_path / "out", policy, options=options)
        assert report.unchanged["layers.1.v"] == "holds NaN or infinity"
        before, after = broken["layers.1.v"].parameters(), load(saved.path)["layers.1.v"].parameters()
        assert all(before[s].numpy().tobytes() == after[s].numpy().tobytes() for s in before)
        assert len(report.targets) >= 4
        assert len(report.targets) + len(report.unchanged) == 6
        assert math.isfinite(report.total["relative_error"])


class TestNonFiniteBias:
    @pytest.fixture
    def broken(self, tmp_path: Path) -> Adapter:
        folder = peft(tmp_path / "in", factors(SHAPES), {"lora_bias": True})
        tensors = load_file(folder / "adapter_model.safetensors")
        for target, (m, _, _) in SHAPES.items():
            tensors[f"{PREFIX}{target}.lora_B.bias"] = rand(90, m)
        tensors[f"{PREFIX}layers.1.v.lora_B.bias"][3] = float("nan")
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        return load(folder)

    @pytest.mark.parametrize("policy", [2, Energy(0.5), Budget(9000)], ids=repr)
    @pytest.mark.parametrize("method", ["auto", "rsvd"])
    def test_the_target_is_named(self, broken: Adapter, tmp_path: Path, policy: int | Policy, method: str) -> None:
        with pytest.raises(AdapterError, match=r"^layers\.1\.v: holds NaN or infinity"):
            squeeze_file(broken, tmp_path / "out", policy, options=Squeeze(method=method))
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("policy", [2, Energy(0.5), Budget(9000)], ids=repr)
    @pytest.mark.parametrize("method", ["auto", "rsvd"])
    def test_or_carried_over(self, broken: Adapter, tmp_path: Path, policy: int | Policy, method: str) -> None:
        options = Squeeze(method=method, allow_nonfinite=True)
        report = squeeze_file(broken, tmp_path / "out", policy, options=options)[1]
        assert report.unchanged["layers.1.v"] == "holds NaN or infinity"

    def test_truncate_names_it_too(self, broken: Adapter, tmp_path: Path) -> None:
        with pytest.raises(AdapterError, match=r"^layers\.1\.v: holds NaN or infinity"):
            truncate_file(broken, tmp_path / "out", 2)
        assert not (tmp_path / "out").exists()


def test_float8_factors_are_compared_and_written_out(tmp_path: Path) -> None:
    pairs = factors(SHAPES, torch.float8_e4m3fn)
    adapter = load(peft(tmp_path / "in", pairs))
    squeezed = squeeze(adapter, 4, options=Squeeze(method="rsvd"))[0]
    report = diff(adapter, squeezed)
    assert all(row.relative_error is not None and 0 < row.relative_error < 1 for row in report.targets.values())
    a, b = pairs["layers.0.q"]
    assert error(2 * b.double() @ a.double(), dict(delta(adapter))["layers.0.q.weight"]) < 1e-6


@pytest.mark.parametrize("mode", ["fold", "keep"])
@pytest.mark.parametrize("side", [0, 1])
def test_zero_updates(tmp_path: Path, side: int, mode: module.ScaleMode) -> None:
    pairs = factors(SHAPES)
    pairs["layers.0.q"][side].zero_()
    saved, report = squeeze_file(load(peft(tmp_path / "in", pairs)), tmp_path / "out", 3, options=Squeeze(scale=mode))
    change = report.targets["layers.0.q"]
    assert (change.relative_error, change.energy_kept, change.rank_after) == (0.0, 1.0, 3)
    assert not load(saved.path)["layers.0.q"].delta().any()
    assert all(bool(torch.isfinite(t).all()) for t in load_file(saved.weights).values())
    assert any("zero updates" in w and "layers.0.q" in w for w in report.warnings)


@pytest.mark.parametrize("mode", ["fold", "keep"])
def test_an_alpha_of_zero_is_a_zero_update(tmp_path: Path, mode: module.ScaleMode) -> None:
    source = peft(tmp_path / "in", factors(SHAPES), {"lora_alpha": 0})
    saved, _ = squeeze_file(load(source), tmp_path / "out", 3, options=Squeeze(scale=mode))
    assert not any(update.delta().any() for update in load(saved.path).values())


@pytest.mark.parametrize("mode", ["fold", "keep"])
@pytest.mark.parametrize("shapes", [SHAPES, {"layers.0.q": (5, 30, 16)}], ids=["usual", "more ranks than rows"])
@pytest.mark.parametrize("alpha", [1.0, 16.0, 12.5])
def test_whatever_alpha_is_a_lone_weights_file_stays_right(
    tmp_path: Path, alpha: float, shapes: Shapes, mode: module.ScaleMode
) -> None:
    """Its readers divide alpha by the rank that they find, so the factors must make up for the new rank."""
    source = peft(tmp_path / "in", factors(shapes))
    (source / "adapter_config.json").unlink()
    adapter = load(source)
    assert any("alpha is unknown" in w for w in adapter.warnings)
    rank = 12 if len(shapes) == 1 else 3
    saved, _ = squeeze_file(adapter, tmp_path / "out.safetensors", rank, options=Squeeze(scale=mode))
    before, after = load_file(source / "adapter_model.safetensors"), load_file(saved.weights)
    for target in shapes:
        deltas = []
        for tensors in (before, after):
            a, b = (tensors[f"{PREFIX}{target}.lora_{side}.weight"].double() for side in "AB")
            deltas.append((alpha / len(a) * b @ a).numpy())
        s = np.linalg.svd(deltas[0], compute_uv=False)
        assert np.linalg.norm(deltas[0] - deltas[1]) <= 1.0001 * np.linalg.norm(s[rank:]) + 1e-6 * s[0]


@pytest.mark.parametrize("mode", ["fold", "keep"])
def test_more_ranks_than_the_matrix_has(tmp_path: Path, mode: module.ScaleMode) -> None:
    """Rank 16 on five rows: what is asked for beyond five is not invented, and nothing is lost."""
    for name, source in (
        ("peft", peft(tmp_path / "in", factors({"layers.0.q": (5, 30, 16)}), {"r": 16})),
        ("kohya", kohya(tmp_path / "in.safetensors", factors({"layers.0.q": (5, 30, 16)}), torch.tensor(7))),
    ):
        adapter = load(source)
        saved, report = squeeze_file(adapter, tmp_path / f"out_{name}.{'' if name == 'peft' else 'safetensors'}", 12)
        (target,) = adapter
        assert report.targets[target].rank_after == load(saved.path).entries[target].rank == 5
        assert error(adapter[target].delta(), load(saved.path)[target].delta()) < 1e-6


@pytest.mark.parametrize("policy", [3, Energy(0.7), Budget(5000)], ids=repr)
@pytest.mark.parametrize("dialect", ["peft", "kohya"])
def test_in_memory_and_streamed_are_the_same_bits(tmp_path: Path, dialect: str, policy: int | Policy) -> None:
    pairs = factors(SHAPES, torch.bfloat16)
    path = tmp_path / "in.safetensors"
    adapter = load(peft(tmp_path / "in", pairs) if dialect == "peft" else kohya(path, pairs, torch.tensor(4.0)))
    memory, memory_report = squeeze(adapter, policy)
    saved, report = squeeze_file(
        adapter, tmp_path / "streamed" / "x.safetensors" if dialect == "kohya" else tmp_path / "b", policy
    )
    again = save(memory, tmp_path / "saved" / "x.safetensors" if dialect == "kohya" else tmp_path / "c")
    first, second = load_file(saved.weights), load_file(again.weights)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) and first[k].dtype == second[k].dtype for k in first)
    assert metadata_of(saved.weights) == metadata_of(again.weights)
    assert load(saved.path).config == load(again.path).config
    assert (report.targets, report.unchanged) == (memory_report.targets, memory_report.unchanged)


@pytest.mark.parametrize("policy", [3, Energy(0.7), Budget(9000)], ids=repr)
def test_the_same_bytes_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: int | Policy) -> None:
    """Whatever the number of workers and of torch's threads."""
    source = kohya(tmp_path / "in.safetensors", factors(SHAPES), torch.tensor(4.0), ss_network_dim="8")
    threads, digests = torch.get_num_threads(), set()
    try:
        for i, (workers, count) in enumerate([(1, 1), (1, 1), (3, 1), (1, 2), (4, 2)]):
            torch.set_num_threads(count)
            for place in (module, spectra_module):
                monkeypatch.setattr(place, "worker_count", lambda device, workers=workers: workers)
            saved, _ = squeeze_file(load(source), tmp_path / f"{i}.safetensors", policy)
            digests.add(hashlib.sha256(saved.weights.read_bytes()).hexdigest())
    finally:
        torch.set_num_threads(threads)
    assert len(digests) == 1


ALPHAS = {
    "none": None,
    "int64": torch.tensor(3),
    "float32": torch.tensor(3.0),
    "float16": torch.tensor(3.1, dtype=torch.float16),  # kept at rank 3 it needs float32, and two bytes more
    "bfloat16": torch.tensor(3.1, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("mode", ["fold", "keep"])
@pytest.mark.parametrize("alpha", [*ALPHAS, "peft"])
def test_a_budget_is_never_exceeded(tmp_path: Path, alpha: str, mode: module.ScaleMode) -> None:
    """By the whole file, header and scalars included, at every size; and little of it is wasted."""
    pairs = factors({f"b.{i}": (3, 4, 8) for i in range(24)}, torch.float16)  # a rank costs 14 bytes
    if alpha == "peft":
        source = peft(tmp_path / "in", pairs)
    else:
        source = kohya(tmp_path / "in.safetensors", pairs, ALPHAS[alpha], ss_network_dim="8", ss_network_alpha="3")
    adapter, suffix = load(source), "" if alpha == "peft" else ".safetensors"
    with pytest.raises(UsageError, match=r"a budget of 500 bytes is too small: .* need \d{4} bytes"):
        squeeze(adapter, Budget(500))
    smallest = squeeze_file(adapter, tmp_path / f"least{suffix}", 1)[0].nbytes
    tried = 0
    for budget in range(smallest - 20, smallest + 760, 26):
        try:
            saved, report = squeeze_file(
                adapter, tmp_path / f"{budget}{suffix}", Budget(budget), options=Squeeze(scale=mode)
            )
        except (UsageError, UnchangedError):
            continue
        tried += 1
        assert saved.weights.stat().st_size == saved.nbytes == report.total["bytes_after"]
        assert saved.nbytes <= budget
        full = all(e.rank == 3 for e in load(saved.path).entries.values())
        assert full or saved.nbytes > budget - 250  # 24 alphas may shrink from int64 to float32
    assert tried > 20


def test_a_budget_holds_for_ranks_that_come_in_steps(samples: Callable[[str], Path], tmp_path: Path) -> None:
    """A grouped convolution of rank 2 cannot go below its two groups: a budget that buys one rank is too small."""
    adapter, tried = load(samples("peft/lora_conv_grouped")), 0
    for budget in range(800, 2200, 20):
        try:
            saved, _ = squeeze_file(adapter, tmp_path / str(budget), Budget(budget))
        except (UsageError, UnchangedError):
            continue
        tried += 1
        assert saved.nbytes <= budget
        assert load(saved.path).entries["gconv"].rank == 2
    assert tried > 10


def test_the_record_and_the_metadata(tmp_path: Path) -> None:
    hashes = {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8, "modelspec.hash_sha256": "0x0"}
    kept = {"ss_network_module": "networks.lora", "ss_tag_frequency": '{"a": 1}'}
    pairs = factors(SHAPES)
    source = kohya(
        tmp_path / "in.safetensors",
        pairs,
        torch.tensor(4.0),
        ss_network_dim="8",
        ss_network_alpha="4",
        **hashes,
        **kept,
    )
    for policy, dim in ((3, "3"), (Energy(0.7), "Dynamic")):
        saved, _ = squeeze_file(load(source), tmp_path / "out.safetensors", policy, force=True)
        found = metadata_of(saved.weights)
        record = json.loads(found.pop("loratools"))
        assert found == kept | {"ss_network_dim": dim, "ss_network_alpha": dim}  # folded: alpha is the rank
        assert record["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
        assert (record["version"], record["verb"]) == (__version__, "squeeze")
        assert record["arguments"]["scale"] == "fold"
        assert str(tmp_path) not in json.dumps(record)
    saved, _ = squeeze_file(load(source), tmp_path / "kept.safetensors", 2, options=Squeeze(scale="keep"))
    assert metadata_of(saved.weights)["ss_network_alpha"] == "1"  # 4 / 8 * 2
    saved, _ = squeeze_file(load(peft(tmp_path / "peft", pairs)), tmp_path / "b", 2, limits=Limits(multiple_of=4))
    found = metadata_of(saved.weights)
    assert found["format"] == "pt"
    assert "multiple_of=4" in json.loads(found["loratools"])["arguments"]["limits"]


@pytest.mark.parametrize("method", ["auto", "exact", "rsvd"])
def test_methods(tmp_path: Path, method: str) -> None:
    """All three find the same; the record says which was asked for."""
    adapter = load(kohya(tmp_path / "in.safetensors", factors(SHAPES), torch.tensor(4.0)))
    saved, report = squeeze_file(adapter, tmp_path / "out.safetensors", 4, options=Squeeze(method=method))
    best, wanted = squeeze(adapter, 4, options=Squeeze(method="exact"))
    for target, change in report.targets.items():
        assert change.relative_error == pytest.approx(wanted.targets[target].relative_error, rel=1e-3)
        assert change.energy_kept == pytest.approx(wanted.targets[target].energy_kept, rel=1e-3)
        assert error(best[target].delta(), load(saved.path)[target].delta()) < 0.02
    assert json.loads(metadata_of(saved.weights)["loratools"])["arguments"]["method"] == method


def test_overflowing_float16_is_refused(tmp_path: Path) -> None:
    pairs = {"layers.0.q": (rand(0, 8, 30).mul(1e4).half(), rand(1, 20, 8).mul(1e4).half())}
    scaled = kohya(tmp_path / "in.safetensors", pairs, torch.tensor(8e3))
    with pytest.raises(AdapterError, match=r"lora_unet_layers_0_q: .*overflows float16"):
        squeeze(load(scaled), 2)


def test_a_tucker_core_that_keeps_its_rank_stays_within_the_budget(tmp_path: Path) -> None:
    r, stem = 40, "lora_unet_a."
    shapes = {"lora_down": (r, 40, 1, 1), "lora_mid": (r, r, 3, 3), "lora_up": (40, r, 1, 1)}
    tensors = {f"{stem}{name}.weight": rand(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    save_file(tensors | {f"{stem}alpha": torch.tensor(40.0)}, tmp_path / "in.safetensors")
    adapter = load(tmp_path / "in.safetensors")
    assert adapter.nbytes > 70_000
    saved, report = squeeze_file(adapter, tmp_path / "out.safetensors", Budget(66_000))
    assert report.targets["lora_unet_a"].rank_after == r
    assert saved.weights.stat().st_size <= 66_000
    assert error(adapter["lora_unet_a"].delta(), load(saved.path)["lora_unet_a"].delta()) < 1e-6


@pytest.mark.parametrize(("maximum", "rank"), [(11, 8), (6, 4), (3, 4)])
def test_groups_round_up_but_not_above_the_maximum(tmp_path: Path, maximum: int, rank: int) -> None:
    stem = "lora_unet_a."
    tensors = {f"{stem}lora_down.weight": rand(0, 20, 8, 3, 3), f"{stem}lora_up.weight": rand(1, 40, 5, 1, 1)}
    save_file(tensors, tmp_path / "in.safetensors")  # 4 groups, so steps of 4
    report = squeeze(load(tmp_path / "in.safetensors"), Energy(0.9), limits=Limits(maximum=maximum))[1]
    assert report.targets["lora_unet_a"].rank_after == rank


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16])
def test_factors_that_overflow_when_a_scale_is_folded_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    pairs = {t: ((a * 20).to(dtype), (b * 20).to(dtype)) for t, (a, b) in factors(SHAPES).items()}
    adapter = load(peft(tmp_path / "in", pairs, {"lora_alpha": 8e10}))
    with pytest.raises(AdapterError, match=r"^layers\.0\.q: a factor overflows float"):
        squeeze_file(adapter, tmp_path / "out", 4)
    assert not (tmp_path / "out").exists()
    squeeze(adapter, 4, options=Squeeze(scale="keep"))


MUTATING = ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"]


@pytest.mark.parametrize("init", MUTATING)
def test_factors_relative_to_another_base_are_refused(tmp_path: Path, init: str) -> None:
    """Such a loader takes the first factors out of the base again, and those of a lower rank are others."""
    adapter = load(peft(tmp_path / "in", factors(SHAPES), {"init_lora_weights": init}))
    assert any(init in warning for warning in adapter.warnings)
    with pytest.raises(MutatedBaseError, match=f"init_lora_weights='{init}'.*--initial-adapter"):
        squeeze_file(adapter, tmp_path / "out", 2)
    with pytest.raises(MutatedBaseError, match="--initial-adapter"):
        truncate_file(adapter, tmp_path / "out", 2, nested="keep")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank", [True, 2.5, "8", None])
def test_a_rank_is_a_whole_number_or_a_policy(tmp_path: Path, rank: object) -> None:
    adapter = load(peft(tmp_path / "in", factors(SHAPES)))
    with pytest.raises(UsageError, match="a rank is a whole number or a policy"):
        squeeze(adapter, rank)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_base_is_named(tmp_path: Path, value: float) -> None:
    shapes: Shapes = {"layers.0.q": (12, 10, 8)}
    folder = peft(tmp_path / "in", factors(shapes), {"use_dora": True})
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[f"{PREFIX}layers.0.q.lora_magnitude_vector"] = rand(5, 12).abs()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    weight = rand(6, 12, 10)
    weight[3, 4] = value
    save_file({"layers.0.q.weight": weight}, tmp_path / "base.safetensors")
    with pytest.raises(AdapterError, match=r"base\.safetensors: layers\.0\.q\.weight holds NaN or infinity"):
        squeeze_file(load(folder), tmp_path / "out", 2, options=Squeeze(base=load_base(tmp_path / "base.safetensors")))
    assert not (tmp_path / "out").exists()


def test_experts_in_a_lone_file_are_not_taken_for_one_matrix(samples: Callable[[str], Path], tmp_path: Path) -> None:
    """Without target_parameters nobody knows how many experts share the rows."""
    lone = tmp_path / "lone.safetensors"
    lone.write_bytes((samples("peft/moe_target_parameters") / "adapter_model.safetensors").read_bytes())
    with pytest.raises(AdapterError, match=r"experts.*adapter_config\.json"):
        squeeze_file(load(lone, alpha=4), tmp_path / "out.safetensors", 1)
    assert not (tmp_path / "out.safetensors").exists()
