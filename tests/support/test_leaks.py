"""The leak check must see every kind of leak, and nothing but leaks."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import socket
import subprocess
import sys
import textwrap
import time
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from leaks import SHARED, VARIABLE, Watch

from strictflow_mp.system import posix

pytest_plugins = ["pytester"]

HERE = Path(__file__).parent
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="shared objects are files on Linux only")


class OwnWatch(Watch):
    """A watch that looks at nothing but the names below, so that these tests may run beside others."""

    def shared(self):
        return [name for name in super().shared() if name.endswith(f"-{os.getpid()}")]


@pytest.fixture
def watch(runtime_dir):
    """What a test leaks on purpose is found, and gone, before the real watch looks."""
    watch = OwnWatch(runtime_dir)
    yield watch
    watch.clean()


def unique(kind):
    return f"sfmp-{kind}-{os.getpid()}"


def sleeping(pid, watch):
    """Whether this is the one thing reported. (For an instant in its start, a process has no arguments.)"""
    (line,) = watch.report() or [""]
    return line.startswith(f"process {pid} (") and line.endswith("time.sleep(60)")


def test_a_tidy_test_leaves_nothing(watch):
    segment = SharedMemory(unique("tidy"), create=True, size=64)
    segment.close()
    segment.unlink()
    subprocess.run([sys.executable, "-c", ""], check=True)
    assert watch.left(0) == []


@on_linux
def test_a_segment_is_found_and_removed(watch):
    path = SHARED / unique("segment")
    with open(path, "w+b") as file:
        file.truncate(64)
        with mmap.mmap(file.fileno(), 64):
            assert watch.left(0) == [f"segment {path}"]
            watch.clean()
    assert not path.exists()


@on_linux
def test_a_segment_that_nobody_has_mapped_is_found(watch):
    path = SHARED / unique("unmapped")
    path.touch()
    assert watch.left(0) == [f"segment {path}"]


@on_linux
def test_a_semaphore_is_found_and_removed(watch):
    semaphore = posix.Semaphore("/" + unique("semaphore"), posix.O_CREX)
    path = SHARED / f"sem.{unique('semaphore')}"
    assert watch.left(0) == [f"semaphore {path}"]
    watch.clean()
    assert not path.exists()
    semaphore.close()


@on_linux
def test_what_another_suite_has_mapped_is_left_alone(watch, eventually):
    path = SHARED / unique("other")
    ends, keep = os.pipe()
    code = f"""
        import mmap, os
        with open({str(path)!r}, "w+b") as file:
            file.truncate(64)
            mapped = mmap.mmap(file.fileno(), 64)
        if os.fork() == 0:
            os.close({keep})
            os.read({ends}, 1)  # until the test closes its end
            os.unlink({str(path)!r})
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        check=True,
        env={name: value for name, value in os.environ.items() if name != VARIABLE},
        pass_fds=[ends, keep],
    )
    assert path.exists()
    assert watch.left(0) == []
    watch.clean()
    assert path.exists()
    os.close(keep)
    os.close(ends)
    eventually(lambda: not path.exists())


def test_a_child_is_found_and_killed(watch, eventually):
    child = subprocess.Popen(SLEEP)
    eventually(lambda: sleeping(child.pid, watch))
    watch.clean()
    child.wait(timeout=0)


def test_an_orphan_is_found_and_killed(watch, eventually):
    run = ["sh", "-c", '"$@" >/dev/null 2>&1 & echo $!', "sh", *SLEEP]
    pid = int(subprocess.check_output(run))
    eventually(lambda: sleeping(pid, watch))
    watch.clean()
    assert watch.processes() == []


def test_a_forked_child_is_found_and_killed(watch):
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    (line,) = watch.left(0)
    assert line.startswith(f"process {pid} (")
    watch.clean()
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, 0)


def test_a_child_that_nobody_reaped_is_found(watch, eventually):
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", ""], os.environ)
    eventually(lambda: "(zombie)" in str(watch.report()))
    assert watch.processes()[0].pid == pid


def test_a_process_that_is_ending_may_end(watch, eventually):
    subprocess.run(["sh", "-c", "sleep 0.5 &"], check=True)
    eventually(watch.report)
    assert watch.left(10) == []


def test_a_socket_and_a_lock_are_found_and_removed(watch, runtime_dir):
    (runtime_dir / "flow").mkdir()
    (runtime_dir / "flow" / "lock").touch()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(runtime_dir / "socket"))
    assert watch.left(0) == [f"file {runtime_dir / 'flow' / 'lock'}", f"file {runtime_dir / 'socket'}"]
    watch.clean()
    assert watch.report() == []


@pytest.mark.parametrize("_again", range(2))
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_worker_sees_the_directory_of_its_own_test(runtime_dir, method, _again):
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(os.getenv, [VARIABLE]) == str(runtime_dir)
        pool.close()
        pool.join()


@given(st.integers())
def test_hypothesis_accepts_the_fixtures(number):
    assert str(number).lstrip("-").isdigit()


def test_eventually(eventually):
    answers = iter([None, 0, "yes"])
    assert eventually(lambda: next(answers)) == "yes"
    with pytest.raises(pytest.fail.Exception, match=r"not within 0\.01 s; the last answer was \[\]"):
        eventually(list, timeout=0.01)


class TestRunPython:
    def test_code(self, run_python, runtime_dir, tmp_path):
        done = run_python(
            f"""
            import os, sys
            print(sys.argv[1:], os.environ[{VARIABLE!r}], os.environ["EXTRA"], os.getcwd())
            sys.exit("sorry")
            """,
            1,
            "two",
            env={"EXTRA": "more"},
        )
        assert done.stdout == f"['1', 'two'] {runtime_dir} more {tmp_path}\n"
        assert (done.returncode, done.stderr) == (1, "sorry\n")

    def test_script_and_module(self, run_python, tmp_path):
        (tmp_path / "script.py").write_text("print(__name__)")
        assert run_python(tmp_path / "script.py").stdout == "__main__\n"
        assert run_python("-m", "script").stdout == "__main__\n"

    def test_warnings_are_errors(self, run_python):
        assert "UserWarning: hm" in run_python("import warnings; warnings.warn('hm')").stderr

    def test_the_package_is_the_one_under_test(self, run_python):
        package = pytest.importorskip("strictflow_mp")
        done = run_python("import strictflow_mp; print(strictflow_mp.__file__)")
        assert done.stdout == f"{package.__file__}\n"

    def test_it_ends(self, run_python):
        with pytest.raises(pytest.fail.Exception, match=r"(?s)still running after 1 s.*so far"):
            run_python("import time; print('so far', flush=True); time.sleep(60)", timeout=1)


@pytest.mark.once
class TestWholeRun:
    """The fixtures, in a run of pytest of their own."""

    @pytest.fixture
    def run(self, pytester):
        pytester.makeconftest((HERE.parent / "conftest.py").read_text() + "\nDEADLINE = 0.2\n")
        pytester.makepyfile(leaks=(HERE / "leaks.py").read_text())

        def run(source):
            pytester.makepyfile(source)
            return pytester.runpytest_subprocess("-p", "no:randomly", "-W", "error")

        return run

    @on_linux
    def test_the_leaking_test_fails_and_the_next_is_unaffected(self, run):
        path = SHARED / unique("inner")
        done = run(
            f"""
            import mmap
            import subprocess

            def test_leaks(runtime_dir):
                global mapped
                with open({str(path)!r}, "w+b") as file:
                    file.truncate(64)
                    mapped = mmap.mmap(file.fileno(), 64)
                (runtime_dir / "lock").touch()
                subprocess.run(["sh", "-c", "sleep 60 &"])

            def test_next(runtime_dir):
                assert list(runtime_dir.iterdir()) == []
            """
        )
        done.assert_outcomes(passed=2, errors=1)
        done.stdout.fnmatch_lines(
            [
                "*ERROR at teardown of test_leaks*",
                "the test left behind:",
                "  process * (sleeping): sleep 60",
                f"  segment {path}",
                "  file /tmp/sf-*/lock",
            ]
        )
        assert not path.exists()

    def test_what_the_resource_tracker_says_fails_the_run(self, run):
        done = run(
            f"""
            from multiprocessing import resource_tracker

            def test_registers():
                resource_tracker.register("/{unique("nothing")}", "shared_memory")
            """
        )
        done.assert_outcomes(passed=1, errors=1)
        done.stdout.fnmatch_lines(["*the resource tracker said:*", "*leaked shared_memory*"])
