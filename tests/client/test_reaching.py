"""Each way in which an attempt to reach a coordinator may end: one test an exit of `try_to_reach`."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from strictflow_mp import FlowNotRunning, ProtocolError, TooManyWorkers
from strictflow_mp.client.reaching import take_leave, try_to_reach
from strictflow_mp.system.lease import Lease
from strictflow_mp.system.paths import own_path
from strictflow_mp.system.place import Place
from strictflow_mp.wire import handshake
from strictflow_mp.wire.stream import Stream

NAME = "reached"
RESUME = (1, 1, 0)
"""Slot, tenant and first number of a process that comes back."""
WELCOME = {"slot": 1, "tenant": 7}
PATIENCE = 0.2
"""Seconds, for attempts that are meant to run out of them."""


@pytest.fixture
def lease() -> Iterator[Lease]:
    lease = Lease.take(NAME)
    yield lease
    lease.leave()


@contextlib.contextmanager
def coordinator(lease: Lease, answer: Callable[[socket.socket], None], key: bytes | None = None) -> Iterator[None]:
    """Somebody who listens there, knows the place's key (or *key*), and answers one greeting."""
    right = lease.new_key()
    listener = handshake.listen(lease.place.socket)
    listener.setblocking(True)
    listener.settimeout(30)

    def serve() -> None:
        with contextlib.suppress(OSError, EOFError, ProtocolError):
            sock, _ = listener.accept()
            with sock:
                handshake.accept_greeting(sock, key or right, 30)
                answer(sock)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        listener.close()


def test_whom_it_takes_has_a_stream_and_its_welcome(lease):
    opened: list[socket.socket] = []
    with coordinator(lease, lambda sock: handshake.welcome(sock, WELCOME)):
        reached = try_to_reach(NAME, opened=opened)
    assert reached is not None
    stream, welcome = reached
    assert (type(stream), welcome) == (Stream, {**WELCOME, "told_path": own_path()})
    assert len(opened) == 1
    take_leave(opened[0])


def test_where_there_is_no_place_is_nobody():
    assert try_to_reach(NAME) is None


@pytest.mark.parametrize("which", ["the flow's own", "the one above"])
def test_a_place_that_others_may_enter_is_refused(lease, which):
    directory = lease.place.directory if which == "the flow's own" else lease.place.directory.parent
    directory.chmod(0o755)
    try:
        with pytest.raises(ProtocolError, match=f"{directory} must be a directory of mode 0700"):
            try_to_reach(NAME)
    finally:
        directory.chmod(0o700)


def test_where_there_is_no_key_yet_is_nobody(lease):
    assert try_to_reach(NAME) is None


def test_where_there_is_a_key_and_no_socket_is_nobody(lease):
    lease.new_key()
    assert try_to_reach(NAME) is None


def test_where_nobody_listens_any_more_is_nobody(lease):
    lease.new_key()
    handshake.listen(lease.place.socket).close()
    assert try_to_reach(NAME) is None


@pytest.mark.parametrize("resume", [None, RESUME])
def test_one_who_accepts_nobody_has_no_time_for_a_first_one_and_is_asked_again_by_who_comes_back(lease, resume):
    lease.new_key()
    with handshake.listen(lease.place.socket):
        if resume is None:
            with pytest.raises(FlowNotRunning, match=r"has let nobody in for 0\.\d+ s") as caught:
                try_to_reach(NAME, patience=PATIENCE)
            assert caught.value.flow == NAME
        else:
            assert try_to_reach(NAME, resume, patience=PATIENCE) is None


@pytest.mark.parametrize("resume", [None, RESUME])
def test_one_who_greets_nobody_back_likewise(lease, resume):
    has_given_up = threading.Event()
    with coordinator(lease, lambda sock: has_given_up.wait(30) and None):
        try:
            if resume is None:
                with pytest.raises(FlowNotRunning, match=r"has let nobody in for 0\.\d+ s"):
                    try_to_reach(NAME, patience=PATIENCE)
            else:
                assert try_to_reach(NAME, resume, patience=PATIENCE) is None
        finally:
            has_given_up.set()


def test_a_wrong_key_is_an_error(lease):
    with (
        coordinator(lease, lambda sock: None, key=bytes(32)),
        pytest.raises(ProtocolError, match="authentication failed"),
    ):
        try_to_reach(NAME)


@pytest.mark.parametrize("becomes", ["another", "none"])
def test_a_key_that_changed_meanwhile_is_no_error_for_the_next_one_was_moving_in(lease, becomes, monkeypatch):
    def connect(path, authkey, *rest):
        if becomes == "another":
            lease.new_key()
        else:
            lease.place.key.unlink()
        return connect_well(path, authkey, *rest)

    connect_well = handshake.connect
    with coordinator(lease, lambda sock: None, key=bytes(32)):
        socket_path = lease.place.socket
        kept = socket_path.with_name("kept")
        kept.hardlink_to(socket_path)
        monkeypatch.setattr(handshake, "connect", lambda path, *rest: connect(kept, *rest))
        assert try_to_reach(NAME) is None
        kept.unlink()


@pytest.mark.parametrize("kind", [TooManyWorkers, ProtocolError])
def test_who_is_refused_is_told_why(lease, kind):
    refusal = {"refused": kind.__name__, "text": "no room here"}
    with (
        coordinator(lease, lambda sock: handshake.welcome(sock, refusal)),
        pytest.raises(kind, match="no room here") as caught,
    ):
        try_to_reach(NAME)
    assert caught.value.flow == NAME


def test_a_refusal_of_a_kind_that_we_do_not_know_is_a_protocol_error(lease):
    refusal = {"refused": "OfTheFuture", "text": "no room here"}
    with (
        coordinator(lease, lambda sock: handshake.welcome(sock, refusal)),
        pytest.raises(ProtocolError, match="no room here"),
    ):
        try_to_reach(NAME)


def test_one_who_ends_before_its_welcome_is_nobody(lease):
    with coordinator(lease, lambda sock: None):
        assert try_to_reach(NAME) is None


def test_a_welcome_that_is_damaged_is_an_error(lease):
    damaged: Any = ["slot"]
    refused = pytest.raises(ProtocolError, match="welcome is damaged")
    with coordinator(lease, lambda sock: handshake.welcome(sock, damaged)), refused:
        try_to_reach(NAME)


@pytest.mark.parametrize("resume", [None, RESUME])
def test_who_leaves_half_way_says_so_but_keeps_its_slot_if_it_comes_back(lease, resume):
    rest: list[bytes] = []

    def refuse(sock: socket.socket) -> None:
        handshake.welcome(sock, {"refused": "ProtocolError", "text": "no"})
        rest.append(sock.recv(100))

    with coordinator(lease, refuse), pytest.raises(ProtocolError):
        try_to_reach(NAME, resume)
    assert bool(rest[0]) == (resume is None), "a goodbye gives the slot back"


def test_the_place_of_a_name_is_the_one_that_was_taken(lease):
    assert Place.of(NAME).directory == lease.place.directory
