"""The coordinator dies, and its owner with it or not: nothing is lost, nothing happens twice, nobody waits for ever."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import secrets
import signal
import socket
import subprocess
import threading
import types
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from holding import has_a_sleeping_reader

from strictflow_mp import CoordinatorLost, FlowNotRunning, StrictFlow, TaskCrashed, TaskTimeout, read, write
from strictflow_mp.client import comeback
from strictflow_mp.coordinator import loop, slots, takeover
from strictflow_mp.coordinator.requests import Requests
from strictflow_mp.coordinator.sessions import Sessions
from strictflow_mp.flow import supervisor
from strictflow_mp.memory import suspect
from strictflow_mp.memory.gatekeeper import GateKeeper, Tenancy
from strictflow_mp.memory.segment import (
    SERVING,
    STARTING,
    W_DEADLINE,
    W_LOADING,
    W_LOADINGS,
    W_PID,
    W_RESTARTS,
    W_START,
    W_STATUS,
    W_SUSPECT,
    W_VERSION,
    Segment,
)
from strictflow_mp.memory.suspect import Marker, loading_seq, suspect_of
from strictflow_mp.store import Receipt, StoreWriter, read_receipts
from strictflow_mp.system import identity as processes
from strictflow_mp.system.identity import PF_EXITING, Identity
from strictflow_mp.system.place import Place
from strictflow_mp.wire.failures import unpack_failure
from strictflow_mp.wire.frames import COUNT, FAILURE, unpack_frame
from strictflow_mp.wire.stream import Stream

RESOLVED = 20.0
"""Seconds in which a future has to be resolved; so long only for machines that are very busy."""

fork = multiprocessing.get_context("fork")


@pytest.fixture
def flow() -> Iterator[StrictFlow]:
    flow = StrictFlow("mortal", state={"ids": [], "n": 0})
    with flow:
        yield flow


def kill(flow: StrictFlow) -> int:
    """Kill the coordinator; return its pid."""
    resident = Place.of(flow.name).resident()
    os.kill(resident.pid, signal.SIGKILL)
    return resident.pid


def is_another(flow: StrictFlow, former: int) -> bool:
    resident = Place.of(flow.name).resident()
    return resident is not None and resident.pid != former and Place.of(flow.name).is_inhabited()


def outcome(future: Any) -> Any:
    error = future.exception(RESOLVED)
    return future.result() if error is None else type(error)


def submit_all(name: str, first: int, count: int, box: Any) -> None:
    flow = StrictFlow(name)
    note = note_in(flow)
    futures = {number: note(number) for number in range(first, first + count)}
    box.put({number: outcome(future) for number, future in futures.items()})


def note_in(flow: StrictFlow) -> Any:
    @write(flow)
    def note(number):
        flow.state["ids"].append(number)
        return number

    return note


def test_each_p1_takes_effect_once_and_resolves_though_the_coordinator_is_killed_again_and_again(flow):
    box: Any = multiprocessing.get_context("spawn").Queue()
    workers = [
        multiprocessing.get_context("spawn").Process(target=submit_all, args=(flow.name, 10_000 * number, 3_000, box))
        for number in range(2)
    ]
    for worker in workers:
        worker.start()
    deaths = 0
    while any(worker.is_alive() for worker in workers) and deaths < 8:
        before = len(flow.state["ids"])
        former = kill(flow)
        deaths += 1
        while len(flow.state["ids"]) < before + 200 and any(worker.is_alive() for worker in workers):
            assert all(worker.exitcode in (None, 0) for worker in workers)
            if not box.empty():
                break
        if not box.empty():
            break
        assert is_another(flow, former)
    outcomes: dict[int, Any] = {}
    for _ in workers:
        outcomes |= box.get(timeout=60)
    for worker in workers:
        worker.join()
    done = [number for number, result in outcomes.items() if result == number]
    crashed = [number for number, result in outcomes.items() if result is TaskCrashed]
    ids = flow.state["ids"]
    assert sorted(ids) == sorted(done)
    assert len(done) + len(crashed) == 6_000
    assert len(crashed) <= deaths
    assert [number for number in ids if number < 10_000] == sorted(number for number in done if number < 10_000)
    assert flow.stats().restarts == deaths > 0


def test_a_task_that_ends_the_coordinator_is_not_tried_again_and_those_behind_it_run(flow, tmp_path):
    tries = tmp_path / "tries"
    note = note_in(flow)

    @write(flow)
    def die():
        flow.state["n"] = 666
        with tries.open("a") as file:
            file.write("x")
        os._exit(3)

    futures = [note(1), note(2), die(), note(3), die(), note(4)]
    assert [outcome(future) for future in futures] == [1, 2, TaskCrashed, 3, TaskCrashed, 4]
    assert flow.state["ids"] == [1, 2, 3, 4]
    assert flow.state["n"] == 0
    assert tries.read_text() == "xx"
    with pytest.raises(TaskCrashed, match=r"flow 'mortal': .* rolled back, and not tried again"):
        futures[2].result()


def test_a_read_that_ends_the_coordinator_is_not_tried_again(flow, tmp_path):
    tries = tmp_path / "tries"

    @read(flow)
    def die():
        with tries.open("a") as file:
            file.write("x")
        os._exit(3)

    @read(flow)
    async def die_later():
        import asyncio

        await asyncio.sleep(0)
        die.__strictflow_function__() if hasattr(die, "__strictflow_function__") else os._exit(3)

    @read(flow, timeout=60)  # the library waits for it in another asyncio task
    async def die_in_time():
        import asyncio

        await asyncio.sleep(0)
        os._exit(3)

    assert outcome(die()) is TaskCrashed
    assert outcome(die_later()) is TaskCrashed
    assert outcome(die_in_time()) is TaskCrashed
    assert outcome(note_in(flow)(1)) == 1


def test_a_function_whose_loading_ends_the_coordinator_is_not_loaded_again(run_python, tmp_path):
    (tmp_path / "fatal_module.py").write_text(
        "import os, multiprocessing\n"
        "if multiprocessing.current_process().name == 'SF-LOOP':\n    os._exit(4)\n"
        "from strictflow_mp import StrictFlow, write\n"
        "@write(StrictFlow('mortal'))\n"  # else nobody knows what was loaded, for the file is as young as the process
        "def task():\n    pass\n"
    )
    ran = run_python(
        f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import fatal_module
        from strictflow_mp import StrictFlow

        with StrictFlow("mortal", state={{"n": 0}}) as flow:
            error = fatal_module.task().exception({RESOLVED})
            flow.put("n", 1).result({RESOLVED})
            print("died while it loaded it" in str(error), flow.stats().restarts, flow.state["n"])
        """
    )
    assert ran.stdout == f"True {takeover.FATAL_LOADINGS} 1\n"  # fewer could have been by chance


def test_a_task_over_its_time_in_c_code_is_stopped_and_undone(run_python):
    ran = run_python(
        """
        from strictflow_mp import StrictFlow, write

        flow = StrictFlow("stuck", state={"n": 0})

        @write(flow, timeout=0.2)
        def stuck():
            flow.state["n"] = 1
            sum(range(10**12))

        with flow:
            error = stuck().exception()
            print(type(error).__name__, flow.state["n"], flow.stats().restarts)
        """
    )
    assert ran.stdout == "TaskTimeout 0 1\n"
    assert "in stuck" in ran.stderr


def test_a_gated_read_waits_for_the_next_coordinator_to_run_what_was_submitted(flow):
    note = note_in(flow)
    note(0).result(RESOLVED)
    pause(flow)
    future = note(1)
    kill(flow)
    assert flow.state["ids"] == [0, 1]
    assert future.result(RESOLVED) == 1


def pause(flow: StrictFlow) -> int:
    pid = Place.of(flow.name).resident().pid
    os.kill(pid, signal.SIGSTOP)
    return pid


def test_a_read_that_need_not_wait_goes_on_while_nobody_serves():
    with StrictFlow("mortal", state={"n": 0}, restart=False) as flow:
        flow.state["n"] = 5
        kill(flow)
        while Place.of(flow.name).is_inhabited():
            pass
        assert flow.state["n"] == 5
        with flow.snapshot() as snapshot:
            assert dict(snapshot) == {"n": 5}


def test_a_snapshot_keeps_its_version_through_a_restart(flow, eventually):
    with flow.snapshot() as snapshot:
        before = snapshot.version
        for _ in range(3):
            former = kill(flow)
            eventually(lambda former=former: is_another(flow, former))
            for number in range(300):
                flow.put(("key", number), "x" * 1000)
            flow.state["n"] += 1
        assert snapshot.version == before
        assert dict(snapshot) == {"ids": [], "n": 0}
    assert flow.state["n"] == 3


def test_a_process_reads_its_own_write_though_it_came_back_after_the_grace(flow, eventually):
    """Nobody waits for it any more then, but it does itself."""
    note = note_in(flow)
    note(0).result(RESOLVED)
    pause(flow)
    future = note(1)
    former = kill(flow)
    eventually(lambda: is_another(flow, former))
    client = flow._client._attachment
    eventually(client.gate.is_open)  # the flag of a process that has not come back was lifted
    assert flow.state["ids"] == [0, 1]
    assert future.result(RESOLVED) == 1


def test_no_flag_stays_up_after_a_restart(flow, eventually):
    note = note_in(flow)
    assert note(0).result(RESOLVED) == 0
    pause(flow)
    futures = [note(1), note(2)]
    kill(flow)
    assert [outcome(future) for future in futures] == [1, 2]
    eventually(flow._client._attachment.gate.is_open)


def test_without_restart_the_future_says_that_the_task_was_not_executed():
    flow = StrictFlow("mortal", state={"ids": []}, restart=False)
    with flow:
        note = note_in(flow)
        note(0).result(RESOLVED)
        pause(flow)
        future = note(1)
        kill(flow)
        with pytest.raises(CoordinatorLost, match=r"flow 'mortal': note\(\) was not executed"):
            future.result(RESOLVED)


def test_without_restart_a_read_that_waits_is_told(eventually):
    flow = StrictFlow("mortal", state={"ids": []}, restart=False)
    with flow:
        note = note_in(flow)
        note(0).result(RESOLVED)
        pause(flow)
        note(1)
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(lambda: flow.state["ids"])
            eventually(lambda: has_a_sleeping_reader(flow))
            kill(flow)
            with pytest.raises(CoordinatorLost, match=r"flow 'mortal': the coordinator \(pid \d+\) died, and no other"):
                reading.result(RESOLVED)


def owner_that_dies(name: str, ready: Any) -> None:
    flow = StrictFlow(name, state={"ids": [], "n": 0})
    flow.start_loop()
    flow.state["n"] = 7
    ready.send(Place.of(name).resident().pid)
    signal.pause()


@pytest.fixture
def orphans() -> Iterator[Callable[[str], StrictFlow]]:
    """A flow whose owner and coordinator are killed; this process is attached to it."""
    children = []

    def make(name: str) -> StrictFlow:
        mine, theirs = fork.Pipe()
        child = fork.Process(target=owner_that_dies, args=(name, theirs))
        child.start()
        children.append(child)
        coordinator = mine.recv()
        flow = StrictFlow.attach(name)
        assert flow.state["n"] == 7
        os.kill(coordinator, signal.SIGSTOP)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        return flow

    yield make
    for child in children:
        child.kill()
        child.join()


def test_when_the_owner_is_dead_too_waiting_ends_and_the_next_start_goes_on_from_the_last_commit(orphans):
    flow = orphans("orphan")
    note = note_in(flow)
    future = note(1)
    kill(flow)
    with pytest.raises(CoordinatorLost, match="was not executed"):
        future.result(RESOLVED)
    with pytest.raises(FlowNotRunning):
        flow._client.attach(0.0)
    heir = StrictFlow("orphan", state={"n": 0})
    with heir:
        assert heir.state["n"] == 7
        assert note(2).result(RESOLVED) == 2
        assert flow.state["ids"] == [2]


def test_the_next_start_discards_the_state_when_it_is_told_to(orphans):
    flow = orphans("orphan")
    kill(flow)
    while Place.of("orphan").is_inhabited():
        pass
    heir = StrictFlow("orphan", state={"n": 1})
    heir.start_loop(recover=False)
    try:
        assert heir.state["n"] == 1
        assert "ids" not in heir.state
    finally:
        heir.stop_loop()


def test_a_coordinator_that_fails_again_and_again_is_given_up_and_everybody_is_told(flow, monkeypatch, eventually):
    monkeypatch.setattr(supervisor, "MAX_FAILURES", 2)
    monkeypatch.setattr(supervisor, "AT_ONCE_SECONDS", 1000.0)
    note = note_in(flow)
    for _ in range(2):
        former = kill(flow)
        eventually(lambda former=former: is_another(flow, former) or not flow._owner.is_alive)
    eventually(lambda: not flow._owner.is_alive)
    with pytest.raises((CoordinatorLost, FlowNotRunning)):
        note(1).result(RESOLVED)


def test_the_owner_has_no_thread_while_it_forks_and_watches_again_afterwards(flow, eventually):
    """Or fork() would warn of threads, and the child could find a lock taken."""
    mine, theirs = fork.Pipe()
    child = fork.Process(target=lambda: theirs.send(Path("/proc/self/task").exists() and threading.active_count()))
    child.start()
    assert mine.recv() == 1
    child.join()
    former = kill(flow)
    eventually(lambda: is_another(flow, former))
    assert note_in(flow)(1).result(RESOLVED) == 1


def test_a_coordinator_whose_exit_code_somebody_else_took_is_followed_by_the_next(run_python):
    result = run_python(
        """
        import os, signal
        from strictflow_mp import StrictFlow

        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # as when gunicorn's master waits for any child: 0 is all we see
        with StrictFlow("reaped", state={"a": 1}) as flow:
            killed = flow.stats().coordinator_pid
            os.kill(killed, signal.SIGKILL)
            flow.state["a"] += 1
            print(flow.state["a"], flow.stats().restarts, flow.stats().coordinator_pid != killed)
        """
    )
    assert (result.returncode, result.stdout) == (0, "2 1 True\n"), result.stderr


def test_a_process_that_a_task_forked_does_not_keep_the_dead_coordinator_alive(flow, tmp_path):
    pids = tmp_path / "pids"

    @write(flow)
    def fork_one():
        child = os.fork()
        if not child:
            signal.pause()
        pids.write_text(str(child))

    fork_one().result(RESOLVED)
    try:
        kill(flow)
        assert note_in(flow)(1).result(RESOLVED) == 1
    finally:
        os.kill(int(pids.read_text()), signal.SIGKILL)


def test_a_stop_ends_a_flow_whose_coordinator_was_killed_just_before(flow):
    flow.state["n"] = 1
    kill(flow)


# The suspect, and the takeover itself, without processes

SLOTS = 5
NOW = 7_000_000_000


@pytest.fixture
def segment() -> Iterator[Segment]:
    segment = Segment.create(
        secrets.token_hex(6), "mortal", capacity=1 << 20, slots=SLOTS, identity=Identity(1, 1, 0, 0)
    )
    yield segment
    segment.close()
    segment.unlink()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time as the module `suspect` knows it."""
    clock = SimpleNamespace(now=NOW)
    monkeypatch.setattr(suspect, "time", SimpleNamespace(monotonic_ns=lambda: clock.now))
    return clock


@pytest.mark.parametrize("slot", [1, 2, SLOTS - 1])
@pytest.mark.parametrize("seq", [0, 1, 255, (1 << 48) - 1])
def test_what_is_marked_can_be_read_by_the_next_coordinator_until_it_has_ended(segment, slot, seq):
    marker = Marker(segment)
    marker.mark(slot, seq)
    assert suspect_of(segment) == (slot, seq, False, False)
    marker.mark_loading(slot, seq)
    assert suspect_of(segment) == (slot, seq, True, False)
    marker.clear()
    assert suspect_of(segment) is None


@pytest.mark.parametrize("slot", [0, SLOTS, SLOTS + 1, (1 << 15) - 1])
def test_a_mark_that_names_no_process_s_slot_is_nobody(segment, slot):
    marker = Marker(segment)
    for mark in (marker.mark, marker.mark_loading):
        mark(slot, 3)
        assert suspect_of(segment) is None


def test_a_task_is_overdue_from_its_deadline_on_and_only_if_it_has_one(segment, clock):
    marker = Marker(segment)
    marker.mark(1, 1)
    marker.limit(1.5)
    assert segment.words[W_DEADLINE] == NOW + 1_500_000_000
    for now, overdue in ((NOW, False), (NOW + 1_499_999_999, False), (NOW + 1_500_000_000, True), (2 * NOW, True)):
        clock.now = now
        found = suspect_of(segment)
        assert found is not None
        assert found.is_overdue == overdue
    marker.unlimit()
    assert suspect_of(segment) == (1, 1, False, False)
    marker.limit(0.0)
    marker.reset()
    assert (segment.words[W_DEADLINE], segment.words[W_SUSPECT]) == (0, 0)


def test_a_function_s_receipt_is_no_task_s(segment):
    numbers = [loading_seq(number) for number in (0, 1, 2, (1 << 48) - 1)]
    assert numbers == [(1 << 62) + number for number in (0, 1, 2, (1 << 48) - 1)]


def test_a_coroutine_is_marked_whenever_it_runs_and_not_while_it_waits(segment):
    seen: list[Any] = []

    @types.coroutine
    def wait(what: str) -> Generator[str, Any, Any]:
        seen.append(suspect_of(segment))
        try:
            return (yield what)
        finally:
            seen.append(suspect_of(segment))

    async def task() -> str:
        assert await wait("first") == 1
        with pytest.raises(LookupError, match="thrown"):
            await wait("second")
        assert await wait("third") == 3
        return "the end"

    run = Marker(segment).marked(task(), 2, 9)
    answers = []
    for sent in (None, 1, LookupError("thrown"), 3):
        try:
            answers.append(run.throw(sent) if isinstance(sent, Exception) else run.send(sent))
        except StopIteration as stop:
            answers.append(stop.value)
        assert suspect_of(segment) is None
    assert answers == ["first", "second", "third", "the end"]
    assert seen == [(2, 9, False, False)] * 6


def test_a_marked_coroutine_that_is_closed_is_closed_within_and_leaves_no_mark(segment):
    closed = []

    async def task() -> None:
        try:
            await asyncio.sleep(0)
        finally:
            closed.append(True)

    coroutine = task()
    run = Marker(segment).marked(coroutine, 2, 9)
    run.send(None)
    run.close()
    assert closed == [True]
    assert coroutine.cr_frame is None
    assert suspect_of(segment) is None


def test_a_marked_coroutine_that_raises_leaves_no_mark(segment):
    async def task() -> None:
        raise LookupError("within")

    with pytest.raises(LookupError, match="within"):
        Marker(segment).marked(task(), 2, 9).send(None)
    assert suspect_of(segment) is None


class Remains:
    """What a coordinator has left when it died: a segment, two processes with slots, and their receipts."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.token = secrets.token_hex(6)
        self.writer = StoreWriter(segment, "mortal")
        self.writer.create()
        self.keeper = GateKeeper(segment, self.token)
        for slot in (2, 4):
            self.keeper.admit(slot, Identity(100 + slot, 200 + slot, 0, 300 + slot))
        self.tenants = {slot: self.keeper.tenancy(slot).tenant for slot in (2, 4)}
        segment.words[W_STATUS] = STARTING

    def leave(self, *receipts: Receipt) -> None:
        for receipt in receipts:
            self.writer.receipts.add(receipt)
        self.writer.publish({b"key": b"value"})

    def take_over(self) -> list[Tenancy]:
        self.writer = StoreWriter(self.segment, "mortal")
        self.keeper = GateKeeper(self.segment, self.token)
        return takeover.take_over(self.segment, self.writer, self.keeper, "mortal", Identity(77, 88, 0, 0))

    def finished(self) -> list[int]:
        return [self.keeper.last_finished(slot) for slot in range(SLOTS)]

    def verdicts(self) -> dict[tuple[int, int], Any]:
        """By tenant and seq: the type of the error, or the answer itself."""
        found: dict[tuple[int, int], Any] = {}
        for tenant, number, seq, tasks, answer in read_receipts(self.segment):
            if number:
                found[tenant, seq] = answer
                continue
            assert tasks == 1
            found[tenant, seq] = answer
            if answer:
                kind, again, text, blob = unpack_frame(answer)
                assert (kind, again) == (FAILURE, seq)
                found[tenant, seq] = type(unpack_failure(text, blob, flow="mortal"))
        return found


@pytest.fixture
def remains(segment: Segment) -> Iterator[Remains]:
    remains = Remains(segment)
    yield remains
    for slot in range(1, SLOTS):
        remains.keeper.dismiss(slot)


def test_a_takeover_says_who_goes_on_and_makes_a_new_version(segment, remains, caplog):
    remains.leave()
    before = segment.words[W_VERSION]
    tenancies = remains.take_over()
    [said] = caplog.messages
    assert said == f"flow 'mortal': the former coordinator died; pid 77 goes on from version {before + 1} (restart 1)"
    assert [(tenancy.slot, tenancy.pid) for tenancy in tenancies] == [(2, 102), (4, 104)]
    assert [segment.words[word] for word in (W_RESTARTS, W_PID, W_START, W_STATUS)] == [1, 77, 88, SERVING]
    assert segment.words[W_VERSION] == before + 1
    remains.take_over()
    assert (segment.words[W_RESTARTS], segment.words[W_VERSION]) == (2, before + 2)


def test_a_takeover_counts_the_tasks_that_have_receipts_as_finished_and_no_others(segment, remains):
    two, four = remains.tenants[2], remains.tenants[4]
    gone = max(two, four) + 1
    remains.leave(
        Receipt(four, 11, 21, 3, b"a run of three"),
        Receipt(four, 14, 24, 1, b"the last"),
        Receipt(four, 0, 25, 1, b""),
        Receipt(gone, 50, 60, 1, b"nobody asks"),
        Receipt(two, 5, 6, 4, b"a run of four"),
    )
    for slot in (2, 4):
        segment.words[segment.submitted + slot] = 30
    remains.take_over()
    assert remains.finished() == [0, 0, 8, 0, 14]
    assert [receipt.seq for receipt in remains.writer.receipts.of(four)] == [21, 24, 25]
    assert not remains.writer.receipts.of(gone)
    remains.writer.publish({})
    assert {receipt.tenant for receipt in read_receipts(segment)} == {two, four}


@pytest.mark.parametrize("late", [False, True])
def test_the_task_that_ran_is_given_its_receipt_and_it_alone(segment, remains, clock, late):
    tenant = remains.tenants[4]
    remains.leave(Receipt(tenant, 1, 2, 1, b"answer"))
    marker = Marker(segment)
    marker.mark(4, 3)
    marker.limit(1.0)
    clock.now += 2_000_000_000 * late
    for _ in range(2):  # the next one may die as well, before it has removed the mark
        remains.take_over()
        assert remains.verdicts() == {(tenant, 2): b"answer", (tenant, 3): TaskTimeout if late else TaskCrashed}
        assert remains.finished() == [0, 0, 0, 0, 1]
        assert suspect_of(segment) is not None
    assert [segment.words[word] for word in (W_LOADING, W_LOADINGS)] == [0, 0]


def test_a_task_whose_process_has_gone_needs_no_receipt(segment, remains):
    remains.leave()
    Marker(segment).mark(3, 3)
    remains.take_over()
    assert remains.verdicts() == {}


def test_only_the_function_that_was_loaded_at_each_of_four_deaths_in_a_row_is_given_up(segment, remains):
    marker = Marker(segment)

    def die(load: int | None = None, task: int = 0) -> list[int]:
        marker.clear()
        if load is not None:
            marker.mark_loading(2, load)
        if task:
            marker.mark(2, task)
        remains.take_over()
        return sorted(seq for _, seq in remains.verdicts())

    remains.leave()
    assert [die(load=6) for _ in range(3)] == [[], [], []]
    assert die(load=7) == []  # another one
    assert [die(load=6) for _ in range(3)] == [[], [], []]
    assert die(task=5) == [5]
    assert [die(load=6) for _ in range(3)] == [[5], [5], [5]]
    assert die() == [5]
    assert [die(load=6) for _ in range(3)] == [[5], [5], [5]]
    assert suspect_of(segment) is None
    for _ in range(2):
        assert die(load=6) == [5, loading_seq(6)]
        assert remains.verdicts()[remains.tenants[2], loading_seq(6)] == b""
        assert suspect_of(segment) == (2, 6, True, False)


def test_an_error_that_cannot_be_compared_ends_nothing(flow):
    class Odd(Exception):
        def __eq__(self, other):
            return self.code == other.code

        __hash__ = Exception.__hash__

    @write(flow)
    def fail():
        raise Odd("odd")

    assert str(fail().exception()) == "odd"
    stats = flow.stats()
    assert stats.restarts == 0
    assert stats.tasks_failed[1] == 1


@pytest.mark.parametrize("ends", [True, False])
def test_a_coordinator_that_has_closed_a_connection_since_it_dies_has_not_meant_it(monkeypatch, tmp_path, ends):
    with StrictFlow("ending", state={}) as flow:
        pid = flow.stats().coordinator_pid
        fields = Path(f"/proc/{pid}/stat").read_text().split()
        assert fields[1].endswith(")")  # its name is one word
        fields[8] = str(int(fields[8]) | PF_EXITING if ends else int(fields[8]) & ~PF_EXITING)
        attachment = flow._client.attach()
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_text(" ".join(fields))
        monkeypatch.setattr(comeback, "EXPELLED_SECONDS", 0)
        monkeypatch.setattr(processes, "PROC", str(tmp_path))
        assert not Place.of(flow.name).resident().identity.is_dead()
        assert comeback.may_return(attachment, attachment.restarts) is ends
        monkeypatch.undo()
        attachment.dead = None


def test_a_process_ends_when_it_is_dead_and_not_before():
    process = subprocess.Popen(["sleep", "600"])
    identity = Identity.of(process.pid)
    assert not identity.is_ending()
    process.kill()
    process.wait()
    assert identity.is_ending()


# Coming back


@pytest.fixture
def moment(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time as SF-LOOP knows it."""
    moment = SimpleNamespace(now=1000.0)
    for module in (slots, loop):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: moment.now))
    return moment


@pytest.fixture
def house(segment, remains) -> Iterator[Any]:
    """The next coordinator's slots; slot 2 is this process's, which has submitted up to ticket 5 and is away."""
    sessions = Sessions(None)
    mine = Identity.mine()
    words = segment.slot(2)
    words.submitted, words.pid, words.start, words.space = 5, mine.pid, mine.start, mine.space
    remains.leave()
    tenancies = [tenancy for tenancy in remains.take_over() if tenancy.slot == 2]
    withdrawn: list[int] = []
    kept = slots.Slots(sessions, segment, remains.keeper, remains.writer, withdrawn.append)
    yield SimpleNamespace(sessions=sessions, slots=kept, me=mine, away=tenancies, withdrawn=withdrawn)
    for session in sessions:
        sessions.close(session)
        sessions.remove(session)
    sessions.shut()


def test_who_knocks_and_goes_again_has_not_come_back(segment, remains, house, moment):
    """On a busy machine its patience may end in the handshake. What it has submitted comes with the next try."""
    sessions, tenant = house.sessions, remains.tenants[2]
    house.slots.expect(house.away)
    for _ in range(2):
        assert house.slots.let_back(house.me, 2, tenant, 1)
        mine, theirs = socket.socketpair()
        session = house.slots.enter(Stream(theirs), 2)
        mine.close()
        sessions.poll(0)
        house.slots.reclaim()
        assert not session.is_open
        assert session.is_expected
        assert not remains.keeper.is_open(), "nobody waits for what it has submitted"
    assert house.withdrawn == [2]  # what the first connection brought comes once more
    moment.now += slots.GRACE_SECONDS
    house.slots.reclaim()
    assert remains.keeper.is_open()
    assert sessions.at(2) is session  # it may still come back


def test_who_has_sent_all_that_it_came_for_is_not_awaited_when_it_goes(segment, remains, house, moment):
    sessions = house.sessions
    house.slots.expect(house.away)
    assert house.slots.let_back(house.me, 2, remains.tenants[2], 1)
    mine, theirs = socket.socketpair()
    session = house.slots.enter(Stream(theirs), 2)
    requests = object.__new__(Requests)
    requests._queue = lambda *args, **options: None
    requests.accept(session, (COUNT, 5))
    mine.close()
    sessions.poll(0)
    house.slots.reclaim()
    assert remains.keeper.is_open()
    assert not session.is_expected


def test_a_p2_waits_for_a_flag_by_the_clock_and_not_by_how_often_it_is_woken(moment):
    sf_loop = object.__new__(loop.SFLoop)
    sf_loop.gate = SimpleNamespace(is_open=lambda: False, is_up=lambda: True)
    sf_loop.scheduler = SimpleNamespace(writes=0)
    woken = iter(range(50_000))

    def drain(timeout: float) -> None:
        if next(woken) == 49_000:
            moment.now += slots.GRACE_SECONDS  # nobody may miss it sooner

    sf_loop._drain = drain
    with pytest.raises(StopIteration):
        sf_loop._look_for_writes()
