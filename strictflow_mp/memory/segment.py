"""The segment: one piece of shared memory for each flow, and what lies where in it.

Owns: the shared memory object ``sfmp-<token>``. The coordinator creates and unlinks it; everybody else
    opens it by name.
Written by: see the table; every word has one writer.
Read by: every attached process; the header and the slots' words also by a process that only looks (`tools.glance`).
Order: the coordinator fills the header before it answers the first handshake, so nobody opens half of one.
If we die here: a segment without its magic word is nobody's; ``strictflow-mp clean`` removes it.
Invariants: where a word lies follows from the number of slots alone, so all processes agree on it. SIZE, SLOTS and
    the hash key never change; CLAIMED only grows.

======================  =====================  ======================================================
words                   writer                 meaning
======================  =====================  ======================================================
0 .. 15                 coordinator, at start  identity: magic, layout, size, slots, pid, hash key
16 VERSION              coordinator            the commit word: the version that readers see
10 RESTARTS             coordinator, at start  how often a coordinator has taken over from a dead one
11 EPOCH                coordinator            moves when what readers have bound is outdated: a takeover, or more slots
12 REACH                coordinator            slots below it are looked at by readers; the others nobody has had yet
17 STATUS               coordinator            starting, serving, stopped, or condemned
24 HORIZON              coordinator            oldest version that can be read without a pin
25 CLAIMED              coordinator            words from the start that have memory; the rest has none yet
26 SUSPECT              coordinator            the task that runs: slot and seq (`suspect`)
27 DEADLINE             coordinator            when it must have ended: monotonic ns, or 0
28 TENANCIES            coordinator            admissions to a slot so far
29 LOADING              coordinator, at start  the function that the last dead one was loading
30 LOADINGS             coordinator, at start  how many in a row died while they loaded that
31 TRACE                coordinator            when the recording of the run began: monotonic ns, or 0
32 RELOADS              coordinator, at start  how many of RESTARTS followed one that left for that (`succession`)
33 LEFT                 coordinator            when it left for the next one: monotonic ns, or 0
34 .. 38 OWNERS ...     coordinator            who would start the next coordinator, and when (`succession`)
64 .. 127               coordinator, at start  the flow's name, UTF-8
128 .. 2175             coordinator            ring of 256 commit records, 8 words each
then, one word a slot
SUBMITTED               the slot's process     P1 tasks submitted
FINISHED                coordinator            P1 tasks finished
WAITING                 the slot's process     1 while a reader sleeps on the slot's semaphore
PIDS, STARTS, SPACES    coordinator            whose the slot is: pid, start time, pid namespace
TENANTS                 coordinator            which admission gave it the slot
WAITS, WAITED           the slot's process     how often and how long (ns) its readers waited
SEMAPHORES              coordinator            the random part of the name of its semaphore (`semaphores`)
PINS (16 a slot)        the slot's process     versions (+1) that its snapshots need (`store.pins`)
then, page aligned
ARENA                   coordinator            trie nodes and cells (`store.trie`)
======================  =====================  ======================================================

Slot 0 is the coordinator's own. A slot passes to another process only when the former is proved dead or to run another
program, or has said goodbye and holds no pin any more; in between the coordinator may set the slot's words.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

from ..errors import ProtocolError, StateFull
from ..system import posix
from ..system.machine import FREE_THREADED
from .backing import Backing
from .fences import WORD, publish_fence, read_fence, words_of
from .slot import PIN_WORDS, SLOT_ARRAYS, SlotWords

if TYPE_CHECKING:
    from ..system.identity import Identity
    from .mapping import Mapping

__all__ = [
    "CONDEMNED",
    "FIRST_REACH_SLOTS",
    "PREFIX",
    "RECORD_WORDS",
    "RING_RECORDS",
    "R_BASE",
    "R_COUNT",
    "R_DELTA",
    "R_ROOT",
    "R_TIME",
    "R_VERSION",
    "SERVING",
    "STARTING",
    "STOPPED",
    "W_DEADLINE",
    "W_EPOCH",
    "W_HORIZON",
    "W_LEFT",
    "W_LOADING",
    "W_LOADINGS",
    "W_OWNERS",
    "W_OWNER_PID",
    "W_OWNER_SPACE",
    "W_OWNER_START",
    "W_OWNER_STARTS",
    "W_PID",
    "W_REACH",
    "W_RELOADS",
    "W_RESTARTS",
    "W_RING",
    "W_START",
    "W_STATUS",
    "W_SUSPECT",
    "W_TENANCIES",
    "W_TRACE",
    "W_VERSION",
    "Segment",
    "unlink_segment",
]

PREFIX = "sfmp-"
"""How the names of all shared objects of this library begin."""

MAGIC = int.from_bytes(b"SFLOWMP\x01", "little")
LAYOUT = 8

W_MAGIC, W_LAYOUT, W_SIZE, W_SLOTS, W_PID, W_START, W_KEY = 0, 1, 2, 3, 4, 5, 8
W_RESTARTS, W_EPOCH, W_REACH = 10, 11, 12
W_VERSION, W_STATUS, W_HORIZON, W_CLAIMED, W_NAME, W_RING = 16, 17, 24, 25, 64, 128
W_SUSPECT, W_DEADLINE, W_TENANCIES, W_LOADING, W_LOADINGS, W_TRACE = 26, 27, 28, 29, 30, 31
W_RELOADS, W_LEFT, W_OWNERS, W_OWNER_PID, W_OWNER_START, W_OWNER_SPACE, W_OWNER_STARTS = 32, 33, 34, 35, 36, 37, 38
"""The control words: where each lies. The table above says what it means and who writes it."""

NAME_BYTES = 512
"""Bytes for the flow's name, with at least one zero after it."""

SERVING, STOPPED, CONDEMNED, STARTING = 1, 2, 3, 4
"""What STATUS says. STOPPED is for good; a segment that is condemned may be taken over, and then is served again."""

RING_RECORDS = 256
"""Commit records kept: a reader that is overtaken by this many commits looks again."""
RECORD_WORDS = 8
"""Words in a commit record: version, trie root, number of keys, time (ns), receipts (two blocks), two in reserve."""
R_VERSION, R_ROOT, R_COUNT, R_TIME, R_BASE, R_DELTA = 0, 1, 2, 3, 4, 5
"""Which word of a record is what."""

FIRST_REACH_SLOTS = 8
"""Slots whose flags readers look at to begin with (`gate.GateKeeper.widen`)."""

PAGE_BYTES = 4096
"""Alignment of the arena, and of SIZE."""
CLAIM_BYTES = 1 << 20
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
        words: every word of the segment, those that are not claimed yet included: nobody may touch these.
        buffer: every byte of it; as with the words.
        memory: the same, for slices that are copies. What several threads may do at a time takes these: CPython without
            the GIL counts the views that are made of one memoryview wrongly (3.13), and lets go of the memory too soon.
        slots: how many slots there are, the coordinator's own included. It never changes.
        size: bytes of the segment, a multiple of a page. It never changes.
        submitted, finished, waiting, pids, starts, spaces, tenants, waits, waited, semaphores: at which word the array
            begins that has one such word for each slot.
        pins: at which word the pin words begin, `PIN_WORDS` for each slot.
        arena: the first word of the state's memory.
    """

    def __init__(self, name: str, mapping: Mapping, slots: int, size: int) -> None:
        self.name = name
        self.slots = slots
        self.size = size
        self._mapping = mapping  # outlives `close` while somebody still looks at it
        assert mapping.buf is not None
        self.buffer: memoryview = mapping.buf[:size]
        self.words = words_of(self.buffer)
        self._whole = self.memory = mapping.memory
        position = W_RING + RING_RECORDS * RECORD_WORDS
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
        self.semaphores = self.waited + array
        self.pins = self.semaphores + array
        self.arena = _round_up(self.pins + slots * PIN_WORDS, PAGE_BYTES // WORD)
        self._backing = Backing(name)  # claims for the coordinator alone

    def record(self, version: int) -> int:
        """Where the commit record of a version begins; of one that is 256 older or younger, too."""
        return W_RING + version % RING_RECORDS * RECORD_WORDS

    def slot(self, number: int) -> SlotWords:
        """The words of a slot, by name."""
        return SlotWords(self.words, number, self.submitted, self.finished - self.submitted, self.pins)

    @staticmethod
    def control_bytes(slots: int) -> int:
        """Bytes before the arena in a segment with that many slots."""
        array = _round_up(slots, 8)
        words = W_RING + RING_RECORDS * RECORD_WORDS + SLOT_ARRAYS * array + slots * PIN_WORDS
        return _round_up(words * WORD, PAGE_BYTES)

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
        size = _round_up(cls.control_bytes(slots) + max(capacity, CLAIM_BYTES), PAGE_BYTES)
        try:
            mapping = _map(name, size)
        except FileExistsError:
            raise
        except OSError as error:
            unlink_segment(name)
            raise StateFull(
                f"a segment of {size:,} bytes cannot be mapped ({error}); start the flow with a smaller capacity=",
                flow=flow,
            ) from error
        segment = cls(name, mapping, slots, size)
        try:
            words = segment.words
            segment._backing.claim(0, _round_up(segment.arena * WORD, PAGE_BYTES), flow)
            words[W_LAYOUT], words[W_SIZE], words[W_SLOTS] = LAYOUT, size, slots
            words[W_PID], words[W_START] = identity.pid, identity.start
            words[W_REACH] = min(FIRST_REACH_SLOTS, slots)
            segment.buffer[W_KEY * WORD : (W_KEY + 2) * WORD] = os.urandom(16)
            encoded = flow.encode()[: NAME_BYTES - WORD]
            segment.buffer[W_NAME * WORD : W_NAME * WORD + len(encoded)] = encoded
            words[W_CLAIMED] = segment.arena
            words[W_STATUS] = status
            # Store-store: MAGIC may not be seen before the header that it vouches for. Pairs with `Segment.open`.
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
            if mapping.user not in (os.getuid(), os.geteuid()):
                raise ProtocolError(f"shared memory {name!r} belongs to user {mapping.user}: nothing of it is read")
            magic = layout = size = slots = 0
            if mapping.size >= PAGE_BYTES:
                (magic,) = struct.unpack_from("Q", mapping.buf)
                read_fence()  # load-load: the header not before the MAGIC that vouches for it. Pairs with `create`
                layout, size, slots = struct.unpack_from("3Q", mapping.buf, WORD)
            sound = magic == MAGIC and size <= mapping.size and size % PAGE_BYTES == 0 and 0 < slots < 1 << 16
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
        views; beyond it lie pages that do not exist, and in a full /dev/shm touching one is SIGBUS.
        """
        limit = max(self.arena, min(self.words[W_CLAIMED], self.size // WORD))  # whatever it says
        return self.array(0, limit), memoryview(self._whole)[: limit * WORD]

    def array(self, start: int, count: int) -> memoryview:
        """Words from *start* on, as a view that has nothing in common with others: any thread may make one."""
        return words_of(memoryview(self._whole)[: self.size])[start : start + count]

    @property
    def words_claimed(self) -> int:
        """How many words are claimed."""
        return int(self.words[W_CLAIMED])

    def claim(self, words: int, flow: str) -> int:
        """Claim at least that many more words after the claimed ones; return how many it was.

        Only the coordinator calls it.

        Raises:
            StateFull: the capacity is used up, or the file system or the container is full.
        """
        start = self.words[W_CLAIMED]
        end = min(_round_up(start * WORD + max(words * WORD, CLAIM_BYTES), CLAIM_BYTES), self.size) // WORD
        if end - start < words:
            raise StateFull(
                f"the state needs {words * WORD:,} bytes more, and its capacity of {self.size:,} bytes is "
                "used up; delete keys, or start the flow with a larger capacity=",
                flow=flow,
            )
        keys = self.words[self.record(self.words[W_VERSION]) + R_COUNT]
        try:
            self._backing.claim(start * WORD, end * WORD, flow, keys)
        except StateFull:
            # A whole step does not fit; what is needed may.
            end = min(_round_up((start + words) * WORD, PAGE_BYTES), self.size) // WORD
            self._backing.claim(start * WORD, end * WORD, flow, keys)
        # Store-store: CLAIMED may not be seen before the memory is there. `Segment.claimed` needs no fence for it: it
        # bounds what is touched by what it has loaded, and the kernel looks for a page when that branch has been taken.
        publish_fence()
        self.words[W_CLAIMED] = end
        return end - start

    def close(self) -> None:
        """Unmap, unless a reader still holds a view on it."""
        self._backing.close()
        if not FREE_THREADED:  # else another thread may be in the midst of a load (`mapping`)
            try:
                self.words.release()
                self.buffer.release()
            except BufferError:
                pass
        self._mapping.close()

    def is_named(self) -> bool:
        """Whether its name still leads to this memory, as far as we can see: whoever attaches opens it by that."""
        return self._backing.is_named()

    def unlink(self) -> None:
        """Remove the name; the memory goes when the last process has closed it."""
        unlink_segment(self.name)

    def __repr__(self) -> str:
        return f"<Segment {self.name} of {self.size:,} bytes, {self.slots} slots>"


def _foreign(name: str) -> ProtocolError:
    return ProtocolError(
        f"shared memory {name!r} is not a StrictFlow segment, or is damaged; "
        "if no flow uses it, run `strictflow-mp clean`"
    )


def unlink_segment(name: str) -> None:
    """Remove a segment's name. No error if it is gone already, and another user's by now."""
    try:
        posix.unlink_shared_memory("/" + name)
    except (posix.ExistentialError, posix.PermissionsError):
        pass
