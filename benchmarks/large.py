"""Large values, beside memcpy: what a copy of the same bytes into shared memory costs, which nothing can do without.

A write is ``flow.put``, submitted and awaited. Its bytes are packed, cross a socket, are checked and are copied into
the state: several copies, where memcpy makes one. Bytes are read as one copy; an array is read in place, so that
its read costs the same at every size.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import repeat
from time import perf_counter
from typing import Any

from strictflow_mp import StrictFlow

from .measure import Bound, Missing, Outcome, Run, Size, compare, figure

SMALLER = 1_000_000
"""Bytes of the smaller of the two values."""


def megabytes(count: int) -> str:
    return f"{count / 1e6:g} MB"


@contextmanager
def memcpy(count: int) -> Iterator[Run]:
    """Copy that many bytes into a shared mapping whose pages are there already."""
    source = bytes(count)
    with mmap.mmap(-1, count) as shared, memoryview(shared) as view:

        def run(times: int) -> float:
            began = perf_counter()
            for _ in repeat(None, times):
                view[:] = source
            return perf_counter() - began

        yield run


def array_of(count: int) -> Any:
    try:
        import numpy
    except ImportError:
        raise Missing("numpy is not installed: pip install numpy") from None
    return numpy.zeros(count // 8)


def written(size: Size, count: int, make: Callable[[int], Any]) -> Outcome:
    """Put the same large value again and again, each time awaited."""
    value = make(count)
    with StrictFlow(capacity=max(1 << 28, 8 * count)) as flow, memcpy(count) as floor:

        def ours(times: int) -> float:
            began = perf_counter()
            for _ in repeat(None, times):
                flow.put("large", value).result()
            return perf_counter() - began

        return compare(ours, floor, size, peer_is="memcpy", note=megabytes(count))


def read(size: Size, count: int, make: Callable[[int], Any]) -> Outcome:
    """Read a large value, each time just changed by the coordinator; only the reads are timed."""
    value = make(count)
    with StrictFlow(capacity=max(1 << 28, 8 * count)) as flow, memcpy(count) as floor:

        def ours(times: int) -> float:
            seconds = 0.0
            for _ in repeat(None, times):
                flow.put("large", value).result()
                began = perf_counter()
                found = flow.state["large"]
                seconds += perf_counter() - began
                assert len(found) == len(value)
                del found
            return seconds

        few = Size(size.repetitions, size.seconds / 10, size.keys)  # most of the time goes into the writes
        return compare(ours, floor, few, peer_is="memcpy", note=megabytes(count))


@figure("write of 1 MB of bytes ÷ memcpy")
def write_bytes(size: Size) -> Outcome:
    """1 MB of bytes, `written`."""
    return written(size, min(SMALLER, size.large), bytes)


@figure("write of 100 MB of bytes ÷ memcpy")
def write_large_bytes(size: Size) -> Outcome:
    """100 MB of bytes, `written`."""
    return written(size, size.large, bytes)


@figure("write of a 1 MB array ÷ memcpy")
def write_array(size: Size) -> Outcome:
    """1 MB of float64 as a NumPy array, `written`."""
    return written(size, min(SMALLER, size.large), array_of)


@figure("write of a 100 MB array ÷ memcpy")
def write_large_array(size: Size) -> Outcome:
    """100 MB of float64 as a NumPy array, `written`."""
    return written(size, size.large, array_of)


@figure("read of 1 MB of bytes ÷ memcpy")
def read_bytes(size: Size) -> Outcome:
    """1 MB of bytes, just changed."""
    return read(size, min(SMALLER, size.large), bytes)


@figure("read of 100 MB of bytes ÷ memcpy")
def read_large_bytes(size: Size) -> Outcome:
    """100 MB of bytes, just changed."""
    return read(size, size.large, bytes)


@figure("read of a 1 MB array ÷ memcpy")
def read_array(size: Size) -> Outcome:
    """1 MB of float64 as a NumPy array, just changed: a view, nothing is copied."""
    return read(size, min(SMALLER, size.large), array_of)


@figure("read of a 100 MB array ÷ memcpy", Bound("≤", 0.1))
def read_large_array(size: Size) -> Outcome:
    """100 MB of float64 as a NumPy array, just changed: a view, nothing is copied."""
    return read(size, size.large, array_of)
