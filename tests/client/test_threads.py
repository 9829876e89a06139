"""Where there is no GIL, each thread reads through a state of its own: what it sees is what all see."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import os
import signal
import threading

import pytest

from strictflow_mp import StrictFlow, read
from strictflow_mp.client import client as clients
from strictflow_mp.client.threads import HomeState, Mine, OwnState
from strictflow_mp.flow import handle
from strictflow_mp.memory.segment import W_EPOCH
from strictflow_mp.system import machine


@pytest.fixture
def flow(monkeypatch):
    """As it is without the GIL, on any interpreter."""
    if not machine.FREE_THREADED:
        monkeypatch.setattr(clients, "FREE_THREADED", True)
        monkeypatch.setattr(handle, "FREE_THREADED", True)
        monkeypatch.setattr(
            StrictFlow, "state", property(lambda flow: flow._states.state, lambda *_: None), raising=False
        )
    with StrictFlow(state={"n": 0, "text": "x"}) as flow:
        assert isinstance(flow._client.state, HomeState)
        yield flow


@pytest.fixture
def pool():
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        yield pool


def test_each_thread_has_its_own_and_all_of_them_see_the_same(flow, pool):
    def look():
        return flow.state, flow.state["n"]

    mine, theirs = look(), pool.submit(look).result()
    assert mine[0] is flow.state
    assert mine[0] is not theirs[0]
    assert isinstance(theirs[0], OwnState)
    assert mine[1] == theirs[1] == 0
    for number in range(1, 20):
        flow.put("n", number)
        assert pool.submit(lambda: flow.state["n"]).result() == number
        assert flow.state["n"] == number
        assert theirs[0]["n"] == number  # in a thread that it is not of


def test_two_share_nothing_that_a_read_looks_at(flow, pool):
    def bound():
        assert flow.state["n"] == 0
        assert flow.state["text"] == "x"
        return flow.state._bound

    mine, theirs = bound(), pool.submit(bound).result()
    assert mine[6] == theirs[6]  # EPOCH
    assert all(one is not other for one, other in zip(mine[:6], theirs[:6], strict=True))
    assert mine[3]["text"] is not theirs[3]["text"]
    buffers = [mine[5].buffer, theirs[5].buffer, mine[2], theirs[2]]
    assert len({id(buffer) for buffer in buffers}) == 4
    assert mine is flow.state._bound  # and it is bound for good


def test_all_are_bound_anew_by_another_epoch_and_another_coordinator(flow, pool, eventually):
    def look():
        return flow.state["n"], flow.state._bound[6]

    assert look() == pool.submit(look).result()
    os.kill(flow.stats().coordinator_pid, signal.SIGKILL)
    flow.put("n", 5).result(60)
    now = flow._client.attach().segment.words[W_EPOCH]
    eventually(lambda: look() == (5, now))
    eventually(lambda: pool.submit(look).result() == (5, now))


def test_a_closed_handle_is_attached_anew_by_whichever_thread(flow, pool):
    assert pool.submit(lambda: flow.state["n"]).result() == 0
    for number in range(1, 5):
        flow._client.close()
        assert flow.state._bound[2] is None
        flow.put("n", number)
        assert pool.submit(lambda: flow.state["n"]).result() == number
        assert flow.state["n"] == number


def test_a_scope_is_known_in_all_threads(flow, pool):
    """A worker-side P2 reads one version throughout, also where its context goes on in another thread."""
    pool.submit(lambda: flow.state["n"]).result()

    @read(flow, where="worker")
    async def look():
        first = flow.state["n"]
        await asyncio.get_running_loop().run_in_executor(pool, lambda: flow.put("n", first + 1).result())
        return first, flow.state["n"], await asyncio.to_thread(lambda: flow.state["n"])

    for number in range(3):
        assert look().result() == (number, number, number)
        assert pool.submit(lambda: flow.state["n"]).result() == number + 1
    assert not any(state._scopes for state in flow._client.state._each())


def test_a_thread_that_has_ended_leaves_nothing(flow):
    home = flow._client.state
    flow.state["n"]
    before = len(list(home._each()))
    for _ in range(20):
        thread = threading.Thread(target=lambda: flow.state["n"])
        thread.start()
        thread.join()
    gc.collect()
    assert len(list(home._each())) <= before + 1
    assert len(home._owns) <= before + 1


def test_one_that_was_bound_to_what_is_gone_by_then_is_not(flow):
    home = flow._client.state
    own = Mine(home).state
    assert own["n"] == 0
    passed = own._host.pass_gate

    class Host:
        """While it passes the gate, the client is bound anew."""

        name = flow.name

        def pass_gate(self):
            reader = passed()
            bind, segment, gate, reader = home.bind, *home.bound_to
            bind(segment, gate, reader, 0)
            return reader

    own.unbind()
    own._host = Host()
    own._pass_gate()
    assert own._bound[2] is None
