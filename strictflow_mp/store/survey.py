"""The survey: what a tree takes up, for whoever takes over a segment whose writer died.

The protocol: docs/protocols/takeover.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .steps import STEP
from .trie import FANOUT, NODE_WORDS

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["survey"]


def survey(words: memoryview, root: int, go_on: Callable[[], object]) -> tuple[list[int], list[int]]:
    """All pointers below *root*: those to nodes, and those to cells. As `walk`, but many at a time.

    A takeover does nothing for longer than this, and everybody waits for it.

    Args:
        go_on: called again and again, to say that it goes on.
    """
    nodes: list[int] = []
    cells: list[int] = []
    most = len(words) // NODE_WORDS
    left = [root] if root else []
    while left:
        some = left[-STEP:]
        del left[-STEP:]
        cells += [pointer for pointer in some if pointer & 1]
        inner = [pointer for pointer in some if not pointer & 1]
        nodes += inner
        if len(nodes) > most:
            raise IndexError
        for pointer in inner:
            node = pointer >> 1
            left += filter(None, words[node : node + FANOUT].tolist())
        go_on()
    return nodes, cells
