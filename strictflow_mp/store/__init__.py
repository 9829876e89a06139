"""The store: the state, a persistent tree in shared memory; one root flip makes a commit visible, whole.

`arena` finds room, `trie` lays out and edits the tree, `commit` publishes versions (and, after a death, has a
`survey` of what is in use, in `steps`), and `reader` reads them without a lock: it notices when what it has read was
reused meanwhile. `pins` keeps an old version for snapshots, `views` shows one version as a mapping, and `receipts` says
in each commit whose tasks are in it. One process writes, the coordinator; any number read.
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
