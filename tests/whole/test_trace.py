"""`flow.trace`: what happened is in the file, in the form that its viewers read; and nothing ever fails for it."""

from __future__ import annotations

import asyncio
import gc
import json
import multiprocessing
import os
import resource
import signal
import time
from collections import defaultdict
from pathlib import Path

import pytest

from strictflow_mp import FlowNotRunning, StrictFlow, StrictFlowError, read, write
from strictflow_mp import trace as parts
from strictflow_mp.coordinator.runner import Runner
from strictflow_mp.memory.segment import W_RESTARTS, W_TRACE
from strictflow_mp.system.place import Place
from strictflow_mp.trace import Part, merge, prepare

fork = multiprocessing.get_context("fork")
ROUNDING = 0.01
"""Microseconds."""


def checked(path: Path) -> list[dict]:
    """The events of a trace, once they are known to follow the Trace Event Format."""
    events = json.loads(path.read_text())["traceEvents"]
    slices = defaultdict(list)
    named, begun, arrows = set(), {}, {}
    for event in events:
        assert type(event["pid"]) is type(event["tid"]) is int
        assert event["ph"] in "MXbeistf"
        if event["ph"] == "M":
            if event["name"] == "process_name":
                named.add(event["pid"])
            continue
        assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
            slices[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        elif event["ph"] == "b":
            begun[event["pid"], event["cat"], event["id"]] = event
        elif event["ph"] == "e":
            assert begun.pop((event["pid"], event["cat"], event["id"]))["ts"] <= event["ts"]
    assert not begun
    assert {event["pid"] for event in events} == named
    for each in slices.values():  # of one thread: within each other, or one behind the other
        open_until = []
        for start, end in sorted(each, key=lambda both: (both[0], -both[1])):
            while open_until and open_until[-1] <= start + ROUNDING:
                open_until.pop()
            assert not open_until or end <= open_until[-1] + ROUNDING
            open_until.append(end)
    for event in events:
        if event["ph"] in "stf":
            here = slices[event["pid"], event["tid"]]
            assert any(start - ROUNDING <= event["ts"] <= end + ROUNDING for start, end in here)
            assert (event["ph"] == "s") == (event["id"] not in arrows)
            assert event.get("bp") == ("e" if event["ph"] == "f" else None)
            former = arrows.get(event["id"], event)
            assert former["ph"] != "f"
            assert (former["name"], former["cat"]) == (event["name"], event["cat"])
            arrows[event["id"]] = event
    assert all(last["ph"] == "f" or last["name"] == "task" for last in arrows.values())
    return events


def named(events: list[dict], name: str, phase: str = "X") -> list[dict]:
    return [event for event in events if event["name"] == name and event["ph"] == phase]


def end(event: dict) -> float:
    return event["ts"] + event["dur"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.json"


@pytest.fixture
def flow():
    with StrictFlow("traced", state={"n": 0}) as flow:
        yield flow


@pytest.fixture
def words(flow):
    return flow._client.attach().words


def test_a_run_is_shown_as_it_was(flow, path, tmp_path, eventually):
    gate = tmp_path / "open"
    reached = tmp_path / "reached"

    @write(flow)
    def hold():
        reached.touch()
        deadline = time.monotonic() + 20
        while not gate.exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        flow.state["n"] = 1

    @read(flow)
    async def poll():
        await asyncio.sleep(0)
        return flow.state["n"]

    attached, go = fork.Event(), fork.Event()

    def look():
        flow.peek("n")
        attached.set()
        go.wait()
        assert flow.state["n"] == 1

    segment = flow._client.attach().segment
    with flow.trace(path) as trace:
        reader = fork.Process(target=look, name="reader")
        reader.start()
        assert attached.wait(10)
        held = hold()
        eventually(reached.exists)
        go.set()
        # It sleeps at the gate.
        eventually(lambda: any(segment.words[segment.waiting : segment.waiting + segment.slots]))
        gate.touch()
        held.result()
        assert poll().result() == 1
        reader.join()
        assert reader.exitcode == 0
    events = checked(path)
    assert trace.events == len(events)
    [p1] = named(events, "P1 hold")
    [burst] = [event for event in named(events, "burst") if event["ts"] <= p1["ts"] <= end(event)]
    [commit] = [event for event in named(events, "commit") if burst["ts"] <= event["ts"] <= end(burst)]
    assert end(p1) <= commit["ts"] + ROUNDING
    assert commit["args"] == {"version": 2, "keys": 1}
    assert (burst["args"]["ran"], burst["args"]["version"]) == (1, 2)
    assert p1["args"]["pid"] == os.getpid()
    assert p1["args"]["queued_us"] >= 0
    assert {event["pid"] for event in (p1, burst, commit)} == {Place.of(flow.name).resident().pid}
    # Who waited, for whom, and how long.
    [wait] = named(events, "wait at the gate")
    assert wait["pid"] == reader.pid
    assert wait["ts"] < end(p1) < end(wait)
    assert os.getpid() in [one["pid"] for one in wait["args"]["behind"]]
    begun, ended = [event for event in events if event["name"] == "waits"]
    assert (begun["pid"], ended["pid"]) == (p1["pid"], reader.pid)
    # From submit to run to answer.
    [submit], [answer] = named(events, "submit hold"), named(events, "answer hold")
    assert submit["ts"] <= p1["ts"] <= answer["ts"]
    way = [event for event in events if event["ph"] in "stf" and event["name"] == "task"]
    identifier = next(event["id"] for event in way if event["ts"] == submit["ts"])
    assert [event["ts"] for event in way if event["id"] == identifier] == [submit["ts"], p1["ts"], answer["ts"]]
    [result] = named(events, "wait for hold")
    assert result["ts"] <= answer["ts"] <= end(result)
    # Async P2 tasks overlap, so they are no slices of the thread.
    [begin], [finish] = named(events, "P2 poll", "b"), named(events, "P2 poll", "e")
    assert begin["id"] == finish["id"]
    assert len(named(events, "P2 poll")) == 1  # until its first await
    names = {event["args"]["name"].partition(" (")[0] for event in named(events, "process_name", "M")}
    assert {"SF-LOOP", "reader"} < names


def test_calls_in_one_go_and_failures_and_ready_made_tasks_are_there(flow, path):
    @write(flow)
    def set_to(n):
        if n == 7:
            raise ValueError("seven")
        flow.state["n"] = n

    @read(flow)
    def get():
        return flow.state["n"]

    with flow.trace(path):
        futures = set_to.map(range(40))
        assert [type(future.exception()) for future in futures].count(ValueError) == 1
        flow.put("n", 1).result()
        flow.state["n"] = 2
        assert get().result() == 2
    events = checked(path)
    runs = named(events, "P1 set_to")
    assert len(runs) == 40
    assert [run["args"].get("failed") for run in runs] == [None] * 7 + ["ValueError"] + [None] * 32
    assert [submit["args"]["tasks"][0][1] for submit in named(events, "submit set_to")] == [16, 24]
    assert len(named(events, "P1 put")) == len(named(events, "submit put")) == 2
    assert len(named(events, "P2 get")) == 1
    ways = defaultdict(str)
    for event in events:
        if event["ph"] in "stf":
            ways[event["id"]] += event["ph"]
    assert list(ways.values()) == ["stf"] * 43


def test_while_nobody_records_the_runner_is_the_plain_one(flow, path, words):
    @read(flow)
    def runners():
        return sorted(type(each).__name__ for each in gc.get_objects() if isinstance(each, Runner))

    assert runners().result() == ["Runner"]
    with flow.trace(path):
        assert words[W_TRACE]
        assert runners().result() == ["_RecordedRunner"]
    assert not words[W_TRACE]
    assert not Place.of(flow.name).trace.is_symlink()
    assert runners().result() == ["Runner"]
    flow.state["n"] = 3
    assert not path.with_name(path.name + parts.SUFFIX).exists()


def test_a_recording_goes_on_with_the_next_coordinator(flow, path, words, eventually):
    first = Place.of(flow.name).resident().pid
    with flow.trace(path):
        flow.state["n"] = 1
        os.kill(first, signal.SIGKILL)
        flow.state["n"] = 2
        eventually(lambda: words[W_RESTARTS] == 1)
        second = Place.of(flow.name).resident().pid
    events = checked(path)
    assert [event["pid"] for event in named(events, "P1 put")] == [first, second]
    [takeover] = named(events, "takeover", "i")
    assert takeover["pid"] == second
    names = [event["args"]["name"] for event in named(events, "process_name", "M") if event["pid"] == second]
    assert names == [f"SF-LOOP, restart 1 ({second})"]


def test_the_error_of_a_bad_path_is_the_callers(flow, tmp_path, words):
    for bad, error in (
        (tmp_path / "nowhere" / "run.json", FileNotFoundError),
        (tmp_path, IsADirectoryError),
        ("a\0b", ValueError),
    ):
        with pytest.raises(error):
            flow.trace(bad)
    assert not words[W_TRACE]
    flow.state["n"] = 1
    assert not any(tmp_path.iterdir())


def test_the_error_of_the_coordinator_is_the_callers_too(flow, path, words):
    write(flow)(refuse)().result()
    with pytest.raises(PermissionError, match="not here"):
        flow.trace(path)
    assert not words[W_TRACE]
    assert not any(path.parent.iterdir())
    flow.put("n", 1).result()


def refuse():
    """Let the coordinator find that it may not write there."""
    from strictflow_mp.coordinator import recorder

    def part(*_, **__):
        raise PermissionError("not here")

    recorder.Part = part


def no_room():
    """Let the coordinator write not one byte more to a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))


def test_a_full_disk_costs_the_trace_and_nothing_else(run_python, path):
    ran = run_python(
        f"""
        import logging, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from strictflow_mp import StrictFlow, setup_logging, write
        from test_trace import no_room

        setup_logging(logging.WARNING)
        flow = StrictFlow("full", state={{"n": 0}})
        with flow, flow.trace({str(path)!r}):
            write(flow)(no_room)().result()
            for n in range(20):
                flow.put("n", n).result()
            print(flow.state["n"])
        """
    )
    assert ran.returncode == 0, ran.stderr
    said = [line for line in ran.stdout.splitlines() if "recorded no more" in line]
    assert len(said) == 1, ran.stdout
    assert "SF-LOOP" in said[0]
    assert ran.stdout.splitlines()[-1] == "19"
    events = checked(path)
    assert len(named(events, "submit put")) == 20
    assert not named(events, "P1 put")


def test_one_recording_at_a_time(flow, path, tmp_path):
    with flow.trace(path):
        for other in (path, tmp_path / "other.json"):
            with pytest.raises(StrictFlowError, match=r"recorded already.*close that trace first"):
                flow.trace(other)
        flow.state["n"] = 1
    assert len(named(checked(path), "P1 put")) == 1
    with flow.trace(path) as trace:
        flow.state["n"] = 2
    assert len(named(checked(path), "P1 put")) == 1
    trace.close()  # nothing happens


def test_a_flow_that_does_not_run_and_a_task_cannot_be_recorded(path):
    flow = StrictFlow("resting")
    flow._client.is_stopped = True
    with pytest.raises(FlowNotRunning):
        flow.trace(path)
    assert not path.exists()
    with flow, pytest.raises(StrictFlowError, match="a task cannot record its own flow"):
        write(flow)(lambda: flow.trace("anywhere"))().result()


def test_what_a_flow_did_before_it_ended_is_there(path):
    with StrictFlow("ending", state={"n": 0}) as flow:
        trace = flow.trace(path)
        flow.state["n"] = 1
    trace.close()
    assert len(named(checked(path), "P1 put")) == 1


def test_a_recording_ends_with_the_process_that_asked_for_it(flow, path, words, eventually, run_python):
    ready, never = fork.Event(), fork.Event()

    def record():
        flow.trace(path)
        flow.state["n"] = 1
        ready.set()
        never.wait()

    process = fork.Process(target=record)
    process.start()
    assert ready.wait(10)
    assert words[W_TRACE]
    process.kill()
    process.join()
    eventually(lambda: not words[W_TRACE])
    flow.state["n"] = 2
    done = run_python("-m", "strictflow_mp.trace", path)
    assert (done.returncode, done.stderr) == (0, "")
    events = checked(path)
    assert done.stdout == f"{len(events)} events\n"
    assert len(named(events, "P1 put")) == 1
    with flow.trace(path):
        flow.state["n"] = 3


def test_an_async_p2_that_outlives_the_recording_has_an_end(flow, path, tmp_path, eventually):
    reached, gate = tmp_path / "reached", tmp_path / "open"

    @read(flow)
    async def outlive():
        reached.touch()
        while not gate.exists():
            await asyncio.sleep(0.001)

    trace = flow.trace(path)
    future = outlive()
    eventually(reached.exists)
    trace.close()
    gate.touch()
    future.result()
    assert len(named(checked(path), "P2 outlive", "e")) == 1


def test_half_a_line_is_dropped_and_nothing_else(path):
    directory = Path(prepare(str(path)))
    for name, last in (("a", '{"ph":"X","na'), ("b", "")):
        part = Part(str(directory), 1000, name, flow="any")
        part.introduce(name, 1)
        part.write(part.slice("gate", "before", 500, 3000, behind=[]), part.event("b", "open", 2000, id="1", cat="P2"))
        del part
        [file] = directory.glob(f"*.{name}")
        file.write_text(file.read_text() + last)
    merge(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    assert [(event["ts"], event["dur"]) for event in named(events, "before")] == [(0.0, 2.0)] * 2
    assert [event["ts"] for event in named(events, "open", "e")] == [2.0]


def test_what_an_earlier_recording_left_is_not_taken_for_this_one(flow, path):
    stale = Path(prepare(str(path))) / "1.loop"
    stale.write_text('{"ph":"X","name":"stale"}\n')
    with flow.trace(path):
        pass
    assert not named(checked(path), "stale")
