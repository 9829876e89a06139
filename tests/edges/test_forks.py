"""Forks: in a task, by C, beside other threads. A child is a process of its own, and does nothing of its parent's."""

from __future__ import annotations

import ast
import asyncio
import ctypes
import multiprocessing
import os
import secrets
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import strictflow_mp
from strictflow_mp import ReadOnlyState, StrictFlow, StrictFlowError, read, write
from strictflow_mp.client import registry
from strictflow_mp.flow.late import OPTIONAL
from strictflow_mp.memory.segment import W_SUSPECT, Segment
from strictflow_mp.memory.suspect import Marker
from strictflow_mp.system import forks
from strictflow_mp.system.identity import Identity

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

FORKS = ["python", "c"]
STILL_RUNNING_SECONDS = 30
"""After which a child that hangs is killed: then its test fails."""


def fork(how: str) -> int:
    """Fork; a child that hangs ends by SIGALRM."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork() if how == "python" else fork_in_c()
    if pid == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(STILL_RUNNING_SECONDS)
    return pid


def fork_in_c() -> int:
    """Fork as C code does, at an instant at which no other thread has asked for the GIL.

    Who gives it up when another thread has asked for it waits in C until that has it: in a child, where that thread is
    not, for ever (CPython's ``drop_gil``). No library can help that; `os.fork` does.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(STILL_RUNNING_SECONDS)
    time.sleep(2 * interval)  # who waits already asks once more, at the latest when the former interval is over
    try:
        return int(ctypes.PyDLL(None).fork())
    finally:
        sys.setswitchinterval(interval)


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_in_child(how: str, function: Callable[[], object]) -> int:
    """Call a function in a forked child; return the child's pid."""
    pid = fork(how)
    if pid:
        return pid
    code = 1
    try:
        function()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def in_child(how: str, function: Callable[[], object]) -> None:
    """Call a function in a forked child, and wait for it."""
    assert exit_code(run_in_child(how, function)) == 0


# Children of tasks

tasks = StrictFlow("children-of-tasks", state={"n": 0}, max_workers=8)


ENDS = {"returns": 0, "raises": 1, "exits": 3}


def come_back(how: str, end: str) -> int:
    """Fork. The child comes back as *end* says; the parent returns its exit code."""
    pid = fork(how)
    if pid:
        return exit_code(pid)
    if end == "raises":
        raise ValueError("in the child")
    if end == "exits":
        raise SystemExit(ENDS[end])
    return -1


@write(tasks)
def p1(how, end):
    tasks.state["n"] += 1
    return come_back(how, end)


@write(tasks, timeout=60)
def timed_p1(how, end):
    tasks.state["n"] += 1
    return come_back(how, end)


@write(tasks)
async def async_p1(how, end):
    tasks.state["n"] += 1
    await asyncio.sleep(0)
    return come_back(how, end)


@write(tasks, key="n")
def keyed_p1(n, how, end):
    return n + 1 if come_back(how, end) >= 0 else -1000


@read(tasks)
def p2(how, end):
    return come_back(how, end)


@read(tasks, timeout=60)
def timed_p2(how, end):
    return come_back(how, end)


@read(tasks)
async def async_p2(how, end):
    await asyncio.sleep(0)
    code = come_back(how, end)
    await asyncio.sleep(0)
    return code


@read(tasks, timeout=60)
async def timed_async_p2(how, end):
    await asyncio.sleep(0)
    code = come_back(how, end)
    await asyncio.sleep(0)
    return code


@pytest.fixture
def flow():
    with tasks:
        yield tasks


KINDS = [p1, timed_p1, async_p1, keyed_p1, p2, timed_p2, async_p2, timed_async_p2]


@pytest.mark.parametrize("how", FORKS)
@pytest.mark.parametrize("task", KINDS, ids=lambda task: task.name)
def test_a_child_that_comes_back_from_a_task_is_ended_and_nothing_else_happens(flow, task, how):
    pid = flow.stats().coordinator_pid
    codes = [task(how, end).result() for end in ENDS]
    if task is not keyed_p1:
        assert codes == list(ENDS.values())
    assert flow.state["n"] == (len(ENDS) if "p1" in task.name else 0)
    flow.put("n", 10).result()
    assert flow.state["n"] == 10
    assert (flow.stats().coordinator_pid, flow.stats().restarts) == (pid, 0)


@pytest.mark.parametrize("how", FORKS)
def test_other_async_tasks_are_not_continued_in_a_child_that_comes_back(flow, tmp_path, how):
    log = tmp_path / "log"

    @read(flow)
    async def other():
        while not (tmp_path / "end").exists():
            await asyncio.sleep(0)
            with open(log, "a") as file:
                file.write(f"{os.getpid()}\n")

    others = [other() for _ in range(3)]
    for _ in range(3):
        assert async_p2(how, "returns").result() == 0
    (tmp_path / "end").touch()
    for future in others:
        future.result()
    assert set(log.read_text().split()) == {str(flow.stats().coordinator_pid)}


def outlive(flow, ended):
    """In a child of a task: look until the state is as it is to be, and say so in it."""
    while flow.state["n"] < 5:
        pass
    with flow.snapshot() as snapshot:
        assert snapshot["n"] >= 5
    assert flow.peek("n") >= 5
    flow.state[ended] = "seen"


@pytest.mark.parametrize("task", [write, read])
def test_a_process_that_a_task_has_forked_is_like_any_other(flow, task, eventually):
    @task(flow)
    def start():
        process = multiprocessing.get_context("fork").Process(target=outlive, args=(flow, "by multiprocessing"))
        process.start()

    start().result()
    for _ in range(6):
        p1("python", "returns").result()
    eventually(lambda: flow.state.get("by multiprocessing") == "seen")


@pytest.mark.parametrize("how", FORKS)
def test_a_child_never_reads_what_its_parent_has_not_committed(flow, how, eventually):
    @write(flow)
    def start():
        flow.state["n"] = 99
        run_in_child(
            how, lambda: flow.put("seen", (flow.state["n"], flow.peek("n"), dict(flow.snapshot())["n"])).result()
        )
        raise ValueError("rolled back")

    with pytest.raises(ValueError, match="rolled back"):
        start().result()
    assert eventually(lambda: flow.state.get("seen")) == (0, 0, 0)


@pytest.mark.parametrize("how", FORKS)
def test_a_change_of_the_state_in_a_child_is_none_of_the_task_and_is_refused(flow, how, eventually):
    def child(inherited):
        for change in (lambda: flow.state.update(n=1), lambda: flow.state.__delitem__("n")):
            with pytest.raises(ReadOnlyState, match="a child that a task forked"):
                change()
        for use in (lambda: inherited[0].result(0), inherited[0].cancel, lambda: inherited[1]["n"]):
            with pytest.raises(StrictFlowError, match="belongs to the parent"):
                use()
        assert flow._inside is None
        assert flow.stats().coordinator_pid == os.getppid()
        flow.put("from the child", p1.__name__).result()
        assert flow.state["n"] == 7

    @read(flow)
    def start():
        inherited = flow.put("n", 7), flow.snapshot()
        run_in_child(how, lambda: child(inherited))

    start().result()
    assert eventually(lambda: flow.state.get("from the child")) == "p1"
    assert flow.state["n"] == 7


def test_a_child_of_a_task_is_ended_by_a_signal_that_comes_as_soon_as_it_is_forked(flow):
    @read(flow)
    def fork_and_end():
        codes = []
        for _ in range(300):
            pid = os.fork()
            if not pid:
                time.sleep(20)
                os._exit(7)
            os.kill(pid, signal.SIGTERM)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        return set(codes)

    assert fork_and_end().result() == {-signal.SIGTERM}


def test_a_pool_in_a_task_computes_and_can_be_terminated(flow):
    @read(flow)
    def compute():
        with multiprocessing.get_context("fork").Pool(2) as pool:  # ends by SIGTERM
            return pool.map(abs, [-1, -2, -3])

    assert compute().result() == [1, 2, 3]


@pytest.mark.parametrize("how", FORKS)
def test_a_child_stores_nothing_where_its_parent_says_what_runs(how):
    segment = Segment.create(secrets.token_hex(6), "marks", capacity=1 << 20, slots=2, identity=Identity.mine())
    try:
        ended = []
        marker = Marker(segment, lambda: ended.append(True) or os._exit(9))
        marker.mark(1, 5)
        before = segment.words[W_SUSPECT]
        for store in (
            marker.clear,
            marker.unlimit,
            marker.stay,
            lambda: marker.mark(1, 6),
            lambda: marker.mark_loading(1, 6),
        ):
            assert exit_code(run_in_child(how, store)) == 9
        assert segment.words[W_SUSPECT] == before
        assert not ended
    finally:
        segment.unlink()
        segment.close()


# Forks that Python does not know of


@pytest.fixture(params=["a page", "pids"])
def mark(request, monkeypatch):
    """How a process finds out: by a page that the kernel empties, or by its pid."""
    monkeypatch.setattr(forks, "mark", forks.new_mark() if request.param == "a page" else forks._PidMark())


@pytest.fixture
def state(mark):
    with StrictFlow(state={"n": 1, "big": "x" * 100_000}, max_workers=8) as flow:
        assert flow.state["n"] == 1
        yield flow


def slot_of(flow):
    return flow._client.attach().slot


@pytest.mark.parametrize("how", FORKS)
@pytest.mark.parametrize(
    "use",
    [
        lambda flow: flow.put("n", 2).result(),
        lambda flow: write(flow, key="n")(lambda n: n + 1)().result(),
        lambda flow: flow.state.update(n=2),
        lambda flow: flow.stats(),
        lambda flow: flow.peek("n"),
        lambda flow: flow.state["big"],
        lambda flow: dict(flow.snapshot()),
        lambda flow: asyncio.run(enter(flow)),
        lambda flow: flow.watch("n").close(),
        lambda flow: flow.close(),
        lambda flow: flow.stop_loop(),
        lambda flow: flow.__exit__(None, None, None),
        lambda flow: read(flow, where="worker")(lambda: flow.state["n"])().result(),
    ],
)
def test_a_child_takes_nothing_of_its_parents_whoever_forked_it(state, use, how):
    mine = slot_of(state)

    def child():
        use(state)
        assert slot_of(state) != mine
        assert state.put("n", 5).result() is None
        assert state.state["n"] == 5

    in_child(how, child)
    assert state.state["n"] == 5
    state.put("n", 6).result()
    assert state.state["n"] == 6
    assert slot_of(state) == mine


async def enter(flow):
    async with flow.snapshot() as snapshot:
        assert snapshot["big"]


@pytest.mark.parametrize("how", FORKS)
def test_children_of_children_see_their_own_writes(state, how):
    def work(depth):
        for number in range(30):
            state.put(str(os.getpid()), number)
            assert state.state[str(os.getpid())] == number
        if depth:
            first, second = (run_in_child(how, lambda: work(depth - 1)) for _ in range(2))
            assert (exit_code(first), exit_code(second)) == (0, 0)

    work(2)


@pytest.mark.parametrize("how", FORKS)
def test_what_is_inherited_says_that_it_is_the_parents(state, how):
    future, snapshot = state.put("n", 2), state.snapshot()
    assert snapshot["n"] in (1, 2)

    def child():
        assert state.state["n"] == 2
        for use in (lambda: snapshot["n"], future.result, future.cancel, lambda: future.add_done_callback(print)):
            with pytest.raises(StrictFlowError, match="belongs to the parent"):
                use()

    in_child(how, child)
    assert future.result() is None


def test_a_read_of_an_unchanged_value_is_right_in_a_child_before_it_has_found_out(state):
    def child():
        assert state.state["n"] in (1, 2)
        while state.state["n"] != 2:
            pass

    pid = run_in_child("c", child)
    state.put("n", 2).result()
    assert exit_code(pid) == 0


def test_a_child_that_c_forked_may_fork_as_python_does_and_end_as_python_does(run_python):
    program = """
        import ctypes, multiprocessing, os, sys, signal
        from strictflow_mp import StrictFlow
        flow = StrictFlow("by-c", state={"n": 1})
        flow.start_loop()
        assert flow.state["n"] == 1
        pid = ctypes.PyDLL(None).fork()
        if pid == 0:
            signal.alarm(30)
            if sys.argv[1] == "fork":
                process = multiprocessing.get_context("fork").Process(target=flow.put("n", 2).result)
                process.start(), process.join()
            sys.exit(0)  # with all that is done at the exit
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        coordinator = flow.stats().coordinator_pid
        os.kill(coordinator, signal.SIGKILL)  # does its owner still watch it?
        flow.put("n", 3).result()
        assert flow.state["n"] == 3 and flow.stats().coordinator_pid != coordinator
        flow.stop_loop()
        sys.exit(code)
    """
    for how in ("fork", "end"):
        ended = run_python(program, how)
        assert ended.returncode == 0, ended.stderr


def test_threads_of_a_child_find_out_together(state):
    def child():
        mine, barrier, slots = slot_before, threading.Barrier(4), []

        def work():
            barrier.wait()
            state.update({"n": 1})
            slots.append(slot_of(state))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(slots)) == 1
        assert mine not in slots

    slot_before = slot_of(state)
    in_child("c", child)


# Forks beside other threads


def test_a_fork_waits_for_the_import_that_another_thread_has_begun(run_python):
    program = """
        import os, signal, sys, threading, time
        import warnings
        from importlib.machinery import PathFinder
        from strictflow_mp import StrictFlow
        import strictflow_mp.wire

        warnings.simplefilter("ignore")  # of a fork beside threads
        begun, go_on = threading.Event(), threading.Event()

        class Slow:  # imports a module in two steps
            def find_spec(self, name, path, target=None):
                if name != "strictflow_mp.wire.handshake":
                    return None
                spec = PathFinder.find_spec(name, path)
                execute = spec.loader.exec_module
                spec.loader.exec_module = lambda module: (begun.set(), go_on.wait(20), execute(module))
                return spec

        def let_it_go_on():
            while True:  # when this thread waits for the import, or has forked
                frame = sys._current_frames()[threading.main_thread().ident]
                inside = set()
                while frame is not None:
                    inside.add(frame.f_code.co_name)
                    frame = frame.f_back
                if "import_module" in inside or forked.is_set():
                    break
                time.sleep(0.001)
            go_on.set()

        forked = threading.Event()
        flow = StrictFlow(sys.argv[1])
        sys.meta_path.insert(0, Slow())
        first = threading.Thread(target=lambda: flow.state["n"])
        first.start()
        begun.wait()
        helper = threading.Thread(target=let_it_go_on)
        helper.start()
        pid = os.fork()
        if pid == 0:
            signal.alarm(10)
            os._exit(0 if flow.state["n"] == 1 else 1)
        forked.set()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        helper.join(), first.join()
        sys.exit(0 if code == 0 else 3)
    """
    with StrictFlow(state={"n": 1}) as flow:
        ended = run_python(program, flow.name)
        assert ended.returncode == 0, ended.stderr


def imports_within_functions(room: Path) -> Iterator[str]:
    """The modules that a room imports when they are needed."""
    for path in sorted(room.rglob("*.py")):
        package = ("strictflow_mp", *path.relative_to(Path(strictflow_mp.__file__).parent).parent.parts)
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.Import):
                    yield from (alias.name for alias in node.names)
                elif isinstance(node, ast.ImportFrom):
                    above = package[: len(package) - node.level + 1] if node.level else ()
                    yield ".".join([*above, *filter(None, [node.module])])


def test_all_that_the_library_imports_late_is_imported_before_a_fork(run_python):
    program = """
        import os, sys
        from strictflow_mp import StrictFlow
        flow = StrictFlow("late")
        pid = os.fork()
        if pid:
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        print(*sys.modules, flush=True)
        os._exit(0)
    """
    ended = run_python(program)
    assert ended.returncode == 0, ended.stderr
    root = Path(strictflow_mp.__file__).parent
    rooms = ("client", "flow", "memory", "store", "system", "values", "wire")
    late = {name for room in rooms for name in imports_within_functions(root / room)}
    assert {"asyncio", "strictflow_mp.wire.handshake"} < late, "found are those that we know of"
    assert late - set(ended.stdout.split()) <= set(OPTIONAL)


def test_no_use_of_a_flow_imports_anything_after_a_fork(run_python):
    program = """
        import os, sys
        from strictflow_mp import StrictFlow, read, write, setup_logging
        flow = StrictFlow(sys.argv[1])
        pid = os.fork()
        if pid:
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        import asyncio
        before = set(sys.modules)
        flow.state["n"] = 1
        flow.update({"a": 1}).result(), flow.delete("a").result()
        assert flow.state["n"] == flow.peek("n") == dict(flow.snapshot())["n"] == 1
        write(flow)(lambda: None)().result()
        read(flow)(lambda: None)().result()
        read(flow, where="worker")(lambda: None)().result()
        async def look():
            async with flow.snapshot() as snapshot:
                await flow.put("n", 2)
        asyncio.run(look())
        flow.watch("n").close()
        flow.stats()
        with flow.trace(sys.argv[2]):
            flow.put("n", 3).result()
        flow.spawn(print, "").join()
        try:
            flow.delete("absent").result()
        except KeyError:
            pass
        flow.close()
        new = set(sys.modules) - before
        print(*sorted(new), file=sys.stderr)
        os._exit(1 if new else 0)
    """
    with StrictFlow(state={"n": 0}) as flow:
        ended = run_python(program, flow.name, "trace.json")
        assert ended.returncode == 0, ended.stderr


def test_no_lock_of_ours_stays_taken_in_a_child(flow):
    locks = [flow._starting, flow._client._attaching, flow._client.attach().submitting]
    locks += [
        flow._client.attach().starting_server,
        registry._registering,
    ]
    taken, end = threading.Barrier(2), threading.Event()

    def hold():
        for lock in locks:
            lock.acquire()
        taken.wait()
        end.wait()
        for lock in reversed(locks):
            lock.release()

    def child():
        assert flow.put("n", 2).result() is None
        with pytest.raises(StrictFlowError, match="lives"):
            flow.start_loop()
        assert StrictFlow(tasks.name).state["n"] == 2
        flow.close()
        flow.__exit__(None, None, None)

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    try:
        in_child("python", child)
    finally:
        end.set()
        thread.join()


def test_threads_that_fork_at_a_time_leave_one_watcher_of_the_coordinator(flow):
    watcher = flow._owner._watcher
    for stand_aside in (watcher.stand_aside,) * 2:
        stand_aside()  # both are about to fork
    watcher.start()
    watcher.start()  # both have forked
    assert [thread.name for thread in threading.enumerate()].count("strictflow-owner") == 1


@pytest.mark.once
def test_a_fork_beside_the_first_read_of_an_array_hangs_nobody(run_python):
    """NumPy is imported when it is first needed, and that takes long: at each instant of it another thread forks."""
    with StrictFlow("arrays-and-forks", state={"row": np.arange(5)}):
        code = """
            import faulthandler, os, sys, threading, time, warnings
            warnings.simplefilter("ignore")
            from strictflow_mp import StrictFlow
            flow = StrictFlow("arrays-and-forks")
            reader = threading.Thread(target=lambda: flow.state["row"])
            reader.start()
            time.sleep(float(sys.argv[1]))
            pid = os.fork()
            if pid == 0:
                faulthandler.dump_traceback_later(30, exit=True)
                assert flow.state["row"].tolist() == [0, 1, 2, 3, 4]
                os._exit(0)
            reader.join()
            print(os.waitpid(pid, 0)[1])
        """
        for milliseconds in (1, 3, 10, 20, 30, 60):
            done = run_python(code, milliseconds / 1000)
            assert done.stdout == "0\n", done.stderr
