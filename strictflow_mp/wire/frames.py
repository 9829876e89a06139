"""Frames: what is said on a connection that is made already (`handshake`), and how it is packed.

A connection carries a stream of msgpack arrays in both directions. msgpack needs no length prefix.

Client to coordinator::

    [FUNCTION, id, by_value, code, name, priority, key, timeout, [[module, file, digest], ...]]
                                       once for each function and connection; the modules: see `origins`
    [CALL, seq, id, [arguments, ...], ticket, ack]
                                       calls seq, seq + 1, ...; arguments: see `arguments`
    [PUT, seq, [[key, payload or nil]], ticket, ack]   a ready-made P1; nil deletes
    [OPERATE, seq, what, [[key, payload or nil]], ticket, ack]
                                       a ready-made P1 that looks first, see `coordinator.operations`
    [PATHS, [path, ...]]               where it looks for modules, when that has changed since its greeting
    [FORGET, [id, ...]]                no call will name these functions again; their numbers are not given again
    [COUNT, ticket]                    count up to that ticket, in its turn: nobody sends those P1 tasks again
    [ACK, ack]                         the answers of P1 tasks up to that seq have arrived
    [CANCEL, seq, other]               asks whether task `other` is still to be had back
    [STATS, seq]
    [STOP, seq, drain]
    [RELOAD, seq, restarts]            asks for a coordinator later than the one with that number of restarts
    [ADOPT, seq, always]               asks to be its owner, who starts the next coordinator, and this one to leave
    [WATCH, seq, version, [key, ...]]  asks to be told when one of the keys (none: any) has changed after that version
    [TRACE, seq, directory, on]        asks to record the run into that directory, or no more
    [GOODBYE]                          the client will not touch its slot again, but to unpin

`seq` numbers what is sent on a connection, from 1 on; an answer carries the `seq` of what it answers. `ticket` numbers
the P1 tasks of a slot (`memory.gate`): that of this one, or of the first of several; 0 for a P2. `ack` says that the
answers of all P1 tasks up to that `seq` have arrived, so that their receipts are needed no more.

After the coordinator's death a process sends the functions that it has not let go of, and every frame that has no
answer yet, once more to the next one, under their old numbers: so the next one knows from the receipts which of them
have been committed.

Coordinator to client::

    [RESULT, seq, [payload, ...]]        of seq, seq + 1, ...
    [FAILURE, seq, text, pickled]        see `failures`
    [CANCELLED, seq]
    [DIFFERENT, id]                      that function's code is not what is loaded: introduce it anew, by value

A process that is not let in is told so in place of its welcome, before any frame (`handshake`).

A frame that breaks a limit or the form closes its own connection, and no other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgpack

from ..errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "MAX_BODY_BYTES",
    "MAX_FIELDS",
    "MAX_FRAME_BYTES",
    "PROTOCOL",
    "Frame",
    "check_fields",
    "pack_frame",
    "unpack_frame",
]

PROTOCOL = 6
"""Version of everything in this module: a greeting with another one is refused."""

FUNCTION, CALL, PUT, CANCEL, STATS, STOP, GOODBYE, ACK, COUNT, WATCH, TRACE, OPERATE, FORGET = range(1, 14)
PATHS, RELOAD, ADOPT = range(14, 17)
RESULT, FAILURE, CANCELLED, DIFFERENT = range(1, 5)

MAX_FRAME_BYTES = 1 << 30
"""Bytes in a frame, at most: a longer one costs its connection."""
MAX_FIELDS = 1 << 19
"""Fields in a frame, or changes in a put, at most: what is announced is set aside before it comes."""
MAX_BODY_BYTES = MAX_FRAME_BYTES - (1 << 20)
"""Bytes of values in a frame, at most. The rest is for what is around them, and for a portion of what comes next."""

_pack = msgpack.Packer(autoreset=True, unicode_errors="surrogatepass").pack

Frame = tuple[Any, ...]


def pack_frame(*fields: Any) -> bytes:
    """One frame. Only for plain fields; thread-safe, since the GIL is held throughout."""
    packed: bytes = _pack(fields)
    return packed


def unpack_frame(data: bytes) -> Frame:
    """One frame that `pack_frame` made."""
    frame: Frame = msgpack.unpackb(
        data, raw=False, use_list=False, strict_map_key=False, unicode_errors="surrogatepass"
    )
    return frame


def check_fields(frame: Sequence[Any], *kinds: type | tuple[type, ...]) -> None:
    """Check the types of a frame's fields after the first; a bool is no int here.

    Raises:
        ProtocolError: wrong number, or wrong type.
    """
    if len(frame) != len(kinds) + 1 or not all(map(_is_of, frame[1:], kinds)):
        raise ProtocolError(f"frame {frame[0]!r} has the wrong fields")


def _is_of(value: Any, kind: type | tuple[type, ...]) -> bool:
    return type(value) in kind if type(kind) is tuple else type(value) is kind
