"""The store: a dict with versions. What is read is right, whoever dies or is overtaken, and no memory is lost."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import random
import secrets
import zlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import event, given, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from watched import Watched, WatchedSegment, nothing, watched_mould, watched_shape

from strictflow_mp.client import state as states
from strictflow_mp.client.state import FlowState
from strictflow_mp.errors import ProtocolError, StateFull, StrictFlowError
from strictflow_mp.memory import segment as segments
from strictflow_mp.memory.fences import WORD
from strictflow_mp.memory.segment import RING_RECORDS, W_EPOCH, W_HORIZON, W_KEY, W_VERSION, Segment
from strictflow_mp.memory.slot import PIN_WORDS
from strictflow_mp.store import Found, PinnedVersions, Pins, StoreReader, StoreWriter, Version, commit
from strictflow_mp.store import arena as arenas
from strictflow_mp.store import reader as readers
from strictflow_mp.store import trie as tries
from strictflow_mp.store.arena import Arena, block_size, span
from strictflow_mp.store.reader import HOPS
from strictflow_mp.store.trie import (
    CELL_HEAD_WORDS,
    FANOUT,
    KEY_SHIFT,
    NEXT,
    NODE_WORDS,
    PAYLOAD_MASK,
    Hash,
    cell_words,
    walk,
)
from strictflow_mp.system.identity import Identity
from strictflow_mp.values import keys as keys_module

pytestmark = pytest.mark.once

LIKE_A_NODE = (NODE_WORDS - CELL_HEAD_WORDS - 1) * WORD
"""Bytes of payload that make a cell, with a key of up to 8 bytes, as large as a node: so it reuses one's memory."""


@pytest.fixture(autouse=True)
def _word_by_word(monkeypatch):
    """Watched cells are filled, and taken apart, so that whatever may happen in between does."""
    monkeypatch.setattr(readers, "shape", watched_shape)
    monkeypatch.setattr(states, "shape", watched_shape)
    monkeypatch.setattr(tries, "mould", watched_mould)


class Store:
    """A segment with a writer, and a reader in slot 1."""

    def __init__(self, capacity: int = 1 << 20) -> None:
        token = secrets.token_hex(6)
        self.segment = Segment.create(
            token, "store", capacity=capacity, slots=4, identity=Identity(os.getpid(), 1, 0, 0)
        )
        self.segment.words[W_KEY : W_KEY + 2] = memoryview(bytes(16)).cast("Q")  # the same tries in every run
        self._opened = [self.segment]
        self.writer = StoreWriter(self.segment, "store")
        self.writer.create()
        self.capacity = self.segment.size
        self.reader = self.reader_in(1)

    def open(self, kind: type[Segment] = Segment) -> Any:
        self._opened.append(kind.open(self.segment.name))
        return self._opened[-1]

    def reader_in(self, slot: int) -> StoreReader:
        segment = self.open()
        return StoreReader(segment, Pins(segment, slot))

    def slow_reader(self) -> tuple[WatchedSegment, StoreReader]:
        segment = self.open(WatchedSegment)
        return segment, StoreReader(segment, Pins(self.segment, 2))

    def another_writer(self, on_access: Any = nothing) -> StoreWriter:
        """One that takes over, as after the death of the first."""
        segment = self.open()
        segment.words = Watched(segment.words, on_access)
        segment.buffer = Watched(segment.buffer, on_access)
        writer = StoreWriter(segment, "store")
        writer.recover()
        return writer

    def get(self, key: bytes) -> bytes | None:
        found = self.reader.get(self.reader.route(key))
        return found and found[2]

    def items(self) -> dict[bytes, bytes]:
        version = self.reader.pin()
        try:
            return {cell.key: bytes(cell.payload) for cell in self.reader.cells(version)}
        finally:
            self.reader.unpin(version)

    def squeeze(self) -> None:
        """Make the writer give back all that rests: a value that can never fit makes it look for room."""
        with pytest.raises(StateFull):
            self.writer.publish({b"huge": bytes(self.capacity)})

    def close(self) -> None:
        for segment in self._opened:
            segment.close()
        self.segment.unlink()


@pytest.fixture
def new_store() -> Iterator[Callable[..., Store]]:
    made: list[Store] = []

    def new_store(**options: Any) -> Store:
        made.append(Store(**options))
        return made[-1]

    yield new_store
    for store in made:
        store.close()


@pytest.fixture
def reuse_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Almost nothing rests, so memory is reused by the next few commits."""
    monkeypatch.setattr(commit, "REST_WORDS", 0)
    monkeypatch.setattr(arenas, "RESERVE_BLOCKS", 8)


WEAK = {
    "strong": lambda key, block, real: real,
    "35 bits equal": lambda key, block, real: real << 35 if block == 0 else real,
    "60 bits equal": lambda key, block, real: real << 60 if block == 0 else real,
    "180 bits equal": lambda key, block, real: 0 if block < 3 else real,
    "every other key collides": lambda key, block, real: 0 if block < 2 and key[-1] & 1 else real,
}


@pytest.fixture(params=WEAK)
def hashing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    weaken = WEAK[request.param]
    first, again = Hash.__call__, Hash.again
    low = (1 << 64) - 1
    monkeypatch.setattr(Hash, "__call__", lambda self, key: weaken(key, 0, first(self, key)) & low)
    monkeypatch.setattr(Hash, "again", lambda self, key, n: weaken(key, n, again(self, key, n)) & low)


class Died(BaseException):
    pass


KEYS = [b"k%d" % number for number in range(12)]
PAYLOADS = st.builds(
    lambda size, byte: bytes([byte]) * size,
    st.sampled_from([1, 7, 8, 9, 100, LIKE_A_NODE - 3, LIKE_A_NODE, 900, 5000]),
    st.sampled_from([0x00, 0x01, 0x80, 0xFF]),
)
CHANGES = st.dictionaries(st.sampled_from(KEYS), st.none() | PAYLOADS, min_size=1, max_size=6)
SLOTS = (1, 2)


class StoreMachine(RuleBasedStateMachine):
    """The store against a dict; every pinned version against the copy of the dict at that version."""

    def __init__(self) -> None:
        super().__init__()
        self.life = math.inf
        self.store = Store(capacity=16 << 20)
        self.writer = self.store.another_writer(self._on_access)
        self.readers = {slot: self.store.reader_in(slot) for slot in SLOTS}
        self.state: dict[bytes, tuple[int, bytes]] = {}  # key -> version that wrote it, payload
        self.pinned: list[tuple[StoreReader, Version, dict[bytes, tuple[int, bytes]]]] = []
        self.total = self.writer.bytes_used + self.writer.bytes_free
        self.empty = self.writer.bytes_used
        self.known: dict[bytes, Found] = {}  # what the first reader has found

    def _on_access(self, where: object, stored: int) -> None:
        self.life -= stored > 0
        if self.life < 0:
            raise Died

    def _changed(self, changes: dict[bytes, bytes | None]) -> dict[bytes, tuple[int, bytes]]:
        state = dict(self.state)
        for key, payload in changes.items():
            if payload is None:
                del state[key]
            else:
                state[key] = (self.writer.version + 1, payload)
        return state

    def _publish(self, changes: dict[bytes, bytes | None]) -> None:
        state = self._changed(changes)
        self.writer.publish(changes)
        self.state = state

    def _possible(self, changes: dict[bytes, bytes | None]) -> dict[bytes, bytes | None]:
        return {key: value for key, value in changes.items() if value is not None or key in self.state}

    @rule(changes=CHANGES)
    def commit(self, changes: dict[bytes, bytes | None]) -> None:
        self._publish(self._possible(changes))

    @rule(count=st.integers(1, 60), payload=PAYLOADS)
    def commit_many(self, count: int, payload: bytes) -> None:
        self._publish({b"many %d" % number: payload for number in range(count)})

    @rule(times=st.integers(2, 20), key=st.sampled_from(KEYS), payload=PAYLOADS)
    def overwrite_again_and_again(self, times: int, key: bytes, payload: bytes) -> None:
        for _ in range(times):
            self._publish({key: payload})

    @rule()
    def delete_everything(self) -> None:
        self._publish(dict.fromkeys(self.state))

    @rule()
    def commit_what_cannot_fit(self) -> None:
        with pytest.raises(StateFull):
            self.writer.publish({KEYS[0]: b"1", KEYS[1]: bytes(self.store.capacity), KEYS[2]: b"2"})

    @rule(slot=st.sampled_from(SLOTS))
    def pin(self, slot: int) -> None:
        reader = self.readers[slot]
        self.pinned.append((reader, reader.pin(), self.state))

    @rule(slot=st.sampled_from(SLOTS), key=st.sampled_from(KEYS), payload=PAYLOADS)
    def pin_more_versions_than_have_a_word_of_their_own(self, slot: int, key: bytes, payload: bytes) -> None:
        for _ in range(PIN_WORDS + 1):
            self._publish({key: payload})
            self.pin(slot)

    @rule(keys=st.sets(st.sampled_from(KEYS)))
    def read(self, keys: set[bytes]) -> None:
        reader = self.readers[1]
        for key in keys:
            found = reader.get(reader.route(key))
            if found is not None:
                self.known[key] = found

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def hold_once_more(self, data: st.DataObject) -> None:
        reader, version, state = data.draw(st.sampled_from(self.pinned))
        reader.hold(version)
        self.pinned.append((reader, version, state))

    @precondition(lambda self: self.pinned)
    @rule(data=st.data(), count=st.integers(1, 20))
    def unpin(self, data: st.DataObject, count: int) -> None:
        for _ in range(min(count, len(self.pinned))):
            index = data.draw(st.integers(0, len(self.pinned) - 1))
            reader, version, _ = self.pinned.pop(index)
            reader.unpin(version)

    def _take_over(self) -> None:
        """Recovery keeps the last version, and pins of that one alone."""
        self.life = math.inf
        self.writer = self.store.another_writer(self._on_access)
        for reader, version, _ in self.pinned:
            if version.number != self.writer.version:
                reader.unpin(version)
        self.pinned = [pin for pin in self.pinned if pin[1].number == self.writer.version]

    @rule()
    def another_writer_takes_over(self) -> None:
        self._take_over()

    @rule(changes=CHANGES, life=st.integers(0, 80))
    def the_writer_dies_between_two_stores(self, changes: dict[bytes, bytes | None], life: int) -> None:
        before, after = self.state, self._changed(self._possible(changes))
        version = self.writer.version
        self.life = life
        try:
            self.writer.publish(self._possible(changes))
        except Died:
            note("it died")
        self._take_over()
        self.state = after if self.writer.version > version else before

    @rule()
    def memory_holds_what_is_reached_and_nothing_else(self) -> None:
        self.store.writer = self.writer
        self.store.squeeze()
        words = self.store.segment.words
        reached = set(walk(words, self.writer.tree[0]))
        for _, version, _ in self.pinned:
            reached.update(walk(words, version.root))
        kept = self.empty + WORD * sum(block_size(_words_of(words, pointer)) for pointer in reached)
        if all(version.is_exact for _, version, _ in self.pinned):
            assert self.writer.bytes_used == kept
        else:
            assert self.writer.bytes_used >= kept

    @invariant()
    def every_reader_sees_the_last_commit(self) -> None:
        reader = self.readers[1]
        for key in [*KEYS, *self.state]:
            found = reader.get(reader.route(key))
            assert (found and found[1:3]) == self.state.get(key)
            if found:
                assert found[0] == self.writer.version
                assert reader.get(reader.route(key), found[1]) == (self.writer.version, found[1], None, *found[3:])

    @invariant()
    def whoever_follows_a_cell_finds_the_last_one(self) -> None:
        reader, words = self.readers[1], self.store.segment.words
        for key, found in self.known.items():
            since, birth, payload, place, lengths = found
            followed = reader.follow(words[W_VERSION], place, since, lengths)
            event("looked up" if followed is None else "followed")
            if followed is not None:
                _, born, new, last, _ = followed
                assert self.state[key] == ((birth, payload) if last == place else (born, new))

    @invariant()
    def nothing_is_led_to_that_nobody_has_committed(self) -> None:
        words = self.store.segment.words
        for pointer in walk(words, self.writer.tree[0]):
            assert not pointer & 1 or words[(pointer >> 1) + NEXT] == 0

    @invariant()
    def every_pinned_version_is_as_it_was(self) -> None:
        for reader, version, state in self.pinned:
            assert version.count == len(state)
            assert {cell.key: (cell.birth, bytes(cell.payload)) for cell in reader.cells(version)} == state
            for key in KEYS[::4]:
                cell = reader.find(version, reader.route(key))
                assert (cell and (cell.birth, bytes(cell.payload))) == state.get(key)

    @invariant()
    def used_and_free_are_all_there_is(self) -> None:
        assert self.writer.bytes_used + self.writer.bytes_free == self.total
        assert self.writer.tree[1] == len(self.state)

    def teardown(self) -> None:
        try:
            for reader, version, _ in self.pinned:
                reader.unpin(version)
            self.pinned.clear()
            self.memory_holds_what_is_reached_and_nothing_else()
            self.delete_everything()
            self.store.squeeze()
            assert self.writer.bytes_used == self.empty
        finally:
            self.store.close()


def _words_of(words: memoryview, pointer: int) -> int:
    if not pointer & 1:
        return NODE_WORDS
    lengths = words[(pointer >> 1) + 2]
    return cell_words(lengths >> KEY_SHIFT, lengths & PAYLOAD_MASK)


@pytest.mark.usefixtures("reuse_at_once", "hashing")
def test_the_store_agrees_with_a_dict_at_every_version_that_is_pinned():
    fewer = settings(settings(), max_examples=settings().max_examples // 3, stateful_step_count=25)
    run_state_machine_as_test(StoreMachine, settings=fewer)


# Readers that are overtaken

NEIGHBOURS = KEYS[1:6]


class History:
    """A writer whose every version is remembered for one key."""

    def __init__(self, store: Store, seed: int, deletes: float = 0.2) -> None:
        self._store = store
        self._deletes = deletes
        self._random = random.Random(seed)
        self.seen: dict[int, bytes | None] = {}
        self.advance(30)

    def advance(self, commits: int) -> None:
        draw, writer = self._random, self._store.writer
        for _ in range(commits):
            changes: dict[bytes, bytes | None] = {
                key: self._payload() for key in draw.sample(NEIGHBOURS, 2) if draw.random() < 0.5
            }
            former = self.seen.get(writer.version)
            present = self._payload()
            if draw.random() < self._deletes:
                present = None
            elif former and draw.random() < 0.3:
                present = former
            if present != former:
                changes[KEYS[0]] = present
            self.seen[writer.publish(changes)] = present

    def _payload(self) -> bytes:
        size = self._random.choice([1, 20, LIKE_A_NODE, LIKE_A_NODE, 3000])
        return self._random.choice([b"\xff", b"\x02", self._random.randbytes(1).replace(b"\xc1", b"\xc2")]) * size


def is_true(found: Found | None, history: History, before: int, after: int) -> bool:
    """Whether a version from *before* to *after* had what was found."""
    if found is None:
        return None in [history.seen[version] for version in range(before, after + 1)]
    return before <= found[0] <= after and history.seen[found[0]] == found[2]


@pytest.mark.usefixtures("reuse_at_once", "hashing")
@pytest.mark.parametrize("commits", [1, 2, 4, 12, 40])
def test_whatever_is_committed_between_two_loads_a_read_returns_a_value_of_its_time(new_store, commits):
    store = new_store()
    history = History(store, seed=commits)
    segment, reader = store.slow_reader()
    again = 0
    for moment in itertools.count(1):
        while store.get(KEYS[0]) is None:
            history.advance(1)
        segment.interrupt(moment, lambda: history.advance(commits))
        before, segment.looks = store.writer.version, 0
        found = reader.get(reader.route(KEYS[0]))
        assert is_true(found, history, before, store.writer.version)
        again += segment.looks > 1
        if not segment.has_been_interrupted():
            break
    assert moment > 8
    assert again or commits < 12


class Follower:
    """Reads one key again and again, from what it found the last time."""

    def __init__(self, segment: Segment, reader: StoreReader) -> None:
        self._words, self._reader, self._route = segment.words, reader, reader.route(KEYS[0])
        self.known: Found | None = None

    def read(self) -> tuple[int, bytes | None]:
        """The version that was read, and the payload."""
        reader, found = self._reader, self.known
        version = self._words[W_VERSION]
        if found is not None:
            since, birth, payload, place, lengths = found
            followed = reader.follow(version, place, since, lengths)
            if followed is not None:
                if not followed[1]:
                    followed = (version, birth, payload, *followed[3:])
                self.known = followed
                return version, followed[2]
        found = self.known = reader.get(self._route)
        return (version, None) if found is None else (found[0], found[2])


class OfState:
    """As `Follower`, with the short cuts of ``flow.state``."""

    def __init__(self, segment: Segment, reader: StoreReader) -> None:
        self._words = segment.words
        host = SimpleNamespace(name="store", pass_gate=lambda: reader, reader=lambda: reader)
        self._state: Any = FlowState(host, 1 << 20)
        self._state.bind(segment, SimpleNamespace(within_reach=lambda: (b"", b"")), reader, 0)

    def read(self) -> tuple[int, bytes | None]:
        before = self._words[W_VERSION]
        try:
            payload = self._state[KEYS[0]]
        except KeyError:
            return before, None
        return self.known[KEYS[0]][0], payload

    @property
    def known(self) -> dict[bytes, Any]:
        return dict(self._state._bound[3])

    @known.setter
    def known(self, known: dict[bytes, Any]) -> None:
        self._state._bound[3].update(known)


@pytest.fixture(params=[Follower, OfState])
def following(request, monkeypatch):
    monkeypatch.setattr(states, "unpack_frozen", bytes)
    monkeypatch.setattr(keys_module, "pack_key", bytes)
    return request.param


@pytest.mark.usefixtures("reuse_at_once")
@pytest.mark.parametrize("commits", [1, 2, 4, 12, 40])
@pytest.mark.parametrize("behind", [1, 3, 6])
def test_whatever_is_committed_while_a_reader_follows_cells_it_returns_a_value_of_its_time(
    new_store, following, monkeypatch, commits, behind
):
    # What has been replaced rests a little longer than a reader is behind, or it could never follow.
    monkeypatch.setattr(commit, "REST_WORDS", 1000 * (behind - 1))
    store = new_store()
    history = History(store, seed=commits)
    segment, reader = store.slow_reader()
    followed = again = 0
    follower = following(segment, reader)
    for moment in itertools.count(1):
        known = follower.read()[1] is not None
        history.advance(behind)
        segment.interrupt(moment, lambda: history.advance(commits))
        before, segment.looks = store.writer.version, 0
        version, payload = follower.read()
        after = store.writer.version
        if payload is None:
            assert None in [history.seen[version] for version in range(before, after + 1)]
        else:
            assert before <= version <= after
            assert history.seen[version] == payload
        looks = segment.looks - (following is OfState)
        followed += known and looks == 1
        again += known and looks > 1
        if not segment.has_been_interrupted() and moment > 40:
            break
    assert followed
    assert again


@pytest.mark.usefixtures("reuse_at_once")
def test_between_any_two_stores_of_a_commit_who_follows_a_cell_finds_what_is_committed(new_store, following):
    store, looks = new_store(), 0
    words = store.segment.words
    # Often as long as the one before, and now and then the same.
    payloads = {number: b"%2d" % (number - number % 3 // 2) * (number // 6 * 4 + 1) for number in range(1, 60)}
    follower = following(store.segment, store.reader)
    late: Any = None

    def look(where: object, stored: int) -> None:
        nonlocal looks
        if stored and late is not None:
            # Two of them: one that looks all the time, and one that has not looked for some versions.
            for each in (follower, late):
                known = each.known
                assert each.read() == (words[W_VERSION], payloads[words[W_VERSION]])
                if each is late:
                    late.known = known
            looks += 1

    writer = store.another_writer(look)
    for number, payload in payloads.items():
        same = payload == payloads.get(number - 1)
        writer.publish({b"other": payload} if same else {KEYS[0]: payload, b"other": payload})
        if number % 3 == 1:
            late = following(store.segment, store.reader)
            late.read()
    assert looks > 10 * len(payloads)


def test_what_is_found_in_another_epoch_is_returned_and_not_kept(new_store, monkeypatch):
    monkeypatch.setattr(states, "unpack_frozen", bytes)
    monkeypatch.setattr(keys_module, "pack_key", bytes)
    store = new_store()
    segment, words = store.segment, store.segment.words
    store.writer.publish({KEYS[0]: b"1"})
    gate = SimpleNamespace(within_reach=lambda: (b"", b""))

    def pass_gate():
        words[W_EPOCH] += moves.pop()
        return store.reader

    host = SimpleNamespace(name="store", pass_gate=pass_gate)
    host.rebind = lambda reader, epoch: state.bind(segment, gate, reader, epoch)
    state: Any = FlowState(host, 1 << 20)
    state.bind(segment, gate, store.reader, 0)
    moves = [0, 0, 1]  # the last one first: while a read passes the gate
    assert state[KEYS[0]] == b"1"
    assert not state._bound[3]
    assert state[KEYS[0]] == b"1"
    assert [*state._bound[3]] == KEYS[:1]
    assert state._bound[6] == 1


@pytest.mark.parametrize("end", ["the last", "a new one", "deleted", "with arrays", "many", "taken over"])
def test_a_cell_leads_to_the_one_that_came_in_its_place(new_store, end):
    store = new_store()
    writer, reader, words = store.writer, store.reader, store.segment.words
    writer.publish({b"key": b"1", b"other": b"1"})
    known = reader.get(reader.route(b"key"))
    assert known is not None
    version, _, _, place, lengths = known
    writer.publish({b"other": b"2"})
    if end == "a new one":
        writer.publish({b"key": b"2"})
    elif end == "deleted":
        writer.publish({b"key": None})
    elif end == "with arrays":
        writer.publish({b"key": b"\xc1 and what follows"})
    elif end == "many":
        for number in range(len(HOPS) + 1):
            writer.publish({b"key": b"%d" % number})
    elif end == "taken over":
        writer = store.another_writer()
        writer.publish({})
    now = reader.get(reader.route(b"key"))
    assert reader.follow(words[W_VERSION], len(words), version, lengths) is None  # a place that is none
    followed = reader.follow(words[W_VERSION], place, version, lengths)
    if end in ("deleted", "many", "taken over"):
        assert followed is None
    elif end == "the last":
        assert followed == (words[W_VERSION], 0, None, place, lengths)
    else:
        assert now is not None
        assert followed == now


def test_no_cell_leads_to_what_a_dead_writer_was_about_to_put_in_its_place(new_store, monkeypatch):
    store = new_store()
    words, reader = store.segment.words, store.reader
    payloads = {b"%d" % number: b"%d" % number * number for number in range(40)}
    store.writer.publish(payloads)
    cells = {key: reader.get(reader.route(key))[3:] for key in payloads}

    def die(event: str) -> None:
        if event.endswith("commit.linked"):
            raise Died

    with monkeypatch.context() as patch:
        patch.setattr(commit, "audit", die)
        with pytest.raises(Died):
            store.writer.publish({key: None if len(key) == 1 else b"never" for key in payloads})
    assert all(words[place + NEXT] for place, _ in cells.values())
    heir = store.another_writer()
    for place, lengths in cells.values():
        assert reader.follow(words[W_VERSION], place, heir.version, lengths)[1:4] == (0, None, place)
    assert store.items() == payloads
    heir.publish({b"20": b"now"})
    place, lengths = cells[b"20"]
    assert reader.follow(words[W_VERSION], place, heir.version - 1, lengths)[1:3] == (heir.version, b"now")


@pytest.mark.usefixtures("reuse_at_once", "hashing")
def test_a_read_that_is_overtaken_at_every_load_still_ends(new_store):
    store = new_store()
    history = History(store, seed=0, deletes=0)
    segment, reader = store.slow_reader()
    segment.on_access = lambda: history.advance(1)
    for _ in range(5):
        before = store.writer.version
        assert is_true(reader.get(reader.route(KEYS[0])), history, before, store.writer.version)
        assert PinnedVersions(store.segment).oldest is None


@pytest.mark.parametrize("commits", [RING_RECORDS - 1, RING_RECORDS, RING_RECORDS + 1, 2 * RING_RECORDS])
def test_a_reader_overtaken_by_the_whole_ring_of_commit_records_looks_again(new_store, commits):
    store = new_store(capacity=16 << 20)
    history = History(store, seed=0)
    segment, reader = store.slow_reader()
    for moment in range(1, 4):
        segment.interrupt(moment, lambda: history.advance(commits))
        before = store.writer.version
        found = reader.get(reader.route(KEYS[0]))
        assert is_true(found, history, before, store.writer.version)


def sealed(key: bytes, version: int, filler: bytes) -> bytes:
    """A payload that can tell whether it is whole, whose it is, and which version wrote it."""
    body = version.to_bytes(8, "little") + filler
    return b"\x00" + zlib.crc32(key + body).to_bytes(4, "little") + body


SEAL = len(sealed(b"", 0, b""))


def read_until_overtaken(name: str, times: int, report: Any) -> None:
    """In a process of its own: read, and count how many reads the writer has overtaken."""
    segment = WatchedSegment.open(name)
    reader = StoreReader(segment, Pins(segment, 1))
    draw = random.Random(0)
    version = reads = overtaken = 0
    wrong: list[object] = []

    def stand_still() -> None:
        ahead = segment.plain[W_VERSION] + 30
        while segment.plain[W_VERSION] < ahead:
            os.sched_yield()

    while overtaken < times:
        key = draw.choice(KEYS)
        if reads % 4:
            segment.interrupt(draw.randrange(1, 12), stand_still)
        began = segment.plain[W_VERSION]
        segment.looks = 0
        found = reader.get(reader.route(key))
        reads += 1
        overtaken += segment.looks > 1
        if found is not None:
            former, (version, birth, payload, *_) = version, found
            if payload != sealed(key, birth, payload[SEAL:]) or not former <= began <= version:
                wrong.append((key, former, began, found))
    report.send((segment.strayed, wrong[:3]))


@pytest.mark.usefixtures("reuse_at_once")
def test_a_reader_in_another_process_that_strays_never_sees_wrong_data(new_store):
    store = new_store()
    writer = store.writer
    mine, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=read_until_overtaken, args=(store.segment.name, 300, theirs))
    process.start()
    theirs.close()
    draw = random.Random(1)
    alive: set[bytes] = set()
    while not mine.poll():
        changes: dict[bytes, bytes | None] = {}
        for key in draw.sample(KEYS, 2):
            if key in alive and draw.random() < 0.2:
                changes[key] = None
            else:
                size = draw.choice([1, 20, LIKE_A_NODE - SEAL, LIKE_A_NODE - SEAL, 3000])
                changes[key] = sealed(key, writer.version + 1, draw.choice([b"\xff", b"\x02"]) * size)
        alive = alive - set(changes) | {key for key, payload in changes.items() if payload}
        writer.publish(changes)
    strayed, wrong = mine.recv()
    process.join()
    mine.close()
    assert wrong == []
    assert strayed > 10


@pytest.mark.parametrize("left", range(1, 12))
def test_a_cell_across_the_end_of_the_memory_that_a_reader_knows_is_read_whole(new_store, left):
    store = new_store(capacity=4 << 20)
    arena = store.writer.arena
    end = store.segment.words_claimed
    position = arena.allocate(1) + 1
    while size := min(end - left - position, 64):
        position = arena.allocate(size) + size
    key, payload = b"a key of four words: %11d" % left, b"five words of payload: %17d" % left
    store.writer.publish({key: payload})
    assert store.segment.words_claimed > end
    assert store.get(key) == payload


# Memory


@pytest.mark.parametrize("keys", [1, 33, 2_000, 60_000])
def test_a_commit_writes_the_path_to_its_key_and_no_more(new_store, keys):
    store = new_store(capacity=64 << 20)
    store.writer.publish({b"%d" % number: b"payload" for number in range(keys)})
    written = 0

    def on_access(where: object, stored: int) -> None:
        nonlocal written
        written += stored

    writer = store.another_writer(on_access)
    for number in range(0, keys, keys // 30 or 1):
        key = b"%d" % number
        depth, used, written = depth_of(writer, key), writer.bytes_used, 0
        writer.publish({key: b"changed"})
        cell = cell_words(len(key), len(b"changed"))
        assert writer.bytes_used - used == (depth * NODE_WORDS + cell) * WORD
        assert written <= (depth * (NODE_WORDS + 1) + cell + segments.RECORD_WORDS + 2) * WORD
        assert depth <= math.log(keys, 32) + 4


@pytest.mark.usefixtures("hashing", "reuse_at_once")
def test_every_block_says_which_version_made_it_and_no_other_block_was_touched(new_store):
    store, draw = new_store(), random.Random(0)
    writer, words = store.writer, store.segment.words
    before: dict[int, int] = {}
    alive: set[bytes] = set()
    for version in range(1, 300):
        keys = draw.sample(KEYS, 3)
        gone = {key for key in keys if key in alive and draw.random() < 0.4}
        changes = {key: None if key in gone else b"\xff" * draw.choice([1, 200]) for key in keys}
        alive = (alive | set(keys)) - gone
        assert writer.publish(changes) == version
        now = {pointer: writer.trie.birth(pointer) for pointer in walk(words, writer.tree[0])}
        made = {pointer for pointer, birth in now.items() if birth == version}
        assert all(birth == before[pointer] for pointer, birth in now.items() if pointer not in made)
        cells = sum(pointer & 1 for pointer in now)
        assert sum(pointer & 1 for pointer in made) == sum(payload is not None for payload in changes.values())
        assert cells == len(alive) == writer.tree[1]
        nodes = len(now) - cells
        assert (nodes == 0) == (cells < 2)
        before = now


def test_a_walk_that_goes_round_in_a_circle_is_an_error_and_ends(new_store):
    store = new_store()
    store.writer.publish(dict.fromkeys(KEYS, b"1"))
    root = store.writer.tree[0]
    words = store.segment.words
    words[root >> 1] = root
    with pytest.raises(IndexError):
        for _ in zip(walk(words, root), range(10 * len(words)), strict=False):
            pass


def depth_of(writer: StoreWriter, key: bytes) -> int:
    words, bits, depth = writer._words, writer.hash(key), 0
    pointer = writer.tree[0]
    while not pointer & 1:
        pointer = words[(pointer >> 1) + (bits >> 5 * depth & FANOUT - 1)]
        depth += 1
    return depth


@pytest.mark.usefixtures("hashing")
def test_when_everything_is_deleted_and_unpinned_all_memory_is_free_again(new_store):
    store = new_store(capacity=32 << 20)
    writer, empty = store.writer, store.writer.bytes_used
    keys = [b"%d" % number for number in range(300)]
    pinned = []
    for size in (10, LIKE_A_NODE, 5000):
        for start in range(0, 300, 60):
            writer.publish(dict.fromkeys(keys[start : start + 60], bytes(size)))
            pinned.append(store.reader.pin())
    writer.publish(dict.fromkeys(keys))
    store.squeeze()
    assert writer.bytes_pinned > 300 * 5000
    assert writer.bytes_used - writer.bytes_pinned == empty
    for version in pinned:
        store.reader.unpin(version)
    store.squeeze()
    assert (writer.bytes_used, writer.bytes_pinned) == (empty, 0)


@pytest.mark.parametrize(("keys", "size"), [(1, 1000), (1, 10_000), (3000, 1)])
def test_what_was_replaced_rests_and_no_more_of_it_than_was_said(new_store, keys, size):
    store = new_store(capacity=64 << 20)
    writer, most = store.writer, 0
    names = [b"%d" % number for number in range(keys)]
    writer.publish(dict.fromkeys(names, bytes(size)))
    for name in itertools.islice(itertools.cycle(names), 6000):
        writer.publish({name: bytes(size)})
        most = max(most, writer.bytes_used)
    rest = commit.REST_WORDS * WORD
    assert rest < most < 2 * rest


def test_the_horizon_never_falls_and_passes_each_version_whose_record_is_overwritten(new_store):
    store = new_store(capacity=64 << 20)
    words, writer, horizon = store.segment.words, store.writer, 0
    for number in range(3000):
        # Large ones make it reclaim what is younger than the ring, small ones then only what is older.
        size = 40_000 if number > 1000 and number % 7 == 0 and number % 1000 < 500 else 8
        writer.publish({b"%d" % (number % 40): bytes(size)})
        assert words[W_HORIZON] >= max(horizon, writer.version - RING_RECORDS + 1)
        horizon = words[W_HORIZON]


def fill(store: Store, payload: bytes, start: int = 0) -> list[bytes]:
    """Commit new keys until the store is full; those that are in."""
    keys = []
    for number in itertools.count(start):
        key = b"%d" % number
        try:
            store.writer.publish({key: payload})
        except StateFull:
            return keys
        keys.append(key)
    raise AssertionError


@pytest.mark.parametrize("size", [1, 100, 5000, 200_000])
def test_a_full_store_stays_readable_and_a_delete_makes_room(new_store, size):
    store = new_store()
    keys = fill(store, bytes(size))
    version = store.reader.version()
    assert store.items() == dict.fromkeys(keys, bytes(size))
    assert store.reader.version() == store.writer.version == version
    store.writer.publish({keys[0]: None})
    store.writer.publish({b"another": bytes(size)})
    assert store.items() == dict.fromkeys([*keys[1:], b"another"], bytes(size))


def test_a_commit_that_does_not_fit_changes_nothing_however_far_it_came(new_store):
    store = new_store()
    keys = fill(store, bytes(100))
    for key in keys[:100]:
        store.writer.publish({key: None})
    before, used = store.items(), set()
    for count in (150, 200, 400, 1000):
        with pytest.raises(StateFull):
            store.writer.publish({keys[200]: None} | {b"new %d" % n: bytes(100) for n in range(count)})
        assert store.items() == before
        used.add(store.writer.bytes_used)
    assert len(used) == 1
    store.writer.publish({b"new %d" % n: bytes(100) for n in range(20)})
    assert len(store.items()) == len(before) + 20


def test_what_was_kept_for_a_pin_makes_room_as_soon_as_the_pin_is_gone(new_store):
    store = new_store()
    store.writer.publish({b"large": bytes(400_000)})
    version = store.reader.pin()
    store.writer.publish({b"large": b"small"})
    store.writer.publish({b"first": bytes(500_000)})
    for _ in range(2):
        with pytest.raises(StateFull):
            store.writer.publish({b"second": bytes(350_000)})
    assert store.writer.bytes_pinned >= 400_000
    store.reader.unpin(version)
    store.writer.publish({b"second": bytes(350_000)})
    assert (store.get(b"large"), store.get(b"second")) == (b"small", bytes(350_000))
    assert store.writer.bytes_pinned == 0


def test_what_no_pin_needs_makes_room_though_another_version_is_pinned(new_store):
    store = new_store()
    store.writer.publish({b"large": b"small"})
    store.reader.pin()
    store.writer.publish({b"large": bytes(400_000)})
    store.writer.publish({b"large": b"small"})
    store.writer.publish({b"first": bytes(500_000)})
    store.writer.publish({b"second": bytes(350_000)})
    assert store.get(b"second") == bytes(350_000)


@pytest.mark.usefixtures("hashing")
def test_nothing_that_a_version_in_use_reaches_is_free_after_a_takeover(new_store):
    store = new_store(capacity=4 << 20)
    keys = [b"%d" % number for number in range(200)]
    roots = []
    for size in (1, LIKE_A_NODE, 2000):
        store.writer.publish(dict.fromkeys(keys[: 100 + size % 7], bytes(size)))
        roots.append(store.reader.pin().root)
    store.writer.publish(dict.fromkeys(keys, b"the last"))
    words = store.segment.words
    heir = store.another_writer()
    taken = set()
    for pointer in {pointer for root in (*roots, heir.tree[0]) for pointer in walk(words, root)}:
        index = pointer >> 1
        first, size = (index, _words_of(words, pointer)) if pointer & 1 else (index - 1, NODE_WORDS)
        taken |= set(range(first, first + block_size(size)))
    free = {heir.arena.allocate(1) for _ in range(heir.arena.free)}
    assert taken.isdisjoint(free)


@pytest.mark.parametrize("size", [1, 50, 1000])
def test_keys_can_be_deleted_however_often_the_store_was_full(new_store, size):
    store = new_store()
    keys: list[bytes] = []
    number = 0
    for _ in range(60):
        more = fill(store, bytes(size), number)
        number += len(more)
        keys += more
        store.writer.publish({keys.pop(0): None})


def test_keys_can_be_deleted_even_if_what_rests_is_not_room_enough(new_store):
    """The last commit that fits leaves the path that it replaced, which is less than two deletes copy."""
    keys = fill(new_store(), bytes(50))
    store = new_store()
    for key in keys:
        store.writer.publish({key: bytes(50)})
    store.writer.publish(dict.fromkeys(keys[:8]))
    assert len(store.items()) == len(keys) - 8
    assert store.writer.arena.is_reserve_full, "the next delete may need it"


def test_a_snapshot_never_shows_other_data_when_another_writer_has_taken_over(new_store):
    store = new_store()
    keys = [b"%d" % number for number in range(100)]
    store.writer.publish(dict.fromkeys(keys, b"pinned"))
    version = store.reader.pin()
    store.writer.publish(dict.fromkeys(keys, b"newer!"))
    store.writer = store.another_writer()
    fill(store, b"other!", start=100)
    for key in keys:
        try:
            cell = store.reader.find(version, store.reader.route(key))
        except StrictFlowError:
            continue
        assert cell is not None
        assert bytes(cell.payload) == b"pinned"


def test_a_value_that_may_hold_arrays_is_read_under_a_pin_only(new_store):
    store = new_store()
    store.writer.publish({b"key": b"\xc1 and what follows"})
    route = store.reader.route(b"key")
    found = store.reader.get(route)
    assert found is not None
    assert found[:3] == (1, 1, None)
    cell = store.reader.find(store.reader.pin(), route)
    assert cell is not None
    assert cell.payload == b"\xc1 and what follows"
    assert cell.payload.readonly


# The arena


class ArenaMachine(RuleBasedStateMachine):
    """Blocks against a list of which words are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.segment = Segment.create(
            secrets.token_hex(6), "arena", capacity=1 << 16, slots=1, identity=Identity(1, 1, 0, 0)
        )
        self.arena = Arena(self.segment, "arena", NODE_WORDS)
        self.arena.prepare()
        assert self.arena.is_reserve_full
        self.reserve = self.arena.used
        self.blocks: dict[int, int] = {}
        self.total = self.arena.used + self.arena.free

    def _take(self, words: int) -> None:
        index = self.arena.allocate(words)
        end = index + block_size(words)
        assert self.arena.start <= index
        assert end <= self.segment.words_claimed
        for other, size in self.blocks.items():
            assert end <= other or other + block_size(size) <= index
        self.blocks[index] = words

    def _try_to_take(self, words: int) -> bool:
        used = self.arena.used
        try:
            self._take(words)
        except StateFull:
            assert self.arena.used == used
            return False
        return True

    @rule(words=st.integers(1, 80) | st.integers(65, 3000), times=st.integers(1, 40))
    def allocate(self, words: int, times: int) -> None:
        for _ in range(times):
            if not self._try_to_take(words):
                break

    @precondition(lambda self: self.blocks)
    @rule(data=st.data(), count=st.integers(1, 30))
    def release(self, data: st.DataObject, count: int) -> None:
        for _ in range(min(count, len(self.blocks))):
            index = data.draw(st.sampled_from(sorted(self.blocks)))
            self.arena.release(index, self.blocks.pop(index))

    @precondition(lambda self: any(words <= arenas.EXACT_WORDS for words in self.blocks.values()))
    @rule(data=st.data())
    def release_all_of_one_size(self, data: st.DataObject) -> None:
        size = data.draw(
            st.sampled_from(sorted({words for words in self.blocks.values() if words <= arenas.EXACT_WORDS}))
        )
        indexes = [index for index, words in self.blocks.items() if words == size]
        for index in indexes:
            del self.blocks[index]
        self.arena.release_all(indexes, size)

    @rule(words=st.integers(1, 2000), size=st.integers(1, arenas.EXACT_WORDS))
    def what_has_room_is_granted(self, words: int, size: int) -> None:
        if self.arena.has_room(words):
            for _ in range(words // size):
                self._take(size)

    @rule()
    def take_over(self) -> None:
        self.arena = Arena(self.segment, "arena", NODE_WORDS)
        self.arena.rebuild([span(*block) for block in self.blocks.items()])
        self._look_at_the_reserve()

    @rule()
    def open_the_reserve(self) -> None:
        held = self.reserve // NODE_WORDS
        assert self.arena.open_reserve() == (held > 0)
        self.reserve = 0
        for _ in range(held):
            self._take(NODE_WORDS)

    @rule()
    def refill_the_reserve(self) -> None:
        self.arena.refill_reserve()
        self._look_at_the_reserve()

    def _look_at_the_reserve(self) -> None:
        self.reserve = self.arena.used - self._in_blocks()
        assert self.reserve in range(0, arenas.RESERVE_BLOCKS * NODE_WORDS + 1, NODE_WORDS)
        assert self.arena.is_reserve_full == (self.reserve == arenas.RESERVE_BLOCKS * NODE_WORDS)

    def _in_blocks(self) -> int:
        return sum(map(block_size, self.blocks.values()))

    @invariant()
    def used_and_free_are_all_there_is(self) -> None:
        assert self.arena.used == self.reserve + self._in_blocks()
        assert self.arena.used + self.arena.free == self.total

    def _every_free_word_can_be_had(self) -> None:
        taken = {word for index, size in self.blocks.items() for word in range(index, index + block_size(size))}
        ones = [self.arena.allocate(1) for _ in range(self.arena.free)]
        assert len(set(ones)) == len(ones)
        assert taken.isdisjoint(ones)
        with pytest.raises(StateFull):
            self.arena.allocate(1)
        self.arena.release_all(ones, 1)

    def teardown(self) -> None:
        try:
            self._every_free_word_can_be_had()
            for index, words in self.blocks.items():
                self.arena.release(index, words)
            self.blocks.clear()
            self.arena.open_reserve()
            assert self.arena.used == 0
        finally:
            self.segment.close()
            self.segment.unlink()


def test_all_that_is_free_can_be_had_in_one_block_however_it_was_split(monkeypatch):
    monkeypatch.setattr(segments, "CLAIM_BYTES", segments.PAGE_BYTES)
    segment = Segment.create(secrets.token_hex(6), "arena", capacity=1 << 16, slots=1, identity=Identity(1, 1, 0, 0))
    arena = Arena(segment, "arena", NODE_WORDS)
    blocks = [arena.allocate(1) for _ in range(arena.free // 2)]
    random.Random(0).shuffle(blocks)
    for index in blocks:
        arena.release(index, 1)
    try:
        arena.allocate(arena.free * 7 // 8)
    finally:
        segment.close()
        segment.unlink()


@pytest.mark.parametrize("keep_gaps", [False, True])
def test_the_arena_of_the_next_writer_knows_what_is_used_and_what_lies_between(monkeypatch, keep_gaps):
    monkeypatch.setattr(segments, "CLAIM_BYTES", segments.PAGE_BYTES)
    segment = Segment.create(secrets.token_hex(6), "arena", capacity=1 << 16, slots=1, identity=Identity(1, 1, 0, 0))
    start, total = segment.arena, segment.size // WORD - segment.arena
    Arena(segment, "arena", NODE_WORDS).allocate(1200)
    claimed = segment.words_claimed
    used = [(start + 900, 70), (start, 10), (start + 20, NODE_WORDS)]
    arena = Arena(segment, "arena", NODE_WORDS)
    arena.rebuild([span(*block) for block in used], keep_gaps=keep_gaps)
    taken = claimed - start if keep_gaps else 10 + NODE_WORDS + 72
    try:
        assert (arena.used, arena.free, arena.is_reserve_full) == (taken, total - taken, False)
        ones = {arena.allocate(1) for _ in range(arena.free)}
        words = {word for index, size in used for word in range(index, index + block_size(size))}
        everything = set(range(claimed if keep_gaps else start, segment.size // WORD))
        assert ones == everything - words
        with pytest.raises(StateFull):
            arena.allocate(1)
    finally:
        segment.close()
        segment.unlink()


def test_the_largest_free_block_is_found_wherever_it_lies(monkeypatch):
    monkeypatch.setattr(segments, "CLAIM_BYTES", segments.PAGE_BYTES)
    segment = Segment.create(secrets.token_hex(6), "arena", capacity=1 << 16, slots=1, identity=Identity(1, 1, 0, 0))
    arena = Arena(segment, "arena", NODE_WORDS)
    blocks = [arena.allocate(10) for _ in range(arena.free // 10)]
    while arena.free:
        arena.allocate(1)
    for start, count in ((100, 50), (300, 2), (400, 3)):
        arena.release_all(blocks[start : start + count], 10)
    try:
        assert arena.allocate(480) == blocks[100]
        with pytest.raises(StateFull):
            arena.allocate(31)
        assert arena.allocate(30) == blocks[400]
        assert len([arena.allocate(1) for _ in range(arena.free)]) == 40
    finally:
        segment.close()
        segment.unlink()


@pytest.mark.parametrize(
    ("words", "size"), [(1, 1), (64, 64), (65, 72), (72, 72), (73, 80), (128, 128), (129, 144), (2048, 2048)]
)
def test_small_blocks_are_exact_and_large_ones_come_in_eighths(words, size):
    assert block_size(words) == size


def test_the_arena_hands_out_no_word_twice_and_loses_none(monkeypatch):
    monkeypatch.setattr(segments, "CLAIM_BYTES", segments.PAGE_BYTES)
    monkeypatch.setattr(arenas, "RESERVE_BLOCKS", 3)
    run_state_machine_as_test(ArenaMachine)


@given(st.integers(1, 1 << 44))
def test_a_block_is_as_large_as_was_asked_and_at_most_an_eighth_larger(words):
    size = block_size(words)
    assert words <= size <= words * 9 / 8
    assert block_size(size) == size


@pytest.mark.parametrize("damage", ["a pointer", "a length", "the version", "the horizon"])
def test_a_damaged_tree_is_an_error_that_says_so(new_store, damage):
    store = new_store()
    store.writer.publish({b"%d" % number: b"payload" for number in range(100)})
    words, reader = store.segment.words, store.reader
    version = reader.pin()
    route = reader.route(b"7")
    pointers = list(walk(words, version.root))
    if damage == "a pointer":
        words[(version.root >> 1) + route.turns[0]] = len(words) << 2 | 1
    elif damage == "a length":
        for pointer in pointers:
            if pointer & 1:
                words[(pointer >> 1) + 2] |= PAYLOAD_MASK
    else:
        words[W_VERSION if damage == "the version" else W_HORIZON] = 1 << 63
        with pytest.raises(ProtocolError, match="damaged"):
            reader.pin()
        words[W_VERSION], words[W_HORIZON] = version.number, 0
        return
    for look in (
        lambda: reader.find(version, route),
        lambda: [*reader.cells(version)],
        lambda: [*reader.cells_since(version, 0)],
    ):
        with pytest.raises(ProtocolError, match="damaged"):
            look()
