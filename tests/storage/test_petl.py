"""PETL-ViT's container: the bytes of a naive encoder read, and written again to the byte."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import petl_files
import pytest
import torch

from loratools.errors import AdapterError, InputError, OutputError
from loratools.petl import open_petl
from loratools.quant.petl import PetlCodes, encode
from loratools.storage.petl import METHODS, PetlModel, PetlSource, write_petl

GOLDEN = Path(__file__).resolve().parents[1] / "fixtures" / "quant"


def opened(path: Path) -> PetlSource:
    source = open_petl(path)
    assert source is not None
    return source


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_every_tensor_is_read_and_the_file_comes_back_to_the_byte(tmp_path: Path, method: str, bits: int) -> None:
    path, wanted = petl_files.write(tmp_path, method, bits=bits)
    source = opened(path)
    assert list(source.specs) == list(wanted)
    for name, tensor in wanted.items():
        found = source.read(name)
        assert source.specs[name].shape == tensor.shape
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), tensor, rtol=1e-6, atol=1e-8)
    assert source.nbytes == path.stat().st_size == source.model.file_size
    assert source.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()
    again = tmp_path / "again" / "x.bin"
    size = write_petl(again, {name: source.record(name) for name in source.specs}, source.model)
    assert again.read_bytes() == path.read_bytes()
    assert size == len(path.read_bytes())
    assert again.with_suffix(".yaml").read_text() == path.with_suffix(".yaml").read_text()
    source.close()
    with pytest.raises(InputError, match="is closed"):
        source.read("head.weight")
    with pytest.raises(KeyError):
        source.read("no such tensor")


@pytest.mark.parametrize(
    ("method", "dim", "classes", "size"),
    [
        ("lora", 32, 100, 455_440),  # of cifar-bit1-dim32.bin in the authors' repository
        ("lora-bihead", 32, 100, 48 * 3080 + 9600 + 8),
        ("adaptformer", 32, 100, 24 * 3080 + 307_600),
        ("adaptformer-bihead", 1, 100, 24 * 104 + 9608),
    ],
)
def test_sizes(method: str, dim: int, classes: int, size: int) -> None:
    assert PetlModel(method, 1, dim, classes).file_size == size


def test_tensors_are_put_in_codes(tmp_path: Path) -> None:
    model = PetlModel("lora-bihead", 2, 1, 3, 10.0, "toy", width=16, blocks=2)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape, _ in model.coded()}
    write_petl(tmp_path / "x.bin", tensors, model)
    source = PetlSource(tmp_path / "x.bin", model)
    for name, _, bits in model.coded():
        assert bits == (1 if name == "head.weight" else 2)
        assert torch.equal(source.read(name), encode(tensors[name], bits).decode())


@pytest.mark.parametrize("name", ["petl-lora-bihead-bit1-dim1", "petl-adaptformer-bit2-dim1"])
def test_golden_files_decode_for_ever(name: str) -> None:
    source = opened(GOLDEN / f"{name}.bin")
    digest = hashlib.sha256()
    for tensor in source.specs:
        digest.update(source.read(tensor).numpy().astype("<f4").tobytes())
    assert digest.hexdigest() == (GOLDEN / f"{name}.sha256").read_text().split()[0]


def test_the_yaml_is_found_where_the_authors_keep_it(tmp_path: Path) -> None:
    path, _ = petl_files.write(tmp_path / "models_bin" / "lora")
    config = tmp_path / "configs" / "lora" / path.with_suffix(".yaml").name
    config.parent.mkdir(parents=True)
    path.with_suffix(".yaml").rename(config)
    assert opened(path).model.method == "lora"
    elsewhere = config.rename(tmp_path / "other.yaml")
    with pytest.raises(
        InputError, match=r"does not say what it holds; put its YAML beside it or name it with --petl \(toy"
    ):
        open_petl(path)
    given = open_petl(path, elsewhere)
    assert given is not None
    assert given.model.dim == 2


def test_other_files_are_left_to_others(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2)}, tmp_path / "run-bit1-dim8.bin")
    torch.save({"x": torch.ones(2)}, tmp_path / "old-bit1-dim8.bin", _use_new_zipfile_serialization=False)
    for name in ("run", "old"):  # settings of a training, which may name a method as well
        (tmp_path / f"{name}-bit1-dim8.yaml").write_text("method: lora\nlr: 0.001\n")
    (tmp_path / "notes.bin").write_bytes(b"anything")
    (tmp_path / "notes.yaml").write_text("method: other\n")
    for name in ("run-bit1-dim8.bin", "old-bit1-dim8.bin", "notes.bin", "missing-bit1-dim8.bin"):
        assert open_petl(tmp_path / name) is None


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("dim: 2", "dim: 4", "and lora with bit 1, dim 4 and 3 classes has"),
        ("dim: 2\n", "", "states no dim"),
        ("dim: 2", "dim: wide", "dim is 'wide', not a whole number"),
        ("dim: 2", "dim: 2.0", "dim is '2.0', not a whole number"),
        ("dim: 2", "dim: 0", "dim is 0; give 1"),
        ("num_class: 3", "num_class: 999999999999", "classes is 999999999999"),
        ("bit: 1", "bit: 32", "with 32 the file holds the head alone"),
        ("bit: 1", "bit: 3", "bit: 3 is not one of 1, 2, 4"),
        ("scale: 0.1", "scale: 1e999", "scale is inf"),
        ("scale: 0.1", "scale: true", "scale is 'True', not a number"),
    ],
)
def test_a_wrong_description_is_refused(tmp_path: Path, old: str, new: str, problem: str) -> None:
    path, _ = petl_files.write(tmp_path)
    config = path.with_suffix(".yaml")
    config.write_text(config.read_text().replace(old, new))
    with pytest.raises(InputError, match=problem):
        open_petl(path)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_of_another_size_is_refused(tmp_path: Path, change: int) -> None:
    path, _ = petl_files.write(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"\0")
    with pytest.raises(InputError, match="is it the right YAML"):
        open_petl(path)


def test_what_is_no_adapter_of_the_model_is_not_written(tmp_path: Path) -> None:
    model = PetlModel("lora", 1, 1, 2, width=16, blocks=1)
    good = {name: torch.arange(16.0).reshape(shape) for name, shape, _ in model.coded()}
    good |= {name: torch.zeros(shape) for name, shape in model.whole().items()}
    down = "blocks.0.attn.lora_q.adapter_down.weight"
    coded = encode(good[down], 2)
    for wrong, problem in (
        ({**good, "tail.weight": torch.ones(1)}, "tail.weight: lora has no such tensor"),
        ({name: t for name, t in good.items() if name != "head.bias"}, "head.bias: is missing"),
        ({**good, down: torch.ones(2, 16)}, r"is a tensor of shape \(2, 16\), where lora has \(1, 16\)"),
        ({**good, down: coded}, r"is 2 bits of shape \(1, 16\)"),
        ({**good, down: torch.full((1, 16), torch.nan)}, f"{down}: holds NaN"),
        ({**good, "head.bias": PetlCodes(32, torch.zeros(2), 0.0, 1.0)}, "head.bias: is in codes"),
    ):
        with pytest.raises(AdapterError, match=problem):
            write_petl(tmp_path / "x.bin", wrong, model)
        assert not list(tmp_path.iterdir())
    write_petl(tmp_path / "x.bin", good, model)
    with pytest.raises(OutputError, match="exists already"):
        write_petl(tmp_path / "x.bin", good, model)
    write_petl(tmp_path / "x.bin", good, replace(model, scale=2.0), force=True)
    assert "scale: 2.0" in (tmp_path / "x.yaml").read_text()
    odd = replace(model, width=3)
    with pytest.raises(AdapterError, match="3 codes of 1 bits fill no whole bytes"):
        write_petl(tmp_path / "y.bin", {name: torch.arange(3.0).reshape(shape) for name, shape, _ in odd.coded()}, odd)


def test_methods_are_named() -> None:
    with pytest.raises(AdapterError, match="'vpt' is none of PETL-ViT's: adaptformer"):
        PetlModel("vpt", 1, 8, 2)
