"""Faults: which exceptions are those of packing and unpacking itself, and which are somebody else's."""

from __future__ import annotations

from struct import error as StructError

from msgpack import UnpackException

from ..errors import StrictFlowError

__all__ = ["FAULTS"]

FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RuntimeError,
    StructError,
    StrictFlowError,
    TypeError,
    UnpackException,
    ValueError,
)
"""What goes wrong by itself while a value is packed or unpacked. An exception of any other class was raised by a signal
handler that ran meanwhile: it belongs to the user, and passes."""
