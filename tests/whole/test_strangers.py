"""Strangers: a damaged or foreign frame, greeting, key or user costs nobody else anything."""

from __future__ import annotations

import contextlib
import os
import socket
import sys

import msgpack
import pytest
from holding import held

from strictflow_mp import FlowNotRunning, ProtocolError, StrictFlow, write
from strictflow_mp.client.reaching import try_to_reach
from strictflow_mp.system.place import Place
from strictflow_mp.wire import frames, handshake

FIRST = {"config": {"handlers": [1, 2, 3]}}


@pytest.fixture
def flow():
    with StrictFlow("errors", state=FIRST) as flow:
        yield flow
        assert flow.put("alive", 1).result() is None
        assert flow.state["alive"] == 1


GREETING = {"protocol": frames.PROTOCOL, "pid": os.getpid(), "python": sys.version_info[:2], "path": []}

LEARN = msgpack.packb([frames.FUNCTION, 0, False, b"os:getpid", "getpid", 2, None, None, []])
FRAMES = {
    "no msgpack": b"\xc1",
    "no array": b"\x01",
    "an empty array": b"\x90",
    "unknown kind": msgpack.packb([99, 1]),
    "a kind that is no number": msgpack.packb([{"a": 1}, 1]),
    "too few fields": msgpack.packb([frames.CALL, 1]),
    "too many fields": msgpack.packb([frames.STATS, 1, 2]),
    "fields of the wrong type": msgpack.packb([frames.CALL, "1", 1, [b""], 0, 0]),
    "a number that is none": msgpack.packb([frames.STATS, True]),
    "arguments that are not packed": LEARN + msgpack.packb([frames.CALL, 1, 0, [[1]], 0, 0]),
    "a call of an unknown function": msgpack.packb([frames.CALL, 1, 77, [b""], 0, 0]),
    "an unknown priority": msgpack.packb([frames.FUNCTION, 0, False, b"os:getpid", "getpid", 9, None, None, []]),
    "changes that are no pairs": msgpack.packb([frames.PUT, 1, [1, 2], 1, 0]),
    "a change to no bytes": msgpack.packb([frames.PUT, 1, [[b"key", 5]], 1, 0]),
    "a key of no bytes": msgpack.packb([frames.PUT, 1, [[5, b"\x01"]], 1, 0]),
    "an oversized array": b"\xdd\xff\xff\xff\xff",
    "an oversized map": b"\x92\x05\xdf\xff\xff\xff\xff",
    "too deep": b"\x91" * 100_000,
    "a wrong string": b"\x92\x05\xa2\xff\xfe",
    "a put of a key that is no msgpack": msgpack.packb([frames.PUT, 1, [[b"\xc1", b"\x01"]], 1, 0]),
    "a put of a value that is no msgpack": msgpack.packb([frames.PUT, 1, [[b"\xa1k", b"\xc1"]], 1, 0]),
    "a put of two values in one": msgpack.packb([frames.PUT, 1, [[b"\xa1k", b"\x01\x01"]], 1, 0]),
    "a put of half a value": msgpack.packb([frames.PUT, 1, [[b"\xa1k", b"\x91"]], 1, 0]),
}


def knock(greeting=GREETING):
    """A connection by hand, greeted."""
    place = Place.of("errors")
    connection = handshake.connect(place.socket, place.authkey(), 5)
    return connection, handshake.greet(connection, greeting)


def is_hung_up_on(connection):
    """Whether the coordinator has closed it, once it has said all."""
    connection.settimeout(10)
    try:
        while connection.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


def test_a_frame_that_breaks_the_rules_closes_its_own_connection_only(flow):
    pid = flow.stats().coordinator_pid
    bystander, _ = knock()
    with bystander:
        for number, (name, frame) in enumerate(FRAMES.items()):
            before = flow.put("before", number)
            connection, welcome = knock()
            with connection:
                assert "slot" in welcome
                connection.sendall(frame)
                assert is_hung_up_on(connection), name
            before.result()
            assert dict(flow.state) == {**FIRST, "before": number}, name
        bystander.sendall(msgpack.packb([frames.STATS, 1]))
        assert msgpack.unpackb(bystander.recv(1 << 16))[:2] == [frames.RESULT, 1]
    assert flow.stats().coordinator_pid == pid


def test_a_frame_that_goes_on_beyond_the_limit_closes_its_own_connection_only(flow):
    @write(flow)
    def limit(size):
        from strictflow_mp.wire import stream

        stream.MAX_FRAME_BYTES = size  # for connections that come now

    limit(1 << 16).result()
    for announcement in (b"\x93\x02\x01\xc6\xff\xff\xff\xff", b"\x92\x05\xdb\xff\xff\xff\xff"):
        connection, _ = knock()
        with connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(announcement + bytes(1 << 17))
            assert is_hung_up_on(connection)
        assert flow.put("large", bytes(1 << 17)).result() is None
    assert flow.state["large"] == bytes(1 << 17)


def test_half_a_frame_and_silence_hold_nobody_up(flow):
    connection, _ = knock()
    with connection:
        connection.sendall(msgpack.packb([frames.PUT, 1, [[b"k", bytes(1000)]], 1, 0])[:100])
        assert flow.put("a", 1).result() is None
        assert flow.state["a"] == 1
    assert flow.state["a"] == 1


GREETINGS = {
    "another protocol": {**GREETING, "protocol": 999},
    "another Python": {**GREETING, "python": ["2", "7"]},
    "a Python that is none": {**GREETING, "python": 3},
    "a path that is none": {**GREETING, "path": 5},
    "a path of no strings": {**GREETING, "path": [5, None]},
    "nothing": {},
}


def test_a_foreign_greeting_is_refused(flow):
    for name, greeting in GREETINGS.items():
        flow.put("before", name).result()
        try:
            connection, welcome = knock(greeting)
        except (EOFError, OSError, ProtocolError):
            pass
        else:
            connection.close()
            assert welcome["refused"] == "ProtocolError", name
        assert flow.state["before"] == name


def test_who_speaks_something_else_is_hung_up_on(flow):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(Place.of("errors").socket))
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
        assert is_hung_up_on(connection)
    assert flow.state["config"] == FIRST["config"]


def test_a_silent_connection_holds_nobody_up(flow):
    silent = [socket.socket(socket.AF_UNIX) for _ in range(20)]
    try:
        for connection in silent:
            connection.connect(str(Place.of("errors").socket))
        flow.close()
        assert flow.state["config"] == FIRST["config"]
    finally:
        for connection in silent:
            connection.close()


def test_who_does_not_know_the_key_is_refused(flow):
    key = Place.of("errors").key
    right = key.read_bytes()
    flow.close()
    key.write_bytes(right[::-1])
    try:
        with pytest.raises(ProtocolError, match="authentication") as caught:
            StrictFlow.attach("errors", timeout=0)
    finally:
        key.write_bytes(right)
    assert caught.value.flow == "errors"
    assert flow.state["config"] == FIRST["config"]


def test_another_user_is_refused(flow):
    @write(flow)
    def pretend(uid):
        from strictflow_mp.wire import handshake

        peer = handshake.peer
        handshake.peer = lambda sock: (peer(sock)[0], uid)

    pretend(os.getuid() + 1).result()
    with pytest.raises((ProtocolError, ConnectionRefusedError)):
        knock()
    pretend(os.getuid()).result()
    connection, welcome = knock()
    connection.close()
    assert "slot" in welcome


def test_a_directory_that_others_may_enter_is_refused(runtime_dir):
    for mode in (0o750, 0o705, 0o777):
        runtime_dir.chmod(mode)
        with pytest.raises(ProtocolError, match="0700") as caught:
            StrictFlow("errors").start_loop()
        runtime_dir.chmod(0o700)
        assert caught.value.flow == "errors"


def test_who_is_not_let_in_since_a_task_runs_all_the_time_is_told_so():
    with StrictFlow("errors") as flow:
        flow.stats()
        with held(flow), pytest.raises(FlowNotRunning, match="a P1 task runs in it all the time") as caught:
            try_to_reach("errors", patience=0.1)
        assert caught.value.flow == "errors"


def test_a_directory_that_is_a_link_is_refused(runtime_dir, tmp_path, monkeypatch):
    link = runtime_dir / "link"
    link.symlink_to(tmp_path)
    monkeypatch.setenv("STRICTFLOW_MP_DIR", str(link))
    with pytest.raises(ProtocolError, match="0700"):
        StrictFlow("errors").start_loop()
