"""gunicorn --user: the master is root, its workers are another user, and a flow is one user's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from servers import EXAMPLES, at_once, pids_that_answer

import strictflow_mp

NOBODY = 65534
WORKERS = 2
HERE = Path(__file__).parent
DIRECTORIES = [sys.prefix, sys.base_prefix, Path(strictflow_mp.__file__).parents[1], HERE, EXAMPLES]
READABLE = ["bash", HERE / "readable.sh", *DIRECTORIES, "--"]
AS_NOBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
PYTHON = [sys.executable, "-m"]


@pytest.fixture(scope="module", autouse=True)
def _may_become_somebody_else():
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    tried = subprocess.run(
        [*READABLE, *AS_NOBODY, sys.executable, "-c", "import strictflow_mp"],
        check=False,
        cwd=EXAMPLES,
        capture_output=True,
        text=True,
        timeout=60,
    )
    if tried.returncode != 0:
        pytest.skip(f"another user cannot run this Python here: {tried.stderr.strip()}")


@pytest.fixture
def gunicorn_as_nobody(gunicorn):
    """The master is root, the workers are not."""

    def gunicorn_as_nobody(*args, **env):
        options = ["--workers", WORKERS, "--user", NOBODY, "--group", NOBODY, *args]
        return gunicorn("probe:app", *options, cwd=EXAMPLES, program=[*READABLE, *PYTHON], **env)

    return gunicorn_as_nobody


@pytest.mark.parametrize("options", [[], ["--preload"]], ids=["", "preload"])
def test_workers_of_another_user_share_the_flow_that_this_user_serves(
    options, serve, gunicorn_as_nobody, runtime_dir, eventually
):
    os.chown(runtime_dir, NOBODY, NOBODY)
    serve("flags", cwd=EXAMPLES, program=[*READABLE, *AS_NOBODY, *PYTHON])
    server = gunicorn_as_nobody(*options)
    workers = pids_that_answer(server, "/pid", WORKERS, eventually)
    assert {psutil.Process(pid).uids().real for pid in workers} == {NOBODY}
    assert psutil.Process(server.pid).uids().real == 0
    assert [answer["value"] for answer in at_once(server, "/read-own/30", 20)] == [0] * 20
    assert sorted(answer["value"] for answer in at_once(server, "/count/", 40)) == list(range(1, 41))
    assert server.stop() == 0


@pytest.mark.parametrize(
    ("options", "used"), [([], {}), (["--preload"], {"USE_IN_MASTER": "1"})], ids=["at first use", "used in the master"]
)
def test_workers_of_another_user_are_told_whose_flow_it_is(options, used, serve, gunicorn_as_nobody, eventually):
    serve("flags")
    server = gunicorn_as_nobody(*options, **used)
    assert server.tries("/count/") is None
    text = f"belongs to user 0, and this process runs as user {NOBODY}; a flow is one user's: change the user before"
    eventually(lambda: text in server.says())
    assert server.ask("/pid")
    assert server.stop() == 0
