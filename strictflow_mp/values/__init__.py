"""Values: how values, keys and changes of the state become bytes, and come back with the types that they had.

`codec` packs and unpacks: msgpack, with the types that it lacks as `types`, and NumPy arrays where a reader can
use them in place (`arrays`). What reads hand out is read-only (`frozen`). `keys` makes equal keys equal bytes,
`changes` packs what a P1 sets and deletes, `annotations` is for type checkers alone, and `culprit` says what in a value
cannot be stored. Nothing here knows of memory or of processes.
"""
