"""Whatever a task raises reaches its future, or a `TaskFailed` that says what it was; it ends nothing else."""

from __future__ import annotations

import asyncio
import builtins
import dataclasses
import gc
import os
import sys
import weakref
from concurrent.futures import CancelledError

import pytest

from strictflow_mp import StrictFlow, StrictFlowError, TaskCrashed, TaskFailed, TaskTimeout, read, write
from strictflow_mp.wire.failures import type_of, words_of


class NoAttribute(Exception):
    """As many client libraries have it: what the server said can be had as attributes; KeyError where there is none."""

    def __init__(self, message, payload):
        super().__init__(message)
        self.payload = payload

    def __getattr__(self, name):
        return self.__dict__["payload"][name]


class Unprintable(Exception):
    def __str__(self):
        raise SystemExit("in __str__")

    __repr__ = __str__


class ExitsWhenRebuilt(Exception):
    def __init__(self, text, *more):
        super().__init__(text)
        if not more:
            sys.exit("usage: ExitsWhenRebuilt(text, more)")


class InterruptsWhenPickled(Exception):
    def __reduce__(self):
        raise KeyboardInterrupt


class EqualToNothing(Exception):
    def __eq__(self, other):
        raise SystemExit

    __hash__ = None


class Shouting(type):
    @property
    def __name__(cls):
        raise SystemExit


class NamedByAnother(Exception, metaclass=Shouting):
    pass


class Uncarried(Exception):
    def __setattr__(self, name, value):
        raise TypeError(f"{type(self).__name__} is immutable")


@dataclasses.dataclass(frozen=True)
class FrozenWithSlots(Exception):
    __slots__ = ("limit",)
    limit: int


class WithoutClass(Exception):
    """`isinstance` asks for it."""

    @property
    def __class__(self):
        raise ValueError("of no class")


class Forwards(Exception):
    """As proxies do."""

    def __getattribute__(self, name):
        raise KeyError(name)


class DiesWhenPickled(Exception):
    def __reduce__(self):
        os._exit(9)


def long_chain():
    error = ValueError("the first")
    for number in range(30_000):
        following = ValueError(number)
        following.__cause__ = error
        error = following
    return error


def huge():
    return ValueError("x" * (80 << 20))


KINDS = {
    "a getter that raises KeyError": (lambda: NoAttribute("no such user", {"code": 404}), "NoAttribute"),
    "a SyntaxError of bytes": (lambda: SyntaxError("bad rule", ("rules.cfg", 1, 3, b"a = = b")), "bad rule"),
    "one that cannot be printed": (Unprintable, "Unprintable"),
    "one that exits when it is rebuilt": (lambda: ExitsWhenRebuilt("m", 1), "ExitsWhenRebuilt: m"),
    "one that interrupts when it is pickled": (lambda: InterruptsWhenPickled("m"), "InterruptsWhenPickled: m"),
    "one that equals nothing": (lambda: EqualToNothing("m"), "m"),
    "one whose class has no name": (NamedByAnother, ""),
    "one that says no class": (lambda: WithoutClass("m"), "WithoutClass: m"),
    "one that forwards all": (lambda: Forwards("m"), "Forwards: m"),
    "one that takes no attributes": (lambda: Uncarried("m"), "m"),
    "a frozen one with slots": (lambda: FrozenWithSlots(3), ""),
    "one at the end of a long chain": (long_chain, "29999"),
    "one with a huge message": (huge, "xxx"),
    "one that kills when it is pickled": (lambda: DiesWhenPickled("m"), None),
    "SystemExit": (lambda: SystemExit(3), "SystemExit"),
    "KeyboardInterrupt": (KeyboardInterrupt, "KeyboardInterrupt"),
    "GeneratorExit": (GeneratorExit, "GeneratorExit"),
}


def make(kind):
    return KINDS[kind][0]()


@pytest.fixture
def flow():
    with StrictFlow(state={"n": 0}) as flow:
        yield flow


def tasks_of(flow):
    @write(flow)
    def p1(kind):
        flow.state["n"] = -1
        raise make(kind)

    @read(flow)
    def p2(kind):
        raise make(kind)

    @read(flow)
    async def p2_async(kind):
        await asyncio.sleep(0)
        raise make(kind)

    @write(flow, timeout=30)
    async def p1_in_time(kind):
        raise make(kind)

    @read(flow)
    async def p2_in_a_task_of_its_own(kind):
        async def fail():
            raise make(kind)

        await asyncio.create_task(fail())

    return [p1, p2, p2_async, p1_in_time, p2_in_a_task_of_its_own]


@pytest.mark.parametrize("kind", [kind for kind, (_, said) in KINDS.items() if said is not None])
def test_whatever_is_raised_its_future_is_told_and_nothing_else_ends(flow, kind):
    said = KINDS[kind][1]
    bump = write(flow, key="n")(lambda n: n + 1)
    for number, task in enumerate(tasks_of(flow), 1):
        error = task(kind).exception(30)
        assert error is not None
        if said:
            assert said in type_of(error) + " " + words_of(error)
        assert task(kind).exception(30) is not None, "and again"
        assert bump().result(30) == number
        assert flow.state["n"] == number
    assert flow.stats().restarts == 0


@pytest.mark.parametrize("kind", ["one that takes no attributes", "a frozen one with slots"])
def test_an_exception_that_refuses_attributes_is_raised_as_itself_and_others_are_answered(flow, kind):
    expected = type(make(kind))
    heard = []
    p1 = tasks_of(flow)[0]
    failed = p1(kind)
    failed.add_done_callback(heard.append)
    for _ in range(2):
        with pytest.raises(expected):
            failed.result(30)
    assert flow.put("x", 1).result(30) is None
    flow.state["x"] = 2
    assert flow.state["x"] == 2
    assert heard == [failed]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_one_that_kills_in_failing_leaves_a_mark_and_is_not_tried_again(which):
    with StrictFlow(state={"n": 0}) as flow:
        task = tasks_of(flow)[which]
        with pytest.raises(TaskCrashed):
            task("one that kills when it is pickled").result(60)
        assert flow.stats().restarts == 1
        assert flow.state["n"] == 0


class DiesWhenPacked(dict):
    """A result that ends whoever packs it."""

    def __iter__(self):
        os._exit(9)

    items = keys = values = __iter__


class RefusesToBePacked(dict):
    def __iter__(self):
        raise SystemExit("in __iter__")

    items = keys = values = __iter__


@pytest.mark.parametrize("decorate", [write, read])
def test_a_result_whose_packing_exits_is_a_failure_of_its_task(flow, decorate):
    assert decorate(flow)(RefusesToBePacked)().exception(30) is not None
    assert flow.put("x", 1).result(30) is None
    assert flow.stats().restarts == 0


def test_a_task_of_asyncio_that_exits_beside_a_p2_ends_nothing(flow):
    @read(flow)
    async def leaves_one_behind():
        async def exits():
            raise SystemExit(3)

        asyncio.get_running_loop().create_task(exits())
        asyncio.get_running_loop().call_soon(sys.exit, 4)
        await asyncio.sleep(0.01)
        return "done"

    @read(flow)
    async def fine():
        await asyncio.sleep(0)
        return "fine"

    assert leaves_one_behind().result(30) == "done"
    assert fine().result(30) == "fine"
    assert flow.stats().restarts == 0


class FailsToLoad:
    """A task whose function raises when it is unpickled."""

    __name__ = __qualname__ = "fails_to_load"

    def __init__(self, kind):
        self.kind = kind

    def __call__(self):
        """Never called."""

    def __reduce__(self):
        return raise_it, (self.kind,)


def raise_it(kind):
    raise make(kind)


@pytest.mark.parametrize("kind", [kind for kind, (_, said) in KINDS.items() if said is not None])
def test_whatever_loading_a_function_raises_its_calls_fail_and_nothing_else(flow, kind):
    task = write(flow)(FailsToLoad(kind))
    beside = flow.put("x", 1)
    for _ in range(2):
        with pytest.raises(StrictFlowError, match="could not be loaded in the coordinator"):
            task().result(30)
    assert beside.result(30) is None
    assert flow.stats().restarts == 0


@pytest.mark.parametrize("how", ["before", "after"])
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, Unprintable, ValueError])
def test_a_callback_of_what_a_task_has_submitted_ends_nothing(flow, error, how):
    @read(flow)
    def child():
        return 1

    @write(flow)
    def bump():
        flow.state["n"] += 1

    def call_back(_):
        raise error

    @read(flow)
    async def parent():
        futures = [child(), bump()]
        if how == "after":
            for future in futures:
                await future
        for future in futures:
            future.add_done_callback(call_back)
        return "done"

    for number in range(1, 4):
        assert words_of(parent().exception(30) or ValueError()) in ("ValueError", words_of(error()))
        assert bump().result(30) is None
        assert flow.state["n"] == 2 * number
    assert flow.stats().restarts == 0


def test_a_failure_says_type_and_message_when_it_cannot_be_carried_over(flow):
    class Local(Exception):
        def __reduce__(self):
            raise TypeError("not this one")

    @write(flow)
    def fails():
        raise Local("first line\nsecond line")

    with pytest.raises(TaskFailed, match=r"Local: first line\nsecond line"):
        fails().result(30)


def fails_with(big, chained):
    """What a task's frames hold is gone when the last of them is."""
    builtins.seen = weakref.ref(big)
    if not chained:
        raise ValueError("with a large local variable")
    try:
        raise KeyError("first")
    except KeyError as error:
        raise ValueError("second") from error


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("kind", ["P1", "keyed P1", "P2", "async P2"])
def test_what_a_failed_task_held_is_gone_at_once(flow, kind, chained):
    @write(flow)
    def collect(enabled):
        gc.enable() if enabled else gc.disable()

    @read(flow)
    def is_gone():
        return builtins.seen() is None

    def fails(*_):
        big = type("Big", (), {})()
        fails_with(big, chained)

    async def fails_later():
        big = type("Big", (), {})()
        fails_with(big, chained)

    makers = {"P1": write(flow), "keyed P1": write(flow, key="n"), "P2": read(flow), "async P2": read(flow)}
    task = makers[kind](fails_later if kind == "async P2" else fails)
    collect(False).result(30)
    assert isinstance(task().exception(30), ValueError)
    assert is_gone().result(30)
    collect(True).result(30)


class Big:
    """What a task has, and how many of them there are."""

    alive = 0

    def __init__(self):
        type(self).alive += 1

    def __del__(self):
        type(self).alive -= 1


def test_what_a_failed_read_in_this_process_had_is_gone_with_its_future(flow):
    @read(flow, where="worker")
    def here():
        big = Big()
        raise ValueError(big is None)

    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            assert isinstance(here().exception(), ValueError)
            assert Big.alive == 0
    finally:
        gc.enable()
        gc.collect()


@pytest.mark.parametrize("end", ["its time is over", "it is cancelled"])
def test_what_an_async_p2_had_is_gone_when_it_is_ended(flow, end):
    @read(flow, timeout=0.05 if end == "its time is over" else None)
    async def sleep():
        big = type("Big", (), {})()
        builtins.seen = weakref.ref(big)
        builtins.begun = 1
        await asyncio.sleep(60)

    @read(flow)
    async def has_begun():
        gc.disable()
        await asyncio.sleep(0)
        return getattr(builtins, "begun", 0)

    @read(flow)
    async def is_gone():
        await asyncio.sleep(0)
        return getattr(builtins, "seen", lambda: 1)() is None

    future = sleep()
    while not has_begun().result(30):
        pass
    if end == "it is cancelled":
        future.cancel()
    with pytest.raises((TaskTimeout, CancelledError)):
        future.result(30)
    while not is_gone().result(30):
        pass
