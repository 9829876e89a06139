"""A WSGI application for the tests: what a request asks for is in its path."""

import json
import os
import threading

from strictflow_mp import StrictFlow, write

flow = StrictFlow("flags")
if os.environ.get("USE_IN_MASTER"):  # with --preload, before the fork
    flow.state["preloaded"] = os.getpid()
    kept = flow.snapshot()
    kept.version  # noqa: B018  it is taken when it is looked at


@write(flow)
def hold(fifo):
    flow.state["held"] = True
    with open(fifo, "rb") as file:
        file.read()


@write(flow, key="count")
def count(value):
    return (value or 0) + 1


told = {}


def follow():
    with flow.watch("news") as changes:
        told["news"] = flow.peek("news", None)
        for change in changes:
            told["news"] = change.value


def call_back():
    """What a done callback was told, when it has been."""
    called = threading.Event()
    outcome = []
    count().add_done_callback(lambda future: (outcome.append(future.result()), called.set()))
    called.wait()
    return outcome[0]


def read_own(times):
    """How often a read behind a write of ours was older than that."""
    key, stale = f"own-{os.getpid()}", 0
    with mine:
        for number in range(int(times)):
            flow.update({key: number})  # nobody waits for it
            stale += flow.state[key] != number
    return stale


mine = threading.Lock()


def answer(action, argument):
    if action == "pid":
        return None
    if action == "get":
        return flow.state.get(argument)
    if action == "set":
        key, _, value = argument.partition("=")
        flow.state[key] = int(value)
        return None
    if action == "read-own":
        return read_own(argument)
    if action == "follow":
        threading.Thread(target=follow, daemon=True).start()
        return None
    if action == "told":
        return told.get("news")
    if action == "call-back":
        return call_back()
    if action == "count":
        return count().result()
    if action == "hang-at-gate":
        return flow.state["held"]
    if action == "hang-in-p1":
        return hold(os.environ["FIFO"]).result()
    if action == "hang-with-snapshot":
        with flow.snapshot():
            threading.Event().wait()
    raise ValueError(action)


def app(environ, start_response):
    action, _, argument = environ["PATH_INFO"].strip("/").partition("/")
    value = answer(action, argument)
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps({"value": value, "pid": os.getpid()}).encode()]
