"""Files from strangers: refused in one line, quickly, and never read differently from the official library."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from loratools.errors import InputError
from loratools.storage import DTYPES, SafetensorsSource, open_source

SECONDS = 5.0  # generous: the slowest refusal takes 0.5 s on two busy cores


def assemble(header: bytes | dict[str, Any], data: bytes = b"", *, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def official_tensors(path: Path) -> dict[str, torch.Tensor] | None:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, TypeError, RuntimeError, ValueError, OverflowError):
        return None


def our_tensors(path: Path) -> dict[str, torch.Tensor] | None:
    try:
        with SafetensorsSource(path) as source:
            return {name: source.read(name) for name in source.specs}
    except InputError as error:
        assert_one_line(path, str(error))
        return None


def assert_one_line(path: Path, message: str) -> None:
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) < len(str(path)) + 500


def assert_safe(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    start = time.perf_counter()
    ours = our_tensors(path)
    assert time.perf_counter() - start < SECONDS
    if ours is None:
        return
    official = official_tensors(path)
    assert official is not None, "the official library refuses this file"
    assert ours.keys() == official.keys()
    for name, tensor in ours.items():
        assert tensor.shape == official[name].shape
        assert tensor.dtype == official[name].dtype
        assert tensor.reshape(-1).view(torch.uint8).equal(official[name].reshape(-1).view(torch.uint8))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile") / "x.safetensors"


REFUSED: dict[str, bytes] = {
    "no bytes": b"",
    "seven bytes": bytes(7),
    "no header": bytes(8),
    "header beyond the end": assemble(b"{}", length=3),
    "header of exabytes": assemble(b"{}", length=2**63),
    "header of all bits": assemble(b"{}", length=2**64 - 1),
    "header above the limit": assemble(b"{}", length=100_000_001),
    "not UTF-8": assemble(b'{"\xff":1}'),
    "byte order mark": assemble(b"\xef\xbb\xbf{}"),
    "not JSON": assemble(b"hello"),
    "a list": assemble(b"[]"),
    "two objects": assemble(b"{}{}"),
    "trailing NUL": assemble(b"{}\0"),
    "unfinished": assemble(b'{"a":'),
    "deep nesting": assemble(b'{"a":' + b"[" * 200_000),
    "deep nesting in an entry": assemble(b'{"a":{"dtype":' + b"[" * 4000 + b"]" * 4000 + b"}}"),
    "nested objects": assemble(b'{"a":' * 100_000),
    "tensor named twice": assemble(
        b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}"
    ),
    "field given twice": assemble(b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "metadata given twice": assemble(b'{"__metadata__":{},"__metadata__":{}}'),
    "metadata key given twice": assemble(b'{"__metadata__":{"a":"b","a":"c"}}'),
    "metadata a list": assemble({"__metadata__": []}),
    "metadata of numbers": assemble({"__metadata__": {"a": 1}}),
    "metadata nested": assemble({"__metadata__": {"a": {"b": "c"}}}),
    "half a surrogate pair": assemble(b'{"__metadata__":{"a":"\\udfff"}}'),
    "control character": assemble(b'{"\x01":' + json.dumps(entry()).encode() + b"}", bytes(4)),
    "unknown dtype": assemble({"a": entry("F31")}, bytes(4)),
    "dtype a list": assemble({"a": entry(["F32"])}, bytes(4)),
    "dtype a number": assemble({"a": entry(4)}, bytes(4)),
    "field missing": assemble({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "field unknown": assemble({"a": entry(more=1)}, bytes(4)),
    "entry a list": assemble({"a": ["F32", [1], [0, 4]]}, bytes(4)),
    "shape not a list": assemble({"a": entry(shape=1)}, bytes(4)),
    "shape negative": assemble({"a": entry(shape=[-1])}, bytes(4)),
    "shape of two negatives": assemble({"a": entry(shape=[-1, -1])}, bytes(4)),
    "shape minus zero": assemble(b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'),
    "shape a float": assemble({"a": entry(shape=[1.0])}, bytes(4)),
    "shape a bool": assemble({"a": entry(shape=[True])}, bytes(4)),
    "shape a text": assemble({"a": entry(shape=["1"])}, bytes(4)),
    "shape of huge sizes": assemble({"a": entry(shape=[2**62, 2**62])}, bytes(4)),
    "shape wrapping to 4 bytes": assemble({"a": entry(shape=[2**32, 2**32 + 1])}, bytes(4)),
    "shape empty and huge": assemble({"a": entry(shape=[0, 2**63], offsets=[0, 0])}),
    "shape beyond 64 bits": assemble({"a": entry(shape=[0, 2**70], offsets=[0, 0])}),
    "shape of 65 dimensions": assemble({"a": entry(shape=[1] * 65)}, bytes(4)),
    "shape of a million dimensions": assemble({"a": entry(shape=[1] * 1_000_000)}, bytes(4)),
    "number of ten thousand digits": assemble(b'{"a":{"shape":[' + b"9" * 10_000 + b"]}}"),
    "offsets of three": assemble({"a": entry(offsets=[0, 4, 4])}, bytes(4)),
    "offsets of bools": assemble({"a": entry("U8", offsets=[False, True])}, bytes(1)),
    "offsets reversed": assemble({"a": entry(offsets=[4, 0])}, bytes(4)),
    "offsets negative": assemble({"a": entry(offsets=[-4, 0])}, bytes(4)),
    "offsets beyond the end": assemble({"a": entry(offsets=[4, 8])}, bytes(4)),
    "offsets astronomical": assemble({"a": entry(offsets=[2**80, 2**80 + 4])}, bytes(4)),
    "size of another dtype": assemble({"a": entry(offsets=[0, 8])}, bytes(8)),
    "overlap": assemble({"a": entry(), "b": entry()}, bytes(4)),
    "overlap in part": assemble({"a": entry(), "b": entry(offsets=[2, 6])}, bytes(6)),
    "hole": assemble({"a": entry(), "b": entry(offsets=[8, 12])}, bytes(12)),
    "hole at the start": assemble({"a": entry(offsets=[4, 8])}, bytes(8)),
    "empty tensor inside another": assemble({"a": entry(), "e": entry(shape=[0], offsets=[2, 2])}, bytes(4)),
    "trailing bytes": assemble({"a": entry()}, bytes(5)),
    "missing bytes": assemble({"a": entry()}, bytes(3)),
    "data without tensors": assemble(b"{}", bytes(3)),
    "name with escapes": assemble({"\x1b[31m\r\n" + "x" * 10_000: entry("?")}, bytes(4)),
    "dtype of a megabyte": assemble({"a": entry("?" * 1_000_000)}, bytes(4)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_malformed_file_is_refused_in_one_line(file: Path, name: str) -> None:
    file.write_bytes(REFUSED[name])
    start = time.perf_counter()
    assert our_tensors(file) is None
    with pytest.raises(InputError):
        open_source(file)
    assert time.perf_counter() - start < SECONDS


ACCEPTED: dict[str, bytes] = {
    "no tensors": assemble(b"{}"),
    "white space around": assemble(
        b' \n{ "a" :\t{"shape": [ 1 ],"data_offsets":[0, 4],\r\n"dtype":"F32"} }  ', bytes(4)
    ),
    "order unlike the data": assemble({"a": entry(offsets=[4, 8]), "b": entry()}, bytes(range(8))),
    "empty tensors between": assemble({"e": entry(shape=[0, 3], offsets=[0, 0]), "a": entry()}, bytes(4)),
    "empty name": assemble({"": entry()}, bytes(4)),
    "NUL and pair in a name": assemble(b'{"\\u0000\\ud83d\\ude00":' + json.dumps(entry()).encode() + b"}", bytes(4)),
    "escaped dtype": assemble(b'{"a":{"dtype":"F\\u00332","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "metadata that looks like an entry": assemble({"__metadata__": {"dtype": "F32"}}),
    "unaligned": assemble(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}} ', bytes(range(4))),
    "bool of seven": assemble({"a": entry("BOOL", offsets=[0, 1])}, b"\x07"),
    "64 dimensions": assemble({"a": entry(shape=[1] * 64)}, bytes(4)),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_unusual_but_valid_file_is_read(file: Path, name: str) -> None:
    file.write_bytes(ACCEPTED[name])
    assert our_tensors(file) is not None
    assert_safe(file, ACCEPTED[name])


LARGE = 100_000_000 - 100
# What the header starts with, and what fills the rest of it.
JUNK: dict[str, tuple[bytes, bytes]] = {
    "NUL bytes": (b"", b"\0"),
    "spaces": (b"", b" "),
    "lists": (b'{"a":', b"[],"),
    "objects": (b"", b'{"a":{},'),
    "opening brackets": (b'{"a":{"shape":', b"["),
    "an endless string": (b'{"', b"x"),
    "an endless string of escapes": (b'{"', b"\\n"),
    "endless metadata": (b'{"__metadata__":{"', b"\xc3\xa9"),
    "an endless number": (b'{"a":{"shape":[', b"9"),
}


@pytest.mark.parametrize("name", JUNK)
def test_100_megabytes_of_junk_are_refused_quickly(file: Path, name: str) -> None:
    start_of_header, filling = JUNK[name]
    file.write_bytes(assemble(start_of_header + filling * (LARGE // len(filling))))
    start = time.perf_counter()
    assert our_tensors(file) is None
    assert time.perf_counter() - start < SECONDS


VALID = assemble(
    {
        "__metadata__": {"format": "pt"},
        "a": entry("F16", [2, 3], [0, 12]),
        "b": entry("U8", [], [12, 13]),
        "c": entry("BF16", [0, 4], [13, 13]),
        "d": entry("I64", [1], [13, 21]),
    },
    bytes(range(21)),
)

NUMBERS = st.one_of(
    st.integers(-2, 24),
    st.sampled_from(
        [2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 2**65, True, False, 1.0, 0.0, -0.0, None, "1"]
    ),
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from([*DTYPES, "F4", "F8_E8M0", "f32", ""]), NUMBERS),
        "shape": st.one_of(st.lists(NUMBERS, max_size=4), NUMBERS),
        "data_offsets": st.one_of(st.lists(NUMBERS, min_size=1, max_size=3), NUMBERS),
    },
    optional={"more": NUMBERS},
)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=st.dictionaries(st.text(max_size=3), ENTRIES, max_size=3), size=st.integers(0, 24), cut=st.booleans())
def test_any_header_is_read_as_the_official_library_does_or_refused(
    file: Path, tree: dict[str, Any], size: int, cut: bool
) -> None:
    raw = json.dumps(tree, ensure_ascii=cut).encode("utf-8", "surrogatepass")
    assert_safe(file, assemble(raw, bytes(size)))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 3), max_size=3)), max_size=5),
    order=st.randoms(use_true_random=False),
    pad=st.integers(0, 9),
)
def test_any_valid_file_is_read(file: Path, sizes: list[tuple[str, list[int]]], order: Any, pad: int) -> None:
    tree, end = {}, 0
    for number, (dtype, shape) in enumerate(sizes):
        start, end = end, end + torch.Size(shape).numel() * DTYPES[dtype][1] // 8
        tree[f"t{number}"] = entry(dtype, shape, [start, end])
    names = list(tree)
    order.shuffle(names)
    raw = json.dumps({name: tree[name] for name in names}).encode() + b" " * pad
    content = assemble(raw, bytes(i % 2 for i in range(end)))
    file.write_bytes(content)
    assert our_tensors(file) is not None
    assert_safe(file, content)


@settings(max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 4), st.binary(max_size=4)), min_size=1, max_size=3
    ),
)
@example(edits=[(0, 8, b"\xff" * 8)])
@example(edits=[(0, 0, b"")])
def test_any_damage_is_read_as_the_official_library_does_or_refused(
    file: Path, edits: list[tuple[int, int, bytes]]
) -> None:
    content = bytearray(VALID)
    for at, removed, added in edits:
        content[at : at + removed] = added
    assert_safe(file, bytes(content))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    swaps=st.lists(
        st.tuples(st.integers(9, VALID.rindex(b"}")), st.sampled_from(list('0123456789-+.eE[]{}",: \\utfn'))),
        min_size=1,
        max_size=4,
    )
)
def test_any_change_of_punctuation_is_read_as_the_official_library_does_or_refused(
    file: Path, swaps: list[tuple[int, str]]
) -> None:
    content = bytearray(VALID)
    for at, character in swaps:
        content[at] = ord(character)
    assert_safe(file, bytes(content))
