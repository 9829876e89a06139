"""Functions: whatever can be called can be a task, wherever it is defined."""

from __future__ import annotations

import functools
import os
import threading

import pytest

from strictflow_mp import SerializationError, StrictFlow, read, write

by_name = StrictFlow("functions", state={"n": 1})
OFFSET = 100


@write(by_name)
def module_level(n):
    by_name.state["n"] += n
    return by_name.state["n"], __name__, os.getpid()


@read(by_name)
def countdown(n):
    if n:
        countdown(n - 1)
    else:
        record("end")


@write(by_name)
def record(what):
    by_name.state[what] = OFFSET


def plain(n):
    return n + OFFSET


class Callable:
    def __init__(self, n):
        self.n = n

    def __call__(self, n):
        return self.n + n

    def method(self, n):
        return self.n * n

    @staticmethod
    def static(n):
        return -n


@pytest.fixture
def flow():
    with by_name:
        yield by_name


def test_a_module_level_function_travels_by_reference(flow):
    pid = flow.stats().coordinator_pid
    assert module_level(2).result() == (3, __name__, pid)
    assert module_level(n=2).result()[0] == 5


def test_a_task_submits_itself(flow, eventually):
    countdown(20).result()
    assert eventually(lambda: flow.peek("end", default=None)) == OFFSET


def test_any_callable_can_be_a_task(flow):
    base = 10

    def nested(n):
        return base + n

    def recursive(n):
        return n and n + recursive(n - 1)

    functions = {
        "nested": (nested, 12),
        "recursive": (recursive, 3),
        "lambda": (lambda n: n * base, 20),
        "module level": (plain, 102),
        "partial": (functools.partial(pow, 3), 9),
        "built-in": (abs, 2),
        "instance": (Callable(5), 7),
        "bound method": (Callable(5).method, 10),
        "static method": (Callable.static, -2),
        "a function that uses another module's globals": (
            lambda n: (plain(n), os.path.basename("a/b")),
            (102, "b"),
        ),
    }
    for name, (function, expected) in functions.items():
        for decorate in (write, read):
            assert decorate(flow)(function)(2).result() == expected, name
        assert read(flow, where="worker")(function)(2).result() == expected, name


def test_a_function_that_cannot_travel_is_refused_at_the_call_and_harms_nobody(flow):
    lock = threading.Lock()

    @write(flow)
    def locked():
        with lock:
            pass

    for _ in range(2):
        with pytest.raises(SerializationError, match=r"locked\(\)") as caught:
            locked()
        assert (caught.value.flow, caught.value.path) == ("functions", "locked")
    assert module_level(1).result()[0] == 2


MAIN = """
import os, sys
from strictflow_mp import StrictFlow, read, write

flow = StrictFlow("main", state={"n": 1})
offset = 5

class Refused(Exception):
    def __init__(self, n):
        super().__init__(n)
        self.n = n

class Point:
    def __init__(self, x):
        self.x = x
    def doubled(self):
        return Point(2 * self.x)

@write(flow)
def add(n):
    flow.state["n"] += Point(n).doubled().x + offset
    if n == 3:
        raise Refused(n)
    if n > 0:
        later(n - 1)
    return flow.state["n"]

@write(flow)
def later(n):
    flow.state["later"] = n

@read(flow)
async def look():
    return flow.state["n"], flow.state["later"]

def worker(number, text):
    add(1).result()
    print("worker", number, text, offset, __name__ != "__main__")

def main():
    with flow:
        assert add(2).result() == 1 + 4 + 5
        assert look().result() == (10, 1)
        try:
            add(3).result()
        except Refused as error:
            assert (type(error), error.n) == (Refused, 3)
        else:
            raise AssertionError
        assert write(flow)(lambda: offset)().result() == 5
        assert read(flow, where="worker")(lambda: flow.state["n"])().result() == 10
        group = flow.spawn(worker, "hello")
        group.join()
        assert group.exitcodes == [0], group.exitcodes
        assert flow.state["n"] == 17
    print("done", __name__)

if __name__ == "__main__" or __name__ == "fake":
    main()
"""


def check(ran, name="__main__"):
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines()[-1] == f"done {name}"
    assert "worker 1 hello 5" in ran.stdout


def test_they_work_in_a_script(run_python, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(MAIN)
    check(run_python(script))


def test_they_work_in_python_dash_c(run_python):
    check(run_python(MAIN))


def test_they_work_in_a_module_that_is_run(run_python, tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("print('imported')\n")
    (package / "tool.py").write_text(MAIN)
    check(run_python("-m", "package.tool"))


def test_they_work_in_a_notebook(run_python):
    cells = f"""
        import sys, types
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        for number, cell in enumerate({MAIN!r}.split("\\n\\n")):
            exec(compile(cell, f"<ipython-input-{{number}}>", "exec"), main.__dict__)
    """
    check(run_python(cells))


def test_a_function_defined_anew_under_its_name_is_the_new_one(flow):
    for n in range(3):

        @write(flow)
        def cell():
            return n  # noqa: B023

        assert cell().result() == n


def test_they_work_in_a_spawned_child_of_a_script(run_python, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        MAIN.replace("if __name__ ==", "def child():\n" + SPAWNED + "\nif 0 and __name__ ==")
        + """
if __name__ == "__main__":
    import multiprocessing
    with flow:
        for method in ("spawn", "forkserver", "fork"):
            process = multiprocessing.get_context(method).Process(target=child)
            process.start()
            process.join()
            assert process.exitcode == 0, (method, process.exitcode)
        assert flow.state["n"] == 1 + 3 * 9
    print("done")
"""
    )
    ran = run_python(script)
    assert (ran.returncode, ran.stderr, ran.stdout) == (0, "", "done\n")


SPAWNED = """
    n = flow.state["n"]
    assert add(2).result() == n + 9
    try:
        add(3).result()
    except Refused as error:
        assert type(error) is Refused
    assert write(flow)(lambda: offset)().result() == 5
    assert look().result() == (n + 9, 1)
"""


def test_a_module_found_by_a_path_that_only_the_caller_has_is_imported_there(flow, tmp_path, monkeypatch):
    (tmp_path / "late_module.py").write_text("FACTOR = 3\ndef triple(n):\n    return FACTOR * n\n")
    monkeypatch.syspath_prepend(tmp_path)
    import late_module

    assert write(flow)(late_module.triple)(2).result() == 6
