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
from loratools.formats.matrix import DIALECTS, GRADES, IMAGES, MATRIX, TEXTS, grade, kinds_of
from loratools.ops.convert import Convert, convert, convert_file, writable_formats
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
    files = [p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".bin", ".pt", ".gguf")]
    (weights,) = (p for p in files if p.stem.split("-")[0] in ("lora", "adapter", "pytorch_lora_weights"))
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
    assert set(found.extras) == set(wanted.extras)


@pytest.mark.parametrize("to", DIALECTS)
@pytest.mark.parametrize("name", named())
def test_the_table_is_true(samples: Samples, tmp_path: Path, name: str, to: str) -> None:
    folder = samples(name)
    base = load_base(folder / "base_hf") if (folder / "base_hf").is_dir() else None
    adapter = opened(folder, base)
    if not adapter.entries:
        pytest.skip("no update of a weight")
    if to == adapter.format.name:
        pytest.skip("the dialect that it is in")
    options = Convert(base=base)
    elsewhere = (to in IMAGES and domain(name) != "image") or (to in TEXTS and domain(name) == "image")
    components = {p.module.component for t in adapter if (q := adapter.format.place(t)) for p in q.pieces}
    if elsewhere or (to == "peft" and len(components) > 1):
        with pytest.raises(AdapterError) as raised:
            convert(adapter, to, options)
        assert isinstance(raised.value, UnmappedModuleError | UnsupportedInTargetError | NeedsBaseError)
        return
    if to == "gguf" and base is None:
        with pytest.raises(NeedsBaseError, match="--base"):
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
    for (target, before), after in zip(adapter.items(), there.values(), strict=True):
        if held == "exact" and not before.needs_base:
            assert torch.linalg.norm(after.delta() - before.delta()) <= 1e-6 * before.delta().norm(), target


LOWERED = ["peft/loha", "peft/lokr", "peft/adalora", "peft/c3a", "peft/vera", "peft/oft", "peft/ia3", "peft/miss"]


@pytest.mark.parametrize("to", ["peft", "kohya", "mlx"])
@pytest.mark.parametrize("name", LOWERED)
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
