"""Quantising, judged from the files: what is read again against naive formulas, sizes against the disk."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_samples import DECODED, FOLDER, HINTS, open_sample

import loratools
from loratools.errors import AdapterError, OutputError, UsageError
from loratools.operators import LowRank
from loratools.ops.coders import Banded, Plain, balanced, delta_come, loraquant
from loratools.ops.components import ComponentStore, grid_part
from loratools.ops.gridding import MEASURED, components_of, dense_on_grid, on_grid, weighted_components_of
from loratools.ops.quantize import Quantize, dtype_before, quantize, quantize_file
from loratools.ops.steps import gaussian_bits
from loratools.quant.gauges import hadamard, learned, rotation

METHODS = [
    Quantize("grid", 5),
    Quantize("rtn", 8),
    Quantize("sign", 1, scales="component"),
    Quantize("lloyd", 3, rounds=2),
    Quantize("nf", 4),
    Quantize("petl", 2),
    Quantize("balanced", 4),
    Quantize("loraquant", 2),
    Quantize("delta-come", 2),
]
each_method = pytest.mark.parametrize("options", METHODS, ids=[o.method for o in METHODS])
TARGETS = {f"model.layers.{i}.self_attn.{m}": (48, 40) for i in range(2) for m in ("q_proj", "v_proj")}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product(m: int = 60, n: int = 50, r: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of a delta with a falling spectrum, in an arbitrary gauge."""
    left = torch.linalg.qr(noise(m, r, seed=seed).double()).Q * torch.logspace(0, -1.5, r, dtype=torch.float64)
    right = torch.linalg.qr(noise(n, r, seed=seed + 1).double()).Q.T
    mix = noise(r, r, seed=seed + 2).double()
    return left @ mix, torch.linalg.solve(mix, right)


def peft(folder: Path, *, rank: int = 8, alpha: float = 16, size: int = 1, dtype: torch.dtype = torch.float32) -> Path:
    tensors = {}
    for i, (target, (m, n)) in enumerate(TARGETS.items()):
        up, down = product(m * size, n * size, rank, seed=10 * i)
        tensors[f"base_model.model.{target}.lora_A.weight"] = down.to(dtype).contiguous()
        tensors[f"base_model.model.{target}.lora_B.weight"] = up.to(dtype).contiguous()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("dialect", ["peft", "kohya", "mlx"])
def test_what_lies_on_a_grid_is_packed_without_loss(tmp_path: Path, dialect: str) -> None:
    first, _ = quantize_file(
        loratools.load(peft(tmp_path / "in", size=3)), tmp_path / "a.safetensors", Quantize(bits=3)
    )
    once = loratools.convert(loratools.load(first.path), dialect)[0]
    again, report = quantize_file(once, tmp_path / "b.safetensors", Quantize("exact"))
    twice = loratools.load(again.path)
    assert report.total["relative_error"] < 1e-7
    assert again.nbytes < 1.2 * first.nbytes  # names and config of another dialect are longer
    for target, update in once.items():
        for slot, tensor in update.parameters().items():
            torch.testing.assert_close(twice[target].parameters()[slot], tensor, rtol=2e-6, atol=0)


def test_what_lies_on_no_grid_is_not_packed_exactly(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"q_proj: a factor lies on no grid \(row 0 .* saved in float32"):
        quantize(loratools.load(peft(tmp_path / "in")), Quantize("exact"))


def deltas(adapter: Any) -> dict[str, torch.Tensor]:
    return {target: update.delta().double() for target, update in adapter.items()}


def relative(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert set(a) == set(b)
    return math.sqrt(
        sum(float((a[t] - b[t]).square().sum()) for t in a) / sum(float(x.square().sum()) for x in a.values())
    )


@each_method
def test_the_report_tells_what_is_read_again(options: Quantize, tmp_path: Path) -> None:
    source = loratools.load(peft(tmp_path / "in"))
    saved, report = quantize_file(source, tmp_path / "out", options)
    assert saved.path == tmp_path / "out.safetensors"
    assert report.total["bytes_after"] == saved.nbytes == saved.path.stat().st_size
    again = loratools.load(saved.path)
    assert again.origin is not None
    assert again.origin.container == "packed"
    truth, found = deltas(source), deltas(again)
    assert relative(truth, found) == pytest.approx(report.total["relative_error"], rel=1e-4, abs=1e-7)
    for target, coded in report.targets.items():
        one = float((truth[target] - found[target]).norm() / truth[target].norm())
        assert coded.relative_error == pytest.approx(one, rel=1e-4, abs=1e-7)
        assert coded.rank_after == again.entries[target].rank
    in_memory, same = quantize(source, options)
    assert relative(found, deltas(in_memory)) < 1e-6
    assert same.total == report.total


@each_method
def test_the_same_input_makes_the_same_bytes(options: Quantize, tmp_path: Path) -> None:
    source = loratools.load(peft(tmp_path / "in"))
    for name in ("a", "b"):
        quantize_file(source, tmp_path / name, options)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("name", [name for name in DECODED if name not in HINTS])
@pytest.mark.parametrize("options", [Quantize("grid", 8), Quantize("rtn", 8, group=16)], ids=["grid", "rtn"])
def test_files_of_the_real_libraries(name: str, options: Quantize, tmp_path: Path) -> None:
    """All keys are there again in the shapes that they had, and 8 bits lose little of any tensor."""
    adapter = open_sample(FOLDER / name)
    if not adapter.format.writable:
        with pytest.raises(OutputError, match="files are read, not written"):
            quantize_file(adapter, tmp_path / "out", options)
        return
    if adapter.format.mutated_init:
        with pytest.raises(AdapterError, match="initial"):
            quantize_file(adapter, tmp_path / "out", options)
        return
    saved, report = quantize_file(adapter, tmp_path / "out", options)
    again = loratools.load(saved.path)
    assert {*report.targets, *report.unchanged} == {*adapter.entries, *adapter.unsupported}
    assert list(again.entries) == list(adapter.entries)
    for key, extra in adapter.extras.items():
        assert torch.equal(again.extras[key].read(), extra.read()), key
    for target, update in adapter.items():
        before, after = update.parameters(), again[target].parameters()
        assert again[target].family == update.family
        if options.method == "rtn":
            assert {s: t.shape for s, t in before.items()} == {s: t.shape for s, t in after.items()}
            for slot, tensor in before.items():
                if tensor.is_floating_point() and tensor.numel():
                    distance = (after[slot].double() - tensor.double()).norm()
                    assert distance <= 0.01 * tensor.double().norm(), (target, slot)
    bound = 0.1 if options.method == "grid" else 0.02  # of so few numbers, tables of codes take a large share
    error = report.total["relative_error"]
    assert error is None or error < bound  # None: every delta that was coded needs the base
    for coded in report.targets.values():
        assert coded.rank_after <= max(coded.rank_before, 1)


@pytest.mark.parametrize("share", [0.3, 0.15, 0.08])
def test_a_budget_is_kept_and_used(share: float, tmp_path: Path) -> None:
    source = loratools.load(peft(tmp_path / "in", rank=16, size=8))
    assert source.origin is not None
    budget = int(source.origin.nbytes * share)
    saved, _ = quantize_file(source, tmp_path / "out", Quantize(budget=budget))
    assert 0.93 * budget <= saved.nbytes <= budget


def test_more_bytes_never_err_more(tmp_path: Path) -> None:
    source = loratools.load(peft(tmp_path / "in"))
    errors = [quantize(source, Quantize(bits=b))[1].total["relative_error"] for b in (2, 3, 4, 6, 8, 12)]
    assert errors == sorted(errors, reverse=True)  # type: ignore[type-var]


def test_a_budget_that_nothing_fits_says_what_remains(tmp_path: Path) -> None:
    source = loratools.load(peft(tmp_path / "in"))
    with pytest.raises(
        UsageError, match=r"a budget of 100 bytes is too small: \d+ bytes .* remain where nothing is left"
    ):
        quantize_file(source, tmp_path / "out", Quantize(budget=100))
    assert not (tmp_path / "out.safetensors").exists()


def test_a_budget_that_holds_everything_keeps_it(tmp_path: Path) -> None:
    source = loratools.load(peft(tmp_path / "in"))
    saved, report = quantize_file(source, tmp_path / "out", Quantize(budget=10_000_000))
    assert report.total["relative_error"] < 1e-3  # type: ignore[operator]
    assert saved.nbytes < 10_000_000


def test_the_grid_beats_every_other_way_at_its_bytes(tmp_path: Path) -> None:
    source = loratools.load(peft(tmp_path / "in", rank=16, size=8))
    for options in METHODS[1:]:
        report = quantize(source, options)[1].total
        ours = quantize(source, Quantize(budget=int(report["bytes_after"] or 0)))[1].total
        assert ours["relative_error"] < report["relative_error"], options.method  # type: ignore[operator]


def test_what_was_quantised_is_an_ordinary_adapter_again(tmp_path: Path) -> None:
    source = loratools.load(peft(tmp_path / "in", dtype=torch.bfloat16))
    saved, _ = quantize_file(source, tmp_path / "out", Quantize(bits=6))
    packed = loratools.load(saved.path)
    assert dtype_before(packed) == "bf16"
    assert packed.config is not None
    assert packed.config["peft_type"] == "LORA"
    back, _ = loratools.convert_file(packed, tmp_path / "back", "peft", loratools.Convert(dtype="f32"))
    assert relative(deltas(packed), deltas(loratools.load(back.path))) < 1e-6


def test_a_packed_adapter_is_an_input_like_any_other(tmp_path: Path) -> None:
    source = loratools.load(peft(tmp_path / "in"))
    packed = loratools.load(quantize_file(source, tmp_path / "out", Quantize(bits=6))[0].path)
    assert loratools.info(packed).codings == {"grid": 8}
    assert loratools.inspect(packed).to_dict()
    squeezed = loratools.squeeze_file(packed, tmp_path / "less", 2)[0]
    assert {e.rank for e in loratools.load(squeezed.path).entries.values()} == {2}
    twice = loratools.load(quantize_file(packed, tmp_path / "twice", Quantize("rtn", 8))[0].path)
    assert relative(deltas(packed), deltas(twice)) < 0.02


def test_existing_files_are_kept_without_force(tmp_path: Path) -> None:
    source = loratools.load(peft(tmp_path / "in"))
    (tmp_path / "out.safetensors").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        quantize_file(source, tmp_path / "out", Quantize())
    assert (tmp_path / "out.safetensors").read_text() == "mine"
    quantize_file(source, tmp_path / "out", Quantize(), force=True)


@each_method
def test_nan_names_its_target_and_leaves_nothing(options: Quantize, tmp_path: Path) -> None:
    folder = peft(tmp_path / "in")
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"][3, 4] = math.nan
    save_file(tensors, folder / "adapter_model.safetensors")
    source = loratools.load(folder)
    with pytest.raises(AdapterError, match=r"layers\.1\.self_attn\.q_proj: holds NaN"):
        quantize_file(source, tmp_path / "out", options)
    assert not list(tmp_path.glob("*out*"))
    from dataclasses import replace

    saved, report = quantize_file(source, tmp_path / "out", replace(options, allow_nonfinite=True))
    assert report.unchanged == {"model.layers.1.self_attn.q_proj": "holds NaN or infinity"}
    assert loratools.load(saved.path)["model.layers.1.self_attn.q_proj"].parameters()["down"].isnan().sum() == 1


@each_method
def test_updates_of_zero_stay_zero(options: Quantize, tmp_path: Path) -> None:
    folder = peft(tmp_path / "in")
    tensors = {k: t * ("lora_A" in k) for k, t in load_file(folder / "adapter_model.safetensors").items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    saved, report = quantize_file(loratools.load(folder), tmp_path / "out", options)
    assert report.total["relative_error"] == 0.0
    assert not any(delta.any() for delta in deltas(loratools.load(saved.path)).values())


@pytest.mark.parametrize("size", [1e-20, 1e15])
def test_sizes_far_from_one_keep_their_error(size: float, tmp_path: Path) -> None:
    folder = peft(tmp_path / "in")
    usual = quantize(loratools.load(folder), Quantize(bits=6))[1].total["relative_error"]
    tensors = {
        k: t * (size if "lora_B" in k else 1) for k, t in load_file(folder / "adapter_model.safetensors").items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    found = quantize_file(loratools.load(folder), tmp_path / "out", Quantize(bits=6))[1].total["relative_error"]
    assert found == pytest.approx(usual, rel=0.3)


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 0},
        {"bits": 17},
        {"method": "sign", "bits": 2},
        {"method": "nf", "bits": 1},
        {"method": "lloyd", "bits": 8},
        {"method": "rtn", "bits": 5},
        {"method": "rtn", "bits": 2.5},
        {"method": "rtn", "bits": 2, "group": 0},
        {"method": "rtn", "bits": 2, "rounds": 9},
        {"method": "rtn", "budget": 100},
        {"method": "balanced", "bits": 5},
        {"budget": 0},
        {"method": "balanced", "bits": 2, "sweeps": -1},
        {"method": "balanced", "bits": 2, "seed": 2**70},
        {"method": "loraquant", "bits": 2, "energy": math.nan},
        {"method": "loraquant", "bits": 2, "energy": 7},
    ],
)
def test_choices_that_do_not_go_together_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Quantize(**fields)


# What a coder does to one product of factors


def values(pair: tuple[Any, Any]) -> torch.Tensor:
    return pair[0].decode().double() @ pair[1].decode().double()


@pytest.mark.parametrize("step", [1e-4, 0.02, 0.1])
def test_the_grid_errs_by_its_step(step: float) -> None:
    left, right = product()
    c = components_of(LowRank(left, right))
    u, s, vt = torch.linalg.svd(left @ right)
    kept = len(c.s)
    assert torch.allclose(c.s, s[:kept], atol=1e-9)
    error = (values(on_grid(c, step)) - left @ right).norm()
    x, y = u[:, :kept] * s[:kept], s[:kept, None] * vt[:kept]
    floor = lambda t: torch.sign(t) * torch.floor(t.abs() / step + 0.35) * step  # noqa: E731
    naive = floor(x) @ torch.diag(1 / s[:kept]) @ floor(y)
    assert error <= (naive - left @ right).norm() * 1.001


def test_the_grid_does_not_depend_on_the_gauge() -> None:
    left, right = product()
    spin = torch.linalg.qr(noise(12, 12, seed=9).double()).Q
    one, two = (
        values(on_grid(components_of(LowRank(a, b)), 0.05)) for a, b in ((left, right), (left @ spin, spin.T @ right))
    )
    assert torch.allclose(one, two, atol=1e-6)


@pytest.mark.parametrize("step", [1e-7, 1e-3, 0.05, 10.0])
def test_a_trial_takes_the_bytes_that_the_codes_will_take(step: float) -> None:
    c = components_of(LowRank(*product()))
    for one, two in zip(on_grid(c, step, trial=True), on_grid(c, step), strict=True):
        assert torch.equal(one.parts.codes, two.parts.codes)  # type: ignore[union-attr]
        assert one.parts.scales.dtype == two.parts.scales.dtype  # type: ignore[union-attr]
        assert one.shape == two.shape


def test_inputs_as_they_were_met_are_blended_with_even_ones() -> None:
    left, right = product()
    x = noise(400, 50, seed=3).double() * torch.logspace(1, -3, 50, dtype=torch.float64)
    second = x.T @ x / len(x)
    channels = second.diagonal()
    c = weighted_components_of(LowRank(left, right), right @ second @ right.T, channels)
    blend = MEASURED * second / channels.mean() + (1 - MEASURED) * torch.eye(50, dtype=torch.float64)
    truth = torch.linalg.svdvals(left @ right @ torch.linalg.cholesky(blend))[: len(c.s)]
    assert torch.allclose(c.s, truth, rtol=1e-8)
    assert torch.allclose((c.x / c.s) @ c.y, left @ right, atol=1e-9)
    assert c.channels is not None
    assert torch.allclose(c.channels, blend.diagonal())
    assert float(c.y.abs().max()) < 100 * float(components_of(LowRank(left, right)).y.abs().max())


def test_components_are_the_same_whether_they_were_kept_or_not(tmp_path: Path) -> None:
    adapter = loratools.load(peft(tmp_path / "in"))
    kept, forgetful = ComponentStore(adapter, None), ComponentStore(adapter, None, limit=0)
    assert list(kept.spreads()) == list(forgetful.spreads())
    for target, update in adapter.items():
        part = grid_part(adapter, target, update)
        assert part is not None
        first = kept.of(target, update, part)
        assert kept.of(target, update, part) is first
        again = forgetful.of(target, update, part)
        assert again is not forgetful.of(target, update, part)
        assert torch.equal(first.x, again.x)
        assert torch.equal(first.y, again.y)
        delta = (first.x.double() / first.s) @ first.y.double() * kept.scale(target, update)
        assert torch.allclose(delta, update.delta().double(), atol=1e-5)


def test_a_dense_delta_goes_on_the_grid_row_by_row() -> None:
    x = noise(20, 300)
    codes = dense_on_grid(x, 0.5)
    assert float((codes.decode() - x).norm() / x.norm()) < 0.5 / math.sqrt(12) * 1.2


def test_loraquant_keeps_the_energy_that_it_is_asked_for() -> None:
    squares = [0.5, 0.3, 0.15, 0.05]
    found = loraquant([math.sqrt(s) for s in squares], high_bits=2, energy=0.8)
    assert found.bands[0][0] == 2  # its own code takes one fewer, and keeps 0.5
    assert loraquant([1.0] * 4, high_bits=2, energy=1.0).bands[0][0] == 4


def test_delta_come_spends_its_bits() -> None:
    bands = delta_come(64, bits=2).bands
    heights = [count for count, _, _ in bands[:3]]
    spent = sum(c[0].bits * n for (_, c, _), n in zip(bands[:3], heights, strict=True) if n)
    assert 1.7 * 64 <= spent <= 2.3 * 64


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_turning_and_least_squares_lower_the_error(bits: int) -> None:
    left, right = product(128, 96, 16)
    exact = left @ right

    def error(coder: Banded) -> float:
        return float((values(coder.pair(left, right)) - exact).norm() / exact.norm())

    settled = error(balanced(bits, group=64, gauge="svd", sweeps=2))
    assert settled <= error(balanced(bits, group=64, gauge="svd", sweeps=0)) + 1e-12


def test_gauges_are_rotations() -> None:
    up, down = noise(40, 16).double(), noise(16, 30, seed=1).double()
    for gauge in ("svd", "hadamard", "random", "learned"):
        spin = rotation(up, down, [4, 12], gauge, 0)
        assert torch.allclose(spin @ spin.T, torch.eye(16, dtype=torch.float64), atol=1e-12)
        assert not spin[:4, 4:].any()
    assert torch.equal(hadamard(2) * math.sqrt(2), torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    x = noise(500, 8, seed=2).double()
    start = torch.linalg.qr(noise(8, 8, seed=3).double()).Q

    def lost(spin: torch.Tensor) -> float:
        turned = x @ spin
        return float((turned - turned.sign() * turned.abs().mean()).norm())

    assert lost(learned(x, start)) < lost(start)


def test_theory_of_one_bit_on_gaussian_factors() -> None:
    """Signs of both factors of an iid Gaussian product lose sqrt(1 - (2 / pi)^2) of it."""
    left, right = noise(768, 16), noise(16, 768, seed=1)
    plain = Plain("sign", 1, "tensor")
    up, down = plain.tensor(left, components_last=True).decode(), plain.tensor(right, components_last=False).decode()
    scale = float((up @ down * (left @ right)).sum() / (up @ down).square().sum())
    error = float((scale * (up @ down) - left @ right).norm() / (left @ right).norm())
    assert error == pytest.approx(math.sqrt(1 - (2 / math.pi) ** 2), abs=0.01)


@pytest.mark.parametrize("deviation", [0.2, 0.5, 1.0, 4.0, 50.0, 400.0])
def test_bits_of_gaussian_numbers_on_the_grid(deviation: float) -> None:
    x = noise(400_000) * deviation
    codes = torch.sign(x) * torch.floor(x.abs() + 0.35)
    shares = torch.unique(codes, return_counts=True)[1].double() / len(x)
    assert gaussian_bits(deviation) == pytest.approx(float(-(shares * shares.log2()).sum()), rel=0.02, abs=0.01)


def test_callers_may_ask_by_name(samples: Callable[[str], Path]) -> None:
    adapter, report = loratools.quantize(loratools.load(samples("peft/rslora")), loratools.Quantize(bits=4))
    assert len(report.targets) == len(adapter)


def test_weighing_by_inputs_lowers_the_error_of_outputs(tmp_path: Path) -> None:
    from loratools.ops.statistics import Statistics, fingerprint

    source = loratools.load(peft(tmp_path / "in", rank=16, size=8))
    moments, means, prints, inputs = {}, {}, {}, {}
    for i, (target, update) in enumerate(source.items()):
        down = update.parameters()["down"].double()
        n = down.shape[1]
        x = noise(4000, n, seed=i).double() * torch.logspace(1, -1, n, dtype=torch.float64)
        x = x @ torch.linalg.qr(noise(n, n, seed=i + 50).double()).Q
        inputs[target] = x
        moments[target], means[target] = (x @ down.T).T @ (x @ down.T) / len(x), x.square().mean(0)
        prints[target] = fingerprint(update)
    met = Statistics(moments, means, 4000, prints)
    truth = deltas(source)

    def of_outputs(options: Quantize) -> float:
        found = deltas(loratools.load(quantize_file(source, tmp_path / "out", options, force=True)[0].path))
        pairs = [((x @ (found[t] - truth[t]).T).norm() ** 2, (x @ truth[t].T).norm() ** 2) for t, x in inputs.items()]
        return math.sqrt(sum(float(a) for a, _ in pairs) / sum(float(b) for _, b in pairs))

    for budget in (9_000, 18_000):
        assert of_outputs(Quantize(budget=budget, weights=met)) < 0.99 * of_outputs(Quantize(budget=budget))
    other = loratools.load(peft(tmp_path / "other", rank=16, size=8, alpha=3))
    quantize(other, Quantize(budget=9_000, weights=met))  # the same factors: alpha does not matter
    with pytest.raises(UsageError, match="statistics are for --method grid"):
        Quantize("rtn", 4, weights=met)
    made, told = quantize(source, Quantize(budget=9_000, weights=met))
    assert told.total["weighted_error"] == pytest.approx(seen_by_inputs(source, made, inputs), rel=1e-6)
    _, written = quantize_file(source, tmp_path / "out", Quantize(budget=9_000, weights=met), force=True)
    assert written.total == told.total
    assert quantize(source, Quantize(budget=9_000))[1].total["weighted_error"] is None


def seen_by_inputs(before: Any, after: Any, inputs: dict[str, torch.Tensor]) -> float:
    """The weighted error by its definition: all of C within the rows of `down`, its diagonal outside of them."""
    squares = []
    for target, x in inputs.items():
        down = before[target].parameters()["down"].double()
        within = torch.linalg.pinv(down) @ down
        outside = torch.eye(len(within), dtype=torch.float64) - within
        c = x.T @ x / len(x)
        met = within @ c @ within + outside @ torch.diag(c.diagonal()) @ outside
        one, other = before[target].delta().double(), after[target].delta().double()
        squares.append([float((d @ met @ d.T).trace()) for d in (one - other, one)])
    return math.sqrt(sum(a for a, _ in squares) / sum(b for _, b in squares))
