"""The README: its quick start runs as it stands there, and what else it shows is sound."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest
from test_examples import quickstart_printed

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
COMMANDS = ["python -m pip install . && strictflow-mp demo", "python -m pip install tox && tox"]


def quick_start(kind: str = "python") -> str:
    """The one block of that kind in the section: the program (python), or what it prints (text)."""
    section = README.split("\n## Quick start\n")[1].split("\n## ")[0]
    [block] = re.findall(rf"^```{kind}\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    return block


def test_the_quick_start_runs_as_it_stands_in_the_readme(run_python, tmp_path):
    script = tmp_path / "quickstart.py"
    script.write_text(quick_start())
    result = run_python(script, env={"PYTHONUNBUFFERED": ""})
    assert (result.returncode, result.stderr) == (0, "")
    quickstart_printed(result.stdout)
    assert sorted(map(shape, result.stdout.splitlines())) == sorted(map(shape, quick_start("text").splitlines()))


def shape(line: str) -> str:
    """A line without what differs from run to run: the version, and whether a reader came before the first commit."""
    return re.sub(r"\d|stable|deploying", "_", line)


def test_what_the_quick_start_is_said_to_print_is_what_it_may_print():
    quickstart_printed(quick_start("text"))


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("'version': 4, 'status': 'deploying'", "'version': 4, 'status': 'stable'"), ("\n1\n", "\n5\n"), ("\n1\n", "\n")],
    ids=["a half-done state", "a version that nobody makes", "a line too few"],
)
def test_what_the_quick_start_cannot_print_is_found_out(right, wrong):
    shown = quick_start("text")
    assert right in shown
    with pytest.raises(AssertionError):
        quickstart_printed(shown.replace(right, wrong, 1))


def test_the_quick_start_is_the_example_of_that_name():
    example = (ROOT / "examples" / "quickstart.py").read_text()
    assert ast.dump(ast.parse(quick_start())) == ast.dump(ast.parse(example))


def test_the_flags_behind_gunicorn_are_the_example_of_that_name():
    """`servers/test_gunicorn.py` does with them what the README shows."""
    [code] = [text for kind, text in BLOCKS if kind == "python" and "def app(" in text]
    example = ast.parse((ROOT / "examples" / "servers" / "gunicorn_flags.py").read_text())
    assert ast.dump(ast.parse(code)) == ast.dump(ast.Module(example.body[1:], []))  # but for its docstring
    assert len(code.splitlines()) <= 20


@pytest.mark.parametrize("command", COMMANDS)
def test_the_readme_gives_the_command(command):
    shown = [line for kind, text in BLOCKS if kind == "console" for line in text.splitlines()]
    assert [line for line in shown if re.fullmatch(rf"\$ {re.escape(command)}( *#.*)?", line)]


def test_every_block_of_code_parses():
    for kind, text in BLOCKS:
        if kind == "python":
            ast.parse(text)
        elif kind != "text":
            assert kind == "console"
            typed = [line[2:] for line in text.splitlines() if line.startswith("$ ")]
            assert typed
            for command in typed:
                subprocess.run(["bash", "-n", "-c", command], check=True)


def test_every_file_that_the_readme_links_to_exists():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
