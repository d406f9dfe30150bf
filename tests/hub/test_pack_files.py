"""Damaged and hostile packs end in an error of one line; memory does not grow with the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hub.pack_hubs import write_hub

from loratools.errors import LoratoolsError
from loratools.hub.pack import Packing, open_pack, pack
from loratools.hub.pack.layout import PIECE, Numbers, PackTarget, Part, Shared, piece_sizes, places


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    pack(write_hub(tmp_path / "hub", "shared", 6), tmp_path / "pack", Packing("70%", "joint"))
    return tmp_path / "pack"


def read_all(path: Path) -> None:
    with open_pack(path) as found:
        for adapter in found.values():
            for update in adapter.values():
                update.operator()


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A change of the index."""

    def apply(path: Path) -> None:
        index = json.loads((path / "index.json").read_text())
        change(index)
        (path / "index.json").write_text(json.dumps(index))

    return apply


def cut(pattern: str) -> Callable[[Path], None]:
    """Half of a file."""

    def apply(path: Path) -> None:
        file = sorted(path.glob(pattern))[0]
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return apply


def removed(pattern: str) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        sorted(path.glob(pattern))[0].unlink()

    return apply


@pytest.mark.parametrize(
    "damage",
    [
        cut("index.json"),
        cut("bases/*"),
        cut("adapters/*"),
        removed("bases/*"),
        removed("adapters/*"),
        edited(lambda i: i.update(version=2)),
        edited(lambda i: i.update(bits=3)),
        edited(lambda i: i.pop("targets")),
        edited(lambda i: i["targets"][0].__setitem__(1, -4)),
        edited(lambda i: i["targets"][0].__setitem__(1, 10**12)),
        edited(lambda i: i["targets"][0].__setitem__(3, "magic")),
        edited(lambda i: i["targets"][0].__setitem__(4, 5)),
        edited(lambda i: i["targets"].pop()),
        edited(lambda i: i["adapters"][0].__setitem__(1, "../../etc/passwd")),
        edited(lambda i: i["adapters"][0].__setitem__(1, "adapters/../../x.safetensors")),
        edited(lambda i: i["adapters"].append(3)),
    ],
)
def test_a_damaged_pack_is_an_error(packed: Path, damage: Callable[[Path], None]) -> None:
    read_all(packed)
    damage(packed)
    with pytest.raises(LoratoolsError):
        read_all(packed)


@pytest.mark.parametrize("offset", range(0, 400, 23))
def test_no_changed_byte_ends_in_a_traceback(packed: Path, offset: int) -> None:
    file = sorted(packed.glob("adapters/*"))[1]
    data = bytearray(file.read_bytes())
    data[offset * len(data) // 400] ^= 0xA5
    file.write_bytes(data)
    with suppress(LoratoolsError):  # of an explained kind, where it is seen at all
        read_all(packed)


@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 300)])
def test_sizes_are_those_of_the_bytes(bits: int, shape: tuple[int, int]) -> None:
    numbers = Numbers("BF16", bits)
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 1e-9  # which float16 would lose
    data = numbers.encode(matrix)
    assert len(data) == numbers.size(*shape)
    off = (numbers.decode(data, *shape) - matrix).norm() / matrix.norm()
    assert float(off) < {0: 0.005, 8: 0.02, 4: 0.25}[bits]
    with pytest.raises(ValueError, match="bytes"):
        numbers.decode(data[:-1], *shape)


def test_things_are_placed_in_pieces() -> None:
    sizes = [10, PIECE, 5, 0, PIECE - 5, 1]
    assert list(places(sizes)) == [(0, 0), (1, 0), (2, 0), (2, 5), (2, 5), (3, 0)]
    assert piece_sizes(sizes) == [10, PIECE, PIECE, 1]


def test_targets_survive_json() -> None:
    for target in (PackTarget("a.b", (3, 4)), PackTarget("c", (5, 6), Shared("atoms", 3, 1, 2))):
        assert PackTarget.from_json(json.loads(json.dumps(target.to_json()))) == target
    for wrong in ([], ["a", 1], ["a", 1, 0], ["a", 1, 2, "joint"], [1, 2, 3], ["a", 1, 2, "joint", 1, 1, -2]):
        with pytest.raises(ValueError, match="no target"):
            PackTarget.from_json(wrong)
    assert Part(-1, 0).width(None) == 1  # of zeros


_MEASURE = """
import sys
from pathlib import Path
from loratools.hub.pack import Packing, pack
pack(Path(sys.argv[1]), Path(sys.argv[2]), Packing("30%", "joint"))
status = Path("/proc/self/status").read_text()  # ru_maxrss is inherited from the parent
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not tell peak memory")
def test_memory_does_not_grow_with_the_number_of_adapters(tmp_path: Path) -> None:
    """300 against 50: the deltas of two targets at a time stay in memory up to their limit, and that is all.

    Blocks of a megabyte and more are given back when they are freed, so that what the program holds is seen, and not
    what the allocator keeps for later.
    """
    peaks, env = [], {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    for count in (50, 300):
        hub = write_hub(tmp_path / f"hub{count}", "shared", count, m=160, n=128, layers=2)
        command = [sys.executable, "-c", _MEASURE, str(hub), str(tmp_path / f"pack{count}")]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=280, env=env)
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 64 << 10, peaks  # in KiB
