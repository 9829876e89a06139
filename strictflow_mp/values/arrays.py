"""NumPy arrays outside the msgpack body, so that a reader can use them where they lie.

A packed value that holds at least one array has this layout; offsets count from its first byte:

=======================  =====================================================================
bytes                    meaning
=======================  =====================================================================
0                        0xC1, the one byte that msgpack never uses: plain msgpack cannot start
                         with it
1 .. 3                   zero
4 .. 7                   length of the body, unsigned, little endian
8 .. 8 + length          the body: msgpack, in which each array is a list of fields (below)
then                     zeros up to a multiple of 16: here the area begins
area                     the arrays' elements, each array at a multiple of 16
=======================  =====================================================================

The fields of an array are ``[dtype, order, offset, *shape]``: the dtype as `dtype_fields` gives it, 0 for C
order or 1 for Fortran order, the offset in bytes from the start of the area (not of the value, so that it
is known before the length of the body is), and the shape. The fields of a NumPy scalar are
``[dtype, bytes]``, or ``["U", str]`` and ``["S", bytes]`` for `numpy.str_` and `numpy.bytes_`.

NumPy is optional: nothing here imports it before there is an array to be read.
"""

from __future__ import annotations

import math
import re
import struct
import sys
import threading
from pickle import PickleBuffer
from typing import TYPE_CHECKING, Any

from ..errors import SerializationError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "MAGIC",
    "Parts",
    "array_fields",
    "array_from",
    "dtype_fields",
    "dtype_from",
    "join",
    "scalar_fields",
    "scalar_from",
    "split",
]

MAGIC = 0xC1
"""The first byte of a packed value that holds arrays."""
ALIGN = 16
"""Bytes: an array begins at a multiple of it in its area, which is enough for every dtype."""
HEADER = struct.Struct("<II")  # MAGIC as a whole word makes the three bytes after it zero
MAX_DTYPE_DEPTH = 32
"""How deep a structured dtype may nest: damaged data must not recurse without end."""

Parts = list[tuple[int, memoryview]]
"""Offset in the area, and elements, of each array that was met so far."""

_SIMPLE = re.compile(r"[<>|][biufcSUVMm]\d+(\[\d*[a-zA-Z]+\])?")


importing = threading.RLock()
"""Held while NumPy is imported here, and over a fork: a child would wait for ever for what another thread imports."""


def _numpy() -> Any:
    try:
        with importing:
            import numpy
    except ImportError as error:
        raise SerializationError(
            "the value holds a NumPy array, and NumPy cannot be imported here: "
            "install it with pip install 'strictflow-mp[numpy]'"
        ) from error
    return numpy


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def _flat(array: Any) -> Any:
    """The elements of a C or Fortran contiguous array, in memory order, as bytes; not a copy."""
    if not array.flags.c_contiguous:
        array = array.T
    return array.reshape(-1).view("u1")


# dtypes


def dtype_fields(dtype: Any) -> Any:
    """*dtype* as plain values: NumPy's short string, or a dict of the fields of a structured one.

    Raises:
        SerializationError: it would not come back the same (objects, a user's own types, `numpy.record`).
    """
    fields = _dtype_fields(dtype)
    try:
        back = dtype_from(fields)
    except (TypeError, ValueError):
        back = None
    if back != dtype or back.type is not dtype.type:
        raise SerializationError(
            f"a NumPy array or scalar of dtype {dtype} cannot be stored: "
            "convert it with .astype() to numbers, strings, bytes, times or fields of these"
        )
    return fields


def _dtype_fields(dtype: Any) -> Any:
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return [_dtype_fields(base), list(shape)]
    if dtype.names is None:
        return dtype.str
    entries = [dtype.fields[name] for name in dtype.names]
    return {
        "names": list(dtype.names),
        "formats": [_dtype_fields(entry[0]) for entry in entries],
        "offsets": [entry[1] for entry in entries],
        "titles": [entry[2] if len(entry) > 2 else None for entry in entries],
        "itemsize": dtype.itemsize,
        "aligned": dtype.isalignedstruct,
    }


def dtype_from(fields: Any, depth: int = 0) -> Any:
    """The dtype that `dtype_fields` described.

    Raises:
        TypeError, ValueError: *fields* is damaged.
    """
    if depth > MAX_DTYPE_DEPTH:
        raise ValueError("a dtype nests too deeply")
    if isinstance(fields, str):
        if not _SIMPLE.fullmatch(fields):
            raise ValueError(f"not a dtype that can be stored: {fields!r}")
        return _numpy().dtype(fields)
    if isinstance(fields, list):
        base, shape = fields
        return _numpy().dtype((dtype_from(base, depth + 1), tuple(shape)))
    formats = [dtype_from(each, depth + 1) for each in fields["formats"]]
    return _numpy().dtype({**fields, "formats": formats})


# Arrays


def array_fields(array: Any, parts: Parts) -> list[Any]:
    """The fields of *array*, whose elements are appended to *parts* (a copy only if it has gaps)."""
    fields = dtype_fields(array.dtype)
    if not array.flags.forc:
        whole = _numpy().zeros(array.shape, array.dtype)  # what lies between fields is not left to chance
        whole[...] = array
        array = whole
    fortran = not array.flags.c_contiguous
    offset = _aligned(parts[-1][0] + parts[-1][1].nbytes) if parts else 0
    parts.append((offset, memoryview(_flat(array) if array.nbytes else b"")))
    return [fields, int(fortran), offset, *array.shape]


def join(body: bytes, parts: Parts) -> bytes:
    """The packed value made of *body* and the arrays in it: one copy of each."""
    pieces: list[bytes | memoryview] = [HEADER.pack(MAGIC, len(body)), body]
    position = HEADER.size + len(body)
    area = _aligned(position)
    for offset, elements in parts:
        pieces += [bytes(area + offset - position), elements]
        position = area + offset + elements.nbytes
    return b"".join(pieces)


def split(data: bytes | bytearray | memoryview) -> tuple[memoryview, memoryview]:
    """The body and the area of what `join` made, read-only, not copied.

    Raises:
        ValueError, struct.error: *data* is damaged.
    """
    view = memoryview(data).toreadonly().cast("B")
    magic, length = HEADER.unpack_from(view)
    end = HEADER.size + length
    if magic != MAGIC or end > len(view):
        raise ValueError("the frame around the arrays is damaged")
    return view[HEADER.size : end], view[_aligned(end) :]


def array_from(
    fields: list[Any], area: memoryview, *, private: bool, hold: Callable[[Any], object] | None = None
) -> Any:
    """The array that *fields* describe: a read-only view on *area*, or with *private* a writable copy.

    *hold* is called with each array that is a view on *area*. A read-only array is a copy as well where
    its elements are not aligned for the processor.

    Raises:
        TypeError, ValueError: *fields* are damaged, or point out of *area*.
    """
    spec, fortran, offset, *shape = fields
    if min([offset, *shape]) < 0:
        raise ValueError("the shape or the place of an array is damaged")
    dtype = dtype_from(spec)
    if offset + math.prod(shape) * dtype.itemsize > len(area):
        raise ValueError("an array points out of the value")
    # A PickleBuffer, for NumPy takes a memoryview apart: the array would keep what is below it and not the
    # view, so that the memory could be closed or made writable under it. And there must be no array in
    # between, else what a user derives from this one keeps that alive, and not this, which *hold* watches.
    buffer = PickleBuffer(area)
    array = _numpy().ndarray(tuple(shape), dtype, buffer, offset, order="F" if fortran else "C")
    if private:
        return _private(array)
    if not array.flags.aligned:
        array = _private(array)
        array.flags.writeable = False
    elif hold is not None:
        hold(array)
    return array


def _private(array: Any) -> Any:
    """A writable copy, byte for byte: NumPy's own copy may leave out what lies between fields."""
    numpy = sys.modules["numpy"]
    order = "C" if array.flags.c_contiguous else "F"
    if not array.nbytes:  # `empty` would make room where the dtype itself has none (S0)
        return numpy.ndarray(array.shape, array.dtype, bytearray(), order=order)
    copy = numpy.empty(array.shape, array.dtype, order)
    _flat(copy)[...] = _flat(array)
    return copy


# Scalars


def scalar_fields(scalar: Any) -> list[Any]:
    """The fields of a NumPy scalar."""
    # An array drops zeros at the end of a string, so these two do not go through one.
    if isinstance(scalar, str):
        return ["U", str.__str__(scalar)]
    if isinstance(scalar, bytes):
        return ["S", bytes(scalar)]
    return [dtype_fields(scalar.dtype), scalar.tobytes()]


def scalar_from(fields: list[Any], *, private: bool) -> Any:
    """The NumPy scalar that *fields* describe.

    Raises:
        TypeError, ValueError: *fields* are damaged.
    """
    spec, data = fields
    if spec == "U" and isinstance(data, str):
        return _numpy().str_(data)
    if spec == "S" and isinstance(data, bytes):
        return _numpy().bytes_(data)
    dtype = dtype_from(spec)
    if type(data) is not bytes or len(data) != dtype.itemsize:
        raise ValueError("a NumPy scalar is damaged")
    # A structured scalar is a view on its buffer, and can be changed if that can.
    return _numpy().ndarray((), dtype, bytearray(data) if private else data)[()]
