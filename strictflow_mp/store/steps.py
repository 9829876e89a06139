"""Steps: what a takeover does with lists of millions, a part at a time, so that it can say in between that it goes on.

The protocol: docs/protocols/takeover.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["STEP", "in_order", "in_parts"]

STEP = 1 << 16
"""Items that are looked at in one step: some hundredths of a second."""


def in_parts(items: list[int], go_on: Callable[[], object]) -> Iterator[list[int]]:
    """What is in a list, some at a time.

    Args:
        go_on: called after each part, to say that it goes on.
    """
    for start in range(0, len(items), STEP):
        yield items[start : start + STEP]
        go_on()


def in_order(items: list[int], go_on: Callable[[], object]) -> Iterator[list[int]]:
    """The same in ascending order, of numbers that lie about as close to each other everywhere, as blocks do."""
    if len(items) <= STEP:
        yield sorted(items)
        return
    first, last = min(items), max(items)
    shift = ((last - first) // (len(items) // STEP + 1)).bit_length()
    buckets: list[list[int]] = [[] for _ in range((last - first >> shift) + 1)]
    for part in in_parts(items, go_on):
        for item in part:
            buckets[item - first >> shift].append(item)
    for bucket in buckets:
        bucket.sort()
        yield bucket
        go_on()
