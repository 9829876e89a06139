"""A program that PyInstaller has frozen: it attaches to a flow that somebody serves, and cannot own one."""

from __future__ import annotations

import subprocess
import sys

import pytest
from servers import EXAMPLES

from strictflow_mp import StrictFlow


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """The example, in one directory. It is built without what it does not need, which would take most of the time."""
    directory = tmp_path_factory.mktemp("frozen")
    options = ["--onedir", "--log-level", "WARN", "--exclude-module", "numpy", "--exclude-module", "tkinter"]
    built = subprocess.run(
        [sys.executable, "-m", "PyInstaller", *options, EXAMPLES / "frozen_program.py"],
        check=False,
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert built.returncode == 0, built.stderr
    return directory / "dist" / "frozen_program" / "frozen_program"


def run(*command):
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


def test_a_frozen_program_reads_writes_and_calls_tasks_and_is_told_that_it_owns_no_flow(frozen, serve):
    alone = run(frozen)
    assert alone.returncode == 1
    assert "no coordinator serves it" in alone.stderr
    owning = run(frozen, "own")
    assert owning.returncode == 1
    assert owning.stderr.splitlines()[-2].endswith(
        "flow 'till': this is a frozen program: it has no Python interpreter of its own to start a coordinator or "
        f"workers in; start the flow from an installed Python {sys.version_info[0]}.{sys.version_info[1]} "
        "(`strictflow-mp serve NAME`), and attach to it here"
    )
    serve("till")
    first, second = run(frozen), run(frozen)
    assert (first.stdout, first.stderr) == ("sold: 1, and seen so: 1\n", "")
    assert (second.stdout, second.stderr) == ("sold: 2, and seen so: 2\n", "")
    flow = StrictFlow("till")
    assert flow.state["sold"] == 2
    assert len(flow.stats().workers) == 1  # nobody but this one
    flow.close()
