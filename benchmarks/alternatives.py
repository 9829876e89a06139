"""The alternatives: the same small read and the same read-modify-write, by ours and by each of them, in turns.

The read is of one small dict, in one process, while nobody writes. The read-modify-write adds one to a counter that
any process may change, running the caller's own code, so that no addition is ever lost; where a peer has none, it
says so. What a peer does not do for its time stands beside it: `Promises`.

The lambda that a batch calls for each operation costs every side the same, 0.04 µs or so.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import secrets
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import perf_counter
from typing import Any

from msgpack import packb, unpackb

from strictflow_mp import StrictFlow, write

from .measure import FIGURES, Figure, Missing, Outcome, Run, Size, child, compare, quantiles
from .peers import NAME, echo, lmdb_environment, manager_counter, redis_client
from .reads import VALUE
from .writes import increment

__all__ = ["ALTERNATIVES", "OURS", "Alternative", "Promises"]

Operation = Callable[[], object]
Work = tuple[Operation | None, Operation | None]
"""The read, and the atomic read-modify-write; None for what there is not."""


@dataclass(frozen=True)
class Promises:
    """What one gets for the time, in words, from the code and the documentation of each.

    Args:
        change: how the read-modify-write is done, or why there is none.
        gate: does a read wait for what others had submitted, but is not done yet?
        torn: can a read see half of a write?
        crash: is everything well when a process is killed at any instruction?
    """

    change: str
    gate: str
    torn: str
    crash: str


@dataclass(frozen=True)
class Alternative:
    """A peer: how it is opened, and whether it must have a process of its own, for importing it changes the process."""

    name: str
    open: Callable[[], AbstractContextManager[Work]]
    promises: Promises
    is_apart: bool = False

    @property
    def word(self) -> str:
        """The name as part of a figure's name."""
        return self.name.partition(" (")[0].lower().replace(" ", "_")


OURS = Promises("a P1 task: any Python function", gate="yes", torn="no", crash="yes")


@contextmanager
def lmdb() -> Iterator[Work]:
    """Begin, get, decode; a write transaction with get, decode, encode, put."""
    with lmdb_environment() as environment:
        with environment.begin(write=True) as transaction:
            transaction.put(b"config", packb(VALUE))
            transaction.put(b"counter", packb(0))

        def read() -> None:
            with environment.begin() as transaction:
                unpackb(transaction.get(b"config"))

        def change() -> None:
            with environment.begin(write=True) as transaction:
                transaction.put(b"counter", packb(unpackb(transaction.get(b"counter")) + 1))

        yield read, change


@contextmanager
def manager() -> Iterator[Work]:
    """A message to the manager's process and its answer; lock, get, set, unlock, so four of these."""
    with manager_counter() as (lock, values):
        values["config"] = VALUE

        def change() -> None:
            with lock:
                values["counter"] += 1

        yield lambda: values["config"], change


@contextmanager
def redis() -> Iterator[Work]:
    """GET, decode; WATCH, GET, MULTI, SET, EXEC, which runs the caller's code, as a P1 does (INCR runs none)."""
    with redis_client() as client:
        client.set("config", packb(VALUE))
        client.set("counter", packb(0))

        def add(pipeline: Any) -> None:
            value = unpackb(pipeline.get("counter")) + 1
            pipeline.multi()
            pipeline.set("counter", packb(value))

        yield lambda: unpackb(client.get("config")), lambda: client.transaction(add, "counter")


@contextmanager
def easyglobals() -> Iterator[Work]:
    """Attribute access. The dict goes through pickle; the process that wrote a name first is its only writer."""
    _need("EasyGlobals")
    from EasyGlobals import Globals

    shared = Globals(f"bench{os.getpid()}")
    try:
        shared.config = VALUE
        yield lambda: shared.config, None
    finally:
        shared.close()


@contextmanager
def ultradict() -> Iterator[Work]:
    """Item access; under its lock, get and set. The lock is the one that unrelated processes share."""
    _need("UltraDict")
    _need("atomics")
    from UltraDict import UltraDict

    shared = UltraDict(
        {"config": VALUE, "counter": 0},
        name=NAME + secrets.token_hex(4),
        create=True,
        shared_lock=True,
        auto_unlink=True,
    )
    try:

        def change() -> None:
            with shared.lock:
                shared["counter"] += 1

        yield lambda: shared["config"], change
    finally:
        shared.close()


@contextmanager
def sharedbox() -> Iterator[Work]:
    """A record of typed fields of fixed size, written in C++: all its fields at one moment, as a dict.

    Only an array field can be changed in place under the box's lock, so the counter is an array of one.
    """
    _need("sharedbox")
    _need("numpy")
    from typing import Annotated

    import numpy as np

    try:
        from sharedbox import Capacity, DType, Shape, SharedBox
    except ImportError:
        raise Missing("a sharedbox with arrays is not installed: pip install 'sharedbox>=0.6'") from None

    def box(label: str, **fields: Any) -> Any:
        return type(SharedBox)(label, (SharedBox,), {"__module__": __name__, "__annotations__": fields})

    Config = box("Config", version=int, status=Annotated[str, Capacity(32)])
    Counter = box("Counter", value=Annotated[np.ndarray, Shape(1), DType("int64")])
    name = f"{NAME}-{secrets.token_hex(4)}"
    config = Config.create(f"{name}-config", **VALUE)
    try:
        counter = Counter.create(f"{name}-counter", np.zeros(1, "int64"))
        try:

            def change() -> None:
                with counter.writing("value") as value:
                    value[0] += 1

            yield config.snapshot, change
        finally:
            counter.unlink()
            counter.close()
    finally:
        config.unlink()
        config.close()


@contextmanager
def dirty_stash() -> Iterator[Work]:
    """A message to gunicorn's dirty arbiter, which keeps the tables, and its answer.

    The arbiter is started alone, on a Unix socket, without a web server and without workers. get and put are
    two messages, between which another process may put: additions would be lost.
    """
    _need("gunicorn")
    if not importlib.util.find_spec("gunicorn.dirty"):
        raise Missing("a gunicorn with dirty arbiters is not installed: pip install 'gunicorn>=25'")
    from gunicorn.dirty import StashClient

    with tempfile.TemporaryDirectory(prefix=f"{NAME}-stash-", dir="/tmp") as directory:
        path = str(Path(directory, "socket"))
        process = multiprocessing.get_context("spawn").Process(target=_arbiter, args=(path,), daemon=True)
        process.start()
        try:
            _wait_for_arbiter(path, process)
            with StashClient(path) as client:
                client.put("bench", "config", VALUE)
                yield lambda: client.get("bench", "config"), None
        finally:
            process.terminate()
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()


def _wait_for_arbiter(path: str, process: BaseProcess) -> None:
    """Its own client would leave a socket open at each try."""
    while True:
        with socket.socket(socket.AF_UNIX) as trial:
            try:
                trial.connect(path)
                return
            except OSError:
                if not process.is_alive():
                    raise Missing("gunicorn's dirty arbiter ended at once") from None
        time.sleep(0.01)


def _arbiter(path: str) -> None:
    """In a child: serve the stash until SIGTERM."""
    from gunicorn.config import Config
    from gunicorn.dirty import DirtyArbiter
    from gunicorn.glogging import Logger

    tempfile.tempdir = str(Path(path).parent)  # it makes a directory of its own
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = Config()
    config.set("loglevel", "critical")
    arbiter = DirtyArbiter(config, Logger(config), path)
    arbiter.ppid = os.getppid()  # it expects to be made before a fork, and would end within a second
    arbiter.run()


@contextmanager
def raw_echo() -> Iterator[Work]:
    """The floor of whatever asks another process: 40 bytes there and back over a socket pair."""
    message = bytes(40)
    answer = bytearray(40)
    with echo() as sock:

        def change() -> None:
            sock.send(message)
            sock.recv_into(answer)

        yield None, change


def _need(module: str) -> None:
    if not importlib.util.find_spec(module):
        raise Missing(f"{module} is not installed: pip install {module}")


ALTERNATIVES = (
    Alternative(
        "LMDB (/dev/shm, no sync)",
        lmdb,
        Promises("a write transaction", gate="no", torn="no", crash="yes"),
    ),
    Alternative(
        "Manager",
        manager,
        Promises("RLock, get, set", gate="no", torn="no", crash="no: a killed holder keeps the lock"),
    ),
    Alternative(
        "Redis (Unix socket)",
        redis,
        Promises("WATCH, GET, MULTI, SET, EXEC", gate="no", torn="no", crash="clients yes; a killed server loses all"),
    ),
    Alternative(
        "EasyGlobals",
        easyglobals,
        Promises(
            "none: each name has one writer",
            gate="no",
            torn="no (x86-64)",
            crash="yes, but a value half written is dropped",
        ),
        is_apart=True,
    ),
    Alternative(
        "UltraDict",
        ultradict,
        Promises(
            "its lock, get, set",
            gate="no",
            torn="yes: reads take no lock",
            crash="no: a killed holder keeps the lock",
        ),
        is_apart=True,
    ),
    Alternative(
        "sharedbox",
        sharedbox,
        Promises(
            "its lock, an array field only",
            gate="no",
            torn="no",
            crash="no: a killed writer keeps the lock until force_unlock()",
        ),
        is_apart=True,
    ),
    Alternative(
        "dirty stash (gunicorn)",
        dirty_stash,
        Promises(
            "none: get and put are two messages", gate="no", torn="no", crash="workers yes; a killed arbiter loses all"
        ),
    ),
    Alternative("raw echo (floor)", raw_echo, Promises("nothing is changed", gate="–", torn="–", crash="–")),
)


def in_batches(operation: Operation) -> Run:
    """Time so many of them."""

    def run(count: int) -> float:
        began = perf_counter()
        for _ in repeat(None, count):
            operation()
        return perf_counter() - began

    return run


def one_by_one(operation: Operation, seconds: float) -> list[float]:
    """Time each of them for about so long; the quantiles, the clock's own share (0.05 µs or so) included."""
    times = []
    now = perf_counter()
    end = now + seconds
    while now < end:
        began = perf_counter()
        operation()
        now = perf_counter()
        times.append(now - began)
    return quantiles(times)


def serve(connection: Connection, number: int) -> None:
    """In a child: do what is asked of that alternative: (0 read | 1 change, count | seconds)."""
    try:
        with ALTERNATIVES[number].open() as work:
            connection.send(None)
            while True:
                try:
                    which, much = connection.recv()
                except EOFError:
                    return
                operation = work[which]
                assert operation is not None
                much_is_count = isinstance(much, int)
                connection.send(in_batches(operation)(much) if much_is_count else one_by_one(operation, much))
    except Missing as missing:
        connection.send(str(missing))


@contextmanager
def opened(number: int, which: int) -> Iterator[tuple[Run, Callable[[float], list[float]]]]:
    """An alternative's read (0) or read-modify-write (1), as batches and one by one."""
    alternative = ALTERNATIVES[number]
    if not alternative.is_apart:
        with alternative.open() as work:
            operation = work[which]
            assert operation is not None
            yield in_batches(operation), partial(one_by_one, operation)
        return
    with child(serve, number) as connection:
        if missing := connection.recv():
            raise Missing(missing)

        def ask(much: float) -> Any:
            connection.send((which, much))
            return connection.recv()

        yield ask, ask


@contextmanager
def ours() -> Iterator[tuple[Operation, Operation]]:
    """The gated read, and the P1."""
    with StrictFlow(state={"config": VALUE, "counter": 0}) as flow:
        add = write(flow, key="counter")(increment)
        state = flow.state
        yield lambda: state["config"], lambda: add(1).result()


def measure(size: Size, number: int, which: int) -> Outcome:
    """One operation of an alternative's, in turns with ours; then the distribution of both."""
    with ours() as mine, opened(number, which) as (theirs, theirs_one_by_one):
        outcome = compare(in_batches(mine[which]), theirs, size, peer_is=ALTERNATIVES[number].name, inverse=True)
        seconds = max(0.001, size.seconds * size.repetitions / 2)
        outcome.series["ours, distribution"] = one_by_one(mine[which], seconds)
        outcome.series["peer, distribution"] = theirs_one_by_one(seconds)
    return outcome


def _add() -> None:
    has_read = {alternative: alternative.open is not raw_echo for alternative in ALTERNATIVES}
    has_change = {alternative: alternative.open not in (easyglobals, dirty_stash) for alternative in ALTERNATIVES}
    for which, (word, what, has) in enumerate(
        (("read", "read", has_read), ("change", "read-modify-write", has_change))
    ):
        for number, alternative in enumerate(ALTERNATIVES):
            if has[alternative]:
                title = f"{what}: {alternative.name} ÷ ours"
                figure = partial(measure, number=number, which=which)
                FIGURES.append(Figure(f"alternatives.{alternative.word}_{word}", title, None, "×", figure))


_add()
