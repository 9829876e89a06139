"""The examples run as scripts, check themselves, and say so when something is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

EXAMPLES = Path(__file__).parents[2] / "examples"

LAST_LINES = {
    "price_board.py": "ok: 600 ticks, 4 readers, no inconsistent board",
    "setpoints.py": r"ok: \d+ mixes set, \d+ refused and taken back, nobody saw a mixture",
    "pool_counters.py": "ok: 1200 words and 4600 letters, counted by 4 processes, none lost",
}

SABOTAGE = {
    "quotes that do not match": ("price_board.py", '"rate": 1 / rate', '"rate": rate'),
    "a tick in two commits": (
        "price_board.py",
        "flow.update(quotes(pair, tick))",
        "[flow.put(*quote).result() for quote in quotes(pair, tick).items()]",
    ),
    "a tick that is not counted": ("price_board.py", "[pair] += 1", "[pair] += ticks[pair] < TICKS - 1"),
    "flows that do not add up": ("setpoints.py", '= total - state["acid"]', "= total"),
    "a check that lets everything pass": ("setpoints.py", "        raise ValueError(", "        print("),
    "a change without its report": ("setpoints.py", "accepted + more", "accepted + more - 1"),
    "a job that counts nothing": ("pool_counters.py", "    add(word)\n", ""),
}


def quickstart_printed(output: str) -> None:
    """What the quick start prints, in every order that it may have: V0 first, and no half-done state ever."""
    lines = output.splitlines()
    states = [line for line in lines if line.startswith("R-A ")]
    versions = [int(line) for line in lines if not line.startswith("R-A ")]
    assert len(states) == 3
    assert len(versions) == 4
    assert set(versions) <= {1, 2, 3, 4}
    old, new = "R-A {'version': 0, 'status': 'stable'}", r"R-A {'version': [1-4], 'status': 'deploying'}"
    assert all(line == old or re.fullmatch(new, line) for line in states)
    # Whoever has read a new version has printed it after the commit, and V0 was printed ahead of it.
    first_new = next(index for index, line in enumerate(lines) if line != old)
    assert old not in lines[first_new:]


def test_the_quick_start_prints_v0_until_the_first_commit_and_never_a_half_done_state(run_python):
    result = run_python(EXAMPLES / "quickstart.py", env={"PYTHONUNBUFFERED": ""})
    assert (result.returncode, result.stderr) == (0, "")
    quickstart_printed(result.stdout)


@pytest.mark.parametrize("name", LAST_LINES)
def test_an_example_checks_itself_and_says_ok_in_its_last_line(run_python, name):
    result = run_python(EXAMPLES / name, env={"PYTHONUNBUFFERED": ""})
    assert (result.returncode, result.stderr) == (0, "")
    assert re.fullmatch(LAST_LINES[name], result.stdout.splitlines()[-1])


@pytest.mark.parametrize("fault", SABOTAGE)
def test_an_example_with_a_fault_in_it_exits_non_zero(run_python, tmp_path, fault):
    name, right, wrong = SABOTAGE[fault]
    source = (EXAMPLES / name).read_text()
    assert source.count(right) == 1
    script = tmp_path / name
    script.write_text(source.replace(right, wrong))
    result = run_python(script)
    assert result.returncode != 0
    assert "\nok" not in result.stdout


def test_every_example_is_run_and_short():
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names == {"quickstart.py", *LAST_LINES}
    assert {name for name, _, _ in SABOTAGE.values()} == set(LAST_LINES)
    assert all(len((EXAMPLES / name).read_text().splitlines()) <= 70 for name in names)
