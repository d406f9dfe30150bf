"""The container of codes: what was packed comes back, a damaged file is an error, and old files decode for ever."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loratools.errors import InputError
from loratools.quant.codec import Coding, rounds_of
from loratools.quant.grid import Gridded
from loratools.storage import open_source
from loratools.storage.packed import CONFIG_KEY, MARK, Coded, PackedSink, Raw

GOLDEN = Path(__file__).resolve().parents[1] / "fixtures" / "quant"


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parts(rows: int, columns: int, *codings: Coding, start: int = 0) -> tuple[object, ...]:
    return tuple(rounds_of(noise(rows, columns), codings, "squares", start=start))


def contents() -> dict[str, Raw | Coded]:
    """One tensor of every kind, of awkward shapes."""
    small = Gridded((noise(3, 7) * 4).round().to(torch.int16), torch.tensor([0.5, 2.0, 1e-3]).half())
    zero = Gridded(torch.zeros(2, 5, dtype=torch.int16), torch.tensor([0.25]))
    large = Gridded((noise(2, 9) * 5000).round().to(torch.int16), torch.tensor([1e-3]))
    four, one = Coding(4, "lloyd", 4), Coding(1, "lloyd", 0)
    return {
        "bf16": Raw(noise(3, 2).bfloat16()),
        "alpha": Raw(torch.tensor(8.0)),
        "rows": Coded((3, 7), parts(3, 7, four)),  # type: ignore[arg-type]
        "columns": Coded((7, 3), parts(3, 7, one, one), transposed=True),  # type: ignore[arg-type]
        "kernel": Coded((3, 7, 1, 1), parts(3, 7, four)),  # type: ignore[arg-type]
        "grid": Coded((3, 7), small),
        "grid of columns": Coded((5, 2), zero, transposed=True),
        "large": Coded((2, 3, 3), large),
    }


def write(path: Path, **config: object) -> int:
    with PackedSink(path) as sink:
        for name, content in contents().items():
            sink.pack(name, content)
        sink.config = config or None
        return sink.commit({"made": "here"})


def test_what_was_packed_comes_back(tmp_path: Path) -> None:
    size = write(tmp_path / "a.safetensors", r=8)
    source = open_source(tmp_path / "a.safetensors")
    assert source.container == "packed"
    assert size == (tmp_path / "a.safetensors").stat().st_size == source.nbytes
    assert source.metadata == {"made": "here", CONFIG_KEY: '{"r": 8}'}
    for name, content in contents().items():
        expected = content.tensor if isinstance(content, Raw) else content.decode()
        read = source.read(name)
        assert torch.equal(read, expected), name
        assert read.dtype == expected.dtype
        assert source.specs[name].shape == tuple(expected.shape)
    assert source.codings == {"4-bit lloyd": 2, "1-bit lloyd": 1, "grid": 3}


def test_tensors_can_be_read_in_any_order_and_more_than_once(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors")
    source = open_source(tmp_path / "a.safetensors")
    for name in [*reversed(contents()), *contents()]:
        content = contents()[name]
        assert torch.equal(source.read(name), content.tensor if isinstance(content, Raw) else content.decode())


def test_pieces_hold_whole_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratools.storage.packed._PIECE", 30)
    monkeypatch.setattr("loratools.storage.packed._PIECE_NUMBERS", 12)
    write(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert sum(key.startswith("data.") for key in file.keys()) > 2  # noqa: SIM118
    test_tensors_can_be_read_in_any_order_and_more_than_once(tmp_path)


def test_a_sink_without_a_path_counts(tmp_path: Path) -> None:
    assert write(None) == write(tmp_path / "a.safetensors")  # type: ignore[arg-type]


def test_the_same_contents_make_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.safetensors", r=1)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_name_is_written_once() -> None:
    with PackedSink(None) as sink:
        sink.pack("a", Raw(torch.zeros(1)))
        with pytest.raises(ValueError, match="'a' was written before"):
            sink.write("a", torch.zeros(1))


def test_a_file_of_the_first_version_decodes() -> None:
    """Written once, and kept: what it decodes to lies beside it."""
    source = open_source(GOLDEN / "version1.packed.safetensors")
    expected = load_file(GOLDEN / "version1.decoded.safetensors")
    assert set(source.specs) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(source.read(name), tensor), name


def damaged(path: Path, change: object) -> Path:
    """The file with its index changed."""
    tensors = load_file(path)
    index = json.loads(zlib.decompress(tensors["index"].numpy().tobytes()))
    change(index)  # type: ignore[operator]
    text = zlib.compress(json.dumps(index).encode())
    tensors["index"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    save_file(tensors, path, metadata={MARK: "1"})
    return path


def entry(index: dict[str, list[list[object]]], name: str) -> list[object]:
    return next(e for e in index["tensors"] if e[0] == name)


@pytest.mark.parametrize(
    "change",
    [
        lambda i: i.pop("tensors"),
        lambda i: i.update(metadata={"a": 1}),
        lambda i: i.update(tensors=[["a"]]),
        lambda i: i.update(pieces=[{"x": [1, 1, 1, 1]}]),
        lambda i: i.update(pieces=[{"0": [1, 9, 1, 1]}]),
        lambda i: entry(i, "rows").__setitem__(1, "X9"),
        lambda i: entry(i, "rows").__setitem__(2, [-1, 7]),
        lambda i: entry(i, "rows").__setitem__(2, [10**6, 10**6]),
        lambda i: entry(i, "rows").__setitem__(3, 7),
        lambda i: entry(i, "rows").__setitem__(4, -4),
        lambda i: entry(i, "rows").__setitem__(5, "spell"),
        lambda i: entry(i, "grid").__setitem__(-1, [0]),
        lambda i: entry(i, "grid").__setitem__(-1, [77, 77, 77]),
        lambda i: i["tensors"].append(entry(i, "rows")),
        lambda i: i.update(metadata=None),
        lambda i: i.update(config="x"),
        lambda i: i.update(pieces="x"),
        lambda i: entry(i, "grid").__delitem__(slice(6, None)),
        lambda i: entry(i, "rows").__delitem__(slice(6, None)),
        lambda i: [s.__setitem__(2, s[2] + 1) for s in i["pieces"][0].values()],
        lambda i: [s.__setitem__(2, 2**70) for s in i["pieces"][0].values()],
    ],
)
def test_an_index_that_is_damaged_is_an_error_at_once(tmp_path: Path, change: object) -> None:
    write(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"a\.safetensors: a packed adapter that is damaged"):
        open_source(damaged(tmp_path / "a.safetensors", change))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("rows", lambda i: entry(i, "rows").__setitem__(4, 10**9)),
        ("rows", lambda i: entry(i, "rows")[-1][0].__setitem__(1, 99)),  # type: ignore[index]
        ("rows", lambda i: entry(i, "rows")[-1][0].__setitem__(2, 7)),  # type: ignore[index]
        ("grid", lambda i: entry(i, "grid").__setitem__(7, 2)),
        ("grid", lambda i: entry(i, "grid").__setitem__(8, "I8")),
        ("grid", lambda i: [s.__setitem__(3, 2**40) for s in i["pieces"][0].values()]),
        ("bf16", lambda i: entry(i, "bf16").__setitem__(4, 10**9)),
    ],
)
def test_a_tensor_that_is_damaged_is_an_error_when_read(tmp_path: Path, name: str, change: object) -> None:
    write(tmp_path / "a.safetensors")
    source = open_source(damaged(tmp_path / "a.safetensors", change))
    with pytest.raises(InputError, match=rf"damaged \(tensor '{name}'"):
        source.read(name)


def test_what_changed_in_the_data_is_an_error_wherever_it_is(tmp_path: Path) -> None:
    """Codes and scales of any value decode to something: a sum tells that they are not those that were written."""
    write(tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    for at in range(len(tensors["data.0"])):
        data = tensors["data.0"].clone()
        data[at] ^= 1 << at % 8
        save_file({**tensors, "data.0": data}, tmp_path / "b.safetensors", metadata={MARK: "1"})
        source = open_source(tmp_path / "b.safetensors")
        for name in contents():
            with pytest.raises(InputError, match="damaged"):
                source.read(name)


def test_a_wide_row_is_not_made_for_bytes_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many numbers as an index may claim of one tensor, in a file of a few bytes: refused before memory is taken."""

    def claim(index: dict[str, list[object]]) -> None:
        index["tensors"] = [["large", "F32", [1, 2**31], 0, 0, "grid", 0, 1, "F32", [0]]]
        index["pieces"] = [{"0": [2, 8, 2**31, 1]}]

    write(tmp_path / "a.safetensors")
    source = open_source(damaged(tmp_path / "a.safetensors", claim))
    monkeypatch.setattr(torch, "zeros", lambda *shape, **_: pytest.fail(f"made {shape}"))
    with pytest.raises(InputError, match="a stream"):
        source.read("large")


def test_a_later_version_is_named(tmp_path: Path) -> None:
    save_file({"index": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={MARK: "2"})
    with pytest.raises(InputError, match="is of version '2'; this loratools reads version 1"):
        open_source(tmp_path / "a.safetensors")


def test_an_index_of_junk_and_one_that_explodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"index": torch.zeros(9, dtype=torch.uint8)}, tmp_path / "a.safetensors", metadata={MARK: "1"})
    with pytest.raises(InputError, match="its index cannot be inflated"):
        open_source(tmp_path / "a.safetensors")
    monkeypatch.setattr("loratools.storage.packed._MAX_INDEX", 100)
    write(tmp_path / "b.safetensors")
    with pytest.raises(InputError, match="its index is cut off or too long"):
        open_source(tmp_path / "b.safetensors")
