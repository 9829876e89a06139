"""A program that has no Python interpreter to start, or starts it in another way, is told so, and owns no flow."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import textwrap
from multiprocessing import spawn

import pytest

from strictflow_mp import StrictFlow, StrictFlowError
from strictflow_mp.system.place import Place

FROZEN = r"this is a frozen program: .* \(`strictflow-mp serve NAME`\), and attach to it here$"
GEVENT = r"gevent has patched this process, .* \(`strictflow-mp serve NAME`\), and attach to it here$"


@pytest.fixture
def interpreter():
    """What multiprocessing starts; put back afterwards."""
    before = spawn.get_executable()
    yield
    spawn.set_executable(before)


def work():
    pass


def freeze(patch):
    patch.setattr(sys, "frozen", True, raising=False)


def patch_with_gevent(patch):
    class Popen(subprocess.Popen):
        __module__ = "gevent.subprocess"

    patch.setattr(subprocess, "Popen", Popen)


@pytest.mark.parametrize(
    ("become", "sentence"), [(freeze, FROZEN), (patch_with_gevent, GEVENT)], ids=["frozen", "patched by gevent"]
)
def test_such_a_program_starts_neither_a_coordinator_nor_workers_but_may_attach(monkeypatch, become, sentence):
    with StrictFlow("served", state={"n": 1}) as flow:
        become(monkeypatch)
        with pytest.raises(StrictFlowError, match=f"flow 'refused': {sentence}"):
            StrictFlow("refused").start_loop()
        with pytest.raises(StrictFlowError, match=f"flow 'served': {sentence}"):
            flow.spawn(work)
        flow.close()
        assert flow.state["n"] == 1
        monkeypatch.undo()
    assert not Place.of("refused").directory.exists()


@pytest.mark.parametrize("nothing", [None, ""])
def test_an_interpreter_that_does_not_know_its_own_name_is_told_how_to_name_one(monkeypatch, interpreter, nothing):
    monkeypatch.setattr(spawn, "_python_exe", nothing)
    with pytest.raises(StrictFlowError, match=r"flow 'embedded': .*with multiprocessing\.set_executable\(\)$"):
        StrictFlow("embedded").start_loop()
    monkeypatch.undo()
    spawn.set_executable(sys.executable)
    with StrictFlow("embedded", state={"n": 1}) as flow:
        assert flow.state["n"] == 1


def test_a_program_that_is_started_as_an_interpreter_does_not_start_itself_again(tmp_path, run_python):
    starts = tmp_path / "starts"
    program = tmp_path / "program"
    code = f"""\
    #!{sys.executable}
    import multiprocessing, sys
    from strictflow_mp import StrictFlow

    with open({str(starts)!r}, "a") as file:
        file.write("x")
    multiprocessing.set_executable(__file__)  # as if all of this were compiled into one file
    StrictFlow("itself").start_loop()
    """
    program.write_text(textwrap.dedent(code))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    done = run_python(program)
    assert done.returncode == 1
    assert starts.read_text() == "xx"
    assert (
        f"flow 'itself': {os.fspath(program)} was started as a Python interpreter, and is this program" in done.stderr
    )
    assert "flow 'itself': its coordinator did not start (exit code 1)" in done.stderr
