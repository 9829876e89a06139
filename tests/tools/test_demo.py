"""The demo shows its timeline, and tells when a reader saw what it must not see."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import strictflow_mp
from strictflow_mp.tools.demo import check

SUPPORT = Path(__file__).parents[1] / "support"


def test_the_demo_shows_a_coordinator_and_four_workers_and_finds_no_fault(run_python):
    done = run_python("-m", "strictflow_mp", "demo")
    assert done.returncode == 0, done.stderr
    lanes = [line.split()[0] for line in done.stdout.splitlines() if line.endswith("|")]
    assert lanes == ["SF-LOOP", "worker-1", "worker-2", "worker-3", "worker-4"]
    assert "no reader saw a stale or a half-done state" in done.stdout


def test_the_demo_fails_when_the_gate_is_broken(run_python, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sabotage\nsabotage.open_the_gate()\n")
    path = [tmp_path, SUPPORT, Path(strictflow_mp.__file__).parent.parent]
    done = run_python("-m", "strictflow_mp", "demo", env={"PYTHONPATH": os.pathsep.join(map(str, path))})
    assert done.returncode == 1
    assert "FAULT: worker-" in done.stdout


WRITE = [
    {"time": 1.0, "who": "worker-1", "event": "submit", "returned": 1.0, "seq": 1},
    {"time": 3.0, "who": "worker-1", "event": "committed", "version": 1, "seq": 1},
]


@pytest.mark.parametrize(
    ("began", "version", "status", "fault"),
    [
        (0.9, 0, "v0", None),
        (0.9, 1, "v1", None),
        (1.1, 1, "v1", None),
        (1.1, 0, "v0", "after the submission of 1 had returned"),
        (0.9, 1, "v0", "half-done"),
    ],
)
def test_each_read_is_held_against_each_write(began, version, status, fault):
    read = {"time": 2.0, "who": "worker-2", "event": "read", "began": began, "version": version, "status": status}
    verdict = check([*WRITE, read])
    assert (verdict.reads, verdict.writes) == (1, 1)
    assert [fault in found for found in verdict.faults] == ([True] if fault else [])
