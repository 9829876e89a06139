"""The segment: one piece of shared memory for each flow, and what lies where in it.

Owns: the shared memory object ``sfmp-<token>``. The coordinator creates and unlinks it; everybody else
    opens it by name.
Written by: see the table; every word has one writer.
Read by: every attached process; the header and the slots' words also by who only looks (`glance`).
Order: the coordinator fills the header before it answers the first handshake, so nobody opens half of one.
If we die here: a segment without its magic word is nobody's; ``strictflow-mp clean`` removes it.

======================  =====================  ======================================================
words                   writer                 meaning
======================  =====================  ======================================================
0 .. 15                 coordinator, at start  identity: magic, layout, size, slots, pid, hash key
16 VERSION              coordinator            the commit word: the version that readers see
10 RESTARTS             coordinator, at start  how often a coordinator has taken over from a dead one
11 EPOCH                coordinator            moves when what readers have bound is outdated: a takeover, or more slots
12 REACH                coordinator            slots below it are looked at by readers; the others nobody has had yet
17 STATUS               coordinator            serving, stopped, or condemned
24 HORIZON              coordinator            oldest version that can be read without a pin
25 CLAIMED              coordinator            words behind which no memory is claimed yet
26 SUSPECT              coordinator            the task that runs: slot and seq (`suspect`)
27 DEADLINE             coordinator            when it must have ended: monotonic ns, or 0
28 TENANCIES            coordinator            admissions to a slot so far
29 LOADING              coordinator, at start  the function that the last dead one was loading
30 LOADINGS             coordinator, at start  how many in a row died while they loaded that
31 TRACE                coordinator            when the recording of the run began: monotonic ns, or 0
64 .. 127               coordinator, at start  the flow's name, UTF-8
128 .. 2175             coordinator            ring of 256 commit records, 8 words each
then, one word a slot
SUBMITTED               the slot's process     P1 tasks submitted
FINISHED                coordinator            P1 tasks finished
WAITING                 the slot's process     1 while a reader sleeps on the slot's semaphore
PIDS, STARTS, SPACES    coordinator            who has the slot: pid, start time, pid namespace
TENANTS                 coordinator            which admission gave it the slot
WAITS, WAITED           the slot's process     how often and how long (ns) its readers waited
PINS (16 a slot)        the slot's process     versions (+1) that its snapshots need (`store.pins`)
then, page aligned
ARENA                   coordinator            trie nodes and cells (`store.trie`)
======================  =====================  ======================================================

Slot 0 is the coordinator's own. A slot passes to another process only when the former one is proved
dead or has said goodbye; in between the coordinator may set the slot's words.
"""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING

import posix_ipc

from .errors import ProtocolError, StateFull
from .processes import Identity
from .words import WORD, publish_fence, words_of

if TYPE_CHECKING:
    from .mapping import Mapping

__all__ = ["PREFIX", "Segment"]

PREFIX = "sfmp-"
"""How the names of all shared objects of this library begin."""

MAGIC = int.from_bytes(b"SFLOWMP\x01", "little")
LAYOUT = 6

W_MAGIC, W_LAYOUT, W_SIZE, W_SLOTS, W_PID, W_START, W_KEY = 0, 1, 2, 3, 4, 5, 8
W_RESTARTS, W_EPOCH, W_REACH = 10, 11, 12
W_VERSION, W_STATUS, W_HORIZON, W_CLAIMED, W_NAME, W_RING = 16, 17, 24, 25, 64, 128
W_SUSPECT, W_DEADLINE, W_TENANCIES, W_LOADING, W_LOADINGS, W_TRACE = 26, 27, 28, 29, 30, 31
NAME_BYTES = 512
SERVING, STOPPED, CONDEMNED, STARTING = 1, 2, 3, 4

RING = 256
"""Commit records kept: a reader that is overtaken by this many commits looks again."""
RECORD = 8
"""Words in a commit record: version, trie root, number of keys, time (ns), receipts (two blocks), two in reserve."""
R_VERSION, R_ROOT, R_COUNT, R_TIME, R_BASE, R_DELTA = 0, 1, 2, 3, 4, 5

ARRAYS = 9
"""Arrays with a word for each slot, beside the pins."""
REACH = 8
"""Slots whose flags readers look at to begin with (`gate.GateKeeper.widen`)."""
PINS = 16
"""Pin words for each slot: the last one is a floor (`store.pins`)."""

PAGE = 4096
STEP = 1 << 20
"""Bytes claimed at a time."""


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _map(name: str, size: int = 0) -> Mapping:
    """Create (size > 0) or open a mapping."""
    from .mapping import Mapping

    return Mapping.of(name, size)


class Segment:
    """A mapped segment: its words, its bytes, and where the arrays in it begin.

    Attributes:
        words: every word of the segment.
        buffer: every byte of it.
        slots: how many slots there are, the coordinator's own included.
    """

    def __init__(self, name: str, mapping: Mapping, slots: int, size: int) -> None:
        self.name = name
        self.slots = slots
        self.size = size
        self._mapping = mapping
        assert mapping.buf is not None
        self.buffer: memoryview = mapping.buf[:size]
        self.words = words_of(self.buffer)
        position = W_RING + RING * RECORD
        array = _round_up(slots, 8)
        self.submitted = position
        self.finished = self.submitted + array
        self.waiting = self.finished + array
        self.pids = self.waiting + array
        self.starts = self.pids + array
        self.spaces = self.starts + array
        self.tenants = self.spaces + array
        self.waits = self.tenants + array
        self.waited = self.waits + array
        self.pins = self.waited + array
        self.arena = _round_up(self.pins + slots * PINS, PAGE // WORD)
        self._fd = -1

    @staticmethod
    def control_bytes(slots: int) -> int:
        """Bytes ahead of the arena in a segment with that many slots."""
        array = _round_up(slots, 8)
        return _round_up((W_RING + RING * RECORD + ARRAYS * array + slots * PINS) * WORD, PAGE)

    @classmethod
    def create(
        cls, token: str, flow: str, *, capacity: int, slots: int, identity: Identity, status: int = SERVING
    ) -> Segment:
        """Create the segment of a flow, with an empty state.

        Args:
            capacity: bytes for the state, claimed only as they are used.
            identity: the coordinator.

        Raises:
            StateFull: shared memory has no room for even an empty flow.
        """
        name = PREFIX + token
        size = _round_up(cls.control_bytes(slots) + max(capacity, STEP), PAGE)
        try:
            mapping = _map(name, size)
        except FileExistsError:
            raise
        except OSError as error:
            unlink(name)
            raise StateFull(
                f"a segment of {size:,} bytes cannot be mapped ({error}); start the flow with a smaller capacity=",
                flow=flow,
            ) from error
        segment = cls(name, mapping, slots, size)
        try:
            words = segment.words
            segment._claim_bytes(0, _round_up(segment.arena * WORD, PAGE), flow)
            words[W_LAYOUT], words[W_SIZE], words[W_SLOTS] = LAYOUT, size, slots
            words[W_PID], words[W_START] = identity.pid, identity.start
            words[W_REACH] = min(REACH, slots)
            segment.buffer[W_KEY * WORD : (W_KEY + 2) * WORD] = os.urandom(16)
            encoded = flow.encode()[: NAME_BYTES - WORD]
            segment.buffer[W_NAME * WORD : W_NAME * WORD + len(encoded)] = encoded
            words[W_CLAIMED] = segment.arena
            words[W_STATUS] = status
            publish_fence()
            words[W_MAGIC] = MAGIC
        except BaseException:
            segment.close()
            segment.unlink()
            raise
        return segment

    @classmethod
    def open(cls, name: str) -> Segment:
        """Open an existing segment.

        Raises:
            FileNotFoundError: there is none of that name.
            ProtocolError: it is not a segment of this library, or of another layout.
        """
        try:
            mapping = _map(name)
        except ValueError as error:  # it is empty
            raise _foreign(name) from error
        try:
            assert mapping.buf is not None
            fields = struct.unpack_from("4Q", mapping.buf) if mapping.size >= PAGE else (0, 0, 0, 0)
            magic, layout, size, slots = fields
            sound = magic == MAGIC and size <= mapping.size and size % PAGE == 0 and 0 < slots < 1 << 16
            if not sound or cls.control_bytes(slots) > size:
                raise _foreign(name)
            if layout != LAYOUT:
                raise ProtocolError(
                    f"shared memory {name!r} has layout {layout}, this version reads {LAYOUT}; "
                    "use the same version of strictflow-mp in all processes of a flow"
                )
            return cls(name, mapping, slots, size)
        except BaseException:
            mapping.close()
            raise

    @property
    def flow(self) -> str:
        """The name of the flow that the segment belongs to."""
        raw = bytes(self.buffer[W_NAME * WORD : W_NAME * WORD + NAME_BYTES])
        return raw.rstrip(b"\0").decode(errors="replace")

    @property
    def hash_key(self) -> bytes:
        """The key of the trie's hash: 16 random bytes, drawn when the flow was created."""
        return bytes(self.buffer[W_KEY * WORD : (W_KEY + 2) * WORD])

    def claimed(self) -> tuple[memoryview, memoryview]:
        """The words and bytes up to the end of the claimed memory.

        A reader that strays (because the memory under it was reused) gets IndexError at the end of these
        views; behind it lie pages that do not exist, and in a full /dev/shm touching one is SIGBUS.
        """
        limit = max(self.arena, min(self.words[W_CLAIMED], self.size // WORD))  # whatever it says
        return self.words[:limit], self.buffer[: limit * WORD]

    @property
    def words_claimed(self) -> int:
        """How many words are claimed."""
        return int(self.words[W_CLAIMED])

    def claim(self, words: int, flow: str) -> int:
        """Claim at least that many more words behind the claimed ones; return how many it was.

        Only the coordinator calls it.

        Raises:
            StateFull: the capacity is used up, or the file system is full.
        """
        start = self.words[W_CLAIMED]
        end = min(_round_up(start * WORD + max(words * WORD, STEP), STEP), self.size) // WORD
        if end - start < words:
            raise StateFull(
                f"the state needs {words * WORD:,} bytes more, and its capacity of {self.size:,} bytes is "
                "used up; delete keys, or start the flow with a larger capacity=",
                flow=flow,
            )
        try:
            self._claim_bytes(start * WORD, end * WORD, flow)
        except StateFull:
            # A whole step does not fit; what is needed may.
            end = min(_round_up((start + words) * WORD, PAGE), self.size) // WORD
            self._claim_bytes(start * WORD, end * WORD, flow)
        publish_fence()
        self.words[W_CLAIMED] = end
        return end - start

    def _claim_bytes(self, start: int, end: int, flow: str) -> None:
        if not hasattr(os, "posix_fallocate"):  # macOS
            return
        if self._fd < 0:
            self._fd = posix_ipc.SharedMemory("/" + self.name).fd
        try:
            os.posix_fallocate(self._fd, start, end - start)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
                raise
            raise StateFull(
                f"/dev/shm has no room for {end - start:,} bytes more ({os.strerror(error.errno)}); "
                "delete keys, or enlarge /dev/shm (Docker: --shm-size)",
                flow=flow,
            ) from error

    def close(self) -> None:
        """Unmap, unless a reader still holds a view on it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        try:
            self.words.release()
            self.buffer.release()
        except BufferError:
            pass
        self._mapping.close()

    def unlink(self) -> None:
        """Remove the name; the memory goes when the last process has closed it."""
        unlink(self.name)

    def __repr__(self) -> str:
        return f"<Segment {self.name} of {self.size:,} bytes, {self.slots} slots>"


def _foreign(name: str) -> ProtocolError:
    return ProtocolError(
        f"shared memory {name!r} is not a StrictFlow segment, or is damaged; "
        "if no flow uses it, run `strictflow-mp clean`"
    )


def unlink(name: str) -> None:
    """Remove a segment's name. No error if it is gone already."""
    try:
        posix_ipc.unlink_shared_memory("/" + name)
    except posix_ipc.ExistentialError:
        pass
