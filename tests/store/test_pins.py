"""Pins: what a snapshot needs is kept, nothing else is, and either the reader or the writer sees the other."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import random
import secrets
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tracing import traced
from watched import WatchedSegment

from strictflow_mp.errors import StateFull
from strictflow_mp.memory import segment as segments
from strictflow_mp.memory.fences import WORD
from strictflow_mp.memory.segment import W_HORIZON, W_VERSION, Segment
from strictflow_mp.memory.slot import PIN_WORDS
from strictflow_mp.store import (
    PinnedVersions,
    Pins,
    Receipt,
    StoreReader,
    StoreWriter,
    Version,
    clear_pins,
    commit,
    has_pins,
    pins,
    read_receipts,
    receipts,
)
from strictflow_mp.store import arena as arenas
from strictflow_mp.system.identity import Identity

EXACT = PIN_WORDS - 1
"""Versions that a slot can pin each for itself; the word behind them is the floor."""
CAPACITY = 8 << 20
SLOTS = 4


@pytest.fixture
def segment() -> Iterator[Segment]:
    segment = Segment.create(
        secrets.token_hex(6), "pins", capacity=CAPACITY, slots=SLOTS, identity=Identity(1, 1, 0, 0)
    )
    yield segment
    segment.close()
    segment.unlink()


@pytest.fixture
def writer(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> StoreWriter:
    """Almost nothing rests: what no pin needs is reused by the next few commits."""
    monkeypatch.setattr(commit, "REST_WORDS", 0)
    monkeypatch.setattr(arenas, "RESERVE_BLOCKS", 8)
    writer = StoreWriter(segment, "pins")
    writer.create()
    advance(writer)
    return writer


@pytest.fixture
def reader(segment: Segment, writer: StoreWriter) -> StoreReader:
    return StoreReader(segment, Pins(segment, 1))


KEYS = [b"%d" % number for number in range(40)]


def advance(writer: StoreWriter, commits: int = 1) -> None:
    """Change every key; all values of one version are its number."""
    for _ in range(commits):
        payload = b"%d" % (writer.version + 1)
        writer.publish(dict.fromkeys(KEYS, payload.rjust(20 + 90 * (writer.version % 3))))


def is_whole(reader: StoreReader, version: Version) -> bool:
    """Whether the version is still what it was."""
    cells = {cell.key: int(bytes(cell.payload)) for cell in reader.cells(version)}
    return cells == dict.fromkeys(KEYS, version.number) and version.count == len(KEYS)


def kept_for_pins(writer: StoreWriter) -> int:
    """Bytes, once the writer has looked at the pins again: a value that cannot fit makes it."""
    with pytest.raises(StateFull):
        writer.publish({b"huge": bytes(CAPACITY)})
    return writer.bytes_pinned


def pin_words(segment: Segment, slot: int) -> list[int]:
    return segment.words[segment.pins + slot * PIN_WORDS : segment.pins + (slot + 1) * PIN_WORDS].tolist()


# What is kept


def test_a_pinned_version_stays_whole_whatever_is_committed(reader, writer):
    version = reader.pin()
    advance(writer, 50)
    assert is_whole(reader, version)
    assert kept_for_pins(writer) > 0
    reader.unpin(version)
    assert kept_for_pins(writer) == 0


def test_an_exact_pin_keeps_its_version_and_not_those_after_it(reader, writer):
    version = reader.pin()
    advance(writer, 2)
    after_two = kept_for_pins(writer)
    advance(writer, 50)
    assert kept_for_pins(writer) == after_two
    assert is_whole(reader, version)


def test_fifteen_versions_are_pinned_exactly_and_the_floor_holds_any_number_more(segment, reader, writer):
    versions = []
    for _ in range(EXACT + 20):
        advance(writer)
        versions.append(reader.pin())
    assert [version.is_exact for version in versions] == [True] * EXACT + [False] * 20
    assert pin_words(segment, 1) == [version.number + 1 for version in versions[: EXACT + 1]]
    advance(writer, 50)
    assert all(is_whole(reader, version) for version in versions)


def test_the_floor_keeps_everything_from_the_oldest_of_its_versions_on(segment, reader, writer):
    for _ in range(EXACT):
        advance(writer)
        reader.pin()
    on_floor = []
    for _ in range(4):
        advance(writer, 3)
        on_floor.append(reader.pin())
    while on_floor:
        assert pin_words(segment, 1)[-1] == on_floor[0].number + 1
        kept = kept_for_pins(writer)
        advance(writer)
        assert kept_for_pins(writer) > kept, "a version that nobody pinned went"
        assert all(is_whole(reader, version) for version in on_floor)
        reader.unpin(on_floor.pop(0))
    assert pin_words(segment, 1)[-1] == 0


def test_a_version_on_the_floor_can_be_let_go_in_any_order(segment, reader, writer):
    for _ in range(EXACT):
        advance(writer)
        reader.pin()
    on_floor = []
    for _ in range(4):
        advance(writer)
        on_floor.append(reader.pin())
    for index in (1, 2, 0):
        reader.unpin(on_floor.pop(index))
        assert pin_words(segment, 1)[-1] == on_floor[0].number + 1
        advance(writer, 10)
        assert all(is_whole(reader, version) for version in on_floor)


def test_when_an_exact_pin_is_let_go_its_word_serves_again(reader, writer):
    first = reader.pin()
    for _ in range(EXACT - 1):
        advance(writer)
        reader.pin()
    advance(writer)
    assert reader.pin_exact() is None
    reader.unpin(first)
    version = reader.pin_exact()
    assert version is not None
    assert version.is_exact


def test_pin_exact_gives_no_version_that_only_the_floor_holds(reader, writer):
    for _ in range(EXACT + 1):
        advance(writer)
        version = reader.pin()
    assert not version.is_exact
    assert reader.pin_exact() is None


def test_holders_of_one_version_share_a_word_until_the_last_lets_go(segment, reader, writer):
    version, same = reader.pin(), reader.pin()
    reader.hold(version)
    assert sum(map(bool, pin_words(segment, 1))) == 1
    for held in (version, same):
        reader.unpin(held)
        advance(writer, 10)
        assert is_whole(reader, version)
    reader.unpin(version)
    assert not any(pin_words(segment, 1))


def test_versions_pinned_in_several_slots_are_each_kept(segment, writer):
    readers = [StoreReader(segment, Pins(segment, slot)) for slot in range(1, SLOTS)]
    pinned = []
    for other in readers:
        pinned.append((other, other.pin()))
        advance(writer, 5)
    while pinned:
        advance(writer, 20)
        assert all(is_whole(*pin) for pin in pinned)
        other, version = pinned.pop()
        other.unpin(version)
    assert kept_for_pins(writer) == 0


def test_when_the_coordinator_clears_a_slot_its_versions_are_free(segment, reader, writer):
    other = StoreReader(segment, Pins(segment, 2))
    mine, theirs = reader.pin(), other.pin()
    for _ in range(EXACT + 3):
        advance(writer)
        other.pin()
    clear_pins(segment, 2)
    assert pin_words(segment, 1)[0] == mine.number + 1
    reader.unpin(mine)
    assert kept_for_pins(writer) == 0
    assert theirs.number == mine.number


def test_each_slot_has_pin_words_of_its_own_however_many_there_are():
    slots = 65
    segment = Segment.create(secrets.token_hex(6), "pins", capacity=1, slots=slots, identity=Identity(1, 1, 0, 0))
    try:
        for slot in range(slots):
            assert not has_pins(segment, slot)
            assert Pins(segment, slot).acquire(slot)
            assert has_pins(segment, slot)
        words = [pin_words(segment, slot) for slot in range(slots)]
        assert words == [[slot + 1] + [0] * EXACT for slot in range(slots)]
        for slot in range(slots):
            clear_pins(segment, slot)
            assert not has_pins(segment, slot)
            assert PinnedVersions(segment).exact == [*range(slot + 1, slots)]
        for index in range(PIN_WORDS):
            word = segment.pins + 7 * PIN_WORDS + index
            segment.words[word] = 1
            assert [slot for slot in range(slots) if has_pins(segment, slot)] == [7]
            segment.words[word] = 0
    finally:
        segment.close()
        segment.unlink()


def test_pins_are_held_until_the_last_of_them_is_let_go(segment, reader, writer):
    pins = Pins(segment, 1)
    assert pins.are_held is False
    for _ in range(2):
        assert pins.acquire(writer.version)
        assert pins.are_held is True
    advance(writer)
    assert pins.acquire(writer.version)
    for version in (writer.version - 1, writer.version, writer.version - 1):
        assert pins.are_held is True
        pins.release(version)
    assert pins.are_held is False


def test_a_version_that_is_pinned_can_be_pinned_again_in_the_way_that_its_word_allows(segment, reader, writer):
    pins = Pins(segment, 1)
    for _ in range(EXACT):
        advance(writer)
        assert [pins.acquire_exact(writer.version), pins.acquire(writer.version)] == [True, True]
    advance(writer)
    assert [pins.acquire_exact(writer.version), pins.acquire(writer.version)] == [False, True]
    assert [pins.acquire_exact(writer.version), pins.acquire(writer.version)] == [False, True]


def test_the_floor_comes_down_for_a_version_that_is_older_by_one(segment, writer):
    """Two threads look at VERSION, and pin what they saw in the other order."""
    pins = Pins(segment, 1)
    for _ in range(EXACT):
        advance(writer)
        assert pins.acquire(writer.version)
    older, newer = writer.version + 1, writer.version + 2
    for version in (newer, older):
        assert pins.acquire(version)
        assert pin_words(segment, 1)[-1] == version + 1
    pins.release(older)
    assert pin_words(segment, 1)[-1] == newer + 1


def test_an_exact_pin_that_is_let_go_leaves_its_word_empty_while_others_are_on_the_floor(segment, reader, writer):
    versions = []
    for _ in range(EXACT + 2):
        advance(writer)
        versions.append(reader.pin())
    before = pin_words(segment, 1)
    reader.unpin(versions[3])
    assert pin_words(segment, 1) == [0 if index == 3 else pin for index, pin in enumerate(before)]


@pytest.mark.parametrize("distance", [-1, 1])
def test_a_process_that_does_not_own_the_pins_lets_go_of_none(segment, writer, distance):
    pins = Pins(segment, 1)
    assert pins.acquire(writer.version)
    before = pin_words(segment, 1)
    pins.pid += distance  # as in a child of a larger pid, or of a smaller one
    pins.release(writer.version)
    assert pin_words(segment, 1) == before
    pins.pid = os.getpid()
    pins._settle()
    assert not has_pins(segment, 1)


def test_two_looks_at_the_pins_are_equal_when_the_same_versions_are_pinned(segment, reader, writer):
    for number in range(EXACT + 1):
        before = PinnedVersions(segment)
        assert before == PinnedVersions(segment)
        advance(writer)
        reader.pin()
        assert before != PinnedVersions(segment), number
    for index in (0, EXACT):
        before = PinnedVersions(segment)
        segment.words[segment.pins + 2 * PIN_WORDS + index] = 1
        assert before != PinnedVersions(segment)
    assert PinnedVersions(segment) != "pins"


VERSIONS = st.integers(0, 12)


@given(
    exact=st.lists(st.lists(VERSIONS, max_size=EXACT), min_size=SLOTS, max_size=SLOTS),
    floors=st.lists(st.none() | VERSIONS, min_size=SLOTS, max_size=SLOTS),
)
def test_a_block_is_needed_when_a_pin_lies_between_its_birth_and_its_end(exact, floors):
    segment = Segment.create(secrets.token_hex(6), "pins", capacity=1, slots=SLOTS, identity=Identity(1, 1, 0, 0))
    try:
        for slot, (versions, floor) in enumerate(zip(exact, floors, strict=True)):
            base = segment.pins + slot * PIN_WORDS
            for index, version in enumerate(versions):
                segment.words[base + index] = version + 1
            if floor is not None:
                segment.words[base + EXACT] = floor + 1
        pinned = PinnedVersions(segment)
        points = {version for versions in exact for version in versions}
        given_floors = {floor for floor in floors if floor is not None}
        assert pinned.oldest == min(points | given_floors, default=None)
        for birth, replaced in itertools.combinations_with_replacement(range(15), 2):
            on_point = any(birth <= version < replaced for version in points)
            over_floor = any(floor < replaced for floor in given_floors)
            assert pinned.needs(birth, replaced) == (on_point or over_floor)
    finally:
        segment.close()
        segment.unlink()


# The race between a reader that pins and the writer


def slow_reader(segment: Segment, writer: StoreWriter, *, on_floor: bool) -> tuple[WatchedSegment, StoreReader]:
    """One in slot 1 that can be interrupted; *on_floor*: it has no exact pin left."""
    clear_pins(segment, 1)
    watched = WatchedSegment.open(segment.name)
    reader = StoreReader(watched, Pins(watched, 1))
    for _ in range(EXACT if on_floor else 0):
        reader.pin()
        advance(writer)
    return watched, reader


@pytest.mark.parametrize("on_floor", [False, True])
@pytest.mark.parametrize("commits", [1, 3, 20])
def test_whatever_is_committed_while_a_version_is_being_pinned_it_is_whole(segment, writer, commits, on_floor):
    for moment in itertools.count(1):
        watched, reader = slow_reader(segment, writer, on_floor=on_floor)
        before = pin_words(segment, 1)
        watched.interrupt(moment, lambda: advance(writer, commits))
        version = reader.pin()
        was_interrupted = watched.has_been_interrupted()
        assert version.is_exact != on_floor
        advance(writer, 10)
        assert is_whole(reader, version)
        reader.unpin(version)
        assert pin_words(segment, 1) == before
        if not was_interrupted:
            break
    assert moment > 6


@pytest.mark.parametrize("on_floor", [False, True])
def test_a_pin_that_comes_too_late_is_refused_and_leaves_no_trace(segment, writer, on_floor):
    watched, _ = slow_reader(segment, writer, on_floor=on_floor)
    pins = Pins(watched, 2)
    late = writer.version
    advance(writer, 20)
    for _ in range(EXACT + 2 if on_floor else 2):
        assert pins.acquire(writer.version)
        advance(writer)
    before = pin_words(segment, 2)
    assert segment.words[W_HORIZON] > late
    assert not pins.acquire(late)
    assert not pins.acquire_exact(late)
    assert pin_words(segment, 2) == before


@pytest.mark.parametrize("on_floor", [False, True])
def test_a_pin_is_there_at_the_fence_and_the_horizon_is_looked_at_behind_it(segment, writer, on_floor, monkeypatch):
    pinned_at_fence = []

    def reclaim() -> None:
        pinned_at_fence.append(PinnedVersions(segment))
        segment.words[W_HORIZON] = writer.version + 1

    mine = Pins(segment, 2)
    for _ in range(EXACT if on_floor else 0):
        assert mine.acquire(writer.version)
        advance(writer)
    monkeypatch.setattr(pins, "fence", reclaim)
    assert not mine.acquire(writer.version)
    assert [pinned.needs(writer.version, writer.version + 1) for pinned in pinned_at_fence] == [True]


@pytest.mark.parametrize("on_floor", [False, True])
def test_a_pin_is_there_until_the_fence_behind_all_that_was_read_under_it(segment, writer, on_floor, monkeypatch):
    mine = Pins(segment, 2)
    for _ in range(EXACT if on_floor else 0):
        assert mine.acquire(writer.version)
        advance(writer)
    version = writer.version
    assert mine.acquire(version)
    advance(writer)
    at_fence = []
    monkeypatch.setattr(pins, "publish_fence", lambda: at_fence.append(PinnedVersions(segment)))
    mine.release(version)
    assert [pinned.needs(version, version + 1) for pinned in at_fence] == [True]
    assert PinnedVersions(segment) != at_fence[0]


def at_opcode(moment: int, what: Callable[[], object], call: Callable[[], Any]) -> tuple[Any, bool]:
    """What *call* returns, and whether *what* happened: ahead of that opcode of the module `pins`."""
    left = moment

    def trace(frame: Any, event: str, arg: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename != pins.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left == 0:
                what()
        return trace

    with traced(trace):
        return call(), left <= 0


@pytest.mark.parametrize("on_floor", [False, True])
@pytest.mark.parametrize("commits", [0, 1], ids=["the same version", "a newer version"])
def test_a_finalizer_may_let_go_of_a_version_at_any_opcode_of_a_pin(segment, writer, on_floor, commits):
    for moment in itertools.count(1):
        _, reader = slow_reader(segment, writer, on_floor=on_floor)
        before = pin_words(segment, 1)
        old = reader.pin()
        advance(writer, commits)
        version, happened = at_opcode(moment, partial(reader.unpin, old), reader.pin)
        if happened:
            assert [pin for pin in pin_words(segment, 1) if pin and pin not in before] == [version.number + 1]
        else:
            reader.unpin(old)
        advance(writer, 10)
        assert is_whole(reader, version), f"opcode {moment}"
        reader.unpin(version)
        assert pin_words(segment, 1) == before, f"opcode {moment}"
        if not happened and moment > 1:  # Python 3.12 shows no opcodes of a function's first traced call
            break
    assert moment > 20


@pytest.mark.parametrize("on_floor", [False, True])
def test_a_finalizer_may_let_go_of_a_version_at_any_opcode_of_another_s_release(segment, writer, on_floor):
    for moment in itertools.count(1):
        _, reader = slow_reader(segment, writer, on_floor=on_floor)
        before = pin_words(segment, 1)
        old = reader.pin()
        advance(writer)
        middle, kept = reader.pin(), reader.pin()
        advance(writer)
        new = reader.pin()
        _, happened = at_opcode(moment, partial(reader.unpin, old), partial(reader.unpin, new))
        if not happened:
            reader.unpin(old)
        reader.unpin(middle)
        advance(writer, 10)
        assert is_whole(reader, kept), f"opcode {moment}"
        reader.unpin(kept)
        assert pin_words(segment, 1) == before, f"opcode {moment}"
        if not happened and moment > 1:  # Python 3.12 shows no opcodes of a function's first traced call
            break
    assert moment > 20


def test_threads_of_one_process_pin_and_let_go_at_the_same_time(segment, reader, writer):
    torn: list[Version] = []
    former = sys.getswitchinterval()

    def pin_again_and_again() -> None:
        for _ in range(100):
            version, same = reader.pin(), reader.pin()
            reader.unpin(version)
            if not is_whole(reader, same):
                torn.append(same)
            reader.unpin(same)

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=pin_again_and_again) for _ in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            advance(writer)
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(former)
    assert torn == []
    assert not any(pin_words(segment, 1))


# Other processes

fork = multiprocessing.get_context("fork")


def pin_until_overtaken(name: str, times: int, report: Any) -> None:
    """In a process of its own: pin, and stand still in the middle of it until the writer is far ahead."""
    segment = WatchedSegment.open(name)
    reader = StoreReader(segment, Pins(segment, 1))
    torn = []

    def stand_still() -> None:
        ahead = segment.plain[W_VERSION] + 20
        while segment.plain[W_VERSION] < ahead:
            os.sched_yield()

    pinned: list[Version] = []
    overtaken = 0
    for number in itertools.count():
        if overtaken == times:
            break
        segment.looks = 0
        segment.interrupt(number % 9 + 1, stand_still)
        pinned.append(reader.pin())
        segment.has_been_interrupted()
        overtaken += segment.looks > 1
        if len(pinned) > EXACT + 2:
            stand_still()
            torn += [version for version in pinned if not is_whole(reader, version)]
            for version in pinned:
                reader.unpin(version)
            pinned.clear()
    report.send(repr(torn))


def test_a_version_that_another_process_has_pinned_is_whole_while_the_writer_runs(segment, writer):
    mine, theirs = multiprocessing.Pipe()
    process = fork.Process(target=pin_until_overtaken, args=(segment.name, 100, theirs))
    process.start()
    theirs.close()
    while not mine.poll():
        advance(writer)
    assert mine.recv() == "[]"
    process.join()
    mine.close()


def test_a_killed_process_keeps_its_versions_until_the_coordinator_clears_its_slot(segment, writer):
    mine, theirs = multiprocessing.Pipe()

    def pin_and_sleep() -> None:
        theirs.send(StoreReader(segment, Pins(segment, 1)).pin().number)
        theirs.recv()

    process = fork.Process(target=pin_and_sleep)
    process.start()
    number = mine.recv()
    advance(writer, 20)
    kept = kept_for_pins(writer)
    assert kept > 0
    process.kill()
    process.join()
    advance(writer, 20)
    assert kept_for_pins(writer) == kept
    assert pin_words(segment, 1)[0] == number + 1
    clear_pins(segment, 1)
    assert kept_for_pins(writer) == 0
    mine.close()
    theirs.close()


def test_a_forked_child_cannot_let_go_of_what_its_parent_has_pinned(segment, reader, writer):
    version = reader.pin()

    def let_go() -> None:
        assert reader.is_foreign
        reader.unpin(version)
        del reader._pins
        gc.collect()

    process = fork.Process(target=let_go)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert not reader.is_foreign
    assert pin_words(segment, 1)[0] == version.number + 1
    advance(writer, 20)
    assert is_whole(reader, version)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_forked_while_a_thread_pins_can_let_go_without_waiting_for_it(segment, reader):
    """The thread that had the lock does not exist in the child."""
    version = reader.pin()
    with reader._pins._lock:
        locked, leave = threading.Event(), threading.Event()
    thread = threading.Thread(target=_hold, args=(reader._pins._lock, locked, leave))
    thread.start()
    locked.wait()
    process = fork.Process(target=reader.unpin, args=(version,))
    process.start()
    process.join(30)
    leave.set()
    thread.join()
    assert process.exitcode == 0


def _hold(lock: Any, locked: threading.Event, leave: threading.Event) -> None:
    with lock:
        locked.set()
        leave.wait()


def test_a_takeover_drops_the_pins_of_the_dead_coordinator_and_of_nobody_else(segment, writer, reader):
    reader.pin()
    StoreReader(segment, Pins(segment, 0)).pin()
    before = pin_words(segment, 1)
    StoreWriter(segment, "pins").recover()
    assert not has_pins(segment, 0)
    assert pin_words(segment, 1) == before


@pytest.mark.parametrize("age", [10, 255, 256, 300])
def test_a_pinned_version_is_whole_after_a_takeover_however_old_it_is(segment, writer, reader, age):
    version = reader.pin()
    advance(writer, age)
    heir = StoreWriter(segment, "pins")
    heir.recover()
    advance(heir, 30)
    assert is_whole(reader, version)


def test_a_pinned_version_is_whole_after_a_takeover_from_a_writer_that_died_over_the_next_record(
    segment, writer, reader
):
    version = reader.pin()
    advance(writer, 255)
    record = segment.record(writer.version + 1)
    segment.words[record] = writer.version + 1  # as far as it came
    heir = StoreWriter(segment, "pins")
    heir.recover()
    advance(heir, 30)
    assert is_whole(reader, version)


def test_receipts_survive_a_takeover_and_leave_when_they_are_acknowledged(segment, writer):
    for seq in range(1, 101):
        writer.receipts.add(Receipt(1 + seq % 2, seq, seq, 1, b"answer %d" % seq))
        if seq % 10 == 0:
            advance(writer)
    heir = StoreWriter(segment, "pins")
    heir.recover()
    assert {receipt.seq: receipt.answer for receipt in heir.receipts.of(1)} == {
        seq: b"answer %d" % seq for seq in range(2, 101, 2)
    }
    heir.receipts.acknowledge(1, 90)
    heir.receipts.forget(2)
    advance(heir)
    assert [receipt.seq for receipt in read_receipts(segment)] == [92, 94, 96, 98, 100]
    used = heir.arena.used
    for _ in range(50):
        heir.receipts.add(Receipt(3, 1, 1, 1, b"x" * 100_000))
        advance(heir)
        heir.receipts.acknowledge(3, 1)
    heir.receipts.forget(1)
    advance(heir, 2)
    assert read_receipts(segment) == []
    assert heir.arena.used <= used + 4096


def test_an_answer_that_finds_no_room_leaves_its_receipt(segment, writer):
    writer.receipts.add(Receipt(1, 1, 1, 1, bytes(2 * CAPACITY)))
    writer.receipts.add(Receipt(1, 2, 2, 1, b"short"))
    advance(writer)
    assert [(receipt.seq, receipt.answer) for receipt in read_receipts(segment)] == [(1, b""), (2, b"short")]


class Ledger:
    """A writer whose receipts are remembered, and looked at whenever a commit is about to be published, and behind it.

    Every commit also changes a key, so that memory which is free by mistake is soon written to.
    """

    def __init__(self, segment: Segment, writer: StoreWriter, monkeypatch: pytest.MonkeyPatch) -> None:
        self._segment = segment
        self.writer = writer
        self.due: dict[tuple[int, int], Receipt] = {}  # tenant, seq of the last task -> receipt
        self._ever = dict(self.due)
        self._committed = dict(self.due)
        self._last = 0
        monkeypatch.setattr(commit, "audit", self._on_event)

    def _on_event(self, event: str) -> None:
        if event.endswith(".recorded"):
            assert self.stored() == self._committed, "somebody has written to the receipts of the last commit"

    def stored(self) -> dict[tuple[int, int], Receipt]:
        return {(receipt.tenant, receipt.last): receipt for receipt in read_receipts(self._segment)}

    def add(self, tenant: int, size: int, tasks: int = 1) -> Receipt:
        first = self._last + 1
        self._last += tasks
        receipt = Receipt(tenant, 7 * first, first, tasks, bytes([first % 255 + 1]) * size)
        self.due[tenant, self._last] = self._ever[tenant, self._last] = receipt
        self.writer.receipts.add(receipt)
        return receipt

    def replace(self, receipt: Receipt, size: int) -> None:
        other = receipt._replace(answer=b"x" * size)
        self.due[receipt.tenant, receipt.last] = self._ever[receipt.tenant, receipt.last] = other
        self.writer.receipts.add(other)

    def acknowledge(self, tenant: int, seq: int) -> None:
        self.due = {key: value for key, value in self.due.items() if key[0] != tenant or key[1] > seq}
        self.writer.receipts.acknowledge(tenant, seq)

    def forget(self, tenant: int) -> None:
        self.due = {key: value for key, value in self.due.items() if key[0] != tenant}
        self.writer.receipts.forget(tenant)

    def commit(self) -> None:
        for size in (3000, 0):
            self.writer.publish({b"garbage": b"\xff" * size} if size else {b"garbage": None})
            self._committed = self.stored()
            assert self.due.items() <= self._committed.items() <= self._ever.items()  # BASE may have more than is due
        for start, words in self.writer.receipts.blocks():
            filled = self._segment.words[start] + WORD
            assert filled <= words * WORD
            assert words == receipts.DELTA_WORDS or filled > (words - 1) * WORD
        for tenant in {tenant for tenant, _ in self.due} | {99}:
            mine = [receipt for (owner, _), receipt in self.due.items() if owner == tenant]
            assert self.writer.receipts.of(tenant) == mine

    def take_over(self) -> None:
        self.due = dict(self._committed)
        self.writer = StoreWriter(self._segment, "pins")
        self.writer.recover()

    def empty(self) -> int:
        """Words in use when everybody has all answers and nothing rests."""
        for tenant in {tenant for tenant, _ in self.due}:
            self.acknowledge(tenant, self._last)
        for _ in range(3):
            self.commit()
        assert self.writer.receipts.blocks() == []
        assert kept_for_pins(self.writer) == 0
        return self.writer.arena.used


@pytest.fixture
def ledger(segment: Segment, writer: StoreWriter, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    return Ledger(segment, writer, monkeypatch)


@pytest.mark.parametrize("seed", range(6))
def test_receipts_are_whole_at_every_instant_and_their_memory_comes_back(ledger, seed):
    draw = random.Random(seed)
    empty = ledger.empty()
    for _ in range(60):
        for _ in range(draw.choice([0, 1, 1, 3, 30])):
            size = draw.choice([0, 1, 7, 8, 9, 100, 700, 20_000])
            receipt = ledger.add(draw.randrange(1, 4), size, draw.choice([1, 1, 5]))
            if draw.random() < 0.1:
                ledger.replace(receipt, draw.choice([0, 8, 700]))
        if draw.random() < 0.4:
            ledger.acknowledge(draw.randrange(1, 4), ledger._last - draw.choice([0, 1, 5, 40]))
        if draw.random() < 0.05:
            ledger.forget(draw.randrange(1, 4))
        ledger.commit()
        if draw.random() < 0.15:
            ledger.take_over()
    assert ledger.empty() == empty


@pytest.mark.parametrize("over", [-8, -1, 0, 1, 7, 8, 9])
def test_what_just_fits_the_block_for_new_receipts_and_what_does_not_overwrites_nothing(segment, ledger, over):
    empty = ledger.empty()
    room = (receipts.DELTA_WORDS - 1) * WORD - 5 * WORD
    for number in range(4):
        ledger.add(1, room + over)
        ledger.commit()
        record = segment.words[segment.record(ledger.writer.version) :]
        assert [bool(record[word]) for word in (segments.R_DELTA, segments.R_BASE)] == [over <= 0, over > 0]
        if number % 2:
            ledger.acknowledge(1, ledger._last)
        else:
            ledger.forget(1)
        ledger.commit()
    assert ledger.empty() == empty


def test_old_receipts_are_not_copied_until_there_are_many_new_ones(segment, ledger):
    for _ in range(300):
        ledger.add(1, 50)
    ledger.commit()
    [old] = ledger.writer.receipts.blocks()
    for _ in range(receipts.MANY_RECEIPTS + 300 // 4):
        ledger.add(2, 50)
        ledger.commit()
        assert ledger.writer.receipts.blocks()[0] == old
        assert len(ledger.writer.receipts.blocks()) == 2
    ledger.add(2, 50)
    ledger.commit()
    [new] = ledger.writer.receipts.blocks()
    assert new != old


@pytest.mark.parametrize("old", [0, 30])
@pytest.mark.parametrize("new", [0, 3])
def test_whichever_blocks_a_dead_coordinator_used_its_receipts_stay_and_the_next_one_s_come(ledger, old, new):
    empty = ledger.empty()
    for count in (old, new):
        for _ in range(count):
            ledger.add(1, 1)
        ledger.commit()
    assert len(ledger.writer.receipts.blocks()) == bool(old) + bool(new)
    ledger.take_over()
    for _ in range(4):
        ledger.add(2, 15_000)
        ledger.commit()
        ledger.acknowledge(2, ledger._last)
    assert ledger.empty() == empty


def test_when_there_is_no_room_only_long_answers_are_given_up(segment, writer):
    long = receipts.KEPT_ANSWER_BYTES
    sizes = [(2 * CAPACITY, 1), (long, 1), (long + 1, 1), (3 * long, 3), (3 * long + 1, 3), (0, 1)]
    for seq, (size, tasks) in enumerate(sizes):
        writer.receipts.add(Receipt(1, 100 + 10 * seq, 10 * seq, tasks, bytes(size)))
    advance(writer)
    found = read_receipts(segment)
    assert [len(receipt.answer) for receipt in found] == [0, long, 0, 3 * long, 0, 0]
    assert [receipt[:4] for receipt in found] == [
        (1, 100 + 10 * seq, 10 * seq, tasks) for seq, (_, tasks) in enumerate(sizes)
    ]


def test_damaged_receipts_are_an_error_and_never_read_beyond_their_block(segment, ledger):
    ledger.add(1, 16)
    ledger.commit()
    [(start, _)] = ledger.writer.receipts.blocks()
    words = segment.words
    length = words[start]
    answer = start + 1 + 4
    assert (length, words[answer]) == (5 * WORD + 16, 16)
    for damaged in (17, 24, 1 << 40):
        words[answer] = damaged
        with pytest.raises(IndexError, match="behind its block"):
            read_receipts(segment)
    words[answer] = 16
    end = (segment.words_claimed - start - 1) * WORD
    words[start] = end + 1
    with pytest.raises(IndexError, match="behind the memory"):
        read_receipts(segment)
    words[start] = length
    assert len(read_receipts(segment)) == 1
