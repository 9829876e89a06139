"""Errors: every bad call is refused with what happened, to which flow; and it costs nobody else anything."""

from __future__ import annotations

import pickle
import threading

import pytest
from holding import held

import strictflow_mp
from strictflow_mp import (
    FlowExists,
    FlowNotRunning,
    ReadOnlyState,
    SerializationError,
    StateFull,
    StrictFlow,
    StrictFlowError,
    read,
    write,
)

FIRST = {"config": {"handlers": [1, 2, 3]}}
THING = object()
BAD = {"handlers": [1, 2, 3, THING]}
ERRORS = sorted(
    (e for e in vars(strictflow_mp).values() if isinstance(e, type) and issubclass(e, StrictFlowError)),
    key=lambda error: error.__name__,
)


@pytest.fixture
def flow():
    with StrictFlow("errors", state=FIRST) as flow:
        yield flow
        assert flow.put("alive", 1).result() is None
        assert flow.state["alive"] == 1


def test_every_error_pickles_with_its_attributes_and_names_its_flow():
    for kind in ERRORS:
        extra = {"path": "a.b[3]"} if kind is SerializationError else {}
        error = kind("what happened", flow="prices", key=("a", 1), **extra)
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), vars(copy), str(copy)) == (kind, vars(error), "flow 'prices': what happened")
        assert (copy.flow, copy.key) == ("prices", ("a", 1))


def test_an_unknown_flow_is_not_running():
    with pytest.raises(FlowNotRunning, match="absent") as caught:
        StrictFlow.attach("absent", timeout=0)
    assert caught.value.flow == "absent"
    StrictFlow("absent").stop_loop()


def test_a_flow_starts_once(flow):
    flow.start_loop()
    with pytest.raises(FlowExists, match="already lives") as caught:
        StrictFlow("errors").start_loop()
    assert caught.value.flow == "errors"
    assert flow.state["config"] == FIRST["config"]


UNSTORABLE = {
    "put": (lambda flow: flow.put("config", BAD), "config.handlers[3]"),
    "update": (lambda flow: flow.update({"fine": 1, "config": BAD}), "config.handlers[3]"),
    "assignment": (lambda flow: flow.state.__setitem__("config", BAD), "config.handlers[3]"),
    "state.update": (lambda flow: flow.state.update(config=BAD), "config.handlers[3]"),
    "a key that is no str": (lambda flow: flow.put(5, BAD), "state[5].handlers[3]"),
    "argument": (lambda flow: write(flow)(print)(1, BAD), "print() argument 1.handlers[3]"),
    "keyword argument": (lambda flow: write(flow)(print)(end=BAD), "print() argument end.handlers[3]"),
    "map": (lambda flow: write(flow)(print).map([1, BAD]), "print() argument 0.handlers[3]"),
}


def test_what_cannot_be_stored_is_refused_at_the_call_with_its_path(flow):
    for call, path in UNSTORABLE.values():
        with pytest.raises(SerializationError) as caught:
            call(flow)
        assert (caught.value.path, caught.value.flow) == (path, "errors")
        assert path in str(caught.value)
        assert "object" in str(caught.value)
    with flow.snapshot() as snapshot:
        assert (dict(snapshot), snapshot.version) == (FIRST, 1)


def test_what_cannot_be_stored_is_refused_in_a_task_which_is_rolled_back(flow):
    @write(flow)
    def assign():
        flow.state["fine"] = 1
        flow.state["config"] = {"handlers": [1, 2, 3, object()]}

    @write(flow)
    def change_in_place():
        flow.state["fine"] = 1
        flow.state["config"]["handlers"].append(object())

    @write(flow, key="config")
    def give_back(config):
        config["handlers"].append(object())
        return config

    @write(flow)
    def result():
        flow.state["fine"] = 1
        return {"handlers": [1, 2, 3, object()]}

    in_p2 = read(flow)(result.__strictflow_function__)
    for task, path in (
        (assign, "config"),
        (change_in_place, "config"),
        (give_back, "config"),
        (result, "result of"),
    ):
        with pytest.raises(SerializationError, match=r"handlers\[3\]") as caught:
            task().result()
        assert caught.value.path.startswith(path)
        assert caught.value.path.endswith("handlers[3]")
        assert caught.value.flow == "errors"
        assert dict(flow.state) == FIRST
    with pytest.raises((SerializationError, ReadOnlyState)):
        in_p2().result()


def test_a_first_state_that_cannot_be_stored_starts_nothing():
    with pytest.raises(SerializationError) as caught:
        StrictFlow("errors", state={"config": BAD}).start_loop()
    assert (caught.value.path, caught.value.flow) == ("config.handlers[3]", "errors")


WRONG_KEYS = {
    "put": lambda flow, key: flow.update({key: 1} if key is THING else {(1, THING): 1}),
    "delete": lambda flow, key: flow.delete(key),
    "read": lambda flow, key: flow.state[key],
    "contains": lambda flow, key: key in flow.state,
    "pop": lambda flow, key: flow.state.pop(key, None),
    "peek": lambda flow, key: flow.peek(key, default=None),
    "snapshot": lambda flow, key: flow.snapshot().get(key),
    "task": lambda flow, key: write(flow, key=key)(print)(),
}


def test_a_key_of_the_wrong_type_is_refused(flow):
    for name, use in WRONG_KEYS.items():
        for key in (THING, [1], {"a": 1}):
            with pytest.raises(SerializationError, match="key") as caught:
                use(flow, key)
            assert caught.value.flow == "errors", name


def test_a_full_state_rolls_the_task_back_and_stays_intact():
    with StrictFlow("full", capacity=1 << 20, state=FIRST) as flow:
        for big in (
            lambda: flow.put("big", bytes(1 << 21)),
            lambda: flow.update({"a": 1, "big": bytes(1 << 21)}),
        ):
            with pytest.raises(StateFull) as caught:
                big().result()
            assert caught.value.flow == "full"
            assert dict(flow.state) == FIRST
        assert flow.put("small", 1).result() is None
    with pytest.raises(StateFull) as caught:
        StrictFlow("full", capacity=1 << 20, state={"big": bytes(1 << 21)}).start_loop()
    assert caught.value.flow == "full"


def fill(state):
    while True:
        state[len(state)] = bytes(1000)


def test_what_found_no_room_never_comes_back_and_a_deletion_makes_room():
    with StrictFlow("full", capacity=1 << 20, state=FIRST) as flow:
        with pytest.raises(StateFull):
            fill(flow.state)
        refused = len(flow.state)
        with pytest.raises(StateFull):
            flow.update({refused: bytes(1000), "more": bytes(1000)}).result()
        for key in range(len(FIRST), refused):
            del flow.state[key]
            assert refused not in flow.state
        assert flow.state == FIRST
        flow.state[refused] = bytes(1000)
        assert flow.state == {**FIRST, refused: bytes(1000)}


def test_what_follows_a_heavy_task_fails_only_if_it_has_no_room_itself():
    with StrictFlow("full", capacity=2 << 20, state=FIRST) as flow:
        flow.put("most", bytes(1_300_000)).result()

        @write(flow)
        def put(key, size):
            flow.state[key] = bytes(size)

        put("loaded", 1).result()
        with held(flow):
            heavy = put("heavy", 600_000)
            rest = [put(f"light-{number}", 50_000) for number in range(5)]
        assert heavy.result() is None
        stored = [future.exception() is None for future in rest]
        assert stored[0]
        assert not stored[-1]
        assert [f"light-{number}" in flow.state for number in range(5)] == stored


def test_a_task_whose_room_a_heavy_one_of_its_burst_has_taken_fails_though_another_heavy_one_follows():
    """What is there when a heavy task comes is committed first: then too its tasks hear whether there was room."""
    with StrictFlow(capacity=2 << 20) as flow:
        flow.put("claimed", bytes(1_800_000)).result()
        flow.delete("claimed").result()
        flow.put("filled", bytes(1_440_000)).result()

        @write(flow)
        def put(key, size):
            flow.state[key] = bytes(size)

        put("first", 1).result()  # the function is there, so the next four calls are one burst
        sizes = {"a": 440_000, "b": 200_000, "c": 300_000, "d": 1}
        with held(flow):
            futures = {key: put(key, size) for key, size in sizes.items()}
        for key, future in futures.items():
            assert isinstance(future.exception(), StateFull) == (key not in flow.state), key
        assert "b" not in flow.state
        assert put("b", 1).result() is None


BAD_CALLS = {
    "empty name": (lambda: StrictFlow(""), ValueError),
    "a name that is none": (lambda: StrictFlow(5), ValueError),
    "max_workers": (lambda: StrictFlow(max_workers=0), ValueError),
    "max_pending": (lambda: StrictFlow(max_pending=0), ValueError),
    "capacity": (lambda: StrictFlow(capacity=0), ValueError),
    "task_timeout": (lambda: StrictFlow(task_timeout=0), ValueError),
    "timeout": (lambda: write(StrictFlow("a"), timeout=-1), ValueError),
    "where": (lambda: read(StrictFlow("a"), where="moon"), ValueError),
    "restart": (lambda: StrictFlow("a").spawn(print, restart="sometimes"), ValueError),
    "processes": (lambda: StrictFlow("a").spawn(print, processes=0), ValueError),
    "target": (lambda: StrictFlow("a").spawn(print, threading.Lock()), TypeError),
    "no callable": (lambda: write(StrictFlow("a"))(5), TypeError),
    "no flow": (lambda: write(print)(print), TypeError),
}


def test_bad_arguments_are_refused_at_once():
    for name, (call, kind) in BAD_CALLS.items():
        try:
            call()
        except kind:
            pass
        else:
            pytest.fail(name)
