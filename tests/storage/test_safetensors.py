"""Safetensors: what we write the official library reads, and the other way round."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loratools.errors import InputError, OutputError
from loratools.storage import (
    DTYPES,
    SafetensorsSink,
    SafetensorsSource,
    TensorSpec,
    file_size,
    header_bytes,
    open_source,
    spec_of,
)

ROOT = Path(__file__).resolve().parents[2]


def random_bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + 1)
    if dtype is torch.bool:
        return torch.rand(shape, generator=generator) > 0.5
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], *, reserve: int = 0) -> int:
    with SafetensorsSink(path, reserve=reserve) as sink:
        for name, tensor in tensors.items():
            sink.write(name, tensor)
        return sink.commit(metadata)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "b": torch.randn(5, 3, generator=generator),
        "a": torch.randn(7, generator=generator).half(),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
        "odd": torch.arange(3, dtype=torch.uint8),
        "ünï\n": torch.tensor([True, False]),
    }


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_makes_the_round_trip_bit_for_bit(tmp_path: Path, name: str) -> None:
    dtype = getattr(torch, DTYPES[name][0])
    written = {"matrix": random_bits(dtype, 6, 5), "scalar": random_bits(dtype), "empty": random_bits(dtype, 3, 0)}
    path = tmp_path / "x.safetensors"
    write(path, {**written, "strided": written["matrix"].T}, {})
    official = load_file(path)
    with open_source(path) as source:
        for key, tensor in {**written, "strided": written["matrix"].T}.items():
            ours = source.read(key)
            assert source.specs[key] == TensorSpec(name, tuple(tensor.shape)) == spec_of(tensor)
            assert ours.dtype == official[key].dtype == dtype
            assert ours.shape == official[key].shape == tensor.shape
            assert bits(ours) == bits(official[key]) == bits(tensor)


def test_views_of_all_kinds_are_written_as_what_they_show(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    views = {
        "columns": base[:, ::2],
        "row": base[2],
        "expanded": base[0].expand(3, 6),
        "conjugate": torch.complex(base, base + 1).conj(),
        "parameter": torch.nn.Parameter(base.T),
    }
    write(tmp_path / "x.safetensors", views, {})
    loaded = load_file(tmp_path / "x.safetensors")
    for name, view in views.items():
        assert torch.equal(loaded[name], view.detach().resolve_conj()), name


@pytest.mark.parametrize("reserve", [0, 8, 16, 104, 512, 520, 4096, 50_000])
def test_the_size_is_known_beforehand_for_every_reserve(
    tmp_path: Path, tensors: dict[str, torch.Tensor], reserve: int
) -> None:
    metadata = {"z": "1", "a": "ä" * 100}
    path = tmp_path / "x.safetensors"
    size = write(path, tensors, metadata, reserve=reserve)
    specs = {name: spec_of(tensor) for name, tensor in tensors.items()}
    assert size == path.stat().st_size == file_size(specs, metadata, reserve=reserve)
    smallest = file_size(specs, metadata)
    data = sum(spec.nbytes for spec in specs.values())
    assert size == max(smallest, -(-reserve // 8) * 8 + data)
    assert path.read_bytes().startswith(header_bytes(specs, metadata, reserve=reserve))
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_data_larger_than_a_chunk_is_moved_correctly(tmp_path: Path) -> None:
    large = torch.arange(5_000_001, dtype=torch.int32)
    write(tmp_path / "moved", {"x": large, "y": large + 1}, {}, reserve=8)
    specs = {"x": spec_of(large), "y": spec_of(large)}
    write(tmp_path / "exact", {"x": large, "y": large + 1}, {}, reserve=len(header_bytes(specs, {})))
    assert (tmp_path / "moved").read_bytes() == (tmp_path / "exact").read_bytes()
    assert torch.equal(load_file(tmp_path / "moved")["y"], large + 1)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"one": 'a "quoted"\n\t\x01\x7f\\ ü 😀 text'}])
def test_the_bytes_are_those_of_the_official_library(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    tensors = {f"layer.{i}.{side}": torch.full((i, 3), i) for i in range(12) for side in ("down", "up \x1f\x7f é")}
    save_file(tensors, tmp_path / "official", metadata=metadata)
    with SafetensorsSource(tmp_path / "official") as source:
        copy = {name: source.read(name) for name in source.specs}
        write(tmp_path / "ours", copy, dict(source.metadata))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "official").read_bytes()


def test_the_header_is_canonical(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "x.safetensors"
    write(path, tensors, {"z": "1", "b": "2", "a": "3"}, reserve=1000)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + length].decode()
    header = json.loads(text)
    assert length == 1000 - 8
    assert text.rstrip(" ").endswith("}}")
    assert list(header) == ["__metadata__", *tensors]
    assert list(header["__metadata__"]) == ["a", "b", "z"]
    ends = [header[name]["data_offsets"] for name in tensors]
    assert [start for start, _ in ends] == [0, *(end for _, end in ends[:-1])]
    with open_source(path) as source:
        assert source.metadata == {"a": "3", "b": "2", "z": "1"}
        assert list(source.specs) == list(tensors)


def test_what_the_official_library_writes_is_read(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "official.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    with open_source(path) as source:
        assert isinstance(source, SafetensorsSource)
        assert source.metadata == {"format": "pt"}
        assert source.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()
        with safe_open(path, "pt") as official:
            assert list(source.specs) == official.offset_keys()
        for name, tensor in tensors.items():
            assert torch.equal(source.read(name), tensor)
        with pytest.raises(KeyError):
            source.read("no such tensor")


@pytest.mark.parametrize("name", [name for name in DTYPES if name != "C64"])
def test_a_scalar_is_the_number_that_the_tensor_holds(tmp_path: Path, name: str) -> None:
    dtype = getattr(torch, DTYPES[name][0])
    write(tmp_path / "x", {"one": torch.tensor([[5.5]]).to(dtype), "two": torch.ones(2).to(dtype)}, {})
    with open_source(tmp_path / "x") as source:
        assert source.read_scalar("one") == float(source.read("one").item())
        with pytest.raises((ValueError, RuntimeError)):
            source.read_scalar("two")


def test_what_is_read_belongs_to_the_caller(tmp_path: Path) -> None:
    write(tmp_path / "x", {"a": torch.zeros(4)}, {})
    with open_source(tmp_path / "x") as source:
        source.read("a").add_(1)
        assert source.read("a").sum() == 0


def test_opening_does_not_import_torch(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    write(tmp_path / "x", tensors, {})
    code = (
        "import sys; from loratools.storage import open_source\n"
        f"source = open_source({str(tmp_path / 'x')!r}); source.sha256()\n"
        "sys.exit(bool({'torch', 'numpy'} & sys.modules.keys()) or len(source.specs) != 6)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_many_threads_read_at_once(tmp_path: Path) -> None:
    tensors = {str(i): torch.full((1000 + i,), float(i)) for i in range(50)}
    write(tmp_path / "x", tensors, {})
    with open_source(tmp_path / "x") as source, concurrent.futures.ThreadPoolExecutor(8) as pool:
        names = list(tensors) * 20
        for name, tensor in zip(names, pool.map(source.read, names), strict=True):
            assert torch.equal(tensor, tensors[name])


def test_a_file_truncated_after_opening_is_an_error_and_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write(path, {"a": torch.zeros(10_000), "b": torch.zeros(10_000)}, {})
    with open_source(path) as source:
        os.truncate(path, 50_000)
        assert source.read("a").shape == (10_000,)
        with pytest.raises(InputError, match=r"x: became shorter while it was read; .* again"):
            source.read("b")
        with pytest.raises(InputError, match="became shorter"):
            source.sha256()


def test_reading_after_close_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "x", {"a": torch.zeros(1)}, {})
    source = open_source(tmp_path / "x")
    source.close()
    source.close()
    with pytest.raises(InputError, match="is closed"):
        source.read("a")


def test_a_tensor_larger_than_memory_is_an_error(tmp_path: Path) -> None:
    count = 1 << 47  # the file is sparse and takes no space
    raw = json.dumps({"a": {"dtype": "U8", "shape": [count], "data_offsets": [0, count]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    try:
        os.truncate(path, 8 + len(raw) + count)
    except OSError:
        count = 1 << 43
        raw = json.dumps({"a": {"dtype": "U8", "shape": [count], "data_offsets": [0, count]}}).encode()
        path.write_bytes(len(raw).to_bytes(8, "little") + raw)
        os.truncate(path, 8 + len(raw) + count)
    with open_source(path) as source, pytest.raises(InputError, match="more than there is memory"):
        source.read("a")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "x", {"a": torch.zeros(1)}, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o666 & ~umask


def test_misuse_is_a_value_error(tmp_path: Path) -> None:
    with SafetensorsSink(tmp_path / "x") as sink:
        sink.write("a", torch.zeros(1))
        for name in ("a", "__metadata__", "half a pair \ud800"):
            with pytest.raises(ValueError, match=r"written before|surrogates"):
                sink.write(name, torch.zeros(1))
        with pytest.raises(ValueError, match="complex128"):
            sink.write("b", torch.zeros(1, dtype=torch.complex128))
        with pytest.raises(ValueError, match="sparse"):
            sink.write("b", torch.eye(2).to_sparse())
        with pytest.raises(ValueError, match="text to text"):
            sink.commit({"a": 1})  # type: ignore[dict-item]
        sink.commit({})
        with pytest.raises(ValueError, match="committed or aborted"):
            sink.commit({})
        with pytest.raises(ValueError, match="committed or aborted"):
            sink.write("b", torch.zeros(1))
    assert load_file(tmp_path / "x").keys() == {"a"}
    with pytest.raises(ValueError, match="reserve=-1"):
        SafetensorsSink(tmp_path / "y", reserve=-1)


def test_a_header_that_no_reader_accepts_is_not_written(tmp_path: Path) -> None:
    with (
        SafetensorsSink(tmp_path / "x") as sink,
        pytest.raises(OutputError, match=r"readers accept 100000000; write fewer tensors or less metadata"),
    ):
        sink.commit({"a": "x" * 100_000_000})
    assert not list(tmp_path.iterdir())


def test_a_symbolic_link_is_replaced_and_its_target_kept(tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_bytes(b"shared")
    (tmp_path / "x").symlink_to(blob)
    write(tmp_path / "x", {"a": torch.zeros(1)}, {})
    assert blob.read_bytes() == b"shared"
    assert not (tmp_path / "x").is_symlink()


def test_metadata_may_be_null(tmp_path: Path) -> None:
    raw = b'{"__metadata__":null}'
    (tmp_path / "x.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    with open_source(tmp_path / "x.safetensors") as source:
        assert source.metadata == {}
        assert source.specs == {}
