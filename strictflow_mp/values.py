"""The codec: how values and keys of the state become bytes, and come back with the types they had.

A packed value is msgpack, with the types that msgpack lacks as `extensions`. One that holds NumPy arrays
has a frame around it, see `arrays`, so that they can be read where they lie.

Invariants: what was unpacked packs to the very same bytes again, so a change in place is found by packing
again. Equal keys pack equally. Equal values do too, but for dicts in another order and for numbers of
another type.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from struct import error as StructError
from types import NoneType
from typing import Any, Final

from msgpack import Packer, UnpackException, unpackb

from . import arrays, culprit
from .errors import FAULTS, ProtocolError, SerializationError, StrictFlowError
from .extensions import NAMES, Decode, Encoder, encoder
from .frozen import FrozenDict, FrozenList

__all__ = ["describe", "has_arrays", "pack", "pack_key", "unpack", "unpack_frozen", "unpack_key"]

Packed = bytes | bytearray | memoryview

# Packing

_KEEP: Final = 1 << 20  # bytes: an encoder never gives memory back, so one that grew beyond is dropped

# An encoder must not be entered twice, be it by another thread, a signal handler or a finalizer. So each
# call takes one out of this list and puts it back: both are atomic, nothing is locked, and a forked child
# finds only idle ones here.
_idle: list[Encoder] = []


_FAULTS = (*FAULTS, UnpackException)

# Numbers need none: msgpack's extension runs no Python code for them, so nobody can come in between.
_IS_COMPILED = Packer.__module__ == "msgpack._cmsgpack"
_NUMBERS = frozenset({int, float, bool, NoneType} if _IS_COMPILED else ())
_pack_number: Callable[[Any], bytes] = Packer(autoreset=True).pack


def pack(value: Any, path: str = "value") -> bytes:
    """*value* as bytes.

    Types come back as they are, and subclasses are refused, but for these: `bytearray` and `memoryview`
    come back as `bytes`, and what was read from the state as plain `dict`, `list` and `set`. Msgpack takes
    a `frozendict` (Python 3.15) for a `dict`; do not use one as a key or in a set, which a dict cannot be in.

    Args:
        path: what *value* is called in an error.

    Raises:
        SerializationError: something in *value* cannot be stored; its `path` says where it is.
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
    except _FAULTS as error:
        return _pack_again(value, path, error)
    if len(data) <= _KEEP:
        _idle.append(idle)
    return data


def _pack_again(value: Any, path: str, error: Exception) -> bytes:
    """Pack *value* with its lone surrogates, or say what in it cannot be stored."""
    if isinstance(error, MemoryError):
        raise error
    # Surrogates are not let through in the first place because that slows down every string.
    encode, parts = encoder(errors="surrogatepass")
    if isinstance(error, UnicodeEncodeError):
        try:
            data = encode(value)
            return arrays.join(data, parts) if parts else data
        except _FAULTS as second:
            path, reason = culprit.find(value, path, second, encode)
    else:
        path, reason = culprit.find(value, path, error, encode)
    raise SerializationError(f"{path}: {reason}", path=path) from None


# Unpacking

_plain = Decode(frozen=False)
_frozen = Decode(frozen=True)


def unpack(data: Packed) -> Any:
    """The value that was packed: plain and mutable, the caller's own.

    Raises:
        ProtocolError: *data* is damaged.
        SerializationError: it names what this process does not have: an Enum member, a time zone, NumPy.
    """
    try:
        # As `Decode.unpack`, spelled out: another call, or a partial, takes a third more.
        return unpackb(data, ext_hook=_plain, strict_map_key=False, unicode_errors="surrogatepass")
    except _FAULTS as error:
        return _unpack_framed(data, error, frozen=False)


def unpack_frozen(data: Packed, hold: Callable[[Any], object] | None = None) -> Any:
    """The value that was packed, read-only: `FrozenDict`, `FrozenList`, `FrozenSet`.

    NumPy arrays in it are read-only views on *data*, which may be shared memory.

    Args:
        hold: called with each such array, so that the caller can keep the memory until the array, and
            whatever was derived from it, is gone. Not called for an array that had to be copied because
            its place does not suit its dtype.

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
    except _FAULTS as error:
        return _unpack_framed(data, error, frozen=True, hold=hold)


def has_arrays(data: Packed) -> bool:
    """Whether the packed value holds NumPy arrays, which can be read where they lie."""
    return len(data) > 0 and data[0] == arrays.MAGIC


def _unpack_framed(data: Packed, error: Exception, *, frozen: bool, hold: Callable[[Any], object] | None = None) -> Any:
    """Unpack what plain msgpack did not take: it has a frame for arrays, or is damaged.

    To look for the frame only now costs a value with arrays 1 µs, and every other nothing.
    """
    if not has_arrays(data):
        if isinstance(error, _NOT_DAMAGE):
            raise error
        raise _damaged(error) from error
    try:
        body, area = arrays.split(data)
        return Decode(frozen=frozen, area=area, hold=hold).unpack(body)
    except _NOT_DAMAGE:
        raise
    except _FAULTS as second:
        raise _damaged(second) from second


_NOT_DAMAGE = (StrictFlowError, MemoryError, RecursionError)
"""What unpacking raises that is no sign of damage. Depth is counted, so the last speaks of the caller."""


def _damaged(error: Exception) -> ProtocolError:
    return ProtocolError(
        f"a packed value is damaged, or foreign ({type(error).__name__}: {error}): "
        "let all processes of a flow use the same version of strictflow_mp"
    )


# Keys

_FIXSTR = [bytes([0xA0 | size]) for size in range(32)]


def pack_key(key: Any) -> bytes:
    """A key of the state as bytes; equal keys give equal bytes, so True is 1.

    Raises:
        SerializationError: *key* is not a str, bytes, int, or a tuple of these.
    """
    if type(key) is str:
        text = key.encode("utf-8", "surrogatepass")
        if len(text) < 32:  # what `pack` gives, in half the time
            return _FIXSTR[len(text)] + text
    try:
        return pack(_canonical(key))
    except (SerializationError, RecursionError):
        raise SerializationError(
            f"{reprlib.repr(key)} cannot be a key of the state: "
            "use a str, bytes, an int, or a tuple of these, and no subclass of them",
            key=key,
        ) from None


def unpack_key(data: Packed) -> Any:
    """The key that was packed.

    Raises:
        ProtocolError: *data* is damaged, or no key.
    """
    try:
        key = unpack(data)
        return key if type(key) is str else _canonical(key)
    except SerializationError as error:
        raise ProtocolError(
            f"a packed key is damaged, or foreign ({error}): "
            "let all processes of a flow use the same version of strictflow_mp"
        ) from None


def _canonical(key: Any) -> Any:
    kind = type(key)
    if kind is str or kind is bytes or kind is int:
        return key
    if kind is bool:
        return int(key)
    if kind is tuple:
        return tuple([_canonical(part) for part in key])
    raise SerializationError(f"no key is of type {culprit.name_of(kind)}")


# For people

_KINDS = [(0x80, "int"), (0x90, "dict"), (0xA0, "list"), (0xC0, "str"), (0xC1, "None"), (0xC2, "damaged")]
_KINDS += [(0xC4, "bool"), (0xC7, "bytes"), (0xCA, "ext"), (0xCC, "float"), (0xD4, "int"), (0xD9, "fixext")]
_KINDS += [(0xDC, "str"), (0xDE, "list"), (0xE0, "dict"), (0x100, "int")]
"""What a first byte stands for that is below this number and not below the one before."""


def describe(data: Packed) -> str:
    """The name of a packed value's type, from its first bytes; "damaged" where these make no sense."""
    try:
        if has_arrays(data):
            data, _ = arrays.split(data)
        first = data[0]
        kind = next(name for limit, name in _KINDS if first < limit)
        if kind.endswith("ext"):  # the code follows the length, which has 1, 2 or 4 bytes
            code = data[1] if kind == "fixext" else data[1 + (1 << (first - 0xC7))]
            return NAMES[code - 0x100] if code & 0x80 else "ExtType"
    except (ValueError, LookupError, StructError):
        return "damaged"
    return kind
