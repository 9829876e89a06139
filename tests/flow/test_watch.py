"""Watching: every change is told, the latest is never missed, and nobody polls."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from strictflow_mp import Change, CoordinatorLost, SerializationError, StrictFlow, StrictFlowError, read, write
from strictflow_mp.coordinator import notices as notices_module
from strictflow_mp.coordinator.notices import Notices
from strictflow_mp.system.place import Place

PATIENCE = 20.0


@pytest.fixture
def flow() -> Iterator[StrictFlow]:
    flow = StrictFlow("watched", state={"a": 0, "b": 0, "config": {"level": 1}})
    with flow:
        yield flow


class Listener:
    """A thread that iterates over a watch."""

    def __init__(self, watch):
        self.heard = []
        self.error = None
        self.watch = watch
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self):
        try:
            for change in self.watch:
                self.heard.append(change)
        except Exception as error:
            self.error = error

    def has_ended(self):
        return not self._thread.is_alive()

    def values(self, key):
        return [change.value for change in self.heard if change.key == key]


def test_each_change_of_a_key_is_told_and_others_are_not(flow, eventually):
    with flow.watch("a") as watch:
        listener = Listener(watch)
        for number in range(1, 4):
            flow.put("b", number).result()
            flow.put("a", number).result()
            eventually(lambda: listener.values("a")[-1:] == [number])  # noqa: B023
        assert listener.heard == [Change(3, "a", 1), Change(5, "a", 2), Change(7, "a", 3)]
        assert "'a'" in repr(watch)
    eventually(listener.has_ended)
    assert listener.error is None


def test_what_changed_between_the_making_and_the_first_look_is_told(flow):
    watch = flow.watch("a", "config")
    flow.update({"a": 1, "config": {"level": 2}}).result()
    flow.put("a", 2).result()
    change = next(watch)
    assert change == Change(2, "config", {"level": 2})
    assert next(watch) == Change(3, "a", 2)
    with pytest.raises(StrictFlowError):
        change.value["level"] = 3
    watch.close()
    assert list(watch) == []


def test_a_key_that_comes_and_goes_is_told_of(flow):
    watch = flow.watch("new")
    flow.put("new", 1).result()
    assert next(watch) == Change(2, "new", 1, False)
    flow.delete("new").result()
    assert next(watch) == Change(3, "new", None, True)
    flow.put("new", 1).result()
    flow.delete("new").result()
    flow.put("new", 2).result()
    assert next(watch).value == 2
    watch.close()


def test_all_keys_can_be_watched(flow, eventually):
    with flow.watch() as watch:
        listener = Listener(watch)
        flow.update({"a": 1, ("x", 2): "y"}).result()
        flow.delete("b").result()
        flow.put("last", 1).result()
        eventually(lambda: listener.values("last"))
        assert {change.key: (change.value, change.is_deleted) for change in listener.heard} == {
            "a": (1, False),
            ("x", 2): ("y", False),
            "b": (None, True),
            "last": (1, False),
        }


def test_a_watch_tells_another_process_of_a_change(flow, eventually):
    def follow(first):
        with StrictFlow("watched").watch("a") as watch:
            StrictFlow("watched").put("ready", True)
            for change in watch:
                StrictFlow("watched").put("seen", change.value).result()
                if change.value == first:
                    return

    workers = flow.spawn(follow, 7)
    eventually(lambda: "ready" in flow.state)
    for number in range(1, 8):
        flow.put("a", number).result()
    eventually(lambda: flow.state.get("seen") == 7)
    assert workers.join(PATIENCE)
    assert workers.exitcodes == [0]


def test_the_latest_change_is_not_missed_when_the_coordinator_is_killed(flow, eventually):
    with flow.watch("a") as watch:
        listener = Listener(watch)
        for number in range(1, 6):
            os.kill(Place.of(flow.name).resident().pid, signal.SIGKILL)
            flow.put("a", number).result(PATIENCE)
            eventually(lambda: listener.values("a")[-1:] == [number], timeout=PATIENCE)  # noqa: B023
    eventually(listener.has_ended)
    assert listener.error is None


def test_a_watch_ends_when_the_flow_is_stopped(eventually):
    flow = StrictFlow("stops", state={"a": 0})
    with flow:
        listener = Listener(flow.watch("a"))
        flow.put("a", 1).result()
        eventually(lambda: listener.values("a") == [1])
    eventually(listener.has_ended)
    assert listener.error is None


def test_a_watch_in_a_process_that_descends_from_the_owner_ends_with_the_flow(eventually):
    def follow():
        with StrictFlow("stops").watch("a") as watch:
            StrictFlow("stops").put("ready", True)
            for _ in watch:
                pass

    flow = StrictFlow("stops", state={"a": 0})
    with flow:
        workers = flow.spawn(follow)
        eventually(lambda: "ready" in flow.state)
    assert workers.join(PATIENCE)
    assert workers.exitcodes == [0]


def test_a_watch_says_that_the_coordinator_died_for_good(eventually):
    with StrictFlow("mourned", state={"a": 0}, restart=False) as flow:
        listener = Listener(flow.watch("a"))
        eventually(lambda: flow._client.attach().watches)
        os.kill(Place.of(flow.name).resident().pid, signal.SIGKILL)
        eventually(listener.has_ended)
        assert type(listener.error) is CoordinatorLost
        assert "died, and no other has come; the last commit stands" in str(listener.error)


SERVE = """
import sys
from strictflow_mp import StrictFlow

with StrictFlow("served", state=eval(sys.argv[1])):
    print("ready", flush=True)
    sys.stdin.read()
"""


@contextmanager
def served(state: dict) -> Iterator[subprocess.Popen]:
    """A flow that no ancestor of ours owns."""
    command = [sys.executable, "-c", SERVE, repr(state)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout.readline() == b"ready\n"
        yield owner


def test_elsewhere_a_watch_goes_on_when_the_flow_is_started_again(eventually):
    flow = StrictFlow("served")
    with served({"a": 1, "b": 1}):
        some, every = Listener(flow.watch("a", "none", "new")), Listener(flow.watch())
        flow.put("a", 2).result()
        eventually(lambda: some.values("a") == every.values("a") == [2])
    assert not flow.is_running
    with served({"a": 2, "c": 3, "new": 4}):
        eventually(lambda: some.values("new") and every.values("new"))
        assert [(change.key, change.value) for change in some.heard[1:]] == [("a", 2), ("new", 4)]
        told = {change.key: (change.value, change.is_deleted) for change in every.heard[1:]}
        assert told == {"a": (2, False), "b": (None, True), "c": (3, False), "new": (4, False)}
        flow.put("a", 5).result()
        eventually(lambda: some.values("a")[-1:] == every.values("a")[-1:] == [5])
    for listener in (some, every):
        assert not listener.has_ended()
        listener.watch.close()
        eventually(listener.has_ended)
        assert listener.error is None


def test_elsewhere_a_watch_goes_on_when_owner_and_coordinator_were_killed(eventually):
    flow = StrictFlow("served")
    with served({"a": 1}) as owner:
        listener = Listener(flow.watch())
        flow.put("a", 2).result()
        eventually(lambda: listener.values("a") == [2])
        coordinator = Place.of(flow.name).resident().pid
        os.kill(coordinator, signal.SIGSTOP)
        owner.kill()
        owner.wait()
        os.kill(coordinator, signal.SIGKILL)
    with served({"b": 1}):
        flow.put("a", 3).result()
        eventually(lambda: listener.values("a")[-1:] == [3])
    assert listener.values("a") == [2, 3]
    assert not listener.values("b")
    listener.watch.close()
    eventually(listener.has_ended)
    assert listener.error is None


def test_elsewhere_an_async_watch_goes_on_when_the_flow_is_started_again():
    async def main():
        flow = StrictFlow("served")
        with served({"a": 1}):
            watch = await asyncio.to_thread(flow.watch, "a")
            listening = asyncio.create_task(anext(aiter(watch), "ended"))
            while not flow._client.attach().watches:
                await asyncio.sleep(0.001)
        with served({"a": 2}):
            assert (await listening).value == 2
            listening = asyncio.create_task(anext(aiter(watch), "ended"))
            while not flow._client.attach().watches:
                await asyncio.sleep(0.001)
        while not watch._is_waiting:
            await asyncio.sleep(0.001)
        watch.close()
        assert await listening == "ended"

    asyncio.run(main())


def test_closing_the_handle_ends_its_watches(eventually):
    with served({"a": 1}):
        flow = StrictFlow("served")
        listener = Listener(flow.watch("a"))
        eventually(lambda: flow._client.attach().watches)
        flow.close()
        eventually(listener.has_ended)
        assert listener.error is None


def test_a_watch_that_waits_does_not_stand_in_the_way_of_tasks(eventually):
    with StrictFlow("narrow", state={"a": 0}, max_pending=1) as flow, flow.watch("never") as watch:
        listener = Listener(watch)
        eventually(lambda: len(flow._client.attach().watches) == 1)
        for number in range(20):
            flow.put("a", number)
        assert flow.state["a"] == 19
        assert not listener.heard


def test_async_watches_overlap_and_can_be_cancelled(flow):
    async def first(*keys):
        async for change in flow.watch(*keys):
            return change
        return None

    async def main():
        waiting = [asyncio.create_task(first("a")), asyncio.create_task(first("b")), asyncio.create_task(first())]
        never = asyncio.create_task(first("never"))
        attachment = flow._client.attach()
        while len(attachment.watches) < 4:
            await asyncio.sleep(0.001)
        await flow.put("b", 5)
        _, b, every = await asyncio.gather(flow.put("a", 6), *waiting[1:])
        a = await waiting[0]
        never.cancel()
        with pytest.raises(asyncio.CancelledError):
            await never
        return a, b, every

    a, b, every = asyncio.run(main())
    assert (a.value, b.value, every.value) == (6, 5, 5)


def test_closing_wakes_an_async_watch(flow):
    async def main():
        watch = flow.watch("a")
        listening = asyncio.create_task(anext(aiter(watch), "ended"))
        while not flow._client.attach().watches:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(watch.close)
        return await listening

    assert asyncio.run(main()) == "ended"


def test_what_cannot_be_watched_is_said(flow):
    with pytest.raises(SerializationError, match="watched"):
        flow.watch(1.5)

    @write(flow)
    def inside():
        flow.watch("a")

    with pytest.raises(StrictFlowError, match="inside SF-LOOP"):
        inside().result()


def test_a_process_that_died_is_not_told(flow, eventually):
    def wait_for_ever():
        for _ in StrictFlow("watched").watch("a"):
            pass

    @read(flow)
    def waiting():
        import gc

        return sum(len(each._waits) for each in gc.get_objects() if type(each).__name__ == "Notices")

    workers = flow.spawn(wait_for_ever, processes=2)
    eventually(lambda: waiting().result() == 2)
    for worker in workers:
        worker.kill()
    assert workers.join(PATIENCE)
    eventually(lambda: waiting().result() == 0)
    flow.put("a", 1).result()


# The policy


class NoticesMachine(RuleBasedStateMachine):
    """Watchers that look late, among commits; none sleeps when what it watches has changed since it looked."""

    keys = st.lists(st.sampled_from([b"a", b"b", b"c"]), max_size=2, unique=True).map(tuple)

    def __init__(self):
        super().__init__()
        self.notices = Notices()
        self.version = 0
        self.history = []  # (version, keys)
        self.asleep = {}  # number -> (looked, keys)
        self.number = 0

    def _told(self):
        for owner, number in self.notices.due():
            assert owner == number % 3
            del self.asleep[number]

    @rule(keys=keys, late=st.integers(0, 3))
    def wait(self, keys, late):
        self.number += 1
        looked = max(0, self.version - late)
        self.asleep[self.number] = looked, keys
        self.notices.wait(self.number % 3, self.number, looked, keys, self.version)
        self._told()

    @rule(keys=keys)
    def commit(self, keys):
        self.version += 1
        self.history.append((self.version, keys))
        self.notices.committed(self.version, keys)
        self._told()

    @rule(owner=st.integers(0, 2))
    def die(self, owner):
        self.notices.keep(lambda other: other != owner)
        self.asleep = {number: each for number, each in self.asleep.items() if number % 3 != owner}

    @rule(number=st.integers(1, 20))
    def drop(self, number):
        assert self.notices.drop(number % 3, number) == (self.asleep.pop(number, None) is not None)

    @invariant()
    def nobody_sleeps_through_a_change(self):
        for looked, keys in self.asleep.values():
            for version, changed in self.history:
                assert version <= looked or (bool(keys) and not set(keys) & set(changed))


def test_nobody_is_left_asleep_whatever_happens(monkeypatch):
    monkeypatch.setattr(notices_module, "REMEMBERED_KEYS", 2)
    run_state_machine_as_test(NoticesMachine)
