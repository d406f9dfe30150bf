"""Ordered, bounded, parallel work."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from loratools.pipeline import batches, ordered_map


def test_results_come_in_order_whatever_finishes_first() -> None:
    def slow_first(i: int) -> int:
        time.sleep(0.03 if i == 0 else 0)
        return i * i

    assert list(ordered_map(slow_first, range(9), workers=3)) == [i * i for i in range(9)]


def test_an_exception_stands_in_its_place_and_stops_the_rest() -> None:
    seen: list[int] = []

    def fail_at_two(i: int) -> int:
        seen.append(i)
        if i == 2:
            raise ValueError("two")
        return i

    results = ordered_map(fail_at_two, range(1000), workers=2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)
    assert len(seen) < 20


def test_no_more_than_two_items_per_worker_wait() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def count(i: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.001)
        with lock:
            running -= 1
        return i

    results = ordered_map(count, range(50), workers=2)
    next(results)
    assert most <= 2
    assert len(list(results)) == 49


def test_thread_counts_are_restored() -> None:
    before = torch.get_num_threads()
    list(ordered_map(lambda i: torch.get_num_threads(), range(4), workers=2))
    assert torch.get_num_threads() == before


def test_batches_group_equal_keys_up_to_the_limit() -> None:
    items = [("a", 1), ("b", 1), ("a", 2), ("a", 3), ("b", 9)]
    found = batches(items, key=lambda i: i[0], size=lambda i: i[1], limit=3)
    assert found == [[("a", 1), ("a", 2)], [("b", 1)], [("a", 3)], [("b", 9)]]
