"""Real servers as subprocesses on loopback, and what tests ask them. Only the tox environment `servers` has them."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from servers import EXAMPLES, PATIENCE, Server

NEEDED = (
    "celery",
    "fastapi",
    "gevent",
    "gunicorn",
    "ipykernel",
    "jupyter_client",
    "PyInstaller",
    "pyuwsgi",
    "uvicorn",
    "uvloop",
)
# The other environments have none of them, and nothing to say about it.
collect_ignore_glob = [] if all(importlib.util.find_spec(name) for name in NEEDED) else ["test_*.py"]


@pytest.fixture
def port() -> int:
    """A port that nobody had a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def launch(tmp_path: Path, port: int) -> Iterator[Callable[..., Server]]:
    """`launch(module, *args)` runs ``python -m module args`` amid the examples; ended by force after the test.

    *program* runs in the place of ``python -m``.
    """
    started: list[Server] = []

    def launch(
        *command: object, cwd: Path = tmp_path, program: Sequence[object] = (sys.executable, "-m"), **env: str
    ) -> Server:
        log = tmp_path / f"log-{len(started)}"
        paths = [str(cwd), str(EXAMPLES), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        with log.open("wb") as file:
            popen = subprocess.Popen(
                [*map(str, program), *map(str, command)],
                cwd=cwd,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"} | env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        started.append(Server(popen, port, log))
        return started[-1]

    yield launch
    for server in reversed(started):
        if server.popen.poll() is None:
            server.popen.kill()
            server.popen.wait()


@pytest.fixture
def serve(launch: Callable[..., Server], eventually: Callable[..., Any]) -> Iterator[Callable[..., Server]]:
    """`serve(name)` runs ``strictflow-mp serve``; the test ends with it, and it must end well."""
    started: list[Server] = []

    def serve(name: str, *args: object, **options: Any) -> Server:
        server = launch("strictflow_mp", "serve", name, *args, **options)
        started.append(server)
        eventually(lambda: "is ready" in server.says() or server.popen.poll() is not None, PATIENCE)
        assert server.popen.poll() is None, server.says()
        return server

    yield serve
    assert [server.stop() for server in started] == [0] * len(started), [server.says() for server in started]


@pytest.fixture
def gunicorn(launch: Callable[..., Server], port: int, eventually: Callable[..., Any]) -> Callable[..., Server]:
    """`gunicorn(app, *args)` runs gunicorn, and returns when it answers."""

    def gunicorn(app: str, *args: object, path: str = "/pid", **launched: Any) -> Server:
        options = ["--no-control-socket", "--graceful-timeout", 5, "--bind", f"127.0.0.1:{port}"]
        server = launch("gunicorn", *options, *args, app, **launched)
        eventually(lambda: server.popen.poll() is not None or server.tries(path), PATIENCE)
        assert server.popen.poll() is None, server.says()
        return server

    return gunicorn


@pytest.fixture
def uwsgi(launch: Callable[..., Server], port: int, eventually: Callable[..., Any]) -> Callable[..., Server]:
    """`uwsgi(app, *args)` runs uWSGI, and returns when it answers. Its SIGTERM ends it, as its packagers have it."""

    def uwsgi(app: str, *args: object, **env: str) -> Server:
        options = ["--http-socket", f"127.0.0.1:{port}", "--die-on-term", "--module", app]
        program = [Path(sys.executable).with_name("uwsgi")]
        server = launch(*options, *args, program=program, **env)
        eventually(lambda: server.popen.poll() is not None or server.tries("/pid"), PATIENCE)
        assert server.popen.poll() is None, server.says()
        return server

    return uwsgi


@pytest.fixture
def uvicorn(launch: Callable[..., Server], port: int, eventually: Callable[..., Any]) -> Callable[..., Server]:
    """`uvicorn(app, *args)` runs uvicorn, and returns when it answers."""

    def uvicorn(app: str, *args: object, **env: str) -> Server:
        server = launch("uvicorn", "--host", "127.0.0.1", "--port", port, *args, app, **env)
        eventually(lambda: server.popen.poll() is not None or server.tries(), PATIENCE)
        assert server.popen.poll() is None, server.says()
        return server

    return uvicorn
