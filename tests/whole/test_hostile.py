"""Hostile input: it costs nobody else anything, and nobody but the flow's own processes runs code."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import operator
import os
import pickle
import random
import resource
import secrets
import signal
import socket
import stat
import struct
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

import msgpack
import numpy
import psutil
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from strictflow_mp import StrictFlow, StrictFlowError, read, write
from strictflow_mp.coordinator.admission import MAX_HANDSHAKES
from strictflow_mp.memory import segment as segments
from strictflow_mp.memory.segment import Segment
from strictflow_mp.memory.slot import PIN_WORDS
from strictflow_mp.store import Pins, StoreReader, StoreWriter
from strictflow_mp.store.trie import FANOUT, walk
from strictflow_mp.store.views import Snapshot
from strictflow_mp.system.identity import Identity
from strictflow_mp.system.place import Place
from strictflow_mp.values import types as extensions
from strictflow_mp.values.codec import pack, unpack_frozen
from strictflow_mp.values.keys import pack_key
from strictflow_mp.wire import frames as wire
from strictflow_mp.wire import handshake
from strictflow_mp.wire.stream import Stream

NAME = "hostile"
MAX_WORKERS = 4
MAX_PENDING = 64
FIRST = {"victim": {"handlers": [1, 2, 3]}}
PATIENCE = 10
"""Seconds after which somebody counts as held up."""
MEMORY = 64 << 20
"""Bytes that the coordinator may take more, at any moment."""

pytestmark = [
    pytest.mark.once,
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
many = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


# Who is attacked


class Victim:
    """A flow, and how it was before."""

    def __init__(self, flow):
        self.flow = flow
        stats = flow.stats()
        self.pid = stats.coordinator_pid
        self.rounds = 0
        self.memory = self.peak()

    def peak(self):
        """The most memory that the coordinator ever had, in bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) << 10

    def is_unharmed(self):
        """Whether it lives, serves, and has the state and about the memory that it had."""
        self.rounds += 1
        flow = self.flow
        assert flow.put("round", self.rounds).result(PATIENCE) is None
        with flow.snapshot() as now:  # what was put may be of a class that nobody has
            assert (now["round"], now["victim"]) == (self.rounds, FIRST["victim"])
        stats = flow.stats()
        assert (stats.coordinator_pid, stats.restarts) == (self.pid, 0)
        assert self.peak() - self.memory < MEMORY
        return True

    def is_alone(self):
        """Whether no slot is taken but ours."""
        return len(self.flow.stats().workers) == 1


@pytest.fixture
def victim(eventually):
    with StrictFlow(NAME, state=FIRST, max_workers=MAX_WORKERS, max_pending=MAX_PENDING) as flow:
        victim = Victim(flow)
        yield victim
        assert victim.is_unharmed()
        eventually(victim.is_alone)
        flow.close()
        fill_all_places()
        assert victim.is_unharmed()


def fill_all_places():
    """No slot is lost: as many processes as may attach do so at once, and each reads and writes."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(MAX_WORKERS)
    crowd = [context.Process(target=take_a_place, args=(barrier, number)) for number in range(MAX_WORKERS)]
    for process in crowd:
        process.start()
    for process in crowd:
        process.join()
    assert [process.exitcode for process in crowd] == [0] * MAX_WORKERS


def take_a_place(barrier, number):
    flow = StrictFlow.attach(NAME)
    try:
        flow.put(("place", number), number).result(PATIENCE)
        assert flow.state["place", number] == number
        barrier.wait(PATIENCE)
    except BaseException:
        barrier.abort()
        raise


# Who attacks


def forked(misbehave, *args):
    """The pid of a process of its own that misbehaves."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        misbehave(*args)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def offend(misbehave, *args):
    """Let a process misbehave until it has done its worst, and is gone."""
    assert os.waitpid(forked(misbehave, *args), 0)[1] == 0


@contextlib.contextmanager
def offender(misbehave, *args):
    """A process that misbehaves, has said so to us, and goes on until it is killed."""
    hear, said = os.pipe()
    pid = forked(stand_by, said, misbehave, *args)
    os.close(said)
    try:
        assert os.read(hear, 1)
        yield pid
    finally:
        os.close(hear)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def stand_by(said, misbehave, *args):
    kept = misbehave(*args)
    os.write(said, b".")
    signal.pause()
    return kept


def dial():
    """A connection on which nothing was said yet."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(Place.of(NAME).socket))
    return connection


def knock(greeting):
    """A connection that has proved to know the key and was greeted."""
    place = Place.of(NAME)
    connection = handshake.connect(place.socket, place.authkey(), PATIENCE)
    welcome = handshake.greet(connection, greeting)
    assert "slot" in welcome, welcome
    return connection, welcome


def finish(connection):
    """Say that there is nothing more to come; return when the coordinator has dealt with it and hung up."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
    return hear_out(connection)


def hear_out(connection):
    """All that the coordinator says until it hangs up."""
    connection.settimeout(PATIENCE)
    heard = b""
    with contextlib.suppress(ConnectionError):
        while some := connection.recv(1 << 16):
            heard += some
    return heard


def say(connection, data):
    """Send, even to one that has hung up already."""
    with contextlib.suppress(ConnectionError):
        connection.sendall(data)


def attach_and_say(greeting, data):
    connection, _ = knock(greeting)
    with connection:
        say(connection, data)
        finish(connection)


class Bomb:
    """Makes whoever unpickles it create a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def bomb(tmp_path):
    """A pickle, and the file that is there once somebody has unpickled it."""
    crater = tmp_path / "crater"
    data = pickle.dumps(Bomb(crater))
    pickle.loads(data).close()
    crater.unlink()
    return data, crater


# What an honest client says


class Honest:
    """The greeting and the frames that the package's own client sends: what is mutated here."""

    def __init__(self):
        self.greeting = {}
        self.frames = []


@pytest.fixture
def honest(victim, monkeypatch):
    honest = Honest()
    greet, flush = handshake.greet, Stream.flush

    def record_greeting(sock, greeting, *rest):
        honest.greeting = dict(greeting)
        return greet(sock, greeting, *rest)

    def record_frames(stream):
        due = bytes(stream.outbox)
        is_sent = flush(stream)
        unpacker = msgpack.Unpacker(strict_map_key=False)
        unpacker.feed(due[: len(due) - len(stream.outbox)])
        honest.frames += unpacker
        return is_sent

    flow = victim.flow
    flow.close()
    with monkeypatch.context() as patch:
        patch.setattr(handshake, "greet", record_greeting)
        patch.setattr(Stream, "flush", record_frames)
        flow.put("own", [1]).result()
        flow.state.update({"own": 2, "other": {"a": (1, 2)}})
        del flow.state["other"]
        write(flow)(operator.not_)(5).result()
        write(flow, key="own")(operator.index)().result()
        read(flow, key="own")(operator.add)(1).result()
        read(flow)(operator.not_)(True).cancel()
        flow.stats()
        flow.close()
    kinds = {frame[0] for frame in honest.frames}
    assert kinds == {wire.FUNCTION, wire.CALL, wire.PUT, wire.CANCEL, wire.STATS, wire.GOODBYE}
    return honest


# Mutations

EDGES = [0, 1, -1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1, -(2**63)]
integers = st.sampled_from(EDGES) | st.integers(-(2**63), 2**64 - 1) | st.integers(-2, 70)


def nested(depth, innermost=b"\x01", level=b"\x91"):
    return level * depth + innermost


class Raw(bytes):
    """Bytes that stand for themselves in a frame, msgpack or not."""


ANNOUNCED = [
    b"\xdd\xff\xff\xff\xff",
    b"\xdd\x04\x00\x00\x00",
    b"\xdf\xff\xff\xff\xff",
    b"\xdf\x04\x00\x00\x00",
]
ANNOUNCED += [
    b"\xc6\xff\xff\xff\xff",
    b"\xc6\x3f\xff\xff\xff",
    b"\xdb\x3f\xff\xff\xff",
    b"\xc9\x3f\xff\xff\xff\x05",
]
ANNOUNCED += [b"\xdd\x00\x40\x00\x00" * 100]

junk = st.one_of(
    st.none(),
    st.booleans(),
    integers,
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=40),
    st.sampled_from(ANNOUNCED).map(Raw),
    st.sampled_from([1, 100, 500, 1000, 1020, 1100]).map(nested).map(Raw),
    st.sampled_from([100, 500, 1000]).map(lambda depth: Raw(nested(depth, level=b"\x81\x01"))),
    st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=20)),
    st.builds(
        lambda code, data: Raw(b"\xc7" + bytes([len(data), code]) + data),
        st.integers(0, 255),
        st.binary(max_size=20),
    ),
    st.sampled_from([Raw(b"\xc1"), Raw(b"\xa2\xff\xfe"), Raw(b"\x90"), Raw(b"\x80"), bytes(1 << 16), "x" * (1 << 16)]),
    st.recursive(integers | st.binary(max_size=8), lambda inner: st.lists(inner, max_size=4), max_leaves=8),
)


def encode(value):
    """Msgpack, with the `Raw` parts as they are."""
    if isinstance(value, Raw):
        return bytes(value)
    if type(value) in (list, tuple):
        return b"\xdd" + struct.pack(">I", len(value)) + b"".join(map(encode, value))
    if type(value) is dict:
        return b"\xdf" + struct.pack(">I", len(value)) + b"".join(encode(k) + encode(v) for k, v in value.items())
    return msgpack.packb(value, unicode_errors="surrogatepass")


def places_in(value, here=()):
    """The path of every item in nested lists."""
    for index, item in enumerate(value):
        yield (*here, index)
        if type(item) is list:
            yield from places_in(item, (*here, index))


def copied(value):
    return [copied(item) for item in value] if type(value) is list else value


@st.composite
def mutations(draw, frames):
    """The bytes of one of *frames* with something wrong in it, perhaps many times."""
    frame = copied(draw(st.sampled_from(frames)))
    how = draw(st.sampled_from(["replace", "replace", "replace", "drop", "insert", "swap", "repeat", "as it is"]))
    *path, index = draw(st.sampled_from(list(places_in(frame))))
    inner = frame
    for step in path:
        inner = inner[step]
    if how == "replace":
        inner[index] = draw(junk)
    elif how == "drop":
        del inner[index]
    elif how == "insert":
        inner.insert(index, draw(junk))
    elif how == "swap":
        other = draw(st.integers(0, len(inner) - 1))
        inner[index], inner[other] = inner[other], inner[index]
    elif how == "repeat":
        inner[index:index] = [inner[index]] * draw(st.integers(1, 300))
    if frame and frame[0] == wire.STOP:  # that one may be asked by anybody
        frame[0] = 0
    data = bytearray(encode(frame))
    how = draw(st.sampled_from(["whole", "whole", "cut", "flip", "many"]))
    if how == "cut":
        del data[draw(st.integers(0, len(data))) :]
    elif how == "flip" and data:
        # Behind the head: a flip there could make a frame a stop.
        data[draw(st.integers(min(6, len(data) - 1), len(data) - 1))] ^= draw(st.integers(1, 255))
    elif how == "many":
        data *= draw(st.integers(2, 40))
    return bytes(data)


# Before the key was proved

lengths = st.sampled_from([-1, -2, 0, 1, 255, 256, 257, 1 << 20, (1 << 31) - 1])


@st.composite
def messages(draw):
    """What `multiprocessing.connection` might take for a message, or not."""
    body = draw(st.binary(max_size=60) | st.sampled_from([b"#CHALLENGE#" + bytes(20), b"#WELCOME#", b"#FAILURE#"]))
    how = draw(st.sampled_from(["sound", "raw", "wrong length", "huge"]))
    if how == "sound":
        return struct.pack("!i", len(body)) + body
    if how == "raw":
        return body
    if how == "wrong length":
        return struct.pack("!i", draw(lengths)) + body
    return struct.pack("!iQ", -1, draw(st.sampled_from([0, 1 << 31, 1 << 62, (1 << 64) - 1]))) + body


def test_whatever_a_stranger_says_it_is_hung_up_on_and_nobody_else_notices(victim):
    @many
    @given(st.lists(messages(), max_size=4).map(b"".join), st.booleans())
    def check(data, echo):
        with dial() as connection:
            if echo:
                data = connection.recv(1 << 16) + data
            say(connection, data)
            finish(connection)
        assert victim.is_unharmed()

    check()


def test_nothing_is_unpickled_before_the_key_was_proved_nor_as_a_greeting(victim, bomb):
    data, crater = bomb
    message = struct.pack("!i", len(data)) + data
    for said in (data, message, message * 3):
        with dial() as connection:
            say(connection, said)
            finish(connection)
    place = Place.of(NAME)
    with handshake.connect(place.socket, place.authkey(), PATIENCE) as connection:
        say(connection, message)
        finish(connection)
    assert victim.is_unharmed()
    assert not crater.exists()


def test_who_does_not_know_the_key_makes_nothing_run(victim, honest, bomb):
    data, crater = bomb
    place = Place.of(NAME)
    right = place.authkey()
    greeting = msgpack.packb(honest.greeting)
    script = struct.pack("!i", len(greeting)) + greeting
    script += wire.pack_frame(wire.FUNCTION, 0, True, data, "bomb", 2, None, None, ())
    for wrong in (b"", right[:-1], right + b"x", right[::-1], bytes(len(right))):
        with dial() as connection, Connection(os.dup(connection.fileno())) as theirs:
            with pytest.raises(multiprocessing.AuthenticationError):
                multiprocessing.connection.answer_challenge(theirs, wrong)
            say(connection, script)
            finish(connection)
        assert victim.is_unharmed()
    assert not crater.exists()
    # With the key, the same script is what a process of the flow may do.
    offend(authenticate_and_say, right, script)
    assert victim.is_unharmed()
    assert crater.exists()


def authenticate_and_say(key, data):
    with handshake.connect(Place.of(NAME).socket, key, PATIENCE) as connection:
        say(connection, data)
        finish(connection)


def tell(flow, module, **settings):
    """Set variables of a module in the coordinator."""

    @write(flow)
    def set_them():
        import importlib

        for variable, value in settings.items():
            setattr(importlib.import_module(f"strictflow_mp.{module}"), variable, value)

    set_them().result()


class Counted:
    """Counts the calls of one of the coordinator's methods from now on."""

    def __init__(self, flow, module, method):
        @write(flow)
        def count():
            import functools
            import importlib

            owner, _, name = method.rpartition(".")
            owner = functools.reduce(getattr, owner.split("."), importlib.import_module(f"strictflow_mp.{module}"))
            real = getattr(owner, name)

            @functools.wraps(real)
            def counting(*args):
                counting.number += 1
                return real(*args)

            counting.number = 0
            setattr(owner, name, counting)

        @write(flow)
        def number():
            import functools
            import importlib

            module_ = importlib.import_module(f"strictflow_mp.{module}")
            return functools.reduce(getattr, method.split("."), module_).number

        count().result()
        self._number = number

    @property
    def number(self):
        return self._number().result(PATIENCE)


def test_who_answers_byte_by_byte_has_no_more_time_for_the_handshake_than_others(victim):
    tell(victim.flow, "coordinator.admission", HANDSHAKE_SECONDS=0.3)
    with dial() as connection:
        connection.settimeout(PATIENCE)
        connection.recv(1 << 16)
        connection.sendall(struct.pack("!i", 200))
        connection.settimeout(0.05)
        for _ in range(199):
            try:
                connection.sendall(b"x")
                assert connection.recv(1) == b""
                return
            except TimeoutError:
                pass
            except ConnectionError:
                return
        pytest.fail("it was listened to until its last byte")


def test_more_silent_strangers_than_there_may_be_handshakes_do_not_keep_the_loop_busy(victim, honest):
    tell(victim.flow, "coordinator.admission", HANDSHAKE_SECONDS=0.5)
    polls = Counted(victim.flow, "coordinator.sessions", "Sessions.poll")
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(dial()) for _ in range(MAX_HANDSHAKES + 8)]
        offend(attach_and_say, honest.greeting, b"")
        for connection in silent:
            hear_out(connection)
    assert polls.number < 40 * MAX_HANDSHAKES


# Greetings


@st.composite
def greetings(draw, honest):
    """The honest greeting with something wrong in it."""
    greeting = dict(honest)
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(sorted(honest)) | st.text(max_size=5) | st.sampled_from(["resume", "token", "slot"]))
        if draw(st.booleans()):
            greeting.pop(key, None)
        else:
            greeting[key] = draw(junk)
    return encode(draw(st.just(greeting) | junk))


def greet_badly(greeting):
    place = Place.of(NAME)
    with handshake.connect(place.socket, place.authkey(), PATIENCE) as connection:
        say(connection, struct.pack("!i", len(greeting)) + greeting)
        finish(connection)


def test_whatever_the_greeting_it_is_refused_or_taken_and_nobody_else_notices(victim, honest):
    @many
    @given(greetings(honest.greeting))
    def check(greeting):
        offend(greet_badly, greeting)
        assert victim.is_unharmed()

    check()


def greet_and_read_nothing(greeting):
    place = Place.of(NAME)
    connection = handshake.connect(place.socket, place.authkey(), PATIENCE)
    say(connection, struct.pack("!i", len(greeting)) + greeting)
    return connection


def test_a_refusal_that_is_not_read_holds_nobody_up(victim, honest, eventually):
    tell(victim.flow, "coordinator.admission", HANDSHAKE_SECONDS=6 * PATIENCE)
    greeting = encode({**honest.greeting, "protocol": b"\0" * 1_000_000})
    handshakes = Counted(victim.flow, "coordinator.admission", "Admission._admit")
    with offender(greet_and_read_nothing, greeting):
        eventually(lambda: handshakes.number > 0)
        assert victim.is_unharmed()


def test_a_path_that_is_none_keeps_nobody_else_from_importing(victim, honest, tmp_path):
    attached = {**honest.greeting, "path": ["\0", "/dev/null", "a" * 5000]}
    offend(attach_and_say, attached, b"")
    (tmp_path / "imported_late.py").write_text("def answer():\n    return 42\n")
    offend(call_what_is_imported_late, {**honest.greeting, "path": [str(tmp_path)]})


def call_what_is_imported_late(greeting):
    connection, _ = knock(greeting)
    with connection:
        connection.settimeout(PATIENCE)
        connection.sendall(
            wire.pack_frame(wire.FUNCTION, 0, False, b"imported_late:answer", "answer", 2, None, None, ())
            + wire.pack_frame(wire.CALL, 1, 0, (b"",), 0, 0)
        )
        assert pack(42) in connection.recv(1 << 16)


# Users

NOBODY = 65534


def as_nobody(key, shared, report):
    """What another user gets to see of that shared memory, who knows the key and finds all doors open."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    answers = {}
    place = Place.of(NAME)
    for path in (*shared, place.key, place.lock):
        try:
            if not path.is_dir():
                os.close(os.open(path, os.O_RDONLY))
                answers[str(path)] = "opened"
        except PermissionError:
            pass
    try:
        with dial() as connection:
            answers["socket"] = hear_out(connection)
        try:
            handshake.connect(place.socket, key, PATIENCE).close()
        except (StrictFlowError, OSError) as error:
            answers["key"] = type(error).__name__
        else:
            answers["key"] = "accepted"
    except PermissionError:
        answers["socket"] = "closed"
    report.send(answers)


def seen_by_nobody():
    mine, theirs = multiprocessing.Pipe()
    place = Place.of(NAME)
    shared = [path for path in Path("/dev/shm").iterdir() if place.resident().token in path.name]
    assert len(shared) > 1, "a segment and a semaphore at least"
    with mine, theirs:
        offend(as_nobody, place.authkey(), shared, theirs)
        return mine.recv()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_reaches_nothing_and_is_refused_even_with_every_door_open_and_the_key(victim):
    place = Place.of(NAME)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (place.directory, place.directory.parent)}
    assert set(modes.values()) == {0o700}
    assert seen_by_nobody() == {"socket": "closed"}
    try:
        for path in modes:
            path.chmod(0o711)
        assert seen_by_nobody() == {"socket": "closed"}
        place.socket.chmod(0o666)
        # Hung up on without a word, before any challenge.
        seen = seen_by_nobody()
        assert seen.pop("key") != "accepted"
        assert seen == {"socket": b""}
    finally:
        place.socket.chmod(0o600)
        for path, mode in modes.items():
            path.chmod(mode)


# Frames


def test_whatever_is_wrong_with_a_frame_nobody_else_notices(victim, honest, eventually):
    frames = [frame for frame in honest.frames if frame[0] != wire.FUNCTION or frame[2] is False]
    functions = b"".join(encode(frame) for frame in frames if frame[0] == wire.FUNCTION)
    assert functions

    @many
    @given(st.lists(mutations(frames), min_size=1, max_size=4).map(b"".join))
    def check(data):
        offend(attach_and_say, honest.greeting, functions + data)
        assert victim.is_unharmed()
        eventually(victim.is_alone)

    check()


def test_whatever_is_sent_in_place_of_frames_nobody_else_notices(victim, honest, eventually):
    @many
    @given(st.binary(max_size=200) | junk.map(encode) | st.lists(junk, max_size=5).map(encode))
    def check(data):
        offend(attach_and_say, honest.greeting, data)
        assert victim.is_unharmed()
        eventually(victim.is_alone)

    check()


def enum_of(module):
    """A packed Enum member of a class in *module*, as if somebody had stored one."""
    code = next(code for code, name in extensions.NAMES.items() if name == "Enum")
    body = msgpack.packb([module, "Color", "RED"])
    return Raw(b"\xc7" + bytes([len(body), code & 0xFF]) + body)


def first(frames, kind):
    return copied(next(frame for frame in frames if frame[0] == kind))


def p2(frames):
    """An honest call of a P2: it is not counted."""
    return next(frame for frame in frames if frame[0] == wire.CALL and frame[4] == 0)


def put(frames, key, value):
    """An honest put, with another key and value."""
    frame = first(frames, wire.PUT)
    place = next(index for index, field in enumerate(frame) if type(field) is list)
    frame[place] = [[key, value]]
    return frame


def with_numbers(frame, number):
    """The same frame with another number wherever there is one."""
    return [frame[0], *(number if type(field) is int else field for field in frame[1:])]


HARD = {
    "a value that is a map": lambda frames: put(frames, pack_key("k"), {1: 2}),
    "a kind that is too deep to be printed": lambda frames: [Raw(nested(1000))],
    "a kind that is a mebibyte long": lambda frames: [bytes(1 << 20)],
    "a value whose class is in a module that exits": lambda frames: put(
        frames, pack_key("not read"), encode(enum_of("unittest.__main__"))
    ),
    "a key that is not packed as keys are": lambda frames: put(frames, b"\xd9\x01k", pack(1)),
    "a key that equals another": lambda frames: put(frames, b"\xc3", pack(1)),
    "a value that is too deep": lambda frames: put(frames, pack_key("k"), nested(1000)),
    "the highest number of all, in a put": lambda frames: with_numbers(first(frames, wire.PUT), 2**64 - 1),
    "the highest number of all, in a call": lambda frames: with_numbers(first(frames, wire.CALL), 2**64 - 1),
    "the number of no task, in a P2": lambda frames: [wire.CALL, 0, *p2(frames)[2:]],
    "an array that is announced and does not come": lambda frames: [
        wire.PUT,
        1,
        Raw(b"\xdd\x10\x00\x00\x00"),
    ],
    "arrays in arrays that do not come": lambda frames: Raw(b"\xdd\x00\x10\x00\x00" * 1000),
}


@pytest.mark.parametrize("what", HARD)
def test_a_hard_case_costs_its_own_connection_at_most(victim, honest, what):
    functions = b"".join(encode(frame) for frame in honest.frames if frame[0] == wire.FUNCTION)
    offend(attach_and_say, honest.greeting, functions + encode(HARD[what](honest.frames)))
    assert victim.is_unharmed()


# Floods


def attach_and_flood(greeting, frame, times):
    connection, _ = knock(greeting)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
    block = encode(frame) * (times // 100)
    with connection:
        for _ in range(100):
            say(connection, block)
        finish(connection)


FLOOD = 400_000
SHARE = FLOOD // 4
"""Of a flood, what may wait, or come ahead of others: far more than the pipe and `max_pending` hold."""


def test_a_flood_of_frames_is_taken_in_portions(victim, honest):
    frame = first(honest.frames, wire.CANCEL)
    handled = Counted(victim.flow, "coordinator.requests", "Requests.accept")
    pid = forked(attach_and_flood, honest.greeting, frame, FLOOD)
    try:
        portions, before = [], 0
        while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            now = handled.number
            portions.append(now - before)
            before = now
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert max(portions) < SHARE


def test_a_flood_of_tasks_does_not_queue_up_without_bound(victim, honest):
    @write(victim.flow)
    def watch():
        from strictflow_mp.coordinator.scheduler import Scheduler

        submit = Scheduler.submit
        Scheduler.longest = 0

        def watching(self, job):
            submit(self, job)
            Scheduler.longest = max(Scheduler.longest, self.writes)

        Scheduler.submit = watching

    @write(victim.flow)
    def longest():
        from strictflow_mp.coordinator.scheduler import Scheduler

        return Scheduler.longest

    watch().result()
    offend(attach_and_flood, honest.greeting, put(honest.frames, pack_key("k"), pack(1)), FLOOD)
    assert longest().result() < SHARE


# The flag


def raise_and_say(greeting, data):
    """As a client that has counted a task whose frame was refused."""
    connection, welcome = knock(greeting)
    segment = Segment.open(welcome["segment"])
    segment.words[segment.submitted + welcome["slot"]] += 5
    say(connection, data)
    hear_out(connection)


def test_the_flag_of_a_process_that_was_hung_up_on_is_lifted_while_it_lives(victim, honest):
    for data in (b"\xc1", encode([99])):
        with offender(raise_and_say, honest.greeting, data):
            assert victim.is_unharmed()


# Segments

KEYS = [pack_key(key) for key in ("a", "b", ("c", 1), 7, b"bytes")] + [pack_key(n) for n in range(100, 180)]
VALUES = [{"list": [1, "two", (3, 4)]}, {5, 6}, 1 << 70, "x" * 300, None]


class Damaged:
    """A segment with a state in it, through which a reader looks after it was damaged."""

    def __init__(self):
        self.segment = Segment.create(
            secrets.token_hex(6), "f", capacity=1 << 20, slots=2, identity=Identity(os.getpid(), 1, 0, 0)
        )
        writer = StoreWriter(self.segment, "f")
        writer.create()
        values = [*VALUES, numpy.arange(20.0), (numpy.float32(1), numpy.zeros((2, 3), "i4"))]
        for round_ in range(3):
            writer.publish({key: pack([round_, values[n % len(values)]]) for n, key in enumerate(KEYS)})
        version = writer.version
        self.root = self.segment.words[self.segment.record(version) + segments.R_ROOT]
        pointers = list(walk(self.segment.words, self.root))
        self.pointers = pointers
        self.nodes = [pointer >> 1 for pointer in pointers if not pointer & 1]
        self.cells = [pointer >> 1 for pointer in pointers if pointer & 1]
        self.end = self.segment.words[segments.W_CLAIMED]
        self._sound = bytes(self.segment.buffer[: self.end * 8])

    def targets(self):
        """Words that mean something, by what they are."""
        ring, record = segments.W_RING, segments.RECORD_WORDS
        control = [segments.W_VERSION, segments.W_HORIZON, segments.W_CLAIMED]
        return {
            "control": control,
            "ring": list(range(ring, ring + segments.RING_RECORDS * record)),
            "record": [ring + version * record + field for version in range(8) for field in range(record)],
            "pins": list(range(self.segment.pins, self.segment.pins + 2 * PIN_WORDS)),
            "nodes": [node + child for node in self.nodes for child in range(-1, FANOUT)],
            "cells": [cell + word for cell in self.cells for word in range(8)],
        }

    def restore(self):
        self.segment.buffer[: self.end * 8] = self._sound

    def read(self):
        """Read everything in every way that a client has."""
        segment = Segment.open(self.segment.name)
        try:
            reader = StoreReader(segment, Pins(segment, 1))
            for key in [*KEYS, pack_key("absent")]:
                with contextlib.suppress(StrictFlowError):
                    found = reader.get(reader.route(key))
                    if found is not None and found[2] is not None:
                        unpack_frozen(found[2])
            with (
                contextlib.suppress(StrictFlowError),
                Snapshot("f", lambda: reader, lambda: True) as snapshot,
            ):
                for key in ("a", "b", ("c", 1), 7, "absent"):
                    with contextlib.suppress(StrictFlowError, KeyError):
                        snapshot[key]
                for _ in snapshot.cells():
                    pass
        finally:
            segment.close()


def damages(damaged):
    targets = damaged.targets()
    rng = random.Random(0)
    values = st.one_of(
        integers.map(lambda number: number % 2**64),
        st.sampled_from([*rng.sample(damaged.pointers, 20), damaged.root, damaged.root | 1]),
        st.sampled_from([index << 1 | tag for index in (1, damaged.end - 1, damaged.end, 1 << 62) for tag in (0, 1)]),
        st.builds(lambda key, length: key << 44 | length, st.integers(0, 2**20 - 1), st.integers(0, 2**44 - 1)),
    )
    words = st.one_of([st.sampled_from(where) for where in targets.values()])
    return st.lists(st.tuples(words, values), min_size=1, max_size=6)


class Endless(BaseException):
    pass


def strike(number, frame):
    raise Endless


def read_what_was_damaged(examples):
    """In a process of its own, which may crash."""
    faulthandler.enable()
    limit = psutil.Process().memory_info().vms + (4 << 30)  # beside what it has mapped from its parent
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGALRM, strike)
    damaged = Damaged()

    @settings(max_examples=examples, database=None)
    @example([(segments.W_HORIZON, 2**64 - 1)])
    @example([(damaged.nodes[0], damaged.nodes[0] << 1)])
    @example([(segments.W_VERSION, 2**64 - 1)])
    @example([(cell + 2, 1 << 44 | (1 << 44) - 1) for cell in damaged.cells[:5]])
    @given(damages(damaged))
    def check(damage):
        for word, value in damage:
            damaged.segment.words[word] = value
        signal.alarm(5)
        try:
            damaged.read()
        finally:
            signal.alarm(0)
            damaged.restore()

    try:
        check()
    finally:
        damaged.segment.close()
        damaged.segment.unlink()


def test_whatever_is_wrong_in_a_segment_a_read_ends_with_a_value_or_an_error_of_ours():
    offend(read_what_was_damaged, 100)
