"""The table of conversions, held to every sample: lossless is the identity there and back, refused names a reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loratools.adapter import Adapter
from loratools.base_weights import BaseWeights, load_base
from loratools.errors import AdapterError, NeedsBaseError, UnmappedModuleError, UnsupportedInTargetError
from loratools.files import load
from loratools.formats import writable_formats
from loratools.formats.matrix import DIALECTS, GRADES, IMAGES, MATRIX, TEXTS, grade, kinds_of
from loratools.formats.modules import Module
from loratools.ops.convert import Convert, convert, convert_file
from loratools.ops.lowering import Lowering

Samples = Callable[[str], Path]
SHARED = Path(__file__).resolve().parents[3] / "shared" / "samples"

# Names under which a sample's modules are of a language model, of an image model, or of a toy of neither.
FOLDERS = {"peft": "text", "mlx": "text", "gguf": "text", "kohya": "image", "diffusers": "image", "lycoris": "toy"}
TOYS = frozenset({"lora_conv2d", "loha_conv", "lokr_conv_effective", "lora_conv_grouped", "lora_bias_true"})
# What tells more than the rows do.
SPLITS = "lycoris/lokr_decompose_both"  # in other factors than PEFT's LoKr can have
BESIDE = {"peft/bias_lora_only", "peft/lora_embedding_saved", "peft/modules_to_save"}  # tensors beside the updates
PARTS = {"kohya/sd15_unet_te", "diffusers/sd_unet_te", "diffusers/sd_unet_te_nometa", "diffusers/sd_bin"}
PARTS |= {"kohya/sd15_linear_only", "kohya/sd15_pt_pickle", "diffusers/sd_to_kohya", "lycoris/none"}
NOT_FOUND = {"peft/unilora", "gguf/llama_q8_0"}  # indices not saved; blocks of 8 bits, which are read as float32


def named() -> list[str]:
    if not SHARED.is_dir():
        return []
    found = [f"{folder}/{case.name}" for folder in FOLDERS for case in sorted((SHARED / folder).iterdir())]
    return [name for name in found if name not in NOT_FOUND]


def opened(folder: Path, base: BaseWeights | None) -> Adapter:
    if (folder / "adapter_config.json").exists():
        return load(folder, base=base)
    beside = ("base", "reference", "sample")
    files = [p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".bin", ".pt", ".gguf")]
    weights = next(p for p in files if not p.stem.startswith(beside))
    return load(weights, base=base)


def domain(name: str) -> str:
    folder, _, case = name.partition("/")
    return "toy" if case in TOYS else FOLDERS[folder]


def rows(adapter: Adapter) -> frozenset[str]:
    entries = adapter.entries.values()
    found = {kind for e in entries for kind in kinds_of(e.family, e.specs, e.layout)}
    if max(e.scale for e in entries) > min(e.scale for e in entries) * (1 + 1e-6):
        found.add("scales that differ")
    if len({e.rank for e in entries if e.rank}) > 1:
        found.add("ranks that differ")
    return frozenset(found)


def assert_identity(found: Adapter, wanted: Adapter) -> None:
    assert type(found.format) is type(wanted.format)
    assert set(found) == set(wanted)
    for target, update in wanted.items():
        again = found[target]
        assert again.scale == update.scale
        assert found.entries[target].alpha == wanted.entries[target].alpha or update.scale == 1.0
        assert set(again.parameters()) == set(update.parameters())
        for slot, tensor in update.parameters().items():
            other = again.parameters()[slot]
            assert other.dtype == tensor.dtype
            assert torch.equal(other, tensor), (target, slot)
    assert found.config == wanted.config
    assert set(found.extras) == set(wanted.extras) - set(wanted.format.copies())


def by_module(adapter: Adapter) -> dict[Module, torch.Tensor]:
    """The delta of every module, cut from the file's deltas by the rows that the placement names."""
    found = {}
    for target, update in adapter.items():
        placement = adapter.format.place(target)
        assert placement is not None
        delta = update.delta().double()
        for piece in placement.pieces:
            found[piece.module] = delta[piece.rows.indices(delta.shape[0])]
    return found


@pytest.mark.parametrize("to", DIALECTS)
@pytest.mark.parametrize("name", named())
def test_the_table_is_true(samples: Samples, tmp_path: Path, name: str, to: str) -> None:
    folder = samples(name)
    base = load_base(folder / "base_hf") if (folder / "base_hf").is_dir() else None
    adapter = opened(folder, base)
    if not adapter.entries:
        with pytest.raises(UnsupportedInTargetError, match="nothing to convert"):
            convert(adapter, to)
        return
    options = Convert(base=base)
    families = {e.family.family for e in adapter.entries.values()}
    made = any(families <= kind.holds for kind in writable_formats()[to])
    if to == adapter.format.name and (not made or grade(rows(adapter), to) != "refused"):
        again = load(convert_file(adapter, tmp_path / "again", to, options)[0].path, base=base)
        assert_identity(again, adapter)
        return
    elsewhere = (to in IMAGES and domain(name) != "image") or (to in TEXTS and domain(name) == "image")
    components = {p.module.component for t in adapter if (q := adapter.format.place(t)) for p in q.pieces}
    if elsewhere or (to == "peft" and len(components) > 1):
        with pytest.raises(AdapterError) as raised:
            convert(adapter, to, options)
        assert isinstance(raised.value, UnmappedModuleError | UnsupportedInTargetError | NeedsBaseError)
        return
    if to == "gguf" and base is None:
        with pytest.raises((NeedsBaseError, UnsupportedInTargetError), match=r"--base|--drop bias"):
            convert(adapter, to, options)
        return
    held = grade(rows(adapter), to)
    if name in BESIDE or (name == SPLITS and to == "peft"):
        held = "refused"
    if held in ("refused", "lowered"):
        with pytest.raises(UnsupportedInTargetError):
            convert(adapter, to, options)
        return
    there = load(convert_file(adapter, tmp_path / "there", to, options)[0].path, base=base)
    assert there.format.name == to
    if held == "lossless":
        back = load(convert_file(there, tmp_path / "back", adapter.format.name, options)[0].path, base=base)
        assert_identity(back, adapter)
    if not any(e.family.needs_base for e in adapter.entries.values()):
        wanted, found = by_module(adapter), by_module(there)
        assert set(wanted) == set(found)
        for module, delta in wanted.items():
            assert torch.linalg.norm(found[module] - delta) <= 1e-6 * delta.norm(), module


LOWERED = ["peft/loha", "peft/lokr", "peft/adalora", "peft/c3a", "peft/vera", "peft/oft", "peft/ia3", "peft/miss"]


HELD = {("peft/loha", "kohya"), ("peft/lokr", "kohya")}
PLACES = [(name, to) for name in LOWERED for to in ("peft", "kohya", "mlx") if (name, to) not in HELD]


@pytest.mark.parametrize(("name", "to"), PLACES)
def test_what_is_lowered_states_its_error(samples: Samples, tmp_path: Path, name: str, to: str) -> None:
    """That of the best LoRA of the rank, for the weights of the sample."""
    base = load_base(samples(name) / "base.safetensors")
    adapter = load(samples(name), base=base)
    options = Convert(Lowering(rank=3), base=base)
    result, report = convert(adapter, to, options)
    shapes = {t: tuple(u.delta().shape) for t, u in result.items()}
    for target, row in report.targets.items():
        (source,) = row.sources
        weight = base.find(adapter.format.parameter(source), shapes[target])
        truth = adapter[source].delta(weight).double()
        error = float((result[target].delta().double() - truth).norm() / truth.norm())
        values = torch.linalg.svdvals(truth)
        best = float(values[3:].norm() / values.norm())
        assert row.relative_error == pytest.approx(error, rel=1e-3, abs=1e-6)
        assert error == pytest.approx(best, rel=1e-3, abs=1e-6)


def test_the_table_has_a_column_for_every_dialect_that_is_written() -> None:
    assert set(writable_formats()) == set(DIALECTS)
    assert all(set(row) == set(DIALECTS) and set(row.values()) <= set(GRADES) for row in MATRIX.values())
