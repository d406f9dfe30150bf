"""Pickles: tensors are read, code is not run, damage is an error."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.errors import InputError, OutputError
from loratools.storage import DTYPES, PickleSource, open_source
from loratools.storage.pickle import write_pickle

MODES = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save(path: Path, tree: object, *, zipped: bool = True, protocol: int = 2) -> None:
    torch.save(tree, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)


def example() -> dict[str, torch.Tensor]:
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    return {
        "whole": base,
        "view": base[1:, ::2],
        "transposed": base.T,
        "expanded": base[0].expand(5, 4),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 2),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }


@MODES
@pytest.mark.parametrize("nest", [None, "state_dict", "model", "module"])
def test_tensors_and_views_are_read(tmp_path: Path, zipped: bool, nest: str | None) -> None:
    path = tmp_path / "x.bin"
    tensors = OrderedDict(example())
    save(path, tensors if nest is None else {"epoch": 3, nest: tensors}, zipped=zipped)
    with open_source(path) as source:
        assert isinstance(source, PickleSource)
        assert list(source.specs) == list(tensors)
        for name, tensor in tensors.items():
            read = source.read(name)
            assert torch.equal(read, tensor.detach())
            assert read.is_contiguous()
            assert not read.requires_grad
            assert source.specs[name].shape == tuple(tensor.shape)
        assert source.metadata == {}
        assert source.skipped == (() if nest is None else ("epoch",))
        assert source.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()
        with pytest.raises(KeyError):
            source.read("no such tensor")


@MODES
def test_every_dtype_is_read_bit_for_bit(tmp_path: Path, zipped: bool) -> None:
    unknown_to_legacy = {"F8_E4M3", "F8_E5M2", "U16", "U32", "U64"}
    names = DTYPES.keys() if zipped else DTYPES.keys() - unknown_to_legacy
    tensors = {name: torch.ones(3).to(getattr(torch, DTYPES[name][0])) for name in names}
    save(tmp_path / "x.pt", tensors, zipped=zipped)
    with open_source(tmp_path / "x.pt") as source:
        for name, tensor in tensors.items():
            assert source.specs[name].dtype == name
            assert torch.equal(source.read(name).view(torch.uint8), tensor.view(torch.uint8))


@MODES
@pytest.mark.parametrize("protocol", [4, 5])
def test_a_protocol_that_the_safe_loader_lacks_is_named(tmp_path: Path, zipped: bool, protocol: int) -> None:
    save(tmp_path / "x.bin", example(), zipped=zipped, protocol=protocol)
    with pytest.raises(InputError, match=r"of a protocol above 3, .*; convert it to safetensors"):
        open_source(tmp_path / "x.bin")


def test_what_is_read_belongs_to_the_caller(tmp_path: Path) -> None:
    save(tmp_path / "x.bin", example())
    with open_source(tmp_path / "x.bin") as source:
        source.read("whole").zero_()
        assert torch.equal(source.read("whole"), example()["whole"])
        assert torch.equal(source.read("view"), example()["view"])


def test_entries_that_are_no_tensors_are_named(tmp_path: Path) -> None:
    tree = {"a": torch.zeros(1), "alpha": 4.0, "config": {"rank": 4, "names": ["q", "k"]}, 7: torch.zeros(1)}
    save(tmp_path / "x.bin", tree)
    with PickleSource(tmp_path / "x.bin") as source:
        assert list(source.specs) == ["a"]
        assert source.skipped == ("alpha", "config", "7")


@pytest.mark.parametrize("tree", [{}, {"a": 1}, [torch.zeros(1)], torch.zeros(1), {"other": {"a": torch.zeros(1)}}, 3])
def test_a_pickle_without_tensors_is_an_error(tmp_path: Path, tree: object) -> None:
    save(tmp_path / "x.bin", tree)
    with pytest.raises(InputError, match="holds no dictionary of tensors; export"):
        open_source(tmp_path / "x.bin")


class Payload:
    """Writes a file when it is unpickled by a loader that executes."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


@MODES
def test_code_is_not_executed(tmp_path: Path, zipped: bool) -> None:
    trace = tmp_path / "trace"
    save(tmp_path / "x.bin", {"a": torch.zeros(1), "evil": Payload(trace)}, zipped=zipped)
    with pytest.raises(InputError, match=r"x\.bin: this pickle holds code or objects .* convert it to safetensors"):
        open_source(tmp_path / "x.bin")
    assert not trace.exists()


def test_a_plain_pickle_is_not_executed(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    for protocol in range(6):
        (tmp_path / "x.bin").write_bytes(pickle.dumps(Payload(trace), protocol))
        with pytest.raises(InputError):
            open_source(tmp_path / "x.bin")
        assert not trace.exists()


def test_a_self_referential_tree_is_an_error(tmp_path: Path) -> None:
    tree: dict[str, Any] = {}
    tree["state_dict"] = tree
    save(tmp_path / "x.bin", tree)
    with pytest.raises(InputError, match="holds no dictionary of tensors"):
        open_source(tmp_path / "x.bin")


def test_a_tensor_that_claims_more_than_the_file_holds_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "x.bin", {"bomb": torch.zeros(1).expand(1 << 20, 1 << 20)})
    with pytest.raises(InputError, match="tensor 'bomb' claims 4398046511104 bytes in a file of"):
        open_source(tmp_path / "x.bin")


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "plain.bin", {"bomb": torch.zeros(1 << 20)})
    with zipfile.ZipFile(tmp_path / "plain.bin") as plain, zipfile.ZipFile(tmp_path / "x.bin", "w", 8) as packed:
        for record in plain.infolist():
            packed.writestr(record.filename, plain.read(record))
    with pytest.raises(InputError, match=r"unpacks to .* do not trust it"):
        open_source(tmp_path / "x.bin")


def test_tensors_that_safetensors_cannot_hold_are_an_error(tmp_path: Path) -> None:
    save(tmp_path / "x.bin", {"a": torch.eye(2).to_sparse()})
    with pytest.raises(InputError, match=r"tensor 'a': .*sparse.*; export it as a plain tensor"):
        open_source(tmp_path / "x.bin")


def test_reading_after_close_is_an_error(tmp_path: Path) -> None:
    save(tmp_path / "x.bin", example())
    source = open_source(tmp_path / "x.bin")
    source.close()
    with pytest.raises(InputError, match="is closed"):
        source.read("whole")


@MODES
@settings(max_examples=150)
@given(data=st.data())
def test_damage_is_an_input_error_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, zipped: bool, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / f"damaged-{zipped}.bin"
    save(path, {"a": torch.arange(3.0), "b": {"c": 1}}, zipped=zipped)
    raw = bytearray(path.read_bytes())
    if data.draw(st.booleans(), label="cut"):
        del raw[data.draw(st.integers(0, len(raw)), label="at") :]
    for _ in range(data.draw(st.integers(0, 4), label="flips")):
        if raw:
            raw[data.draw(st.integers(0, len(raw) - 1), label="where")] = data.draw(st.integers(0, 255), label="to")
    path.write_bytes(raw)
    try:
        with PickleSource(path) as source:
            for name in source.specs:
                source.read(name)
    except InputError as error:
        assert_one_line(str(error))


def assert_one_line(message: str) -> None:
    assert message.isprintable()
    assert len(message) < 600


def test_a_pickle_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "made" / "x.bin"
    size = write_pickle(place, example())
    assert size == place.stat().st_size
    found = torch.load(place, weights_only=True)
    assert list(found) == list(example())
    assert all(torch.equal(found[name], tensor) for name, tensor in example().items())
    again = tmp_path / "y.bin"
    write_pickle(again, example())
    assert again.read_bytes() == place.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        write_pickle(place, example())
    pwrite, calls = os.pwrite, []

    def full(fd: int, data: bytes, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "full")
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    before = place.read_bytes()
    with pytest.raises(OutputError, match="the disk is full"):
        write_pickle(place, {"x": torch.ones(1000)}, force=True)
    assert os.listdir(place.parent) == ["x.bin"]
    assert place.read_bytes() == before
