"""Whose code runs: that of the process that called it, and never another one's of the same name."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import sys
import textwrap
from importlib.util import source_hash

import pytest

from strictflow_mp import StrictFlow, StrictFlowError, write
from strictflow_mp.coordinator.library import Library
from strictflow_mp.system.place import Place
from strictflow_mp.wire import origins

NAME = "whose"

TASKS = """
from strictflow_mp import StrictFlow, read, write
{imports}
flow = StrictFlow("whose")
RATE = {rate}

@write(flow)
def price(amount):
    flow.state["price"] = amount * {expression}
    return flow.state["price"]

@read(flow)
async def ask(amount):
    return amount * {expression}
"""

MAIN = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import tasks
print(*[task(int(amount)).result(30) for amount in sys.argv[2:] for task in (tasks.price, tasks.ask)])
"""


@pytest.fixture
def flow():
    with StrictFlow(NAME, state={"price": 0}) as flow:
        yield flow


@pytest.fixture
def program(tmp_path, run_python):
    """`program(name, rate, ...)` writes a program of that name, runs it, and returns what it prints."""

    def program(name, rate, *amounts, expression="RATE", imports="", **files):
        write_program(tmp_path / name, rate, expression, imports, **files)
        done = run_python(MAIN, tmp_path / name, *amounts)
        assert done.stderr == ""
        return done.stdout.split()

    return program


def forget_bytecode(folder):
    """Python itself takes a file of the same second and size for the one that it has compiled."""
    for cache in list(folder.rglob("__pycache__")):
        shutil.rmtree(cache)


def write_program(folder, rate, expression="RATE", imports="", **files):
    folder.mkdir(exist_ok=True)
    forget_bytecode(folder)
    (folder / "tasks.py").write_text(TASKS.format(rate=rate, expression=expression, imports=imports))
    for name, text in files.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))


def test_two_programs_with_modules_of_one_name_each_run_their_own(flow, program):
    for _ in range(2):
        assert program("one", 10, 1) == ["10", "10"]
        assert program("other", 99, 1) == ["99", "99"]


def test_code_that_was_deployed_anew_runs_at_once_also_where_only_a_constant_has_changed(flow, program):
    assert program("one", 10, 1) == ["10", "10"]
    assert program("one", 20, 1) == ["20", "20"]


HELPERS = {
    "a function of another module": ("helper.rate()", "import helper", "def rate(): return {}"),
    "a constant of another module": ("LIMIT", "from helper import LIMIT", "LIMIT = {}"),
    "a module that another imports": ("helper.rate()", "import helper", "import deep\ndef rate(): return deep.X"),
    "a base class": (
        "helper.Rate().it()",
        "import helper",
        "class Base:\n    def it(self): return {}\nclass Rate(Base): pass",
    ),
}


@pytest.mark.parametrize("what", HELPERS)
def test_what_a_function_leads_to_counts_as_much_as_its_own_code(flow, program, what):
    expression, imports, helper = HELPERS[what]
    for rate in (3, 4):
        files = {"helper": helper.format(rate), "deep": f"X = {rate}"}
        assert program("one", 0, 5, expression=expression, imports=imports, **files) == [str(5 * rate)] * 2


def test_functions_of_a_package_too(flow, tmp_path, run_python):
    code = MAIN.replace("import tasks", "from shop.orders import tasks")
    for rate in (7, 8):
        folder = tmp_path / "shop" / "orders"
        folder.mkdir(parents=True, exist_ok=True)
        (tmp_path / "shop" / "__init__.py").touch()
        (folder / "__init__.py").touch()
        forget_bytecode(tmp_path)
        (folder / "rates.py").write_text(f"RATE = {rate}")
        (folder / "tasks.py").write_text(TASKS.format(rate=0, expression="rates.RATE", imports="from . import rates"))
        assert run_python(code, tmp_path, 1).stdout.split() == [str(rate)] * 2


def test_a_main_program_is_not_given_another_programs_module(flow, tmp_path, run_python):
    code = """
        import sys
        sys.path.insert(0, sys.argv[1])
        import tool
        from strictflow_mp import StrictFlow, read

        @read(StrictFlow("whose"))
        def look():
            return tool.X

        print(look().result(30))
    """
    for number in (1, 2, 1):
        folder = tmp_path / str(number)
        folder.mkdir(exist_ok=True)
        forget_bytecode(folder)
        (folder / "tool.py").write_text(f"X = {number}")
        assert run_python(code, folder).stdout == f"{number}\n"


def test_a_module_is_looked_for_where_its_process_looks_though_another_comes_first_here(tmp_path, program, monkeypatch):
    write_program(tmp_path / "one", 10)
    monkeypatch.syspath_prepend(tmp_path / "one")
    with StrictFlow(NAME, state={"price": 0}):
        assert program("other", 99, 1) == ["99", "99"]
        assert program("one", 10, 1) == ["10", "10"]


MADE = """
import functools
import helper, prices
from strictflow_mp import StrictFlow, write

flow = StrictFlow("whose")
task = write(flow)({expression})
"""

HELPER = """
import functools

def call(function, *args, **more):
    return function(*args, **more)

def keyword(*args, function):
    return function(*args)

def closed(function):
    def wrapper(*args):
        return function(*args)
    return wrapper

def default(function):
    def wrapper(*args, function=function):
        return function(*args)
    return wrapper

def named(function):
    return functools.wraps(functools.reduce)(closed(function))

class Held:
    def __init__(self, function):
        self.functions = [{"it": function}]
    def __call__(self, *args):
        return self.functions[0]["it"](*args)
    def method(self, *args):
        return self(*args)
    partialmethod = functools.partialmethod(method)
"""

PRICES = """
FACTOR = {factor}
def price(amount, number=1):
    return amount * number * FACTOR
class Prices:
    def price(self, amount):
        return price(amount)
PRICES = Prices()
"""

MADE_OF = {
    "a partial": "functools.partial(prices.price, 1)",
    "a partial of a partial": "functools.partial(functools.partial(prices.price), number=1)",
    "an argument of a partial": "functools.partial(helper.call, prices.price)",
    "a keyword of a partial": "functools.partial(helper.keyword, function=prices.price)",
    "a class": "functools.partial(helper.call, prices.Prices.price, None)",
    "an object": "functools.partial(helper.call, prices.PRICES.price)",
    "an object's attribute": "helper.Held(prices.price)",
    "a method of such an object": "helper.Held(prices.price).method",
    "a partialmethod of such an object": "helper.Held(prices.price).partialmethod",
    "a method of an object of a module": "prices.PRICES.price",
    "a closure": "helper.closed(prices.price)",
    "a default": "helper.default(prices.price)",
    "a wrapper that says that it is another": "helper.named(prices.price)",
    "a wrapper of a wrapper": "functools.wraps(prices.price)(helper.closed(helper.default(prices.price)))",
    "a cache": "functools.lru_cache(prices.price)",
    "a cache of a closure": "functools.cache(helper.closed(functools.partial(prices.price, 1)))",
    "a function of many": "functools.singledispatch(helper.closed(prices.price))",
}


@pytest.mark.parametrize("what", MADE_OF)
def test_what_a_callable_is_made_of_counts_as_much_as_a_function(flow, tmp_path, run_python, what):
    (tmp_path / "helper.py").write_text(HELPER)
    (tmp_path / "tasks.py").write_text(MADE.format(expression=MADE_OF[what]))
    for factor in (10, 99, 99):
        (tmp_path / "prices.py").write_text(PRICES.format(factor=factor))
        forget_bytecode(tmp_path)
        done = run_python("import tasks; print(tasks.task(2).result(30))")
        assert (done.stdout, done.stderr) == (f"{2 * factor}\n", "")


def test_a_partial_whose_module_cannot_travel_by_value_is_refused_and_not_run_with_the_code_of_last_week(
    flow, tmp_path, run_python
):
    (tmp_path / "helper.py").write_text("")
    (tmp_path / "tasks.py").write_text(MADE.format(expression=MADE_OF["a partial"]))
    said = []
    for factor in ("10", "[99, threading.Lock()][0]"):
        (tmp_path / "prices.py").write_text(
            "import threading\nLOCK = threading.Lock()\ndef price(amount, number):\n    with LOCK: return 2 * " + factor
        )
        forget_bytecode(tmp_path)
        run_python("")  # who begins after this one knows that it is younger than the file
        said.append(run_python("import tasks; print(tasks.task(2).result(30))"))
    assert (said[0].stdout, said[0].stderr) == ("20\n", "")
    assert said[1].stdout == ""
    assert f"module 'prices' ({tmp_path / 'prices.py'}) has changed since" in said[1].stderr


def test_what_the_globals_of_a_main_program_are_made_of_counts_too(flow, tmp_path, run_python):
    code = """
        import functools, helper, prices
        from strictflow_mp import StrictFlow, write

        half = functools.partial(helper.call, functools.partial(prices.price, 1))
        kept = {"price": [functools.cache(prices.price)]}

        @write(StrictFlow("whose"))
        def task(number):
            return half(number), kept["price"][0](number)

        del prices
        print(*task(2).result(30))
    """
    (tmp_path / "helper.py").write_text(HELPER)
    for factor in (10, 99):
        (tmp_path / "prices.py").write_text(PRICES.format(factor=factor))
        forget_bytecode(tmp_path)
        done = run_python(code)
        assert (done.stdout, done.stderr) == (f"{2 * factor} {2 * factor}\n", "")


def load(folder, patch):
    """The module `tasks` of a program, as if this process were that."""
    patch.delitem(sys.modules, "tasks", raising=False)
    patch.syspath_prepend(folder)
    return importlib.import_module("tasks")


@pytest.fixture
def _without_tasks():
    yield
    sys.modules.pop("tasks", None)


@pytest.mark.usefixtures("_without_tasks")
def test_while_two_programs_come_at_a_time_the_second_is_told_and_its_next_call_runs(flow, tmp_path, monkeypatch):
    write_program(tmp_path / "one", 10)
    write_program(tmp_path / "other", 99)
    assert load(tmp_path / "one", monkeypatch).price(1).result(30) == 10
    tasks = load(tmp_path / "other", monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr("strictflow_mp.client.introducing.known_of", lambda text: {})  # it has looked before that
        with pytest.raises(StrictFlowError, match="was not called") as failure:
            tasks.price(1).result(30)
    assert tasks.price(1).result(30) == 99
    for part in (tmp_path / "one" / "tasks.py", tmp_path / "other" / "tasks.py", "strictflow-mp reload whose"):
        assert str(part) in str(failure.value)


def test_what_cannot_travel_by_value_is_refused_with_both_files_and_what_to_do(flow, tmp_path, program, run_python):
    program("one", 10, 1)
    write_program(
        tmp_path / "other", 99, expression="LOCKED[0]", imports="import threading; LOCKED = [threading.Lock()]"
    )
    code = """
        import sys
        sys.path.insert(0, sys.argv[1])
        import tasks
        try:
            tasks.price(1)
        except Exception as error:
            print(type(error).__name__, error)
    """
    said = run_python(code, tmp_path / "other").stdout
    assert said.startswith("SerializationError")
    for part in (str(tmp_path / "one" / "tasks.py"), str(tmp_path / "other" / "tasks.py"), "strictflow-mp reload"):
        assert part in said


@pytest.mark.usefixtures("_without_tasks")
def test_an_old_process_still_runs_its_own_code_when_the_next_coordinator_would_load_the_new(
    flow, tmp_path, monkeypatch
):
    folder = tmp_path / "one"
    write_program(folder, 10)
    tasks = load(folder, monkeypatch)
    assert tasks.price(1).result(30) == 10
    pid = flow.stats().coordinator_pid
    os.kill(pid, signal.SIGSTOP)
    future = tasks.price(2)  # on its way to the next one
    write_program(folder, 20)
    os.kill(pid, signal.SIGKILL)
    assert future.result(30) == 20
    assert tasks.price(3).result(30) == 30


@pytest.mark.usefixtures("_without_tasks")
def test_a_path_that_a_process_has_gained_since_it_attached_is_looked_at(flow, tmp_path, monkeypatch):
    assert flow.state["price"] == 0
    folder = tmp_path / "gained"
    write_program(folder, 11)
    tasks = load(folder, monkeypatch)
    assert tasks.price(2).result(30) == 22
    assert is_by_reference(flow, tasks.price)


@pytest.mark.usefixtures("_without_tasks")
@pytest.mark.parametrize("decorator", ["functools.cache", "functools.singledispatch", "inside()"])
def test_a_module_that_is_younger_than_its_process_is_known_whatever_its_tasks_are_made_of(
    flow, tmp_path, monkeypatch, decorator
):
    (tmp_path / "tasks.py").write_text(f"""
import contextlib, functools
from strictflow_mp import StrictFlow, write

@contextlib.contextmanager
def inside():
    yield

@write(StrictFlow("whose"))
@{decorator}
def price(amount):
    return amount * 10
""")
    tasks = load(tmp_path, monkeypatch)
    assert tasks.price(2).result(30) == 20
    assert is_by_reference(flow, tasks.price)


@pytest.mark.usefixtures("_without_tasks")
def test_what_may_have_changed_and_cannot_travel_is_refused_with_its_one_file(flow, tmp_path, monkeypatch):
    (tmp_path / "tasks.py").write_text("import threading\nLOCK = threading.Lock()\ndef f(): return LOCK.locked()\n")
    tasks = load(tmp_path, monkeypatch)
    with pytest.raises(StrictFlowError, match="has changed since it was loaded, or may have") as failure:
        write(flow)(tasks.f)()
    assert str(failure.value).count(str(tmp_path)) == 1


def is_by_reference(flow, task):
    from weakref import ref

    from strictflow_mp.wire.frames import unpack_frame

    attachment = flow._client.attach()
    return unpack_frame(attachment.function_frames[attachment.functions[ref(task)]])[2] is False


def test_the_same_code_goes_by_reference_and_what_the_coordinator_keeps_of_it_is_removed_with_the_flow(flow, program):
    place = Place.of(NAME)
    assert not place.code.exists()
    assert program("one", 10, 1, 2) == ["10", "10", "20", "20"]
    known = origins.known_of(place.code.read_bytes())
    assert known["tasks"][0].endswith("/one/tasks.py")
    flow.stop_loop()
    assert not place.directory.exists()


def test_a_file_that_changed_after_it_was_loaded_is_known_by_nobody(tmp_path, monkeypatch):
    (tmp_path / "loaded_early.py").write_text("def f(): return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("loaded_early")
    try:
        seen = origins.look("loaded_early")
        assert seen is not None
        assert seen.digest == b""  # it is younger than this process, and nobody has looked when it was loaded
        assert origins.stale(origins.modules_of(module.f), {}) == {"loaded_early"}
    finally:
        del sys.modules["loaded_early"]


DEPLOY = """
import os
def deploy(name, old, new):
    with open(os.path.join(os.path.dirname(__file__), name)) as file:
        text = file.read()
    with open(os.path.join(os.path.dirname(__file__), name), "w") as file:
        file.write(text.replace(old, new))
"""


@pytest.mark.parametrize("changed", ["tasks.py", "helper.py"])
def test_a_deploy_amid_an_import_is_noticed(changed, flow, program):
    # The file changes when it has been read, and before the first task is decorated.
    imports = f"import helper\nfrom deploying import deploy\ndeploy({changed!r}, 'X = 10', 'X = 1000')\nX = 10"
    files = {"helper": "X = 10", "deploying": DEPLOY}
    assert program("one", 0, 1, expression="(X + helper.X)", imports=imports, **files) == ["20", "20"]


def test_what_is_deployed_while_a_coordinator_imports_it_is_not_taken_for_what_it_has(tmp_path, monkeypatch):
    folder = tmp_path / "one"
    write_program(folder, 10)
    deployed = (folder / "tasks.py").read_text()
    (folder / "tasks.py").write_text(f"with open(__file__, 'w') as file: file.write({deployed!r})\nRATE = 5\n")
    library = Library(NAME, Place.of(NAME))
    digest = source_hash(deployed.encode())
    entries = (("tasks", str(folder / "tasks.py"), digest),)
    try:
        with library.loading(entries, [str(folder)]):
            assert importlib.import_module("tasks").RATE == 5
        assert source_hash((folder / "tasks.py").read_bytes()) == digest
        assert "has changed since" in library.compare(entries)
    finally:
        sys.modules.pop("tasks", None)


def test_a_digest_is_that_of_the_source_wherever_the_bytecode_is(tmp_path, run_python):
    code = """
        import sys
        sys.path.insert(0, sys.argv[1])
        sys.dont_write_bytecode = len(sys.argv) > 2
        import tasks
        from strictflow_mp.wire.origins import entries_of, modules_of
        print(entries_of(modules_of(tasks.price)))
    """
    write_program(tmp_path / "one", 10)
    said = [run_python(code, tmp_path / "one", *more).stdout for more in ((), ("without",), ())]
    shutil.rmtree(tmp_path / "one" / "__pycache__")
    said.append(run_python(code, tmp_path / "one").stdout)
    assert len(set(said)) == 1
    assert "tasks.py" in said[0]


def test_functions_of_the_standard_library_and_of_installed_packages_are_taken_by_their_names():
    assert origins.modules_of(os.path.exists) == {}
    assert origins.modules_of(abs) == {}

    def nested():
        return os.path.exists(pytest.__file__)

    assert origins.modules_of(nested).keys() == {__name__}
