"""The command line, used as a person or a script would."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import termios
from contextlib import contextmanager
from datetime import date

import psutil
import pytest
from holding import held

from strictflow_mp import StrictFlow
from strictflow_mp.system.place import Place, base_directory
from strictflow_mp.tools.cli import main
from strictflow_mp.tools.commands import group

SERVE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background would ignore them
signal.signal(signal.SIGHUP, signal.{})
from strictflow_mp.tools.cli import main
sys.exit(main(["serve", *sys.argv[1:]]))
"""


@contextmanager
def serving(name, *options, hangup="SIG_DFL", **given):
    """`strictflow-mp serve`, ready; killed if it still runs in the end."""
    command = [sys.executable, "-c", SERVE.format(hangup), name, "--log", "error", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **given) as process:
        try:
            assert process.stdout.readline() == f"flow {name!r} is ready\n"
            yield process
        finally:
            process.kill()


@pytest.fixture
def served(tmp_path):
    """A flow with a first state."""
    state = tmp_path / "state.json"
    state.write_text('{"flag": true, "limits": {"low": 1}}')
    with serving("served", "--state", str(state)) as process:
        yield process


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
        for given in (["show", "served"], ["top", "served", "--once"]):
            assert main(given) == 1
            assert "`strictflow-mp serve served` goes on from it" in capsys.readouterr().err
        assert main(["clean"]) == 0
        assert "removed flow 'served'" in capsys.readouterr().out
        assert listed() == {"living": "alive"}
        assert living.state["key"] == 1


def cut_off(*names):
    """Source that makes importing these fail, as if they were not installed."""
    return f"import sys; sys.modules.update(dict.fromkeys({names})); "


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_the_extra_each_command_says_what_to_install(run_python, missing):
    call = "from strictflow_mp.tools.cli import main; sys.exit(main({}))"
    for given in (["ls"], ["serve", "flags"], ["demo", "--help"], []):
        done = run_python(cut_off(missing) + call.format(given))
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.count("\n") == 1
        assert "pip install 'strictflow-mp[cli]'" in done.stderr
    done = run_python(
        cut_off(missing) + "from strictflow_mp.tools import demo; demo.run = lambda: 7; " + call.format(["demo"])
    )
    assert done.returncode == 7


def test_a_wrong_call_exits_with_2_and_says_what_is_wrong(capsys, tmp_path):
    no_object = tmp_path / "list.json"
    no_object.write_text("[1]")
    no_json = tmp_path / "broken.json"
    no_json.write_text("{")
    for given, said in (
        (["shwo"], "No such command 'shwo'"),
        (["top"], "Missing argument 'NAME'"),
        (["top", "flags", "--interval", "0"], "--interval"),
        (["serve", "flags", "--state", str(tmp_path / "absent")], "does not exist"),
        (["serve", "flags", "--state", str(no_object)], "must hold a JSON object"),
        (["serve", "flags", "--state", str(no_json)], "is not JSON"),
        (["serve", "flags", "--log", "loud"], "--log"),
        (["serve", ""], "a flow has a name"),
    ):
        assert main(given) == 2, given
        assert said in capsys.readouterr().err, given


@pytest.mark.parametrize("given", [[], *([name] for name in group.commands)])
def test_every_command_has_a_help_with_an_example(capsys, given):
    assert main([*given, "--help"]) == 0
    told = capsys.readouterr().out
    assert given == ["demo"] or "Examples:" in told


def test_show_finds_keys_that_are_no_strings_and_writes_any_value_as_json(capsys):
    state = {7: {"bytes": b"\x00", "when": date(2026, 1, 2)}, "7": 1, (1, "a"): {3, 1}}
    with StrictFlow("keys", state=state):
        for key, text in (("7", "1"), ("(1, 'a')", "[1, 3]")):
            assert main(["show", "keys", key, "--json"]) == 0
            assert capsys.readouterr().out == text + "\n"
        assert main(["show", "keys", "--json"]) == 0
        assert [row["key"] for row in json.loads(capsys.readouterr().out)] == [[1, "a"], "7", 7]


def test_the_shell_completes_flows_and_keys(served, run_python):
    def completed(words):
        env = {"_STRICTFLOW_MP_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        lines = run_python("-m", "strictflow_mp", env=env).stdout.split()
        return [line.partition(",")[2] for line in lines]

    assert completed("strictflow-mp show se") == ["served"]
    assert completed("strictflow-mp show served li") == ["limits"]
    assert completed("strictflow-mp show nobody li") == []
    served.terminate()
    assert served.wait(30) == 0


def test_show_has_a_line_for_each_key(served, capsys):
    assert main(["show", "served"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [line[:2] for line in lines] == [["'flag'", "bool"], ["'limits'", "dict"]]
    assert all(int(line[2]) > 0 for line in lines)
    served.terminate()
    assert served.wait(30) == 0


def test_serve_tells_the_service_manager(tmp_path):
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(60)
        with serving("told", env={**os.environ, "NOTIFY_SOCKET": address}) as process:
            assert manager.recv(100) == b"READY=1"
            StrictFlow.attach("told").close()
            process.send_signal(signal.SIGINT)
            assert manager.recv(100) == b"STOPPING=1"
            assert process.wait(30) == 0


def test_serve_ends_with_its_terminal_and_leaves_nothing():
    terminal, end = os.openpty()

    def take_terminal():
        fcntl.ioctl(end, termios.TIOCSCTTY, 0)

    with serving("hung-up", start_new_session=True, preexec_fn=take_terminal) as process:
        os.close(end)
        os.close(terminal)
        assert process.wait(30) == 0


def test_serve_is_reloaded_by_sighup_and_says_how_long_nobody_ran_tasks(eventually):
    with serving("hupped", start_new_session=True) as process:
        flow = StrictFlow.attach("hupped")
        flow.state["n"] = 1
        pid = flow.stats().coordinator_pid
        process.send_signal(signal.SIGHUP)
        assert re.fullmatch(r"flow 'hupped' is reloaded: a pause of \d+\.\d{3} s\n", process.stdout.readline())
        assert flow.state["n"] == 1
        stats = flow.stats()
        assert (stats.restarts, stats.reloads) == (1, 1)
        assert stats.coordinator_pid != pid
        flow.close()
        process.terminate()
        assert process.wait(30) == 0


def test_reload_tells_its_pause(served, capsys):
    assert main(["reload", "served"]) == 0
    assert re.fullmatch(r"flow 'served' is reloaded: a pause of \d+\.\d{3} s\n", capsys.readouterr().out)
    assert main(["reload", "served", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == {"name", "pause"}
    assert main(["show", "served", "flag"]) == 0
    served.terminate()
    assert served.wait(30) == 0


def test_serve_under_nohup_outlives_its_terminal():
    with serving("kept", hangup="SIG_IGN") as process:
        with open(f"/proc/{process.pid}/status") as status:
            ignored = next(int(line.split()[1], 16) for line in status if line.startswith("SigIgn:"))
        assert ignored >> signal.SIGHUP - 1 & 1
        process.terminate()
        assert process.wait(30) == 0


def test_ls_waits_for_nobody_and_show_says_for_whom_it_waits(run_python, eventually, tmp_path):
    with StrictFlow("busy", state={"a": 1, "[red]b": 2}) as flow:
        with held(flow):
            done = run_python("-m", "strictflow_mp", "ls", "--json")
            (listed,) = json.loads(done.stdout)
            assert (listed["status"], listed["version"], listed["keys"], listed["workers"]) == ("alive", 1, 2, 1)
            said = tmp_path / "said"
            command = [sys.executable, "-m", "strictflow_mp", "show", "busy"]
            with said.open("w") as stderr:
                process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
            eventually(lambda: f"SF-LOOP runs a task of process {os.getpid()}" in said.read_text())
        assert "'[red]b'" in process.communicate(timeout=30)[0]
        assert process.returncode == 0


def test_a_damaged_flow_is_listed_with_what_is_wrong(served, capsys):
    token = json.loads(next(base_directory().glob("served-*/lock")).read_text().partition("\n")[0])["token"]
    with open(f"/dev/shm/sfmp-{token}", "r+b") as magic:
        kept = magic.read(8)
        magic.seek(0)
        magic.write(bytes(8))
        magic.flush()
        assert main(["ls"]) == 0
        out, err = capsys.readouterr()
        assert out.splitlines()[1].split()[:2] == ["served", "alive"]
        assert "flow 'served': " in err
        assert "is not a StrictFlow segment" in err
        magic.seek(0)
        magic.write(kept)
    served.terminate()
    assert served.wait(30) == 0


def test_serve_ends_when_somebody_else_has_stopped_the_flow():
    with serving("served", "--log", "critical", stderr=subprocess.PIPE) as process:
        StrictFlow.attach("served").stop_loop()
        assert process.wait(30) == 1
        assert process.stderr.read() == "strictflow-mp: flow 'served' has ended\n"


@pytest.mark.parametrize("end", ["SIGTERM", "SIGINT", "serve alone is killed", "both are killed"])
def test_only_a_kill_leaves_the_state_to_the_next(served, end, eventually):
    flow = StrictFlow.attach("served")
    flow.state["flag"] = False
    coordinator = psutil.Process(flow.stats().coordinator_pid)
    if end == "both are killed":
        coordinator.suspend()  # it would find itself deserted, and clean up
    flow.close()
    served.send_signal(getattr(signal, end, signal.SIGKILL))
    served.wait(30)
    if end == "both are killed":
        coordinator.kill()
    if end != "serve alone is killed":  # then it waits to be adopted
        eventually(lambda: not Place.of("served").is_inhabited())
    with StrictFlow("served", state={"flag": "first"}) as heir:
        assert heir.state["flag"] == (False if "killed" in end else "first")


@pytest.mark.parametrize("missing", [[], ["click", "rich"]])
def test_an_interrupted_command_ends_with_130_and_no_traceback(run_python, missing):
    done = run_python(
        cut_off(*missing) + "import strictflow_mp.tools.demo as demo, signal\n"
        "demo.run = lambda *_, **__: signal.raise_signal(signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from strictflow_mp.tools.cli import main\n"
        "sys.exit(main(['demo']))"
    )
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
