"""Named semaphores and shared memory, from each of the two that provide them."""

from __future__ import annotations

import os
import secrets
import signal
import sys
import threading
import time

import pytest

from strictflow_mp.system import posix, semlock

PROVIDERS = [posix, semlock]
if not posix.KEEPS_EXCEPTIONS:
    import posix_ipc  # it would turn the GIL on

    PROVIDERS = [posix_ipc, semlock]


@pytest.fixture(params=PROVIDERS, ids=lambda provider: provider.__name__.rpartition(".")[2])
def provider(request):
    return request.param


@pytest.fixture
def name(provider):
    name = f"/test-{secrets.token_hex(6)}"
    yield name
    for unlink in (provider.unlink_semaphore, provider.unlink_shared_memory):
        with pytest.raises(provider.ExistentialError):
            unlink(name)


@pytest.fixture
def made(provider, name):
    """A semaphore."""
    semaphore = provider.Semaphore(name, provider.O_CREX, 0o600, 0)
    yield semaphore
    provider.unlink_semaphore(name)


def test_both_ends_of_a_semaphore_see_each_others_posts(provider, name, made):
    for others in PROVIDERS:
        other = others.Semaphore(name)
        other.release()
        made.acquire(0)
        made.release()
        made.release()
        assert (made.value, other.value) == (2, 2)
        other.acquire()
        other.acquire(5)
        other.close()
    with pytest.raises(provider.BusyError):
        made.acquire(0)
    with pytest.raises(provider.BusyError):
        made.acquire(0.01)
    assert made.value == 0


def test_one_is_made_once_and_only_its_owner_may_use_it(provider, name, made):
    with pytest.raises(provider.ExistentialError):
        provider.Semaphore(name, provider.O_CREX)
    status = os.stat(f"/dev/shm/sem.{name[1:]}")
    assert (status.st_mode & 0o777, status.st_uid) == (0o600, os.getuid())


def test_what_is_not_there_is_said_to_be_missing(provider):
    missing = f"/missing-{secrets.token_hex(6)}"
    for look in (
        lambda: provider.Semaphore(missing),
        lambda: provider.SharedMemory(missing),
        lambda: provider.unlink_semaphore(missing),
        lambda: provider.unlink_shared_memory(missing),
    ):
        with pytest.raises(provider.ExistentialError) as caught:
            look()
        assert isinstance(caught.value, provider.Error)


def test_a_closed_one_says_so(provider, made):
    made.close()
    with pytest.raises(provider.ExistentialError):
        made.close()
    with pytest.raises(provider.ExistentialError):
        made.release()


def test_a_thread_that_waits_is_woken_by_a_post(provider, made):
    woken = []
    thread = threading.Thread(target=lambda: woken.append(made.acquire(30)))
    thread.start()
    made.release()
    thread.join(30)
    assert woken == [None]


def test_shared_memory_is_one_file_under_its_name(provider, name):
    memory = provider.SharedMemory(name, provider.O_CREX)
    with pytest.raises(provider.ExistentialError):
        provider.SharedMemory(name, provider.O_CREX)
    os.ftruncate(memory.fd, 4096)
    for others in PROVIDERS:
        other = others.SharedMemory(name)
        assert os.path.sameopenfile(memory.fd, other.fd)
        assert os.fstat(other.fd).st_size == 4096
        assert not os.get_inheritable(other.fd)
        other.close_fd()
    memory.close_fd()
    provider.unlink_shared_memory(name)


class Raised(Exception):
    pass


def test_what_a_signal_handler_raises_comes_out_of_a_wait_of_semlock(name):
    """Not out of one of posix_ipc: `memory.semaphores.sleep_on` knows the difference."""

    def handle(*_):
        raise Raised

    semaphore = semlock.Semaphore(name, semlock.O_CREX)
    former = signal.signal(signal.SIGUSR1, handle)
    asleep = threading.get_native_id()

    def send():
        while _state_of(asleep) != "S":
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=send)
    try:
        thread.start()
        with pytest.raises(Raised):
            semaphore.acquire(60)
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, former)
        semaphore.unlink()


def _state_of(thread):
    with open(f"/proc/self/task/{thread}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def test_the_library_never_turns_the_gil_on(run_python):
    code = """
import sys
from strictflow_mp import StrictFlow
import strictflow_mp.coordinator.main, strictflow_mp.flow.late as late
from importlib import import_module
for name in [f"strictflow_mp.{name}" for name in late.OURS] + list(late.LATE):
    import_module(name)
print(getattr(sys, "_is_gil_enabled", lambda: False)(), "posix_ipc" in sys.modules)
"""
    done = run_python(code, env={"PYTHON_GIL": ""})
    is_free = "t" in sys.abiflags
    expected = f"{not is_free and sys.version_info >= (3, 13)} {not is_free}\n"
    assert done.stdout + done.stderr == expected
