"""P1 tasks and commits. Every P1 here is the whole path: a keyed task that reads, modifies and writes."""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import repeat
from multiprocessing.connection import Connection
from socket import socket
from time import perf_counter
from typing import Any

from msgpack import packb

from strictflow_mp import StrictFlow, Task, write
from strictflow_mp.memory.gatekeeper import GateKeeper
from strictflow_mp.memory.segment import Segment
from strictflow_mp.store import StoreWriter
from strictflow_mp.system.identity import Identity
from strictflow_mp.values.codec import pack, unpack
from strictflow_mp.values.keys import pack_key
from strictflow_mp.wire.arguments import pack_arguments, unpack_arguments
from strictflow_mp.wire.frames import CALL, RESULT, pack_frame, unpack_frame

from .measure import Bound, Outcome, Run, Size, bound_figures, compare, figure
from .peers import answer, echo, lmdb_environment, manager_counter, redis_client, served
from .reads import VALUE

BATCH = 1000


def increment(value: int, step: int) -> int:
    """The P1 task: read, modify, write."""
    return value + step


@contextmanager
def counter() -> Iterator[Task[..., int]]:
    """A flow with one counter, and the P1 task that adds to it."""
    with StrictFlow(state={"counter": 0}) as flow:
        add = write(flow, key="counter")(increment)
        add(1).result()
        yield add


def one_by_one(add: Task[..., int]) -> Run:
    def run(count: int) -> float:
        began = perf_counter()
        for _ in repeat(None, count):
            add(1).result()
        return perf_counter() - began

    return run


REQUEST = pack_frame(CALL, 1000, 0, pack(((1,), {})))
"""What a P1 that adds to a counter sends, without what no reply needs."""


def echoed(sock: socket) -> Run:
    """Send that, and wait until it has come back."""
    answer = bytearray(len(REQUEST))

    def run(count: int) -> float:
        began = perf_counter()
        for _ in repeat(None, count):
            sock.send(REQUEST)
            sock.recv_into(answer)
        return perf_counter() - began

    return run


def locked(lock: Any, values: Any) -> Run:
    """Add to a Manager's counter under its lock."""

    def run(count: int) -> float:
        began = perf_counter()
        for _ in repeat(None, count):
            with lock:
                values["counter"] = values["counter"] + 1
        return perf_counter() - began

    return run


@figure("P1, submit to result ÷ raw echo of the same bytes", Bound("≤", 1.5))
def round_trip(size: Size) -> Outcome:
    """One P1 that adds to a counter: submitted, run, committed, answered; the caller waits for the result.

    The echo is the floor: the request's bytes go through a socket pair to a process that waits with epoll and
    sends them back. It runs nothing, commits nothing, checks nothing.
    """
    with counter() as add, echo() as sock:
        return compare(one_by_one(add), echoed(sock), size, peer_is="echo", note=f"{len(REQUEST)} bytes")


@bound_figures("P1, submit to result ÷ raw echo")
def bound_round_trip(size: Size, go: Callable[[], None]) -> Outcome:
    """`round_trip`. On one core there is none to be woken, or to spin on; on two, an echo wakes both, a P1 none."""
    with counter() as add, echo() as sock:
        go()
        return compare(one_by_one(add), echoed(sock), size, peer_is="echo")


def run_and_commit(connection: Connection, socks: list[socket]) -> None:
    """In a child: an echo that runs each P1 and commits it, with its receipt, before it answers."""
    key, current = pack_key("counter"), pack(0)
    with stored(10) as (segment, writer):
        gate = GateKeeper(segment, secrets.token_hex(6))

        def run(request: memoryview) -> bytes:
            nonlocal current
            _, number, _, (arguments,), flag, _ = unpack_frame(request)
            args, kwargs = unpack_arguments(arguments)
            current = pack(increment(unpack(current), *args, **kwargs))
            frame = pack_frame(RESULT, number, (current,))
            writer.receipts.add((1, flag, number, 1, frame))
            writer.commit({key: current})
            gate.finish({1: flag})
            writer.receipts.acknowledge(1, number)
            return frame

        answer(connection, socks, run, writer.tidy)


def asked(sock: socket) -> Run:
    """Pack a P1, send it, wait for the answer, unpack it."""
    buffer = memoryview(bytearray(1 << 16))

    def run(count: int) -> float:
        began = perf_counter()
        for number in range(1, count + 1):
            sock.send(pack_frame(CALL, number, 0, [pack_arguments((1,), {})], number, number - 1))
            received = sock.recv_into(buffer)
            unpack(unpack_frame(buffer[:received])[2][0])
        return perf_counter() - began

    return run


@bound_figures("an echo that runs and commits ÷ raw echo")
def least(size: Size, go: Callable[[], None]) -> Outcome:
    """The floor of `round_trip`: what no P1 of ours can be without, one step after the other in one loop.

    Both ends pack and unpack; the server runs the function, writes cell, path, receipt and record, flips the version,
    lowers the flag, and answers. No future, no lock, no flag that is raised, no transaction to be undone, no queue,
    no other process that might ask, nobody who could die; and nobody spins.
    """
    with served(run_and_commit, 1) as (one,), echo() as sock:
        go()
        return compare(asked(one), echoed(sock), size, peer_is="echo")


@figure("P1, submit to result ÷ Manager RLock + get + set", Bound("≤", 0.2))
def against_manager(size: Size) -> Outcome:
    """An atomic read-modify-write of a counter in another process. Ours: the P1 of `round_trip`.

    Manager: take its RLock, get, set, release: four messages and their answers. Whoever is killed while
    holding the lock stops everybody.
    """
    with counter() as add, manager_counter() as manager:
        return compare(one_by_one(add), locked(*manager), size, peer_is="Manager")


@figure("raw echo of the same bytes ÷ Manager RLock + get + set")
def echo_against_manager(size: Size) -> Outcome:
    """The floor of `against_manager`: whatever asks another process takes an echo at least."""
    with echo() as sock, manager_counter() as manager:
        return compare(echoed(sock), locked(*manager), size, peer_is="Manager")


@figure("pipelined P1 a second ÷ Redis pipelined INCR a second", Bound("≥", 1.2))
def pipelined(size: Size) -> Outcome:
    """Additions to a counter, 1,000 submitted in one go, all results awaited; then the next 1,000.

    Ours: ``task.map``, one P1 with its own transaction and its own Future each. Redis: INCR in a pipeline, without
    MULTI; each is atomic and has its own result. Redis runs no code of the caller's.
    """
    with counter() as add, redis_client() as redis:

        def ours(count: int) -> float:
            began = perf_counter()
            for _ in repeat(None, count):
                for future in add.map(repeat(1, BATCH)):
                    future.result()
            return (perf_counter() - began) / BATCH

        def theirs(count: int) -> float:
            began = perf_counter()
            for _ in repeat(None, count):
                pipeline = redis.pipeline(transaction=False)
                for _ in repeat(None, BATCH):
                    pipeline.incr("counter")
                pipeline.execute()
            return (perf_counter() - began) / BATCH

        each = Size(size.repetitions, size.seconds / BATCH, size.keys)
        return compare(ours, theirs, each, peer_is="Redis", inverse=True)


@contextmanager
def store(keys: int) -> Iterator[StoreWriter]:
    """The writer of a store of that many keys."""
    with stored(keys) as (_, writer):
        yield writer


@contextmanager
def stored(keys: int) -> Iterator[tuple[Segment, StoreWriter]]:
    """A store of that many keys, in a segment of its own, without a coordinator."""
    segment = Segment.create(secrets.token_hex(6), "bench", capacity=1 << 30, slots=2, identity=Identity.mine())
    try:
        writer = StoreWriter(segment, "bench")
        writer.create()
        payload = packb(VALUE)
        for begin in range(0, keys, 10_000):
            writer.publish({pack_key(f"key:{n}"): payload for n in range(begin, min(keys, begin + 10_000))})
        yield segment, writer
    finally:
        segment.unlink()
        segment.close()


def commits(writer: StoreWriter, keys: int) -> Run:
    """Commit one random key of that many, again and again."""
    payload = packb(VALUE)

    def run(count: int) -> float:
        changes = [{pack_key(f"key:{random.randrange(keys)}"): payload} for _ in range(count)]
        publish = writer.publish
        began = perf_counter()
        for change in changes:
            publish(change)
        return perf_counter() - began

    return run


@figure("commit of one key among many ÷ among 10", Bound("≤", 2))
def commit(size: Size) -> Outcome:
    """One commit that changes one key, chosen at random, to a packed value; hash, cell, path, record, flip.

    Both stores have run long enough before that they reuse memory, so both pay for that too.
    """
    with ExitStack() as stack:
        many = commits(stack.enter_context(store(size.keys)), size.keys)
        few = commits(stack.enter_context(store(10)), 10)
        for run in (many, few):
            run(round(size.seconds * 5e5))
        return compare(many, few, size, peer_is="among 10:", note=f"{size.keys:,} keys")


def lmdb_commits(environment: Any, keys: int) -> Run:
    """The same in LMDB: a write transaction that puts one key."""
    payload = packb(VALUE)

    def run(count: int) -> float:
        names = [b"key:%d" % random.randrange(keys) for _ in range(count)]
        begin = environment.begin
        began = perf_counter()
        for name in names:
            with begin(write=True) as transaction:
                transaction.put(name, payload)
        return perf_counter() - began

    return run


@contextmanager
def lmdb_store(keys: int) -> Iterator[Any]:
    """LMDB with that many keys."""
    with lmdb_environment() as environment:
        payload = packb(VALUE)
        with environment.begin(write=True) as transaction:
            for number in range(keys):
                transaction.put(b"key:%d" % number, payload)
        yield environment


@figure("LMDB: commit of one key among many ÷ among 10")
def lmdb_commit(size: Size) -> Outcome:
    """What `commit` would be in C: a write transaction without sync; more keys lie deeper, and in no cache."""
    with lmdb_store(size.keys) as many, lmdb_store(10) as few:
        runs = lmdb_commits(many, size.keys), lmdb_commits(few, 10)
        return compare(*runs, size, peer_is="among 10:", note=f"{size.keys:,} keys")
