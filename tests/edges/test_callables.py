"""Tasks made of whatever can be called: they work, or say why not, at once; in SF-LOOP as in the calling process."""

from __future__ import annotations

import asyncio
import functools

import pytest

from strictflow_mp import StrictFlow, read, write


async def plain(value):
    await asyncio.sleep(0)
    return value


def same(value):
    return value


def wrapped(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)

    return wrapper


def hidden(function):
    def wrapper(*args):
        return function(*args)

    return wrapper


class Called:
    def __call__(self, value):
        return value


class CalledAsync:
    async def __call__(self, value):
        await asyncio.sleep(0)
        return value

    async def method(self, value):
        await asyncio.sleep(0)
        return value


CALLABLES = {
    "async def": plain,
    "wraps": wrapped(plain),
    "hidden": hidden(plain),
    "partial": functools.partial(plain),
    "partial of partial": functools.partial(functools.partial(hidden(plain))),
    "object": Called(),
    "async object": CalledAsync(),
    "async method": CalledAsync().method,
    "staticmethod": staticmethod(plain),
    "builtin": abs,
    "cache": functools.cache(same),
    "lru_cache": functools.lru_cache(2, typed=True)(hidden(same)),
    "partial of cache": functools.partial(functools.cache(same)),
    "singledispatch": functools.singledispatch(same),
}


@pytest.mark.parametrize("name", CALLABLES)
@pytest.mark.parametrize("where", ["loop", "worker"])
def test_they_give_what_the_function_returns(name, where):
    with StrictFlow() as flow:
        look = read(flow, where=where)(CALLABLES[name])
        assert look(7).result(30) == 7
        if name != "builtin":
            assert write(flow)(CALLABLES[name])(8).result(30) == 8

        async def ask():
            return await look(9), await asyncio.gather(look(1), look(2))

        assert asyncio.run(ask()) == (9, [1, 2])


def test_a_hidden_coroutine_reads_one_version_and_may_fail():
    with StrictFlow(state={"n": 0}) as flow:

        @read(flow, where="worker")
        @hidden
        async def look(fail):
            before = flow.state["n"]
            await asyncio.to_thread(lambda: flow.put("n", before + 1).result(30))
            if fail:
                raise LookupError("as asked")
            return before, flow.state["n"]

        assert look(False).result(30) == (0, 0)
        with pytest.raises(LookupError, match="as asked"):
            look(True).result(30)
        assert flow.state["n"] == 2


FUNCTOOLS = """
import functools
from strictflow_mp import StrictFlow, write

@functools.cache
def fib(n):
    return n if n < 2 else fib(n - 1) + fib(n - 2)

@functools.lru_cache(maxsize=5, typed=True)
def over(n):
    return n + OFFSET

over.tag = "added"
OFFSET = 3

class Own:
    pass

@functools.singledispatch
def kind(what):
    return "any"

@kind.register(Own)
def _(what):
    return "own"

@kind.register(list)
def _(what):
    return [kind(one) for one in what]

class Counted:
    counted = 0

    @functools.cached_property
    def once(self):
        self.counted += 1
        return self.counted

    @functools.lru_cache
    def method(self, n):
        return n

    @functools.singledispatchmethod
    def kind(self, what):
        return "any"

    @kind.register
    def _(self, what: int):
        return "int"

    half = functools.partialmethod(method, 7)
"""

USED = {
    "fib(30), fib.cache_info().misses": (832040, 31),
    "over(1), over.cache_info().misses, over.cache_info().hits": (4, 1, 0),
    "over.cache_parameters(), over.tag, over.__name__": ({"maxsize": 5, "typed": True}, "added", "over"),
    "kind(Own()), kind([1, Own(), [Own()]]), kind.tag": ("own", ["any", "own", ["own"]], "added"),
    "counted.once, counted.once, counted.method(1), counted.half()": (1, 1, 1, 7),
    "counted.kind(1), counted.kind('')": ("int", "any"),
}


def test_what_functools_makes_in_a_main_program_is_there_in_its_tasks(run_python):
    code = (
        FUNCTOOLS
        + f"""
kind.tag = "added"
counted = Counted()
over(1)  # what is kept here stays here
with StrictFlow() as flow:
    for expression in {list(USED)}:
        print(eval(f"write(flow)(lambda: [{{expression}}])().result(30)"))
    for function, value in ((fib, 10), (over, 10), (kind, [1])):
        print(write(flow)(function)(value).result(30))
"""
    )
    done = run_python(code)
    assert done.stderr == ""
    *used, cached, evicting, dispatched = map(eval, done.stdout.splitlines())
    assert dict(zip(USED, map(tuple, used), strict=True)) == USED
    assert (cached, evicting, dispatched) == (55, 13, ["any"])


def test_one_cache_stays_one_wherever_a_function_comes_past_it():
    calls = []

    def count(n):
        calls.append(n)
        return len(calls) + (again(n - 1) if n else 0)

    again = functools.cache(count)
    with StrictFlow() as flow:

        @write(flow)
        def task():
            return again(2), again(2), again is count.__closure__[0].cell_contents, len(calls)

        assert task().result(30) == (6, 6, True, 3)
    assert calls == []


def generator():
    yield 1


async def async_generator():
    yield 1


@pytest.mark.parametrize("function", [generator, async_generator, functools.partial(generator)])
def test_generators_are_refused_at_once(function):
    flow = StrictFlow("never-started")
    for decorate in (write(flow), read(flow), read(flow, where="worker")):
        with pytest.raises(TypeError, match=r"is a generator.*return a list"):
            decorate(function)


@pytest.mark.parametrize("function", [generator, async_generator])
def test_hidden_generators_are_refused(function):
    with StrictFlow() as flow, pytest.raises(TypeError, match=r"is a generator.*return a list"):
        read(flow, where="worker")(hidden(function))().result(30)


def test_methods_are_refused_and_static_ones_work():
    with StrictFlow(state={"n": 0}) as flow:

        class Service:
            @write(flow)
            def method(self, n):
                return n

            @classmethod
            @write(flow)
            def of_class(cls, n):
                return n

            @staticmethod
            @write(flow)
            def inner(n):
                return n

            @write(flow)
            @staticmethod
            def outer(n):
                return n

            borrowed = write(flow)(abs)

        service = Service()
        with pytest.raises(TypeError, match=r"method\(\) is a task and cannot be a method.*staticmethod"):
            service.method(1)
        with pytest.raises(TypeError, match="of_class"):  # from Python 3.13 on nobody asks the task for a method
            Service.of_class(1).result(30)
        for task in (service.inner, Service.inner, service.outer, Service.outer, service.borrowed, Service.borrowed):
            assert task(1).result(30) == 1


def test_what_a_worker_side_read_has_started_reads_on_when_that_has_ended():
    with StrictFlow(state={"n": 0}) as flow:
        ended = asyncio.Event()

        async def outlive():
            seen = [flow.state["n"], len(flow.state)]
            await ended.wait()
            flow.state["n"] += 1
            return [*seen, flow.state["n"], len(list(flow.state)), flow.state.get("m")]

        async def run():
            started = []

            @read(flow, where="worker")
            async def look():
                started.append(asyncio.ensure_future(outlive()))
                await asyncio.sleep(0)
                return flow.state["n"]

            assert await look() == 0
            await flow.put("m", 5)
            ended.set()
            return await started[0]

        assert asyncio.run(run()) == [0, 1, 1, 2, 5]
