"""The transaction is the running task's own: no thread, no child and no later task reads or writes through it."""

from __future__ import annotations

import asyncio
import threading

import pytest

from strictflow_mp import ReadOnlyState, StrictFlow, read, write

STATE = {"valves": {"inflow": 0, "outflow": 0}}


@pytest.fixture
def flow():
    with StrictFlow(state=STATE) as flow:
        yield flow


def in_a_thread(function):
    """What it returns, or the exception that it raises, in a thread of its own."""
    box = []

    def run():
        try:
            box.append(function())
        except BaseException as error:
            box.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    return box[0]


def plain(value):
    return {**value} if isinstance(value, dict) else value


def test_a_thread_of_a_p1_sees_what_is_committed_and_cannot_change_it(flow):
    @write(flow)
    def half_done():
        flow.state["valves"]["inflow"] = 1
        flow.state["new"] = 1
        seen = in_a_thread(
            lambda: [plain(flow.state["valves"]), "new" in flow.state, sorted(flow.state), len(flow.state)]
        )
        errors = [
            in_a_thread(lambda: flow.state.__setitem__("stray", 1)),
            in_a_thread(lambda: flow.state.__delitem__("valves")),
            in_a_thread(lambda: flow.state.update(stray=1)),
            in_a_thread(lambda: flow.state["valves"].update(inflow=7)),
        ]
        flow.state["valves"]["outflow"] = 1
        return seen, [type(error).__name__ for error in errors]

    seen, errors = half_done().result(30)
    assert seen == [STATE["valves"], False, ["valves"], 1]
    assert errors == [ReadOnlyState.__name__] * 4
    assert dict(flow.state) == {"valves": {"inflow": 1, "outflow": 1}, "new": 1}


def test_a_thread_that_a_task_left_behind_reads_and_writes_through_no_other_task(flow):
    import queue

    @write(flow)
    def leaves_a_thread_and_fails():
        import builtins

        asked, told = queue.Queue(), queue.Queue()

        def serve():
            while True:
                function = asked.get()
                try:
                    told.put(function())
                except BaseException as error:
                    told.put(type(error).__name__)

        threading.Thread(target=serve, daemon=True).start()
        builtins.strays_of_the_test = asked, told
        raise LookupError("rolled back")

    @write(flow)
    def foreign():
        import builtins

        asked, told = builtins.strays_of_the_test
        flow.state["valves"]["inflow"] = 1
        asked.put(lambda: plain(flow.state["valves"]))
        seen = told.get(timeout=30)
        asked.put(lambda: flow.state.__setitem__("stray", 1))
        error = told.get(timeout=30)
        flow.state["valves"]["outflow"] = 1
        return seen, error

    assert isinstance(leaves_a_thread_and_fails().exception(30), LookupError)
    assert foreign().result(30) == (STATE["valves"], "ReadOnlyState")
    assert dict(flow.state) == {"valves": {"inflow": 1, "outflow": 1}}


def test_a_thread_of_an_async_p2_never_sees_a_half_done_or_rolled_back_state(flow):
    @read(flow)
    async def watches(rounds):
        def look():
            import time

            seen = []
            for _ in range(rounds):
                value = flow.state["valves"]
                seen.append((type(value).__name__, value["inflow"], value["outflow"]))
                time.sleep(0.0005)
            return seen

        return await asyncio.to_thread(look)

    @write(flow)
    def set_both(n, fail=False):
        import time

        valves = flow.state["valves"]
        valves["inflow"] = n
        time.sleep(0.005)
        valves["outflow"] = n
        if fail:
            raise LookupError("rolled back")

    watching = watches(400)
    for n in range(1, 20):
        set_both(n).result(30)
        assert isinstance(set_both(-1, fail=True).exception(30), LookupError)
    seen = watching.result(60)
    assert {kind for kind, _, _ in seen} == {"FrozenDict"}
    assert all(inflow == outflow >= 0 for _, inflow, outflow in seen)


def test_many_threads_of_a_p2_read_while_p1_tasks_commit(flow):
    @read(flow)
    async def crowd(rounds):
        def look():
            values = [flow.state["valves"] for _ in range(rounds)]
            return [value["inflow"] == value["outflow"] for value in values]

        return [all(found) for found in await asyncio.gather(*[asyncio.to_thread(look) for _ in range(4)])]

    found = crowd(3000)
    while not found.done():
        flow.update({"valves": {"inflow": 1, "outflow": 1}, "pad": "x" * 2000}).result(30)
        flow.update({"valves": {"inflow": 2, "outflow": 2}, "pad": "y" * 3000}).result(30)
    assert found.result(60) == [True] * 4


def test_a_snapshot_in_a_p1_has_every_p1_that_was_submitted_before_it(flow):
    @write(flow)
    def hold():
        import time

        time.sleep(0.1)

    bump = write(flow, key="n")(lambda n: (n or 0) + 1)

    @write(flow)
    def look():
        flow.state["mine"] = 1
        with flow.snapshot() as now:
            return now.get("n"), flow.state["n"], "mine" in now, now["valves"] == STATE["valves"]

    hold()
    for _ in range(5):
        bump()
    assert look().result(30) == (5, 5, False, True)
    assert flow.state["mine"] == 1


def test_a_snapshot_that_outlives_its_p1_stays_at_its_version(flow):
    @write(flow)
    def keep():
        import builtins

        builtins.kept_by_the_test = flow.snapshot()
        return builtins.kept_by_the_test["valves"]["inflow"]

    @read(flow)
    def again():
        import builtins

        return builtins.kept_by_the_test["valves"]["inflow"]

    assert keep().result(30) == 0
    for n in range(300):
        flow.put("valves", {"inflow": n, "outflow": n})
    assert flow.state["valves"]["inflow"] == 299
    assert again().result(30) == 0
