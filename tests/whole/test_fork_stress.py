"""Forks by Python, by C and in tasks, execs, threads, and kills of all but the owner: seconds of `fork_stress`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

STRESS = Path(__file__).with_name("fork_stress.py")
KINDS = [
    "python",
    "c",
    "multiprocessing",
    "task",
    "child of a child",
    "child of a child of C",
    "exec",
    "exec by C",
    "with threads",
    "with threads by C",
]


@pytest.mark.parametrize("pause", [0, 1], ids=["the coordinator lives", "coordinators are killed"])
def test_no_child_hangs_reads_what_is_old_or_costs_a_place(run_python, record_property, pause):
    done = run_python(STRESS, "--seconds", 8, "--patience", 40, "--pause", pause, timeout=170)
    record_property("report", done.stdout)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "nothing is wrong" in done.stdout
    for kind in KINDS:
        assert re.search(rf"^  {kind}: [1-9]", done.stdout, re.MULTILINE), done.stdout
    deaths = int(re.search(r"deaths of the coordinator: (\d+)", done.stdout)[1])
    assert (deaths > 0) is (pause > 0)


@pytest.mark.by_hand
@pytest.mark.parametrize(
    ("sabotage", "seen"),
    [
        ("drop_receipts", "twice"),
        ("keep_the_mark", "undead"),
        ("write_nothing", "lost"),
        ("raise_no_flag", "stale"),
        ("store_no_pin", "torn"),
    ],
)
def test_the_check_sees_every_sabotage(run_python, sabotage, seen):
    arguments = ["--seconds", 25, "--patience", 20, "--pause", 1, "--sabotage", sabotage]
    done = run_python(STRESS, *arguments, timeout=170)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(rf"^  {seen}: ", done.stdout, re.MULTILINE), done.stdout
