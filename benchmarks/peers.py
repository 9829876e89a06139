"""The peers: what a user would pick instead, and the floors that nothing can be faster than.

Each is a context manager that starts what it needs and removes it again, or raises `Missing`.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgpack

from strictflow_mp.system import posix

from .measure import Missing, child, now

__all__ = [
    "NAME",
    "echo",
    "echoes",
    "lmdb_environment",
    "lmdb_writer",
    "manager_counter",
    "redis_client",
    "semaphore_poster",
    "spin",
    "versions",
]

NAME = f"bench-{os.getpid()}"
"""How the names of all that is made here begin, but for what the library itself makes."""


@contextmanager
def lmdb_environment(path: str | None = None) -> Iterator[Any]:
    """LMDB in /dev/shm, without sync; *path* of an environment that exists already, to open it once more."""
    try:
        import lmdb
    except ImportError:
        raise Missing("lmdb is not installed: pip install lmdb") from None
    shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
    directory = path or tempfile.mkdtemp(prefix=f"{NAME}-lmdb-", dir=shared)
    environment = lmdb.open(directory, map_size=1 << 30, sync=False)
    try:
        yield environment
    finally:
        environment.close()
        if path is None:
            shutil.rmtree(directory)


def lmdb_writer(connection: Connection, path: str) -> None:
    """In a child: write the values that arrive under their keys, and say when they are committed."""
    with lmdb_environment(path) as environment:
        while True:
            try:
                changes = connection.recv()
            except EOFError:
                return
            with environment.begin(write=True) as transaction:
                for key, value in changes:
                    transaction.put(key, msgpack.packb(value))
            connection.send(None)


Server = Callable[[Connection, list[socket.socket]], None]


@contextmanager
def echo() -> Iterator[socket.socket]:
    """One end of a socket pair; at the other, a process waits with epoll and sends back what arrives."""
    with served(_echo, 1) as (here,):
        yield here


@contextmanager
def echoes(count: int) -> Iterator[list[socket.socket]]:
    """The same for so many socket pairs; one process serves them all."""
    with served(_echo, count) as here:
        yield here


@contextmanager
def served(server: Server, count: int) -> Iterator[list[socket.socket]]:
    """One end of so many socket pairs; at the other ends, one process runs *server* until the pipe is closed."""
    with ExitStack() as stack:
        pairs = [socket.socketpair() for _ in range(count)]
        here = [stack.enter_context(mine) for mine, _ in pairs]
        there = [theirs for _, theirs in pairs]
        with child(server, there):
            for sock in there:
                sock.close()
            try:
                yield here
            finally:
                for sock in here:
                    sock.close()


def _echo(connection: Connection, socks: list[socket.socket]) -> None:
    answer(connection, socks, lambda data: data, lambda: None)


def answer(
    connection: Connection,
    socks: list[socket.socket],
    reply: Callable[[memoryview], bytes | memoryview],
    afterwards: Callable[[], None],
) -> None:
    """In a child, until its starter closes the pipe: reply to what arrives, then do what is left to do."""
    buffer = memoryview(bytearray(1 << 16))
    by_descriptor = {sock.fileno(): sock for sock in socks}
    with select.epoll() as epoll:
        for descriptor in (connection.fileno(), *by_descriptor):
            epoll.register(descriptor, select.EPOLLIN)
        while True:
            for descriptor, _ in epoll.poll():
                if descriptor == connection.fileno():
                    for sock in socks:
                        sock.close()
                    return
                sock = by_descriptor[descriptor]
                count = sock.recv_into(buffer)
                if count:
                    sock.send(reply(buffer[:count]))
                    afterwards()
                else:
                    epoll.unregister(descriptor)


@contextmanager
def manager_counter() -> Iterator[tuple[Any, Any]]:
    """A lock and a dict with a counter, both in a `multiprocessing.Manager`."""
    with multiprocessing.get_context("spawn").Manager() as manager:
        yield manager.RLock(), manager.dict(counter=0)


@contextmanager
def redis_client() -> Iterator[Any]:
    """A client of a Redis server of our own, on a Unix socket, without persistence."""
    try:
        import redis
    except ImportError:
        raise Missing("the client redis is not installed: pip install redis") from None
    server = shutil.which("redis-server")
    if server is None:
        raise Missing("redis-server is not installed: apt-get install redis-server")
    with tempfile.TemporaryDirectory(prefix=f"{NAME}-redis-", dir="/tmp") as directory:
        path = str(Path(directory, "socket"))
        options = ["--port", "0", "--unixsocket", path, "--save", "", "--appendonly", "no"]
        process = subprocess.Popen([server, *options], cwd=directory, stdout=subprocess.DEVNULL)
        try:
            with closing(redis.Redis(unix_socket_path=path)) as client:
                _wait_for_redis(client, process, redis.ConnectionError)
                yield client
        finally:
            process.terminate()
            process.wait()


def _wait_for_redis(client: Any, process: subprocess.Popen[bytes], refused: type[Exception]) -> None:
    while True:
        try:
            client.ping()
            return
        except refused:
            if process.poll() is not None:
                raise Missing(f"redis-server ended at once, with exit code {process.returncode}") from None
            time.sleep(0.01)


@contextmanager
def semaphore_poster(seconds: float) -> Iterator[tuple[posix.Semaphore, Connection]]:
    """A named semaphore, and a process that, asked by a message, works for *seconds*, then posts it.

    Its answer on the pipe is the time at which it was about to post.
    """
    semaphore = posix.Semaphore(f"/{NAME}", posix.O_CREX, 0o600, 0)
    try:
        with child(_post, semaphore.name, seconds) as connection:
            connection.recv()
            yield semaphore, connection
    finally:
        semaphore.unlink()
        semaphore.close()


def _post(connection: Connection, name: str, seconds: float) -> None:
    semaphore = posix.Semaphore(name)
    connection.send(None)
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        ended = spin(seconds)
        semaphore.release()
        connection.send(ended)


def spin(seconds: float) -> int:
    """Work for that long; return when that ended (`now`)."""
    end = now() + int(seconds * 1e9)
    while (at := now()) < end:
        pass
    return at


PACKAGES = ("lmdb", "redis", "hiredis", "EasyGlobals", "UltraDict", "sharedbox", "gunicorn", "numpy")


def versions() -> dict[str, str]:
    """The peers on this machine and their versions; "missing" where there is none.

    None is imported: some change the process that does.
    """
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    found["redis-server"] = "missing"
    if server := shutil.which("redis-server"):
        words = subprocess.run([server, "--version"], capture_output=True, text=True, check=True).stdout.split()
        found["redis-server"] = next((word[2:] for word in words if word.startswith("v=")), "?")
    return found
