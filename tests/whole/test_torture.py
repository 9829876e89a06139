"""Deaths of workers and coordinators at random moments; and that this very check sees when a rule is broken."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TORTURE = Path(__file__).with_name("torture.py")


@pytest.fixture
def torture(run_python):
    def torture(**options):
        arguments = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", value)]
        return run_python(TORTURE, "--seconds", 30, "--keys", 2000, *arguments, timeout=110)

    return torture


def test_no_death_of_workers_and_coordinators_loses_repeats_or_hides_a_task(torture, record_property):
    done = torture(coordinator_deaths=15, worker_deaths=40, seed=1, pause=0.05)
    record_property("report", done.stdout)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "deaths: coordinator 15 " in done.stdout
    assert "workers 40\n" in done.stdout
    assert int(re.search(r"acknowledged (\d+)", done.stdout)[1]) > 100
    assert int(re.search(r"reads checked: (\d+)", done.stdout)[1]) > 50


@pytest.mark.proof
@pytest.mark.parametrize(
    ("sabotage", "seen"),
    [
        ("drop_receipts", "twice"),
        ("keep_the_mark", "undead"),
        ("write_half", "torn"),
        ("write_nothing", "lost"),
        ("lose_answers", "unresolved"),
        ("raise_no_flag", "stale"),
    ],
)
def test_the_check_sees_every_sabotage(torture, sabotage, seen):
    deaths = {"coordinator_deaths": 8, "worker_deaths": 8}
    if sabotage == "lose_answers":
        deaths = {"coordinator_deaths": 1, "worker_deaths": 20}  # the next coordinator would answer
    done = torture(**deaths, seed=1, pause=0.05, patience=1, sabotage=sabotage)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(rf"^  {seen}: ", done.stdout, re.MULTILINE), done.stdout
