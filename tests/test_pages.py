"""Every block of Python on the pages of `docs/` is a program: it runs, and prints what the page says that it prints.

A block has a name, ``title="race.py"``: it is run as that file, beside those that came ahead of it on the page. What a
``text`` block behind it says must be what it prints. A block that needs what is not here has a reason ahead of it,
``<!-- no-run: reason -->``; how many have one is counted here, so that they stay few.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(page for page in ROOT.glob("docs/**/*.md") if page.name != "servers.md")
"""Those of `servers.md` are the files of `examples/servers` (`test_servers_page.py`), which `tests/servers` runs."""
BLOCK = re.compile(
    r"(?:^<!-- no-run: (?P<reason>[^\n]+) -->\n)?"
    r"^```(?P<kind>\w+)(?P<options>[^\n]*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


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
