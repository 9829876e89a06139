"""What mypy and pyright make of the library. Nothing here is run: both check it, in `tox -e types`.

`assert_type` says what the type is. A line that ignores an error must have that error, in both: they complain about
what is ignored for nothing.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Coroutine, Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

from strictflow_mp import Change, Key, Snapshot, StrictFlow, Task, TaskFuture, Watch, read, write

if TYPE_CHECKING:
    from typing_extensions import assert_type

PRICE: Key[float] = Key("price")
NAMES: Key[list[str]] = Key(("names", 1))
PLAIN = "plain"

flow = StrictFlow("examples", state={PRICE: 1.0, PLAIN: {"a": 1}})


# A function keeps its parameters


@write(flow)
def rename(old: str, new: str, *, force: bool = False) -> int:
    """Rename something."""
    return len(new)


@write(flow, timeout=1.5)
def reset() -> None:
    flow.state.clear()


@write(flow)
def collect(first: int, *rest: int, **options: str) -> list[int]:
    return [first, *rest]


assert_type(rename("a", "b"), TaskFuture[int])
assert_type(rename("a", new="b", force=True), TaskFuture[int])
assert_type(rename("a", "b").result(), int)
assert_type(rename("a", "b").result(timeout=1), int)
assert_type(rename("a", "b").exception(), BaseException | None)
assert_type(reset(), TaskFuture[None])
assert_type(collect(1, 2, 3, colour="red"), TaskFuture[list[int]])
assert_type(rename.name, str)

rename("a")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
rename("a", 2)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
rename("a", "b", True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
rename("a", "b", forced=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
reset(1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
collect(1, "2")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
collect(1, colour=2)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def without_a_flow() -> None: ...


write(without_a_flow)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]


# A future is one of concurrent.futures, and can be awaited


def wait() -> None:
    futures = [rename("a", "b"), rename("b", "c")]
    for future in concurrent.futures.as_completed(futures):
        assert_type(future.result(), int)
    plain: concurrent.futures.Future[int] = rename("a", "b")
    plain.add_done_callback(lambda done: print(done.result() + 1))
    wrong: TaskFuture[str] = rename("a", "b")  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    print(wrong)


async def gather() -> None:
    assert_type(await rename("a", "b"), int)
    assert_type(await asyncio.gather(rename("a", "b"), report("a")), tuple[int, dict[str, float]])


# Async functions: the future gives what they return


@read(flow)
async def report(reader: str, times: int = 1) -> dict[str, float]:
    await asyncio.sleep(0.1)
    return {reader: flow.state[PRICE] * times}


@write(flow)
async def rise(by: float) -> float:
    flow.state[PRICE] += by
    return flow.state[PRICE]


@read(flow)
def makes_no_coroutine() -> Iterator[int]:
    return iter([1])


assert_type(report("a", times=2), TaskFuture[dict[str, float]])
assert_type(report("a").result(), dict[str, float])
assert_type(rise(1), TaskFuture[float])
assert_type(makes_no_coroutine(), TaskFuture[Iterator[int]])
report(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


# In the calling process: the same


@read(flow, where="worker")
def look(name: str) -> float:
    return flow.state[PRICE]


@read(flow, where="worker")
async def look_async(name: str) -> float:
    return flow.state[PRICE]


assert_type(look("a"), TaskFuture[float])
assert_type(look_async("a"), TaskFuture[float])
look()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def elsewhere() -> None: ...


read(flow, where="elsewhere")(elsewhere)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]


# Many calls


assert_type(look.map(["a", "b"]), list[TaskFuture[float]])
assert_type(rename.map(["a", "b"], ["c", "d"]), list[TaskFuture[int]])
look.map(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


# A key that is plain: the first parameter is given, whatever its type


@write(flow, key="count")
def count(value: int | None, by: int) -> int:
    return (value or 0) + by


@read(flow, key=("a", 1))
def length(value: list[str]) -> int:
    return len(value)


@write(flow, key=b"count")
async def count_async(value: int, by: int = 1) -> int:
    return value + by


assert_type(count(2), TaskFuture[int])
assert_type(count(by=2), TaskFuture[int])
assert_type(length(), TaskFuture[int])
assert_type(count_async(), TaskFuture[int])
assert_type(count.map(range(9)), list[TaskFuture[int]])
count(1, 2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
count("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
length([])  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def takes_no_value() -> int:
    return 1


write(flow, key="count")(takes_no_value)  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue, reportArgumentType]


def not_a_key(value: int) -> int:
    return value


write(flow, key=1.5)(not_a_key)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]


# A key with a type: the first parameter and the result are checked


@write(flow, key=PRICE)
def raise_price(price: float, by: float) -> float:
    return price + by


@write(flow, key=PRICE)
def first_price(price: float | None) -> float:
    return 1.0 if price is None else price


@write(flow, key=NAMES)
async def append(names: list[str], name: str) -> list[str]:
    return [*names, name]


@read(flow, key=PRICE, where="worker")
def show(price: float, digits: int = 2) -> str:
    return f"{price:.{digits}f}"


@read(flow, key=NAMES)
async def joined(names: list[str]) -> str:
    return ", ".join(names)


assert_type(raise_price(1), TaskFuture[float])
assert_type(first_price(), TaskFuture[float])
assert_type(append("a"), TaskFuture[list[str]])
assert_type(show(digits=3), TaskFuture[str])
assert_type(joined(), TaskFuture[str])
raise_price()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
append(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def takes_another_type(price: str) -> float:
    return float(price)


write(flow, key=PRICE)(takes_another_type)  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue, reportArgumentType]


def may_return_none(price: float) -> float | None:
    return None


write(flow, key=PRICE)(may_return_none)  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue, reportArgumentType]


def reads_another_type(price: list[str]) -> float:
    return 1.0


read(flow, key=PRICE)(reads_another_type)  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue, reportArgumentType]


# The state


def use_the_state() -> None:
    state = flow.state
    assert_type(state[PRICE], float)
    assert_type(state[NAMES][0], str)
    assert_type(state[PLAIN], Any)
    assert_type(state.get(PRICE), float | None)
    assert_type(state.get(PRICE, 0.0), float)
    assert_type(state.get(NAMES, None), list[str] | None)
    assert_type(state.get(NAMES, 1), list[str] | int)
    state[PRICE] = 1
    state[PLAIN] = {"anything": b"at all"}
    state[1], state[b"1"], state["a", 2] = range(3)
    state.update({PRICE: 1.5})
    del state[PRICE], state[PLAIN]
    print(PRICE in state, len(state), list(state))
    mapping: MutableMapping[Any, Any] = state
    print(mapping)
    state[PRICE] = "much"  # type: ignore[misc]  # pyright: ignore[reportArgumentType, reportCallIssue]
    state[NAMES] = ["a", 1]  # type: ignore[misc]  # pyright: ignore[reportArgumentType, reportCallIssue]
    state[1.5] = 1  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    state[PRICE].append(1)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    del state[1.5]  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def peek_and_put() -> None:
    assert_type(flow.peek(PRICE), float)
    assert_type(flow.peek(PRICE, 0.0), float)
    assert_type(flow.peek(PRICE, default=None), float | None)
    assert_type(flow.peek(PLAIN), Any)
    assert_type(flow.peek(PLAIN, default=1), Any)
    assert_type(flow.put(PRICE, 1.5), TaskFuture[None])
    assert_type(flow.put(PLAIN, object), TaskFuture[None])
    assert_type(flow.update({PRICE: 1, PLAIN: 2}), TaskFuture[None])
    assert_type(flow.delete(PRICE), TaskFuture[None])
    flow.put(PRICE, "much")  # type: ignore[misc]  # pyright: ignore[reportArgumentType, reportCallIssue]
    flow.delete(1.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def take_snapshots() -> None:
    with flow.snapshot() as snapshot:
        assert_type(snapshot, Snapshot)
        assert_type(snapshot.version, int)
        assert_type(snapshot[PRICE], float)
        assert_type(snapshot.get(NAMES), list[str] | None)
        assert_type(snapshot[PLAIN], Any)
        mapping: Mapping[Any, Any] = snapshot
        print(mapping)
        snapshot[PRICE] = 1.0  # type: ignore[index]  # pyright: ignore[reportIndexIssue]


async def take_snapshots_async() -> None:
    async with flow.snapshot(gated=False) as snapshot:
        assert_type(snapshot[PRICE], float)


# Watching


def watch() -> None:
    with flow.watch(PRICE, "config", b"x") as changes:
        assert_type(changes, Watch)
        for change in changes:
            assert_type(change, Change)
            assert_type(change.version, int)
            assert_type(change.value, Any)
            version, key, value, is_deleted = change
            assert_type(version, int)
            assert_type(is_deleted, bool)
            print(key == PRICE, value)
    flow.watch(1.5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def watch_async() -> None:
    async for change in flow.watch():
        assert_type(change, Change)


# Handles, workers, statistics


def work(number: int) -> None:
    with StrictFlow.attach("examples", timeout=1) as attached:
        assert_type(attached, StrictFlow)
    group = flow.spawn(work, processes=4, restart="on-failure")
    group.join()
    assert_type(flow.stats().version, int)
    assert_type(flow.stats().coordinator_pid, int)
    flow.spawn(work, restart="sometimes")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


# Tasks as values


def submit(task: Task[[str], float], name: str) -> float:
    return task(name).result()


submit(look, "a")
submit(rename, "a")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
submit(write(flow)(lambda name: 1.0), "a")


def inspect(task: Task[..., Any]) -> str:
    return task.name


inspect(rename)
inspect(count)


def of_a_generic_function(values: list[int]) -> None:
    first = read(flow)(max)
    assert_type(write(flow)(len)("abc"), TaskFuture[int])
    print(first)


def a_coroutine_is_not_what_one_gets(future: TaskFuture[Coroutine[Any, Any, int]]) -> None: ...


a_coroutine_is_not_what_one_gets(rise(1))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
