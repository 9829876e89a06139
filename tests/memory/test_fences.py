"""Fences: which there are on which machine, and that the tests can have those of the other kind."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys

import pytest

from strictflow_mp.memory import fences

SHOW = """
import sys
if {without}:
    sys.modules["ctypes"] = None
from strictflow_mp.memory import fences
print(fences.WEAK, fences.fence is fences.publish_fence is fences.read_fence, fences.fence is fences._fence_of_locks)
for _ in range(3):
    assert fences.fence() is fences.publish_fence() is fences.read_fence() is None
"""


def shown(without: bool = False, **variables: str) -> list[str]:
    """What another interpreter has of fences."""
    environment = {name: value for name, value in os.environ.items() if name != "STRICTFLOW_MP_WEAK"}
    done = subprocess.run(
        [sys.executable, "-c", SHOW.format(without=without)],
        env={**environment, **variables},
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.split()


def has_libatomic() -> bool:
    try:
        return hasattr(ctypes.CDLL("libatomic.so.1"), "atomic_thread_fence")
    except OSError:
        return False


@pytest.mark.skipif(platform.machine() != "x86_64", reason="there the fences of weaker machines are the only ones")
def test_x86_64_has_only_the_fence_between_a_store_and_a_load():
    assert shown() == ["False", "False", "False"]
    assert shown(STRICTFLOW_MP_WEAK="") == ["False", "False", "False"]


def test_where_fences_are_weak_all_three_are_one_full_barrier():
    assert shown(STRICTFLOW_MP_WEAK="1") == ["True", "True", str(not has_libatomic())]


def test_without_libatomic_the_barrier_is_made_of_locks():
    assert shown(without=True, STRICTFLOW_MP_WEAK="1") == ["True", "True", "True"]


def test_the_barrier_of_locks_gives_a_lock_back_before_it_takes_another_one(monkeypatch):
    """One section alone is no full barrier, nor are locks that are only taken: models/litmus/fence-locks.litmus."""
    done = []

    class Lock:
        def __init__(self) -> None:
            self.number = len({number for number, _ in done})

        def acquire(self, blocking: bool) -> bool:
            done.append((self.number, "acquire"))
            return True

        def release(self) -> None:
            done.append((self.number, "release"))

    monkeypatch.setattr(fences, "allocate_lock", Lock)
    fences._fence_of_locks()
    assert done == [(0, "acquire"), (0, "release"), (1, "acquire")]
