"""The codec: how values of the state become bytes, and come back with the types that they had.

A packed value is msgpack, with the types that msgpack lacks as `types`. One that holds NumPy arrays
has a frame around it, see `arrays`, so that they can be read where they lie.

Invariants: what was unpacked packs to the very same bytes again, so a change in place is found by packing
again. Equal values pack equally, but for dicts in another order and for numbers of another type.
"""

from __future__ import annotations

from types import NoneType
from typing import TYPE_CHECKING, Any, Final

from msgpack import Packer, unpackb

from ..errors import ProtocolError, SerializationError, StrictFlowError
from . import arrays, culprit
from .faults import FAULTS
from .frozen import FrozenDict, FrozenList
from .types import Decode, DecodeAsIs, Encoder, encoder

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FAULTS", "Packed", "check", "check_size", "has_arrays", "pack", "unpack", "unpack_frozen"]

Packed = bytes | bytearray | memoryview

# Packing

_KEEP_BYTES: Final = 1 << 20
"""An encoder never gives memory back, so one that has grown beyond this is dropped."""

# An encoder must not be entered twice, be it by another thread, a signal handler or a finalizer. So each
# call takes one out of this list and puts it back: both are atomic, nothing is locked, and a forked child
# finds only idle ones here.
_idle: list[Encoder] = []

# Numbers share one encoder: msgpack's extension runs no Python code for them, so nobody can come in between.
_IS_COMPILED = Packer.__module__ == "msgpack._cmsgpack"
_NUMBERS = frozenset({int, float, bool, NoneType} if _IS_COMPILED else ())
_pack_number: Callable[[Any], bytes] = Packer(autoreset=True).pack


def pack(value: Any, path: str = "value", limit: int | None = None) -> bytes:
    """*value* as bytes.

    Types come back as they are, and subclasses are refused, but for these: `bytearray` and `memoryview`
    come back as `bytes`, and what was read from the state as plain `dict`, `list` and `set`. Msgpack takes
    a `frozendict` (Python 3.15) for a `dict`; do not use one as a key or in a set, which a dict cannot be in.

    Args:
        path: what *value* is called in an error.
        limit: bytes that it may have, for it is to be sent; above 1 MiB.

    Raises:
        SerializationError: something in *value* cannot be stored, its `path` says where it is; or it is too long.
    """
    if type(value) in _NUMBERS:
        try:
            return _pack_number(value)
        except OverflowError:
            pass  # too large for msgpack's own
    try:
        idle = _idle.pop()
    except IndexError:
        idle = encoder()
    encode, parts = idle
    try:
        data = encode(value)
        if parts:
            data = arrays.join(data, parts)
            parts.clear()
    except FAULTS as error:
        data = _pack_again(value, path, error)
        check_size(len(data), path, limit)
        return data
    if len(data) <= _KEEP_BYTES:
        _idle.append(idle)
    else:
        check_size(len(data), path, limit)
    return data


def check_size(size: int, path: str, limit: int | None) -> None:
    """Look at the size of what is to be sent before it is: the other end would close the connection.

    Raises:
        SerializationError: it is longer than a message may be.
    """
    if limit is not None and size > limit:
        raise SerializationError(
            f"{path}: {size:,} bytes are more than the {limit:,} that a message may have; make it of several parts",
            path=path,
        )


def _pack_again(value: Any, path: str, error: Exception) -> bytes:
    """Pack *value* with its lone surrogates, or say what in it cannot be stored.

    The encoder that failed is not given back: it may hold half a value.
    """
    if isinstance(error, MemoryError):
        raise error  # no fault of the value
    # Surrogates are not let through in the first place because that slows down every string.
    encode, parts = encoder(errors="surrogatepass")
    if isinstance(error, UnicodeEncodeError):
        try:
            data = encode(value)
            return arrays.join(data, parts) if parts else data
        except FAULTS as second:
            path, reason = culprit.find(value, path, second, encode)
    else:
        path, reason = culprit.find(value, path, error, encode)
    raise SerializationError(f"{path}: {reason}", path=path) from None


# Unpacking

_NOT_DAMAGE = (StrictFlowError, MemoryError, RecursionError)
"""What unpacking raises that is no sign of damage. Depth is counted, so a RecursionError speaks of the caller."""

_plain = Decode(frozen=False)
_frozen = Decode(frozen=True)
_as_is = DecodeAsIs(frozen=True)


def unpack(data: Packed) -> Any:
    """The value that was packed: plain and mutable, the caller's own.

    Raises:
        ProtocolError: *data* is damaged.
        SerializationError: it names what this process does not have: an Enum member, a time zone, NumPy.
    """
    try:
        # As `Decode.unpack`, spelled out: another call, or a partial, takes a third more.
        return unpackb(data, ext_hook=_plain, strict_map_key=False, unicode_errors="surrogatepass")
    except FAULTS as error:
        return _unpack_framed(data, error, frozen=False)


def unpack_frozen(data: Packed, hold: Callable[[Any], object] | None = None) -> Any:
    """The value that was packed, read-only: `FrozenDict`, `FrozenList`, `FrozenSet`.

    NumPy arrays in it are read-only views on *data*, which may be shared memory.

    Args:
        hold: called with each such array, so that the caller can keep the memory until the array, and
            whatever was derived from it, is gone. Not called for an array that had to be copied because
            its elements are not aligned for its dtype.

    Raises:
        ProtocolError, SerializationError: as `unpack`.
    """
    try:
        return unpackb(
            data,
            ext_hook=_frozen,
            object_hook=FrozenDict,
            list_hook=FrozenList,
            strict_map_key=False,
            unicode_errors="surrogatepass",
        )
    except FAULTS as error:
        return _unpack_framed(data, error, frozen=True, hold=hold)


def check(data: Packed) -> None:
    """See to it that a packed value is sound, without a look at what it names: no module is imported for it.

    Raises:
        ProtocolError, SerializationError: as `unpack`.
    """
    try:
        unpackb(data, ext_hook=_as_is, strict_map_key=False, unicode_errors="surrogatepass")
    except FAULTS as error:
        _unpack_framed(data, error, frozen=True, kind=DecodeAsIs)


def has_arrays(data: Packed) -> bool:
    """Whether the packed value holds NumPy arrays, which can be read where they lie."""
    return len(data) > 0 and data[0] == arrays.MAGIC


def _unpack_framed(
    data: Packed,
    error: Exception,
    *,
    frozen: bool,
    hold: Callable[[Any], object] | None = None,
    kind: type[Decode] = Decode,
) -> Any:
    """Unpack what plain msgpack did not take: it has a frame for arrays, or is damaged.

    To look for the frame only now costs a value with arrays 1 µs, and every other nothing.
    """
    if not has_arrays(data):
        if isinstance(error, _NOT_DAMAGE):
            raise error
        raise _damaged(error) from error
    try:
        body, area = arrays.split(data)
        return kind(frozen=frozen, area=area, hold=hold).unpack(body)
    except _NOT_DAMAGE:
        raise
    except FAULTS as second:
        raise _damaged(second) from second


def _damaged(error: Exception) -> ProtocolError:
    return ProtocolError(
        f"a packed value is damaged, or foreign ({type(error).__name__}: {error}): "
        "let all processes of a flow use the same version of strictflow_mp"
    )
