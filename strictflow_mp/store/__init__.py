"""The store: a persistent tree in shared memory, one root flip for each commit.

`arena` finds room, `trie` lays out and edits the tree, `commit` publishes versions, `reader` reads them,
`pins` keeps old ones alive for snapshots.
"""

from .commit import BURST_BYTES, StoreWriter
from .pins import PinnedVersions, Pins, clear_pins
from .reader import Cell, StoreReader, Version

__all__ = ["BURST_BYTES", "Cell", "PinnedVersions", "Pins", "StoreReader", "StoreWriter", "Version", "clear_pins"]
