"""How much memory the limits of a container leave, by what the files of both versions of cgroups say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from strictflow_mp.system import cgroup
from strictflow_mp.system.cgroup import RESERVE_BYTES, Headroom, Limit, tightest
from strictflow_mp.system.machine import FREE_THREADED

MIB = 1 << 20
V1_ROOT = Path("/sys/fs/cgroup/memory")


def write_level(level, **files):
    level.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (level / name.replace("__", ".")).write_text(f"{text}\n")


@pytest.fixture
def no_swap(monkeypatch):
    monkeypatch.setattr(cgroup, "_free_swap", lambda level: 0)


@pytest.fixture
def look(tmp_path, no_swap):
    """`look("0::/a/b")`: the tightest limit in `tmp_path`, for a process that is there."""

    def look(*lines):
        membership = tmp_path / "membership"
        membership.write_text("\n".join(lines) + "\n")
        return tightest(tmp_path, membership)

    return look


def test_version_2(look, tmp_path):
    write_level(tmp_path)  # the root has no such files
    stat = "anon 7\nfile 900\nactive_file 5\ninactive_file 4\nshmem 700"
    write_level(tmp_path / "a", memory__max="max", memory__current=10, memory__stat=stat)
    assert look("0::/a") is None
    write_level(tmp_path / "a" / "b", memory__max=1000, memory__current=600, memory__stat=stat)
    limit = look("0::/a/b")
    assert limit == Limit(tmp_path / "a" / "b" / "memory.max", 1000, 409)
    write_level(tmp_path / "a", memory__max=2000, memory__current=1700, memory__stat=stat)
    assert look("0::/a/b").left == 309  # of a level above
    assert look("0::/not/seen/here") is None  # the root is that of the container


def test_version_1(look, tmp_path):
    stat = "inactive_file 1\nactive_file 1\ntotal_inactive_file 30\ntotal_active_file 20"
    files = {"memory__usage_in_bytes": 500, "memory__stat": stat}
    write_level(tmp_path / "memory", memory__limit_in_bytes=1 << 62, **files)
    write_level(tmp_path / "memory" / "c", memory__limit_in_bytes=800, **files)
    assert look("9:cpu:/c", "4:memory:/c", "0::/") == Limit(tmp_path / "memory/c/memory.limit_in_bytes", 800, 350)
    write_level(tmp_path / "memory", memory__limit_in_bytes=700, **files)
    assert look("4:memory:/elsewhere").left == 250


@pytest.mark.parametrize("what", ["memory__current", "memory__stat"])
def test_files_that_cannot_be_read_are_no_limit(look, tmp_path, what):
    files = {"memory__max": 1000, "memory__current": 1, "memory__stat": "active_file 1\ninactive_file 1"}
    write_level(tmp_path / "a", **(files | {what: "?"}))
    assert look("0::/a") is None or what == "memory__stat"
    assert tightest(tmp_path, tmp_path / "nowhere") is None


def test_free_swap_counts_as_far_as_its_own_limit_goes(tmp_path, monkeypatch):
    real = Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda path, **how: "MemFree: 1 kB\nSwapFree: 8 kB\n" if path.name == "meminfo" else real(path, **how),
    )
    assert cgroup._free_swap(tmp_path) == 8192
    write_level(tmp_path, memory__swap__max="max")
    assert cgroup._free_swap(tmp_path) == 8192
    write_level(tmp_path, memory__swap__max=3000, memory__swap__current=1000)
    assert cgroup._free_swap(tmp_path) == 2000


class Limits:
    """What `tightest` says, and how often it was asked."""

    def __init__(self, monkeypatch):
        self.left, self.looks, self.now = None, 0, 0.0
        monkeypatch.setattr(cgroup, "tightest", self.tightest)
        monkeypatch.setattr(cgroup, "time", self)

    def monotonic(self):
        return self.now

    def tightest(self):
        self.looks += 1
        return None if self.left is None else Limit(Path("limit"), 1 << 30, self.left)


@pytest.fixture
def limits(monkeypatch):
    return Limits(monkeypatch)


def test_where_there_is_no_limit_it_is_looked_for_seldom(limits):
    headroom = Headroom()
    for _ in range(200):
        assert headroom.refuses(MIB) is None
    assert limits.looks == 1
    limits.now += cgroup.LOOK_SECONDS
    headroom.refuses(MIB)
    assert limits.looks == 2


def test_the_nearer_the_limit_the_more_often_it_is_looked_at(limits):
    headroom, left = Headroom(), 64 * MIB
    claimed = 0
    while True:
        limits.left = left - claimed
        if headroom.refuses(MIB):
            break
        claimed += MIB
    assert claimed == left - RESERVE_BYTES
    assert 10 < limits.looks < 40
    limits.left += MIB
    assert headroom.refuses(MIB) is None  # somebody has given memory back


def test_a_state_that_outgrows_its_container_is_full_and_goes_on(run_python):
    level = V1_ROOT / f"strictflow-test-{os.getpid()}"
    try:
        level.mkdir()
    except OSError:
        pytest.skip("no cgroup of version 1 can be made here")
    try:
        done = run_python(f"""
import os
with open("{level}/memory.limit_in_bytes", "w") as file:
    file.write("{128 * MIB if not FREE_THREADED else 256 * MIB}")
with open("{level}/cgroup.procs", "w") as file:
    file.write(str(os.getpid()))
from strictflow_mp import StateFull, StrictFlow
with StrictFlow(state={{}}) as flow:
    try:
        for number in range(400):
            flow.state[number] = bytes(1_000_000)
    except StateFull as error:
        print(error.flow == flow.name, "the container has no room" in str(error), "{level}" in str(error))
    kept = len(flow.state)
    print(20 < kept < 250, len(flow.state[0]))
    flow.state.clear()
    flow.state["x"] = bytes(1_000_000)
    print(len(flow.state), flow.stats().restarts)
""")
        assert (done.stdout, done.stderr) == ("True True True\nTrue 1000000\n1 0\n", "")
    finally:
        level.rmdir()
