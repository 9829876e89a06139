"""Keys: how a key of the state becomes bytes, and comes back.

A key is a str, bytes, an int, or a tuple of these. Whatever equals one of them and hashes like it is that key, as in a
dict: an `IntEnum`, a NumPy integer, a str subclass, 1.0. So it does not matter whether a dict finds the key (the cache
of a process, a snapshot's) or its bytes do.

Invariant: equal keys give equal bytes, so a key is found by its bytes alone; nobody compares keys themselves.
"""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Any

from ..errors import ProtocolError, SerializationError, StrictFlowError
from .codec import Packed, pack, unpack
from .culprit import name_of

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["pack_key", "packed_key", "plain_key", "unpack_key"]

MAX_KEY_BYTES = (1 << 20) - 1
"""Of a packed key: its length has the 20 bits of a cell's word of lengths that the payload's leaves (`store.trie`)."""

_FIXSTR = [bytes([0xA0 | size]) for size in range(32)]
"""The byte with which msgpack begins a str of that many bytes."""


def pack_key(key: Any) -> bytes:
    """A key of the state as bytes; equal keys give equal bytes, so True is 1.

    Raises:
        SerializationError: *key* is not, and does not equal, a str, bytes, int, or a tuple of these; or it is too long.
    """
    if type(key) is str:
        text = key.encode("utf-8", "surrogatepass")
        if len(text) < 32:  # what `pack` gives, in half the time
            return _FIXSTR[len(text)] + text
    try:
        packed = pack(plain_key(key))
    except (SerializationError, RecursionError):
        raise _refused(key) from None
    if len(packed) > MAX_KEY_BYTES:
        raise SerializationError(
            f"a key of {len(packed):,} bytes, packed: one may have {MAX_KEY_BYTES:,}; let the value hold what is long"
        )
    return packed


def plain_key(key: Any) -> Any:
    """The str, bytes, int or tuple that *key* is, or equals.

    Raises:
        SerializationError: there is none.
    """
    kind = type(key)
    if kind is str or kind is bytes or kind is int:
        return key
    try:
        if kind is tuple:
            return tuple([plain_key(part) for part in key])
        for plain in _candidates(key, kind):
            if hash(plain) == hash(key) and plain == key:
                return plain
    except Exception:  # a key's own methods may raise anything; it has no hash, or is no number
        pass
    raise _refused(key)


def _candidates(key: Any, kind: type) -> Iterator[Any]:
    """What *key* might equal. Whether it does is for the caller to see, so it does no harm to guess."""
    if issubclass(kind, str):
        yield str.__str__(key)  # what it holds, whatever it says
    elif issubclass(kind, bytes):
        yield bytes.join(b"", (key,))
    elif kind is memoryview:
        yield key.tobytes()
    elif isinstance(key, tuple):
        yield tuple([plain_key(part) for part in tuple(key)])
    else:
        try:
            yield int(getattr(key, "real", key))  # of a complex number, too
        except (TypeError, ValueError, OverflowError):
            pass  # it is no number, or not a finite one
        yield str(key)  # a proxy of a str, a lazily translated one


def _refused(key: Any) -> SerializationError:
    try:
        shown = reprlib.repr(key)
    except Exception:  # it is its own that runs
        shown = f"<{name_of(type(key))} object>"
    return SerializationError(
        f"{shown} cannot be a key of the state: use a str, bytes, an int, or a tuple of these, or what equals one of "
        "them and hashes like it",
        key=key,
    )


def unpack_key(data: Packed) -> Any:
    """The key that was packed.

    Raises:
        ProtocolError: *data* is damaged, or no key.
    """
    try:
        key = unpack(data)
        return key if type(key) is str else _checked(key)
    except SerializationError as error:
        raise ProtocolError(
            f"a packed key is damaged, or foreign ({error}): "
            "let all processes of a flow use the same version of strictflow_mp"
        ) from None


def _checked(key: Any) -> Any:
    """What was unpacked, if it is a key. Nobody packs what merely equals one."""
    kind = type(key)
    if kind is str or kind is bytes or kind is int:
        return key
    if kind is bool:
        return int(key)
    if kind is tuple:
        return tuple([_checked(part) for part in key])
    raise SerializationError(f"no key is of type {name_of(kind)}")


def packed_key(key: Any, flow: str) -> bytes:
    """As `pack_key`; the error names the flow as well.

    Raises:
        SerializationError: as `pack_key`.
    """
    try:
        return pack_key(key)
    except StrictFlowError as error:
        raise error.of(flow) from None
