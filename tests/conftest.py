"""A runtime directory for each test, and proof after each test that nothing of it is left."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any, TextIO

import pytest
from hypothesis import settings
from leaks import PREFIX, VARIABLE, Watch, wait_for

DEADLINE = 10.0
"""Seconds that what a test started has for ending after the test."""

# OpenBLAS would start threads when NumPy is imported, and from 3.15 on fork() in a process with threads is a warning
# that can be an error. A test that wants to fork amid threads starts them itself, and says so.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

settings.register_profile("default", deadline=None, max_examples=50, print_blob=True)
settings.register_profile("thorough", deadline=None, max_examples=2000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="session", autouse=True)
def tracker_says() -> Iterator[TextIO]:
    """What the resource tracker of this process writes to its standard error: nothing, please.

    It is started here, before any test could start it, so that it belongs to none.
    """
    with tempfile.NamedTemporaryFile("r") as says, open(says.name, "a") as heard:
        stderr = os.dup(2)
        os.dup2(heard.fileno(), 2)
        resource_tracker.ensure_running()
        os.dup2(stderr, 2)
        os.close(stderr)
        yield says
        resource_tracker._resource_tracker._stop()  # only now does it tell what nobody unregistered
        if text := says.read():
            pytest.fail(f"the resource tracker said:\n{text}", pytrace=False)


@pytest.fixture(autouse=True)
def runtime_dir() -> Iterator[Path]:
    """A directory of its own for each test; in /tmp, because a socket's path is limited to 107 bytes."""
    directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir="/tmp"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(directory))
        yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(autouse=True)
def nothing_left(runtime_dir: Path, tracker_says: TextIO) -> Iterator[None]:
    """Fail the test that leaves a process, a shared object or a file; then remove it by force.

    A flow lives within one test: a fixture of a wider scope runs outside of any runtime directory.
    """
    watch = Watch(runtime_dir)
    yield
    _stop_forkserver()
    multiprocessing.active_children()  # reaps those that have ended
    if left := watch.left(DEADLINE):
        watch.clean()
    left += [f"resource tracker: {line}" for line in tracker_says.read().splitlines()]
    if left:
        pytest.fail("the test left behind:\n  " + "\n  ".join(left), pytrace=False)


def _stop_forkserver() -> None:
    """One that lived on would give the next test's children this test's environment."""
    server = forkserver._forkserver
    if server._forkserver_pid is not None:
        os.kill(server._forkserver_pid, signal.SIGKILL)  # else it waits for every fork that holds its pipe
        server._stop()


@pytest.fixture
def eventually() -> Callable[..., Any]:
    """`eventually(predicate, timeout=10)` waits until *predicate* returns something true, and returns it."""

    def eventually(predicate: Callable[[], Any], timeout: float = 10) -> Any:
        __tracebackhide__ = True
        if answer := wait_for(predicate, timeout):
            return answer
        return pytest.fail(f"not within {timeout} s; the last answer was {answer!r}")

    return eventually


@pytest.fixture
def run_python(runtime_dir: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_python(code_or_path, *args)` runs a fresh interpreter, with warnings as errors, to its end.

    *code_or_path* is source code, a `Path`, or "-m" (the module's name follows). The package is the one that
    this process imports; the working directory is `tmp_path` unless *cwd* says otherwise; *env* adds to the
    environment. It returns when everyone has closed its standard output and error, so that a resource
    tracker's last words are in them.
    """

    def run_python(
        code_or_path: str | Path,
        *args: object,
        env: dict[str, str] | None = None,
        cwd: Path = tmp_path,
        timeout: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        __tracebackhide__ = True
        if isinstance(code_or_path, Path):
            program = [str(code_or_path.resolve())]
        else:
            program = ["-m"] if code_or_path == "-m" else ["-c", textwrap.dedent(code_or_path)]
        command = [sys.executable, "-W", "error", *program, *map(str, args)]
        try:
            return subprocess.run(
                command,
                check=False,
                cwd=cwd,
                env=os.environ | {"PYTHONPATH": _import_path()} | (env or {}),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="backslashreplace",
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as late:
            so_far = [(stream or b"").decode(errors="replace") for stream in (late.stdout, late.stderr)]
            return pytest.fail("\n".join([f"still running after {timeout} s; it wrote:", *so_far]))

    return run_python


def _import_path() -> str:
    found = importlib.util.find_spec("strictflow_mp")
    here = [str(Path(found.origin).parent.parent)] if found and found.origin else []
    return os.pathsep.join([*here, *filter(None, [os.environ.get("PYTHONPATH")])])
