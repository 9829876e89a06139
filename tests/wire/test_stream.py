"""A connection's end by itself: what it receives, in portions, and what it refuses."""

from __future__ import annotations

import socket

import pytest

from strictflow_mp.errors import ProtocolError
from strictflow_mp.wire import frames
from strictflow_mp.wire import stream as streams
from strictflow_mp.wire.frames import pack_frame
from strictflow_mp.wire.stream import Stream


@pytest.fixture
def ends():
    mine, theirs = socket.socketpair()
    with mine, theirs:
        yield Stream(mine), theirs


def fill(stream: Stream) -> list[frames.Frame] | None:
    """As `receive`, by the way that clients take."""
    if not stream.fill():
        return None
    frames = list(stream.inbox)
    stream.inbox.clear()
    return frames


@pytest.fixture(params=[Stream.receive, fill])
def receive(request):
    return request.param


def test_frames_come_whole_and_in_order_however_they_are_cut(ends, receive):
    stream, theirs = ends
    sent = [(1, n, b"x" * n) for n in range(5)]
    data = b"".join(pack_frame(*frame) for frame in sent)
    found = []
    for position in range(0, len(data), 3):
        theirs.send(data[position : position + 3])
        found += receive(stream)
        assert stream.is_drained
    assert found == sent


def test_when_nothing_has_come_it_says_so(ends, receive):
    stream, _ = ends
    stream.is_drained = False
    assert receive(stream) == []
    assert stream.is_drained
    assert not stream.has_ended


@pytest.mark.parametrize("reset", [False, True])
def test_it_sees_the_other_end_close(ends, receive, reset):
    stream, theirs = ends
    if reset:
        stream.socket.send(b"nobody reads this")
    theirs.close()
    assert receive(stream) is None
    assert stream.has_ended


def test_more_than_a_portion_comes_in_several(monkeypatch, ends, receive):
    monkeypatch.setattr(streams, "RECEIVE_BYTES", 100)
    mine, theirs = ends
    stream = Stream(mine.socket)  # with a buffer of that size
    sent = [(1, b"x" * 30) for _ in range(20)]
    theirs.send(b"".join(pack_frame(*frame) for frame in sent))
    found, portions = receive(stream), 1
    while not stream.is_drained:
        found += receive(stream)
        portions += 1
    assert found == sent
    assert portions > 1


@pytest.mark.parametrize(
    ("data", "text"),
    [(b"\x05", "must be an array, not int"), (b"\x90", "must be an array"), (b"\xc1", "damaged frame")],
)
def test_what_is_no_frame_is_refused(ends, receive, data, text):
    stream, theirs = ends
    theirs.send(data)
    with pytest.raises(ProtocolError, match=text):
        receive(stream)


def test_a_frame_that_is_too_long_is_refused(monkeypatch, ends, receive):
    monkeypatch.setattr(streams, "MAX_FRAME_BYTES", 64)
    stream, theirs = Stream(ends[0].socket), ends[1]
    theirs.send(pack_frame(1, b"x" * 100))
    with pytest.raises(ProtocolError, match="too long"):
        receive(stream)
