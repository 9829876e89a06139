"""Every block of Python on the pages of `docs/` is a program: it runs, and prints what the page says that it prints.

A block has a name, ``title="race.py"``: it is run as that file, beside those that came ahead of it on the page. What a
``text`` block behind it says must be what it prints. A block that needs what is not here has a reason ahead of it,
``<!-- no-run: reason -->``; how many have one is counted here, so that they stay few.

Every block of a console, of the README too, is typed into a shell as it stands, those of a page one after the other,
and prints what the page shows (`console.py`). Those that a fresh machine cannot run are in `NOT_RUN`, with reasons.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from console import is_shown, typed

import strictflow_mp

ROOT = Path(__file__).parents[2]
PAGES = sorted(page for page in ROOT.glob("docs/**/*.md") if page.name != "servers.md")
"""Those of `servers.md` are the files of `examples/servers` (`test_servers_page.py`), which `tests/servers` runs."""
BLOCK = re.compile(
    r"(?:^<!-- no-run: (?P<reason>[^\n]+) -->\n)?"
    r"^```(?P<kind>\w+)(?P<options>[^\n]*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
CONSOLES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
NOT_RUN = {
    ("README.md", "python -m pip install . && strictflow-mp demo"): "installs; test_demo.py runs the demo",
    ("README.md", "python -m pip install '.[cli]' gunicorn"): "needs gunicorn; servers/test_gunicorn.py runs it",
    ("cli.md", "python -m pip install 'strictflow-mp[cli]'"): "installs",
    ("cli.md", 'strictflow-mp top flags --json --once | jq \'.rates.tasks."1", .latency."1".p99\''): "needs jq",
    ("coverage.md", "tox -e coverage"): "needs tox, and minutes",
    ("index.md", "python -m pip install strictflow-mp"): "installs",
    ("mutation.md", "pip install -e '.[test]' cosmic-ray==8.7.0"): "installs, and takes hours",
    ("performance.md", "python -m pip install -e '.[bench]'"): "installs, and takes minutes; see test_benchmarks.py",
    ("servers.md", "# /etc/systemd/system/flags.service"): "needs systemd",
    ("servers.md", "FROM python:3.12-slim"): "needs Docker",
    ("servers.md", "services:"): "needs Docker",
    ("tracing.md", "python -m pip install 'strictflow-mp[prometheus]'"): "installs",
    ("tracing.md", "python -m pip install 'strictflow-mp[otel]' opentelemetry-sdk"): "installs",
}
"""The blocks that are neither Python nor text and are not run, by page and first line (without comment), and why."""


class Program(NamedTuple):
    """A block of Python, and what must be printed (None: anything)."""

    page: Path
    title: str
    code: str
    printed: str | None
    reason: str | None


def programs(page: Path) -> list[Program]:
    blocks = list(BLOCK.finditer(page.read_text()))
    found = []
    for index, block in enumerate(blocks):
        if block["kind"] != "python":
            continue
        behind = blocks[index + 1] if index + 1 < len(blocks) else None
        is_output = (
            behind is not None
            and behind["kind"] == "text"
            and not page.read_text()[block.end() : behind.start()].strip()
        )
        title = re.search(r'title="([\w.]+)"', block["options"])
        found.append(
            Program(
                page, title[1] if title else "", block["text"], behind["text"] if is_output else None, block["reason"]
            )
        )
    return found


ALL = [program for page in PAGES for program in programs(page)]
RUN = [program for program in ALL if program.reason is None]


def test_each_block_has_a_name_and_few_are_left_out():
    assert [program for program in ALL if not program.title] == []
    assert [program.title for program in ALL if program.reason] == [
        "threads.py",
        "with_redis.py",
        "metrics.py",
        "spans.py",
    ]
    assert len(RUN) > 10


@pytest.mark.once
@pytest.mark.parametrize("program", RUN, ids=lambda program: f"{program.page.stem}-{program.title}")
def test_a_block_runs_and_prints_what_the_page_says(program, tmp_path, run_python):
    for other in programs(program.page):
        (tmp_path / other.title).write_text(other.code)
    done = run_python(tmp_path / program.title)
    assert (done.returncode, done.stderr) == (0, "")
    if program.printed is not None:
        assert done.stdout == program.printed


def consoles(page: Path) -> list[tuple[tuple[str, str], str]]:
    """The blocks that are neither Python nor text, each behind its page and first line."""
    texts = [block["text"] for block in BLOCK.finditer(page.read_text()) if block["kind"] not in {"python", "text"}]
    return [((page.name, re.split("  +#|\n", text.removeprefix("$ "))[0]), text) for text in texts]


SESSIONS = {page: [text for place, text in consoles(page) if place not in NOT_RUN] for page in CONSOLES}


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Callable[[str, str], str]]:
    """`shell(command, shown)` types the command, and returns what it printed on both streams.

    One that serves goes on beside those behind it, as in another terminal, when it has printed as many lines as are
    shown. It must end well.
    """
    package = Path(strictflow_mp.__file__).parent.parent
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    serving: list[subprocess.Popen[str]] = []

    def shell(command: str, shown: str) -> str:
        is_server = command.startswith("strictflow-mp serve ")
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}" if is_server else command],
            cwd=tmp_path,
            env=os.environ | {"PATH": path, "PYTHONPATH": str(package)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if is_server:
            serving.append(process)
            return "".join(process.stdout.readline() for _ in shown.splitlines())
        printed, _ = process.communicate()
        assert process.returncode == 0, printed
        return printed

    yield shell
    for process in serving:
        process.terminate()
        printed, _ = process.communicate()
        assert process.returncode == 0, printed


def test_each_block_of_a_console_is_run_or_has_a_reason():
    there = [place for page in CONSOLES for place, _ in consoles(page)]
    assert {place: there.count(place) for place in NOT_RUN} == dict.fromkeys(NOT_RUN, 1)
    assert {page.name for page in CONSOLES if SESSIONS[page]} == {"cli.md", "index.md"}


@pytest.mark.once
@pytest.mark.parametrize("page", [page for page in CONSOLES if SESSIONS[page]], ids=lambda page: page.stem)
def test_what_is_typed_prints_what_the_page_shows(page, tmp_path, shell):
    for program in programs(page):
        (tmp_path / program.title).write_text(program.code)
    for block in SESSIONS[page]:
        for command, shown in typed(block):
            printed = shell(command, shown)
            assert is_shown(printed, shown), f"{command}\n{printed}"


@pytest.mark.parametrize(
    ("printed", "shown", "answer"),
    [
        ("", "", True),
        ("a\n", "", False),
        ("", "a\n", False),
        ("a\nb\n", "a\n", False),
        ("pid  7 here\n", "pid ... here\n", True),
        ("pid\n7 here\n", "pid ... here\n", False),
        ("a\nb\nc\n", "...\nc\n", True),
        ("c\n", "...\nc\n", True),
        ("a\nd\n", "...\nc\n", False),
        ("a.c\n", "a.c\n", True),
        ("abc\n", "a.c\n", False),
    ],
)
def test_three_dots_are_anything_within_a_line_or_any_lines(printed, shown, answer):
    assert is_shown(printed, shown) is answer
