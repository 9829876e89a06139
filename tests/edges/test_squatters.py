"""Another user makes, or keeps, files in /dev/shm under names of ours."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from strictflow_mp import ProtocolError, StrictFlow, StrictFlowError
from strictflow_mp.memory import leftovers, semaphores
from strictflow_mp.memory.segment import PREFIX, Segment
from strictflow_mp.system import place as places
from strictflow_mp.system import posix
from strictflow_mp.system.identity import Identity
from strictflow_mp.system.place import Place

pytestmark = pytest.mark.once

NAME = "coveted"
SHARED = Path("/dev/shm")


@pytest.fixture
def flow() -> Iterator[StrictFlow]:
    flow = StrictFlow(NAME, state={"n": 1}, max_workers=4)
    flow.start_loop()
    yield flow
    with suppress(StrictFlowError):
        flow.stop_loop()


@pytest.fixture
def squatted(flow) -> Iterator[list[Path]]:
    """Every name that the token tells, of every slot."""
    token = Place.of(NAME).resident().token
    paths = [SHARED / f"sem.{PREFIX}{token}.{slot}" for slot in range(6)]
    for path in paths:
        path.touch(mode=0o000)
    yield paths
    for path in paths:
        path.unlink()


def attach(run_python) -> str:
    done = run_python(f"from strictflow_mp import StrictFlow; print(StrictFlow({NAME!r}).state['n'])")
    return done.stdout + done.stderr


def test_names_that_can_be_guessed_are_not_used(flow, squatted, run_python, eventually):
    assert attach(run_python) == "1\n"
    former = Place.of(NAME).resident().pid
    os.kill(former, signal.SIGKILL)
    flow.put("n", 2).result(20)
    assert attach(run_python) == "2\n"
    flow.stop_loop()
    with StrictFlow(NAME, state={"n": 3}):
        assert attach(run_python) == "3\n"


def test_a_name_that_is_taken_is_passed_over(segment, monkeypatch):
    drawn = iter([5, 5, 6])
    monkeypatch.setattr(semaphores, "draw", lambda: next(drawn))
    token = segment.name.removeprefix(PREFIX)
    first = semaphores.make_semaphore(token, segment.slot(1))
    segment.slot(1).semaphore = 0  # as if it were another user's
    second = semaphores.make_semaphore(token, segment.slot(1))
    assert segment.slot(1).semaphore == 6
    for semaphore in (first, second):
        semaphore.unlink()
        semaphore.close()


@pytest.fixture
def segment() -> Iterator[Segment]:
    segment = Segment.create(secrets.token_hex(6), NAME, capacity=1, slots=5, identity=Identity(1, 1, 0, 0))
    yield segment
    segment.close()
    segment.unlink()


def test_an_unlink_that_is_refused_is_no_error(segment, monkeypatch):
    def refuse(name):
        raise posix.PermissionsError

    token = segment.name.removeprefix(PREFIX)
    semaphore = semaphores.make_semaphore(token, segment.slot(2))
    with monkeypatch.context() as patch:
        patch.setattr(posix, "unlink_semaphore", refuse)
        patch.setattr(posix, "unlink_shared_memory", refuse)
        leftovers.remove(token)
        assert segment.slot(2).semaphore == 0
    semaphore.unlink()
    semaphore.close()


def test_what_a_dead_coordinator_left_is_found_though_its_segment_is_damaged(segment):
    token = segment.name.removeprefix(PREFIX)
    semaphore = semaphores.make_semaphore(token, segment.slot(2))
    semaphore.close()
    segment.words[0] = 0
    assert leftovers.remove(token) == [semaphore.name, "/" + segment.name]


def test_a_segment_of_another_user_is_not_read(segment, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: 1)
    monkeypatch.setattr(os, "geteuid", lambda: 1)
    with pytest.raises(ProtocolError, match="belongs to user"):
        Segment.open(segment.name)


class Taken:
    """A directory such as /dev/shm, where another user may take names; who has which is said here."""

    def __init__(self, parent, monkeypatch):
        self.parent, self.others = parent, set()
        monkeypatch.setattr(places, "_owner_of", self.owner_of)

    def owner_of(self, path):
        return 7 if path.name in self.others else 1000 if path.exists() else None

    def base(self):
        return places._ours(self.parent, 1000).name


def test_a_base_directory_that_another_user_has_is_passed_over(tmp_path, monkeypatch):
    taken = Taken(tmp_path, monkeypatch)
    assert taken.base() == "sfmp-1000"
    taken.others = {"sfmp-1000", "sfmp-1000.1"}
    assert taken.base() == "sfmp-1000.2"
    (tmp_path / "sfmp-1000.2").mkdir()
    taken.others |= {"sfmp-1000.3"}
    assert taken.base() == "sfmp-1000.2"
    taken.others = set()  # he gives them up: we stay where our flows are
    assert taken.base() == "sfmp-1000.2"
    (tmp_path / "sfmp-1000").mkdir()
    assert taken.base() == "sfmp-1000"


def test_a_flow_starts_though_another_user_has_its_base_directory(run_python):
    base = SHARED / f"sfmp-{os.getuid()}"
    code = f"""
from strictflow_mp import StrictFlow
from strictflow_mp.system import place
look = place._owner_of
place._owner_of = lambda path: 7 if str(path) == "{base}" else look(path)
with StrictFlow({NAME!r}, state={{"n": 5}}):
    flow = StrictFlow.attach({NAME!r})
    print(flow.state["n"], flow._client.place.directory.parent)
    flow.close()
"""
    done = run_python(code, env={"STRICTFLOW_MP_DIR": ""})
    assert done.stdout + done.stderr == f"5 {SHARED / base.name}.1\n"
    assert not list(SHARED.glob(f"{base.name}.*"))  # nobody has anything there any more
