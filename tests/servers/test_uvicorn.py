"""uvicorn with several workers and a FastAPI application: strict across workers, and clients that leave."""

from __future__ import annotations

import os
import socket

import pytest
from holding import held
from servers import PATIENCE

from strictflow_mp import StrictFlow

WORKERS = 3


@pytest.fixture
def flow():
    flow = StrictFlow("limits")
    yield flow
    flow.close()


@pytest.fixture
def server(serve, uvicorn, flow, eventually):
    serve("limits")
    server = uvicorn("fastapi_limits:app", "--workers", WORKERS)
    seen = set()
    eventually(lambda: seen.add(server.ask()["pid"]) or len(seen) == WORKERS, PATIENCE)
    yield server
    assert server.stop() in (0, -15)
    eventually(lambda: {worker.pid for worker in flow.stats().workers} <= {os.getpid(), flow.stats().coordinator_pid})


def test_a_limit_that_one_worker_has_set_holds_in_all_and_orders_are_counted_exactly(server, flow, eventually):
    wrote, took = set(), set()
    for limit in range(3, 33, 3):
        wrote.add(server.ask(f"/limit/{limit}", "PUT")["pid"])
        assert server.ask()["limit"] == limit
        answers = [server.ask("/orders", "POST") for _ in range(5)]
        assert [answer["accepted"] for answer in answers] == [True, True, True, False, False]
        took |= {answer["pid"] for answer in answers}
    assert flow.state["orders"] == 30
    assert len(wrote) > 1
    assert len(took) == WORKERS


def test_every_worker_is_told_of_the_latest_limit(server, flow, eventually):
    for limit in range(40, 45):
        flow.state["limit"] = limit
    told = set()

    def one_more():
        answer = server.ask()
        if answer["told"] == 44:
            told.add(answer["pid"])
        return len(told) == WORKERS

    eventually(one_more, PATIENCE)


def test_a_worker_answers_others_while_one_waits_at_the_gate_and_its_client_may_leave(server, flow, eventually):
    with held(flow, orders=7):
        clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3 * WORKERS)]
        for index, client in enumerate(clients):
            request = b"POST /orders" if index % 2 else b"GET /"
            client.sendall(request + b" HTTP/1.1\r\nHost: here\r\n\r\n")
        assert server.ask("/health")["pid"]
        for client in clients:
            client.close()
        assert server.ask("/health")["pid"]
    # A call of which only the client has gone is still a call.
    eventually(lambda: flow.state["orders"] >= 7)
    assert server.ask("/orders", "POST")["accepted"] is True
