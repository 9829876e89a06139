"""Where processes that we start look for modules: where their parent does, and nowhere that it does not."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pathlib
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

import strictflow_mp
from strictflow_mp import StrictFlow, read
from strictflow_mp.coordinator import admission
from strictflow_mp.system.paths import fitting, usable
from strictflow_mp.trace import process_name
from strictflow_mp.wire.handshake import MAX_PATH_BYTES, MAX_PATHS

LIBRARY = Path(strictflow_mp.__file__).parent
PATH = [entry for entry in sys.path if entry and not Path(entry, "strictflow_mp").exists()]
# Where another copy of the library is there may be what it needs: such an entry comes last.
REST = [entry for entry in sys.path if entry and entry not in PATH and Path(entry) != LIBRARY.parent]

LIFE = """
import os, signal, sys
from strictflow_mp import StrictFlow, read

flow = StrictFlow("life", state={"n": 1})

def flags():  # but for safe_path, which is always on in a child
    import sys
    return tuple(flag for flag in repr(sys.flags)[len("sys.flags("):-1].split(", ") if "safe_path" not in flag)

@read(flow)
def look():
    import os, sys
    return flags(), sys.path[:], sys.warnoptions[:], os.getpid()

def tell():
    import sys
    flow.state["worker"] = (flags(), sys.path[:], sys.warnoptions[:])

with flow:
    here = (flags(), list(dict.fromkeys(sys.path)), sys.warnoptions[:])
    with flow.spawn(tell) as workers:
        pass
    assert workers.exitcodes == [0], workers.exitcodes
    for there in (look().result(30), flow.state["worker"]):
        assert tuple(there[0]) == here[0], (there[0], here[0])
        assert list(there[1]) == here[1], (there[1], here[1])
        assert list(there[2])[-len(here[2]) or None:] == here[2], (there[2], here[2])
    # A coordinator that is started again is a child like the first.
    os.kill(look().result(30)[3], signal.SIGKILL)
    flow.state["n"] += 1  # when this is committed, the next one serves
    assert tuple(look().result(30)[0]) == here[0]
print("done")
"""


def run(options, code, cwd, path):
    """Run a program under these options, in that directory; it finds modules in *path*."""
    here = "[p for p in sys.path if p and not os.path.exists(os.path.join(p, 'strictflow_mp'))]"
    begin = f"import os, sys; sys.path[:] = {here} + {path!r}\n"
    # Not with `-c`, which puts the current directory first.
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "program.py"
        program.write_text(begin + textwrap.dedent(code))
        return subprocess.run(
            [sys.executable, *options, str(program)],
            check=False,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
        )


@pytest.fixture
def trap(tmp_path):
    """A directory with a module for each name of the standard library, that tells of being run."""
    directory = tmp_path / "trap"
    directory.mkdir()
    sprung = tmp_path / "sprung"
    code = f"with open({str(sprung)!r}, 'a') as file: file.write(__name__ + ' ')\nraise SystemExit(66)\n"
    for name in (*sys.stdlib_module_names, "msgpack", "posix_ipc", "cloudpickle", "psutil", "strictflow_mp"):
        (directory / f"{name}.py").write_text(code)
    yield directory
    assert not sprung.exists(), f"run from the current directory: {sprung.read_text()}"


@pytest.mark.parametrize("options", [["-I"], []], ids=["isolated", "plain"])
def test_nothing_is_imported_from_the_current_directory_unless_the_parent_does(trap, options):
    done = run(options, LIFE, trap, [*PATH, str(LIBRARY.parent), *REST])
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_packages_beside_the_library_do_not_come_before_the_standard_library(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "strictflow_mp").symlink_to(LIBRARY)
    for name in ("enum", "typing", "pickle", "dataclasses"):  # from PyPI, for Pythons that lacked them
        (site / f"{name}.py").write_text("raise SystemExit(66)")
    done = run(["-I"], LIFE, tmp_path, [*PATH, str(site), str(LIBRARY.parent), *REST])
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_a_child_has_this_very_library_though_another_comes_first_on_the_path(tmp_path):
    (tmp_path / "other" / "strictflow_mp").mkdir(parents=True)
    (tmp_path / "other" / "strictflow_mp" / "__init__.py").write_text("raise SystemExit(66)")
    late = f"import strictflow_mp; sys.path.insert(0, {str(tmp_path / 'other')!r})\n"
    done = run(["-I"], late + LIFE, tmp_path, [*PATH, str(LIBRARY.parent), *REST])
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.parametrize(
    "options",
    [
        ["-O"],
        ["-OO", "-B"],
        ["-E", "-s"],
        ["-bb", "-W", "error"],
        ["-X", "utf8", "-X", "dev", "-W", "ignore::ResourceWarning"],
        pytest.param(["-P"], marks=pytest.mark.skipif(sys.version_info < (3, 11), reason="there is no -P")),
    ],
    ids=" ".join,
)
def test_children_run_under_the_flags_of_their_parent(tmp_path, options):
    done = run(options, LIFE, tmp_path, [*PATH, str(LIBRARY.parent), *REST])
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_serve_run_as_a_module_does_not_look_in_the_current_directory(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(LIBRARY.parent), *PATH, *REST])}
    command = [sys.executable, "-m", "strictflow_mp", "serve", "module"]
    server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    try:
        flow = StrictFlow.attach("module", timeout=30)

        @read(flow)
        def path():
            return sys.path[:]

        assert str(tmp_path) not in path().result(30)
        flow.close()
    finally:
        server.terminate()
        server.wait()


# What a process says of its sys.path


def test_what_another_process_can_use_is_absolute_and_is_a_name_that_a_file_can_have(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Name(str):
        def __str__(self):
            return "/elsewhere"

    entries = ["", "lib", "/srv/a", pathlib.Path("/srv/b"), None, 7, b"/srv/c", "/srv/\0", Name("/srv/d"), "/srv/a"]
    found = usable([*entries, "/srv/caf\udce9", "/srv/\ud800"])
    here = str(tmp_path)
    assert found == [here, f"{here}/lib", "/srv/a", "/srv/d", "/srv/caf\udce9"]
    assert {type(path) for path in found} == {str}


def test_relative_entries_mean_nothing_when_the_current_directory_is_gone(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert usable(["", "lib", "/srv"]) == ["/srv"]


def test_what_does_not_fit_is_first_what_is_not_there(tmp_path):
    there = str(tmp_path)
    assert fitting(["/nowhere/1", there], 2, 1000) == ["/nowhere/1", there]
    assert fitting(["/nowhere/1", there, "/"], 2, 1000) == [there, "/"]
    assert fitting(["/", there, "/", "/"], 2, 1000) == ["/", there]
    assert fitting(["/", there], 2, 3) == ["/"]


MODULE = "def where():\n    return __name__\n"

CLIENT = """
import os, pathlib, sys
from strictflow_mp import StrictFlow, read
{spoil}
import found_there
flow = StrictFlow("paths")
assert read(flow)(found_there.where)().result(30) == "found_there"
flow.close()
with StrictFlow("its-own", state={{"n": 1}}) as own:  # both its coordinator and its workers look there, too
    assert read(own)(found_there.where)().result(30) == "found_there"
    with own.spawn(found_there.where) as workers:
        pass
    assert workers.exitcodes == [0], workers.exitcodes
print("done")
"""


@pytest.mark.parametrize(
    "spoil",
    [
        "sys.path += [pathlib.Path('/srv/somewhere'), None, 7]; sys.path.append(os.getcwd())",
        "sys.path += [os.fsdecode(b'/srv/caf\\xe9'), os.getcwd()]",
        "sys.path += [*(f'/nowhere/{i}' for i in range(1100)), os.getcwd()]",
        "sys.path += [*(f'/nowhere/{i:02000}' for i in range(600)), os.getcwd()]",
        "sys.path.append('')",
        "sys.path.append('../lib')",
        "sys.path = (*sys.path, os.getcwd()); sys.path = list(sys.path)",
        "del sys.argv; sys.path.append(os.getcwd())",
        "sys.argv = [pathlib.Path('a'), 7]; sys.path.append('.')",
    ],
    ids=["odd", "no-utf8", "many", "long", "empty", "relative", "tuple", "no-argv", "odd-argv"],
)
def test_whatever_is_on_the_path_of_a_process_it_attaches_and_its_modules_are_found(tmp_path, spoil):
    directory = tmp_path / "lib"
    directory.mkdir()
    (directory / "found_there.py").write_text(MODULE)
    with StrictFlow("paths", state={"n": 1}):
        code = CLIENT.format(spoil=spoil)
        done = run([], code, directory, [*PATH, str(LIBRARY.parent), *REST])
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_a_path_that_is_too_long_is_cut_with_a_word(caplog, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, *(f"/nowhere/{i}" for i in range(MAX_PATHS))])
    with caplog.at_level(logging.WARNING, "strictflow_mp"), StrictFlow("cut", state={"n": 1}) as flow:
        assert flow.state["n"] == 1
    assert f"of the {len(usable(sys.path))} entries of sys.path" in caplog.text
    assert MAX_PATH_BYTES < 1 << 20


def test_the_coordinator_says_which_entries_it_does_not_look_at(caplog, monkeypatch):
    full = [*sys.path, *(f"/full/{i}" for i in range(admission.MAX_ALL_PATHS - 1 - len(set(sys.path))))]
    monkeypatch.setattr(sys, "path", full)
    before = len(full)
    with caplog.at_level(logging.WARNING, "strictflow_mp"):
        admission.take_paths(["/new/1", "relative", "/new/2", "/full/0", "/new/\0", "/new/3"], 4711)
    assert sys.path[before:] == ["/new/1"]
    assert "of pid 4711, the last 2 entries" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "name"), [(["/a/b"], "b"), ([], "python"), (None, "python"), ([Path("/a")], "a")]
)
def test_a_process_has_a_name_in_traces_whatever_its_arguments_are(monkeypatch, arguments, name):
    if arguments is None:
        monkeypatch.delattr(sys, "argv")
    else:
        monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(multiprocessing.current_process(), "name", "MainProcess")
    assert process_name() == name
