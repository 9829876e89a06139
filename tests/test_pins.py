"""Pins: what a snapshot needs is kept, nothing else is, and either the reader or the writer sees the other."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import secrets
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from watched import WatchedSegment

from strictflow_mp import segment as segments
from strictflow_mp.errors import StateFull
from strictflow_mp.processes import Identity
from strictflow_mp.segment import PINS, W_HORIZON, W_VERSION, Segment
from strictflow_mp.store import (
    PinnedVersions,
    Pins,
    Receipt,
    StoreReader,
    StoreWriter,
    Version,
    clear_pins,
    commit,
    pins,
    read_receipts,
)
from strictflow_mp.store import arena as arenas

EXACT = PINS - 1
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
    monkeypatch.setattr(arenas, "RESERVE", 8)
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
    return segment.words[segment.pins + slot * PINS : segment.pins + (slot + 1) * PINS].tolist()


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


VERSIONS = st.integers(0, 12)


@given(
    exact=st.lists(st.lists(VERSIONS, max_size=EXACT), min_size=SLOTS, max_size=SLOTS),
    floors=st.lists(st.none() | VERSIONS, min_size=SLOTS, max_size=SLOTS),
)
def test_a_block_is_needed_when_a_pin_lies_between_its_birth_and_its_end(exact, floors):
    segment = Segment.create(secrets.token_hex(6), "pins", capacity=1, slots=SLOTS, identity=Identity(1, 1, 0, 0))
    try:
        for slot, (versions, floor) in enumerate(zip(exact, floors, strict=True)):
            base = segment.pins + slot * PINS
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

    former = sys.gettrace()
    sys.settrace(trace)
    try:
        return call(), left <= 0
    finally:
        sys.settrace(former)


@pytest.mark.parametrize("on_floor", [False, True])
@pytest.mark.parametrize("commits", [0, 1], ids=["the same version", "a newer version"])
def test_a_finalizer_may_let_go_of_a_version_at_any_opcode_of_a_pin(segment, writer, on_floor, commits):
    for moment in itertools.count(1):
        _, reader = slow_reader(segment, writer, on_floor=on_floor)
        before = pin_words(segment, 1)
        old = reader.pin()
        advance(writer, commits)
        version, happened = at_opcode(moment, partial(reader.unpin, old), reader.pin)
        if not happened:
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
    record = segments.W_RING + (writer.version + 1) % segments.RING * segments.RECORD
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
