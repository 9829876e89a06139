"""The segment: what is not ours is refused, what is full says so, and nobody but its owner removes it."""

from __future__ import annotations

import gc
import itertools
import os
import secrets
import textwrap
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from strictflow_mp.errors import ProtocolError, StateFull
from strictflow_mp.memory import segment as segments
from strictflow_mp.memory.fences import WORD
from strictflow_mp.memory.segment import CLAIM_BYTES, PAGE_BYTES, PREFIX, Segment
from strictflow_mp.memory.slot import PIN_WORDS, SLOT_ARRAYS
from strictflow_mp.system import posix
from strictflow_mp.system.identity import Identity
from strictflow_mp.system.machine import FREE_THREADED

SHARED = Path("/dev/shm")
MiB = 1 << 20


@pytest.fixture
def new_segment() -> Iterator[Callable[..., Segment]]:
    made: list[Segment] = []

    def new_segment(flow: str = "a flow", *, capacity: int = CLAIM_BYTES, slots: int = 4) -> Segment:
        token = secrets.token_hex(6)
        made.append(Segment.create(token, flow, capacity=capacity, slots=slots, identity=Identity(12, 34, 0, 0)))
        return made[-1]

    yield new_segment
    for segment in made:
        segment.close()
        segment.unlink()


@pytest.fixture
def segment(new_segment: Callable[..., Segment]) -> Segment:
    return new_segment()


@pytest.fixture
def foreign() -> Iterator[Callable[[int], str]]:
    """`foreign(size)` makes shared memory of that many bytes, all zero; its name."""
    names: list[str] = []

    def foreign(size: int) -> str:
        names.append(f"{PREFIX}{secrets.token_hex(6)}")
        memory = posix.SharedMemory("/" + names[-1], posix.O_CREX)
        os.ftruncate(memory.fd, size)
        memory.close_fd()
        return names[-1]

    yield foreign
    for name in names:
        posix.unlink_shared_memory("/" + name)


def file_of(segment: Segment) -> Path:
    return SHARED / segment.name


# The header


def test_the_header_is_read_behind_the_magic_that_vouches_for_it(segment, monkeypatch):
    """On a machine whose loads overtake each other a fence stands between them."""
    header = segment.words[segments.W_LAYOUT]

    def fence() -> None:
        segment.words[segments.W_LAYOUT] = header + 1

    monkeypatch.setattr(segments, "read_fence", fence)
    with pytest.raises(ProtocolError, match=f"has layout {header + 1}"):
        Segment.open(segment.name)


def test_what_one_process_creates_another_opens_with_the_same_contents(segment):
    segment.words[segment.arena] = 1 << 63
    opened = Segment.open(segment.name)
    assert (opened.slots, opened.size, opened.flow) == (segment.slots, segment.size, "a flow")
    assert opened.hash_key == segment.hash_key != bytes(16)
    assert opened.words[segment.arena] == 1 << 63
    opened.words[segment.arena] = 7
    assert segment.words[segment.arena] == 7
    assert segment.words[segments.W_PID] == 12
    assert segment.words[segments.W_START] == 34
    opened.close()


def test_two_segments_have_different_hash_keys(new_segment):
    assert new_segment().hash_key != new_segment().hash_key


@pytest.mark.parametrize("name", ["plain", "Grüße an 世界", "x" * 2000, "ü" * 1000, "nul\0inside"])
def test_the_name_of_the_flow_can_be_read_back_as_far_as_it_fits(new_segment, name):
    found = new_segment(name).flow
    assert found == name or (len(name) > 200 and name.startswith(found.rstrip("�")) and len(found) > 200)


def test_a_segment_that_is_not_there_is_a_missing_file():
    with pytest.raises(FileNotFoundError):
        Segment.open(f"{PREFIX}nobody")


@pytest.mark.parametrize("size", [0, 1, 100, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 1, 2 * MiB])
def test_memory_that_is_not_ours_is_refused(foreign, size):
    name = foreign(size)
    with pytest.raises(ProtocolError, match=name):
        Segment.open(name)
    assert (SHARED / name).stat().st_size == size


@pytest.mark.parametrize("left", [0, 1, PAGE_BYTES - 1, PAGE_BYTES, 0.5, -PAGE_BYTES, -1])
def test_a_truncated_segment_is_refused(segment, left):
    size = int(segment.size * left) if left == 0.5 else left % segment.size
    os.truncate(file_of(segment), size)
    with pytest.raises(ProtocolError, match="damaged"):
        Segment.open(segment.name)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        (segments.W_MAGIC, 0),
        (segments.W_MAGIC, segments.MAGIC + 1),
        (segments.W_SIZE, 0),
        (segments.W_SIZE, 1 << 63),
        (segments.W_SLOTS, 0),
        (segments.W_SLOTS, 1 << 15),
        (segments.W_SLOTS, (1 << 64) - 1),
    ],
)
def test_a_damaged_header_is_refused(segment, word, value):
    segment.words[word] = value
    with pytest.raises(ProtocolError, match=r"damaged; .*strictflow-mp clean"):
        Segment.open(segment.name)


@pytest.mark.parametrize("layout", [0, segments.LAYOUT + 1, 1 << 40])
def test_another_layout_is_refused_and_named(segment, layout):
    segment.words[segments.W_LAYOUT] = layout
    with pytest.raises(ProtocolError, match=f"layout {layout}, .* reads {segments.LAYOUT}; use the same version"):
        Segment.open(segment.name)


@example(damage={}, delta=-1)
@given(
    damage=st.dictionaries(
        st.sampled_from([segments.W_MAGIC, segments.W_LAYOUT, segments.W_SIZE, segments.W_SLOTS]),
        st.integers(0, (1 << 64) - 1) | st.integers(0, 5000),
    ),
    delta=st.integers(-9, 0),
)
def test_whatever_the_header_says_opening_gives_a_segment_or_a_protocol_error(damage, delta):
    segment = Segment.create(secrets.token_hex(6), "f", capacity=CLAIM_BYTES, slots=4, identity=Identity(1, 1, 0, 0))
    words = memoryview(bytearray(segment.words.tobytes()[: 16 * WORD])).cast("Q")
    try:
        segment.words[segments.W_SIZE] += delta
        for word, value in damage.items():
            segment.words[word] = value
        try:
            opened = Segment.open(segment.name)
        except ProtocolError:
            return
        assert opened.words[0] == segments.MAGIC
        assert opened.buffer[opened.size - 1] == 0
        assert opened.words[opened.arena - 1] == 0
        opened.close()
    finally:
        segment.words[:16] = words
        segment.close()
        segment.unlink()


def test_nothing_stays_open_when_opening_was_refused(segment):
    segment.words[segments.W_LAYOUT] = 99
    before = hold_on(segment)
    for _ in range(3):
        with pytest.raises(ProtocolError):
            Segment.open(segment.name)
    assert hold_on(segment) == before


def hold_on(segment: Segment) -> tuple[int, int]:
    """How many descriptors and how many mappings of it this process has."""
    gc.collect()
    links = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.islink(entry.path)]
    maps = Path("/proc/self/maps").read_text()
    return sum(segment.name in link for link in links), maps.count(segment.name)


# Where things lie


@given(st.integers(1, 1 << 12))
def test_no_two_arrays_share_a_word_whatever_the_number_of_slots(slots):
    class Mapping:
        memory = bytearray(Segment.control_bytes(slots))
        buf = memoryview(memory)

    segment = Segment("name", Mapping(), slots, len(Mapping.buf))  # type: ignore[arg-type]
    ring = segments.W_RING + segments.RING_RECORDS * segments.RECORD_WORDS
    names = ["submitted", "finished", "waiting", "pids", "starts", "waits", "waited"]
    extents = [(getattr(segment, name), slots) for name in names] + [(segment.pins, slots * PIN_WORDS)]
    assert extents[0][0] >= ring
    for (start, size), (following, _) in itertools.pairwise([*extents, (segment.arena, 0)]):
        assert start + size <= following
    assert segment.arena * WORD % PAGE_BYTES == 0
    assert segment.arena * WORD == Segment.control_bytes(slots)


@pytest.mark.parametrize("version", [0, 1, segments.RING_RECORDS - 1, segments.RING_RECORDS, 1000])
def test_a_record_lies_in_the_ring_where_its_version_says(segment, version):
    record = segment.record(version)
    assert record == segments.W_RING + version % segments.RING_RECORDS * segments.RECORD_WORDS
    assert segments.W_RING <= record <= segment.submitted - segments.RECORD_WORDS


def test_a_slot_has_each_of_its_words_by_name_and_none_of_another_slot(segment):
    arrays = (
        "submitted",
        "finished",
        "waiting",
        "pids",
        "starts",
        "spaces",
        "tenants",
        "waits",
        "waited",
        "semaphores",
    )
    names = ("submitted", "finished", "waiting", "pid", "start", "space", "tenant", "waits", "waited", "semaphore")
    assert len(arrays) == SLOT_ARRAYS
    slot = segment.slot(2)
    for number, name in enumerate(names, 1):
        setattr(slot, name, number)
    for number, (array, name) in enumerate(zip(arrays, names, strict=True), 1):
        begin = getattr(segment, array)
        assert segment.words[begin : begin + segment.slots].tolist() == [0, 0, number, 0]
        assert getattr(slot, name) == number
    slot.pins[PIN_WORDS - 1] = 7
    assert segment.words[segment.pins + 3 * PIN_WORDS - 1] == 7
    assert len(slot.pins) == PIN_WORDS
    assert not any(segment.slot(3).pins)
    assert repr(slot) == "<SlotWords of slot 2, pid 4>"


def test_an_existing_segment_is_never_taken_for_a_new_one(segment):
    segment.words[segment.arena] = 5
    with pytest.raises(FileExistsError):
        Segment.create(segment.name[len(PREFIX) :], "b", capacity=CLAIM_BYTES, slots=1, identity=Identity(1, 1, 0, 0))
    assert Segment.open(segment.name).flow == "a flow"
    assert segment.words[segment.arena] == 5


# Claiming memory


def claimed_bytes(segment: Segment) -> int:
    return file_of(segment).stat().st_blocks * 512


def test_a_new_segment_takes_the_memory_of_its_control_words_only(new_segment):
    segment = new_segment(capacity=1 << 30)
    assert claimed_bytes(segment) <= segment.arena * WORD + PAGE_BYTES
    assert file_of(segment).stat().st_size == segment.size > 1 << 30


def test_what_is_claimed_exists_and_nothing_more(new_segment):
    segment = new_segment(capacity=64 * MiB)
    for words in (1, 1, CLAIM_BYTES // WORD + 1, 10 * CLAIM_BYTES // WORD):
        before = segment.words_claimed
        gained = segment.claim(words, "a flow")
        assert gained >= words
        assert segment.words_claimed == before + gained
        assert claimed_bytes(segment) == segment.words_claimed * WORD


def test_a_reader_sees_the_claimed_memory_and_gets_an_index_error_behind_it(segment):
    reader = Segment.open(segment.name)
    words, buffer = reader.claimed()
    assert (len(words), len(buffer)) == (segment.arena, segment.arena * WORD)
    segment.claim(1, "a flow")
    for view, index in ((words, segment.arena), (buffer, segment.arena * WORD)):
        with pytest.raises(IndexError):
            view[index]
    words, buffer = reader.claimed()
    assert len(words) == segment.words_claimed > segment.arena
    assert (words[-1], buffer[-1]) == (0, 0)
    del words, buffer
    reader.close()


def test_at_the_end_of_its_capacity_a_segment_is_full_and_stays_as_it_is(new_segment):
    segment = new_segment(capacity=3 * CLAIM_BYTES - PAGE_BYTES)
    while segment.words_claimed * WORD < segment.size:
        segment.claim(1, "a flow")
        assert segment.words_claimed * WORD <= segment.size
    segment.words[-1] = 1
    with pytest.raises(StateFull, match=r"'a flow'.* needs 8 bytes more.*capacity") as caught:
        segment.claim(1, "a flow")
    assert caught.value.flow == "a flow"
    assert segment.words_claimed * WORD == segment.size


def test_the_last_words_of_the_capacity_can_be_had_but_not_one_more(new_segment):
    segment = new_segment(capacity=2 * CLAIM_BYTES)
    left = segment.size // WORD - segment.words_claimed
    with pytest.raises(StateFull):
        segment.claim(left + 1, "a flow")
    assert segment.claim(left, "a flow") == left


@pytest.fixture
def run_in_small_shm(run_python: Callable[..., Any]) -> Callable[[str], Any]:
    """`run_in_small_shm(code)` is `run_python` where /dev/shm has 3 MiB and nothing in it."""
    enter = """
        import os, sys

        mount = 'mount -t tmpfs -o size=3m tmpfs /dev/shm && exec "$@"'
        unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
        os.execvp("unshare", [*unshare, sys.executable, "-W", "error", "-c", sys.argv[1]])
    """
    probe = run_python(enter, "")
    if probe.returncode:
        pytest.skip(f"no mount namespace to be had here: {probe.stderr}")
    return lambda code: run_python(enter, textwrap.dedent(code))


def test_when_shared_memory_is_full_a_claim_says_so_and_what_was_claimed_can_be_used(run_in_small_shm):
    done = run_in_small_shm("""
        import os, re
        from strictflow_mp.errors import StateFull
        from strictflow_mp.system.identity import Identity
        from strictflow_mp.memory.segment import PAGE_BYTES, Segment

        segment = Segment.create("full", "a flow", capacity=1 << 26, slots=4, identity=Identity(1, 1, 0, 0))
        for words in (1 << 18, 1 << 18, 1):
            while True:
                before = segment.words_claimed
                try:
                    gained = segment.claim(words, "a flow")
                except StateFull as full:
                    assert re.search("'a flow'.*/dev/shm has no room for .*; delete keys, or enlarge", str(full))
                    assert segment.words_claimed == before
                    break
                assert segment.words_claimed == before + gained >= before + words
        assert os.statvfs("/dev/shm").f_bavail == 0
        start, end = segment.arena * 8, segment.words_claimed * 8
        segment.buffer[start:end] = b"x" * (end - start)
        words, buffer = Segment.open("sfmp-full").claimed()
        assert buffer[start:] == b"x" * (end - start)
        print("alive")
    """)
    assert (done.stdout, done.stderr, done.returncode) == ("alive\n", "", 0)


def test_a_segment_that_finds_no_room_for_its_control_words_leaves_nothing(run_in_small_shm):
    done = run_in_small_shm("""
        import os
        from strictflow_mp.errors import StateFull
        from strictflow_mp.system.identity import Identity
        from strictflow_mp.memory.segment import Segment

        with open("/dev/shm/filler", "wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, (3 << 20) - 8192)
        try:
            Segment.create("full", "a flow", capacity=1 << 26, slots=4, identity=Identity(1, 1, 0, 0))
        except StateFull as full:
            print(full.flow, os.listdir("/dev/shm"))
    """)
    assert (done.stdout, done.stderr, done.returncode) == ("a flow ['filler']\n", "", 0)


def test_a_segment_that_is_too_large_to_be_mapped_leaves_nothing(run_python):
    done = run_python("""
        import os, resource
        from strictflow_mp.system.identity import Identity
        from strictflow_mp.memory.segment import Segment

        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        try:
            Segment.create("full", "a flow", capacity=1 << 32, slots=4, identity=Identity(1, 1, 0, 0))
        except Exception:
            print(os.path.exists("/dev/shm/sfmp-full"))
    """)
    assert (done.stdout, done.stderr, done.returncode) == ("False\n", "", 0)


# Who may remove it


def test_the_resource_tracker_never_hears_of_a_segment(segment, monkeypatch):
    heard: list[Any] = []
    for name in ("register", "unregister"):
        monkeypatch.setattr(resource_tracker, name, lambda *what: heard.append(what))
    another = Segment.create(secrets.token_hex(6), "b", capacity=CLAIM_BYTES, slots=1, identity=Identity(1, 1, 0, 0))
    Segment.open(segment.name).close()
    another.close()
    another.unlink()
    with pytest.raises(FileNotFoundError):
        Segment.open(another.name)
    assert heard == []


def test_the_resource_tracker_still_hears_of_other_shared_memory(segment, monkeypatch):
    Segment.open(segment.name).close()
    heard: list[Any] = []
    monkeypatch.setattr(resource_tracker, "register", lambda *what: heard.append(what))
    other = shared_memory.SharedMemory(create=True, size=10)
    assert heard == [(other._name, "shared_memory")]
    monkeypatch.undo()
    resource_tracker.register(other._name, "shared_memory")
    other.close()
    other.unlink()


@pytest.mark.parametrize("end", ["segment.close()", "", "os.kill(os.getpid(), 9)"])
def test_a_process_that_opened_a_segment_does_not_remove_it_when_it_ends(segment, run_python, end):
    done = run_python(
        f"""
        import os, sys
        from multiprocessing import resource_tracker
        from strictflow_mp.system.identity import Identity
        from strictflow_mp.memory.segment import Segment

        resource_tracker.ensure_running()
        segment = Segment.open(sys.argv[1])
        {end}
        """,
        segment.name,
    )
    assert (done.stderr, done.returncode) == ("", -9 if "kill" in end else 0)
    Segment.open(segment.name).close()


def test_a_process_that_has_no_memory_to_map_a_segment_does_not_remove_it(new_segment, run_python):
    segment = new_segment(capacity=1 << 32)
    done = run_python(
        """
        import resource, sys
        from strictflow_mp.system.identity import Identity
        from strictflow_mp.memory.segment import Segment

        resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
        try:
            Segment.open(sys.argv[1])
        except OSError as error:
            print(error.strerror)
        """,
        segment.name,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("Cannot allocate memory\n", "", 0)
    assert file_of(segment).exists()


def test_removing_what_is_gone_already_is_no_error(new_segment):
    segment = new_segment()
    segment.unlink()
    segment.unlink()
    segments.unlink_segment(f"{PREFIX}nobody")


# Closing


def test_a_removed_segment_can_be_used_until_it_is_closed(new_segment):
    segment = new_segment()
    opened = Segment.open(segment.name)
    segment.unlink()
    segment.words[segment.arena] = 3
    assert opened.words[segment.arena] == 3
    opened.close()


def test_a_closed_segment_is_unmapped(segment):
    before = hold_on(segment)
    opened = Segment.open(segment.name)
    opened.claim(1, "a flow")
    assert hold_on(segment) > before
    opened.close()
    opened.close()
    if FREE_THREADED:  # there the last one who may look at it has it unmapped
        del opened
        gc.collect()
    assert hold_on(segment) == before
    if not FREE_THREADED:
        with pytest.raises(ValueError, match="released"):
            opened.words[0]


@pytest.mark.parametrize("view", ["words", "buffer"])
def test_what_somebody_looks_at_outlives_the_handle_and_nothing_else_does(segment, view):
    before = hold_on(segment)
    opened = Segment.open(segment.name)
    held = getattr(opened, view)[16:32]
    claimed = opened.claimed()
    opened.close()
    del opened
    segment.buffer[:] = bytes([7]) * segment.size
    assert set(held.cast("B")) == {7}
    assert set(claimed[1][:100]) == {7}
    del held, claimed
    assert hold_on(segment) == before
