"""Futures behave as those of concurrent.futures and asyncio do, from many threads, under backpressure."""

from __future__ import annotations

import asyncio
import concurrent.futures as cf
import os
import signal
import sys
import threading

import pytest
from holding import held, is_inside

from strictflow_mp import StrictFlow, TaskFailed, TaskFuture, read, write
from strictflow_mp.store import read_receipts


@pytest.fixture
def flow():
    with StrictFlow(state={"log": []}, max_pending=8) as flow:
        yield flow


@pytest.fixture
def log(flow):
    @write(flow)
    def log(item):
        flow.state["log"].append(item)
        return item

    return log


def test_wait_and_as_completed_take_them(flow, log):
    with held(flow):
        futures = log.map(range(5))
        assert cf.wait(futures, timeout=0).not_done == set(futures)
        assert not any(future.done() for future in futures)
    assert cf.wait(futures).done == set(futures)
    assert sorted(future.result() for future in cf.as_completed(log.map("abc"))) == ["a", "b", "c"]
    done, _ = cf.wait([log("d"), log("e")], return_when=cf.FIRST_COMPLETED)
    assert done <= set(done)
    assert all(isinstance(future, (cf.Future, TaskFuture)) for future in futures)


def test_many_are_awaited_at_once(flow, log):
    @read(flow)
    async def fail():
        raise LookupError("no")

    async def main():
        return await asyncio.gather(*(log(n) for n in range(100)), fail(), return_exceptions=True)

    *results, error = asyncio.run(main())
    assert results == list(range(100))
    assert isinstance(error, LookupError)
    assert flow.state["log"] == results


def test_an_await_leaves_the_loop_free_and_its_cancellation_takes_the_task_back(flow, log):
    async def main():
        with held(flow), pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(log("never"), 0.01)
        return await log("later")

    assert asyncio.run(main()) == "later"
    assert flow.state["log"] == ["later"]


def test_callbacks_run_once_and_may_submit_and_wait(flow, log):
    called = []

    def again(future):
        called.append((future.result(), log("inner").result(), log("unwaited")))

    with held(flow):
        future = log("outer")
        future.add_done_callback(again)
    assert future.result() == "outer"
    future.add_done_callback(called.append)  # it is done: called at once
    cf.wait([log("after")])
    while len(called) < 2:
        log("turn").result()
    assert min(map(str, called)).startswith("('outer', 'inner'")
    assert len(called) == 2
    assert called.count(future) == 1


def test_a_started_task_cannot_be_cancelled(flow):
    with cf.ThreadPoolExecutor(1) as pool:
        with held(flow) as running:
            cancelling = pool.submit(running.cancel)
        assert not cancelling.result()
    assert not running.cancelled()
    assert not running.cancel()


@pytest.mark.parametrize("decorate", [write, read])
def test_a_task_that_was_cancelled_never_runs_and_one_that_was_not_does(flow, log, tmp_path, decorate, eventually):
    touch = decorate(flow)(lambda name: (tmp_path / name).touch())
    outcomes = {}
    with cf.ThreadPoolExecutor(1) as pool:
        while True not in outcomes.values():  # usually the first
            name = f"try-{len(outcomes)}"
            with held(flow):
                queued = touch(name)
                cancelling = pool.submit(queued.cancel)
            outcomes[name] = cancelling.result()
            assert queued.cancelled() == outcomes[name]
            assert queued.cancel() == outcomes[name]
            assert cf.wait([queued]).done == {queued}
    for ask in (queued.result, queued.exception, lambda: asyncio.run(asyncio.wait_for(queued, 60))):
        with pytest.raises((cf.CancelledError, asyncio.CancelledError)):
            ask()
    if decorate is write:
        # Nor would the next coordinator run it, though it were sent there.
        segment = flow._client.attach().segment
        eventually(lambda: queued.seq in {receipt.seq for receipt in read_receipts(segment)})
    assert log("after").result() == "after"
    assert {name: not (tmp_path / name).exists() for name in outcomes} == outcomes


def test_result_and_exception_time_out_and_can_be_asked_again(flow, log):
    with held(flow):
        future = log("slow")
        for ask in (future.result, future.exception):
            for seconds in (0, 0.01):
                with pytest.raises(cf.TimeoutError):
                    ask(seconds)
    assert (future.result(), future.result(0), future.exception()) == ("slow", "slow", None)


def test_a_tasks_exception_has_the_remote_traceback_as_its_cause(flow):
    @write(flow)
    def deep():
        def deeper():
            raise LookupError("no", {"a": 1})

        deeper()

    with pytest.raises(LookupError) as caught:
        deep().result()
    assert caught.value.args == ("no", {"a": 1})
    assert "in deeper" in str(caught.value.__cause__)
    assert "LookupError: ('no', {'a': 1})" in str(caught.value.__cause__)


class Stubborn(Exception):
    """It does not come back from pickling: its __init__ takes two arguments, its args are one."""

    def __init__(self, a, b):
        super().__init__(a)


def test_an_exception_that_does_not_pickle_arrives_as_task_failed_with_its_text(flow):
    @write(flow)
    def refuse():
        raise Stubborn("first", "second")

    @read(flow)
    async def hold_a_lock():
        error = ValueError("lock")
        error.lock = threading.Lock()
        raise error

    for task, text in ((refuse, "Stubborn: first"), (hold_a_lock, "ValueError: lock")):
        with pytest.raises(TaskFailed, match=text) as caught:
            task().result()
        assert caught.value.flow == flow.name
        assert "Traceback" in str(caught.value.__cause__)


EXITS = {
    "sys.exit": lambda: sys.exit(3),
    "KeyboardInterrupt": lambda: (_ for _ in ()).throw(KeyboardInterrupt),
    "SIGINT": lambda: os.kill(os.getpid(), signal.SIGINT),
    "GeneratorExit": lambda: (_ for _ in ()).throw(GeneratorExit),
}


def test_a_task_cannot_end_sf_loop(flow, log):
    pid = flow.stats().coordinator_pid
    for name, leave in EXITS.items():

        async def leave_later(leave=leave):
            await asyncio.sleep(0)
            leave()

        for decorate in (write, read):
            for body in (leave, leave_later):
                error = decorate(flow)(body)().exception(timeout=60)
                assert isinstance(error, TaskFailed) or (error is None and name == "SIGINT")
    assert log("alive").result() == "alive"
    assert flow.stats().coordinator_pid == pid


def test_more_than_max_pending_tasks_are_submitted_in_order(flow, log):
    futures = log.map(range(100))
    for number in range(100, 200):
        futures.append(log(number))
    assert [future.result() for future in futures] == list(range(200)) == flow.state["log"]


def test_a_submit_waits_while_max_pending_tasks_are_outstanding(flow, log, eventually):
    submitted = []

    def submit():
        for number in range(20):
            log(number)
            submitted.append(number)

    with held(flow):
        thread = threading.Thread(target=submit)
        thread.start()
        eventually(lambda: is_inside(thread, "wait_for_room"))
        assert len(submitted) == 7  # the one that is held counts
    thread.join()
    assert flow.state["log"] == list(range(20))


def test_threads_submit_and_wait_at_the_same_time(flow, log):
    def work(thread):
        done = []
        for number in range(30):
            futures = [log((thread, number, n)) for n in range(3)]
            flow.state["log"]
            if number % 3 == 0:
                cf.wait(futures)
            done += [future.result() for future in reversed(futures)][::-1]
        return done

    with cf.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(work, range(8)))
    expected = [[(t, number, n) for number in range(30) for n in range(3)] for t in range(8)]
    assert answers == expected
    assert [[item for item in flow.state["log"] if item[0] == t] for t in range(8)] == expected


def test_threads_share_the_last_places_under_backpressure(flow):
    nothing = write(flow)(int)

    def work(_):
        return [future.result() for _ in range(40) for future in nothing.map([0] * 5)]

    with cf.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [[0] * 200] * 8


def test_a_submit_goes_on_when_the_pipe_was_full(eventually):
    with StrictFlow(state={"log": []}) as flow:
        futures = []

        @write(flow)
        def log(number, _):
            flow.state["log"].append(number)

        def submit():
            futures.extend(log(number, bytes(100_000)) for number in range(50))

        thread = threading.Thread(target=submit)
        with held(flow):
            thread.start()
            eventually(lambda: flow._client.attach().stream.unsent)
        thread.join()
        assert [future.exception() for future in futures] == [None] * 50
        assert flow.state["log"] == list(range(50))


def test_a_callback_that_fails_is_logged_and_keeps_no_other_from_being_called(flow, log, caplog, eventually):
    called = []

    def fail(future):
        raise LookupError("in a callback")

    with held(flow):
        future = log("a")
        for callback in (fail, called.append, fail, called.append):
            future.add_done_callback(callback)
        assert called == []
    future.result()
    future.add_done_callback(called.append)
    future.add_done_callback(fail)

    def logged():
        return [record.exc_info[0] for record in caplog.records if record.name == "concurrent.futures"]

    # The thread that reads answers may still be at one of them.
    eventually(lambda: called == [future] * 3 and logged() == [LookupError] * 3)


def test_whoever_waits_for_the_first_failure_hears_of_failures_and_of_what_was_taken_back(flow, log, eventually):
    @write(flow)
    def fail():
        raise LookupError("no")

    @read(flow)
    async def wait():
        while not flow.state["log"]:
            await asyncio.sleep(0.005)

    with cf.ThreadPoolExecutor(1) as pool:
        with held(flow):
            futures = [wait(), fail()]
            waiting = pool.submit(cf.wait, futures, return_when=cf.FIRST_EXCEPTION)
            eventually(lambda: all(future._listeners for future in futures))
        assert waiting.result() == ({futures[1]}, {futures[0]})
        log("a").result()
        futures[0].result()
        with held(flow):
            futures = [log("c"), log("d")]
            waiting = pool.submit(cf.wait, futures)
            eventually(lambda: futures[1]._listeners)
            cancelling = threading.Thread(target=futures[1].cancel)
            cancelling.start()
        cancelling.join()
        assert waiting.result().done == set(futures)
        assert not any(future.running() for future in futures)


def test_an_async_read_that_sleeps_is_taken_back_when_nobody_awaits_it_any_more(flow, eventually):
    @read(flow)
    async def sleep():
        await asyncio.sleep(3600)

    async def main():
        future = sleep()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(future, 0.01)
        return future

    future = asyncio.run(main())
    eventually(future.done)
    assert future.cancelled()
