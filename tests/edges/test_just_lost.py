"""A connection that another thread has lost this very moment: whoever uses it goes on with the next, or is told."""

from __future__ import annotations

import time

import pytest

from strictflow_mp import StrictFlow, StrictFlowError, write
from strictflow_mp.client.client import Client
from strictflow_mp.client.comeback import lose
from strictflow_mp.wire import frames
from strictflow_mp.wire.stream import Stream

pytestmark = pytest.mark.once


@pytest.fixture
def flow():
    with StrictFlow("lost", state={"n": 1}) as flow:
        assert flow.state["n"] == 1
        yield flow


@pytest.fixture
def losing(flow, monkeypatch):
    """The next `attach` returns what is lost already when it is used."""
    attach = Client.attach

    def attach_and_lose(self, *args):
        attachment = attach(self, *args)
        monkeypatch.setattr(Client, "attach", attach)
        lose(attachment)
        return attachment

    monkeypatch.setattr(Client, "attach", attach_and_lose)


USES = {
    "stats": lambda flow: flow.stats(),
    "stop": lambda flow: flow._client.ask_in_time(time.monotonic() + 30, frames.STATS),
    "watch": lambda flow: flow._client.watch(0, ()).result(30),
    "put": lambda flow: flow.put("n", 2).result(30),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.usefixtures("losing")
def test_who_uses_what_is_lost_attaches_anew(flow, use):
    USES[use](flow)
    assert flow.state["n"] in (1, 2)


@pytest.fixture
def losing_at_send(flow, monkeypatch):
    """The next frame is sent on a connection that another thread loses in between."""
    flush = Stream.flush
    attachment = flow._client.attach()

    def lose_and_flush(self):
        monkeypatch.setattr(Stream, "flush", flush)
        lose(attachment)
        return flush(self)

    monkeypatch.setattr(Stream, "flush", lose_and_flush)


@pytest.mark.parametrize("use", USES)
@pytest.mark.usefixtures("losing_at_send")
def test_who_sends_when_it_is_lost_is_told_so(flow, use):
    with pytest.raises(StrictFlowError, match="lost"):
        USES[use](flow)
    assert flow.state["n"] == 1


def test_an_answer_that_cannot_be_acknowledged_any_more_is_an_answer(flow, monkeypatch):
    @write(flow)
    def much():
        return b"x" * (1 << 20)

    send = Stream.send
    attachment = flow._client.attach()
    lost = []

    def lose_and_send(self, data):
        if data == frames.pack_frame(frames.ACK, attachment.outgoing.acked):
            monkeypatch.setattr(Stream, "send", send)
            lost.append(1)
            lose(attachment)
        return send(self, data)

    monkeypatch.setattr(Stream, "send", lose_and_send)
    assert len(much().result(30)) == 1 << 20
    assert lost
    assert flow.state["n"] == 1


def test_a_cancellation_of_what_is_lost_takes_nothing_back(flow):
    @write(flow)
    def nothing():
        pass

    future = nothing()
    lose(flow._client.attach())
    assert not future.cancel()


def test_a_connection_can_be_lost_while_another_thread_is_sending(flow):
    """The bytes that a system call reads cannot be taken from under it."""
    attachment = flow._client.attach()
    attachment.stream.outbox.extend(b"half a frame")
    with memoryview(attachment.stream.outbox):  # as `socket.send` has it
        lose(attachment)
    assert attachment.stream.has_ended
    assert flow.state["n"] == 1
