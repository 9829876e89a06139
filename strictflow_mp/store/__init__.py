"""The store: a persistent tree in shared memory, one root flip for each commit.

`arena` finds room, `trie` lays out and edits the tree, `commit` publishes versions, `reader` reads them,
`pins` keeps old ones alive for snapshots, `receipts` says in each commit whose tasks are in it.
"""

from .commit import BURST_BYTES, StoreWriter
from .pins import PinnedVersions, Pins, clear_pins, has_pins
from .reader import ARRAYS, STRAYED, Cell, Found, Route, StoreReader, Version
from .receipts import Receipt, Receipts, read_receipts
from .trie import GONE, NEXT, Take, shape

__all__ = [
    "ARRAYS",
    "BURST_BYTES",
    "GONE",
    "NEXT",
    "STRAYED",
    "Cell",
    "Found",
    "PinnedVersions",
    "Pins",
    "Receipt",
    "Receipts",
    "Route",
    "StoreReader",
    "StoreWriter",
    "Take",
    "Version",
    "clear_pins",
    "has_pins",
    "read_receipts",
    "shape",
]
