"""The command line, used as a person or a script would."""

from __future__ import annotations

import json
import subprocess
import sys

import psutil
import pytest

from strictflow_mp import StrictFlow
from strictflow_mp.cli import main


@pytest.fixture
def served(tmp_path):
    """`strictflow-mp serve`, ready."""
    state = tmp_path / "state.json"
    state.write_text('{"flag": true, "limits": {"low": 1}}')
    command = [sys.executable, "-m", "strictflow_mp", "serve", "served", "--state", str(state), "--log", "error"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "flow 'served' is ready\n"
        yield process
        process.kill()


def test_serve_runs_a_flow_that_others_attach_to_and_ends_on_sigterm_with_0(served):
    flow = StrictFlow.attach("served")
    assert flow.state["limits"] == {"low": 1}
    flow.close()
    served.terminate()
    assert served.wait(30) == 0


def test_serve_says_that_the_flow_exists_already(served, run_python):
    second = run_python("-m", "strictflow_mp", "serve", "served")
    assert second.returncode == 1
    assert "already lives under that name" in second.stderr
    served.terminate()
    assert served.wait(30) == 0


def test_ls_and_show_tell_what_is_there(served, capsys):
    assert main(["ls", "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert listed | {"pid": 0, "bytes": 0} == {
        "name": "served",
        "pid": 0,
        "status": "alive",
        "version": 1,
        "keys": 2,
        "workers": 0,
        "bytes": 0,
    }
    assert main(["ls"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["served", "alive"]
    assert main(["show", "served", "--json"]) == 0
    assert [(row["key"], row["type"]) for row in json.loads(capsys.readouterr().out)] == [
        ("flag", "bool"),
        ("limits", "dict"),
    ]
    assert main(["show", "served", "limits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"low": 1}
    assert main(["show", "served", "absent"]) == 1
    assert "no key 'absent'" in capsys.readouterr().err
    served.terminate()
    assert served.wait(30) == 0


def test_an_unknown_flow_is_an_error_in_words(capsys):
    assert main(["show", "nobody"]) == 1
    assert "flow 'nobody': no coordinator serves it" in capsys.readouterr().err


def test_clean_removes_what_a_killed_coordinator_left_and_no_more(served, capsys):
    def listed():
        assert main(["ls", "--json"]) == 0
        return {flow["name"]: flow["status"] for flow in json.loads(capsys.readouterr().out)}

    with StrictFlow("living", state={"key": 1}) as living:
        flow = StrictFlow.attach("served")
        coordinator = psutil.Process(flow.stats().coordinator_pid)
        coordinator.suspend()  # so that it does not clean up by itself when its owner ends
        flow.close()
        served.kill()
        served.wait(30)
        coordinator.kill()
        coordinator.wait(30)
        assert listed() == {"living": "alive", "served": "stale"}
        assert main(["clean"]) == 0
        assert "removed flow 'served'" in capsys.readouterr().out
        assert listed() == {"living": "alive"}
        assert living.state["key"] == 1
