"""Sizes read and written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratools.errors import UsageError
from loratools.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("4096B", 4096),
        ("4kB", 4_000),
        ("4KB", 4_000),
        ("4MB", 4_000_000),
        ("4 mb", 4_000_000),
        ("4MiB", 4 * 2**20),
        ("1.5GB", 1_500_000_000),
        (".5KiB", 512),
        ("0.29MB", 290_000),  # 0.29 * 10**6 is 289999.99999999994 in floats
        ("2TiB", 2 * 2**40),
        (" 7 ", 7),
        ("1.9", 1),
    ],
)
def test_sizes_are_read_exactly(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-4MB", "4 M B", "1e6", "nan", "4,000", "٤MB", "0x10", "1.2.3MB", "4MB\n4"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        parse_size(text)


def test_a_bare_letter_is_ambiguous() -> None:
    with pytest.raises(UsageError, match="4MB or 4MiB"):
        parse_size("4M")
    with pytest.raises(UsageError, match="unknown unit"):
        parse_size("4 parsecs")


@pytest.mark.parametrize("text", ["0", "0MB", "0.5B"])
def test_less_than_a_byte_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="less than one byte"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_996, "10.0 kB"),
        (99_960, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (4_000_000, "4.00 MB"),
        (12_345_678_901, "12.3 GB"),
        (-1_500_000, "-1.50 MB"),
        (5 * 10**18, "5000 PB"),
    ],
)
def test_sizes_are_written_to_three_digits(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(1, 10**17))
def test_a_written_size_reads_back_to_three_digits(size: int) -> None:
    if size < 999_500_000_000_000:  # petabytes are only written
        assert parse_size(format_size(size)) == pytest.approx(size, rel=0.0051)
