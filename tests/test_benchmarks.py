"""The benchmarks: every figure can be measured, and the table says what was found. Nothing here judges speed."""

import importlib.util
import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest

import strictflow_mp

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # `benchmarks` lies beside the package; the package itself may be installed

from benchmarks.__main__ import GROUPS, main  # noqa: E402
from benchmarks.measure import FIGURES, Bound, Figure, Outcome, Size, compare  # noqa: E402
from benchmarks.table import Row, render  # noqa: E402

TINY = Size(repetitions=2, seconds=0.001, keys=300)
RUN = f"""
import os, sys, tempfile
from benchmarks.__main__ import main
from benchmarks.measure import Size
from benchmarks.peers import NAME
status = main(sys.argv[1:], size={TINY!r})
places = [place for place in ("/dev/shm", tempfile.gettempdir()) if os.path.isdir(place)]
left = [name for place in places for name in os.listdir(place) if NAME in name]
sys.exit(f"left behind: {{left}}" if left else status)
"""


@pytest.fixture
def benchmarks(run_python, tmp_path):
    """Run them, tiny, as ``python -m benchmarks`` does; what was written as JSON by name, and what was printed."""

    def run(*arguments, **environment):
        report = tmp_path / "report.json"
        path = os.pathsep.join([str(Path(strictflow_mp.__file__).parent.parent), str(ROOT)])
        ran = run_python(RUN, *arguments, "--json", report, env={"PYTHONPATH": path, **environment}, timeout=100)
        assert ran.returncode == 0, ran.stderr
        assert "Warning" not in ran.stderr
        return {figure["name"]: figure for figure in json.loads(report.read_text())["figures"]}, ran.stdout

    return run


def peer_is_missing(name):
    module = {"reads": "lmdb", "writes": "redis"}[name.partition(".")[0]]
    return not importlib.util.find_spec(module) or (module == "redis" and not shutil.which("redis-server"))


def test_one_run_measures_every_figure_and_prints_each(benchmarks):
    found, printed = benchmarks()
    assert list(found) == [figure.name for group in GROUPS for figure in FIGURES if figure.group == group]
    assert {figure.group for figure in FIGURES} == set(GROUPS)
    for figure in FIGURES:
        row = found[figure.name]
        assert figure.title in printed
        if "skipped" in row:
            assert peer_is_missing(figure.name), row
            assert "not installed" in row["skipped"]
            assert row["skipped"] in printed
        else:
            assert row["values"], row
            assert all(math.isfinite(value) and value > 0 for value in row["values"]), row
            assert row["bound"] == str(figure.bound)
            assert row["ours"] in printed


def test_a_missing_peer_costs_its_own_figure_only(benchmarks, tmp_path):
    found, printed = benchmarks("--only", "writes.pipelined", "writes.commit", PATH=str(tmp_path))
    assert list(found) == ["writes.pipelined", "writes.commit"]
    assert "not installed" in found["writes.pipelined"]["skipped"]
    assert "skipped: " in printed
    assert len(found["writes.commit"]["values"]) == TINY.repetitions


def test_a_broken_figure_is_told_and_the_next_one_is_measured(monkeypatch, capsys):
    def broken(size):
        raise ZeroDivisionError("no such luck")

    figures = [
        Figure("reads.broken", "a broken one", Bound("≤", 1), "×", broken),
        Figure("reads.sound", "a sound one", Bound("≤", 1), "×", lambda size: Outcome([0.5], "1 µs")),
    ]
    monkeypatch.setattr("benchmarks.__main__.FIGURES", figures)
    assert main([], size=TINY) == 1
    said = capsys.readouterr()
    assert "no such luck" in said.err
    assert [line.split("  ")[0] for line in said.out.splitlines()[-2:]] == ["a broken one", "a sound one"]


@pytest.mark.parametrize(
    ("bound", "values", "met"),
    [
        (Bound("≤", 1.5), [1.0, 1.4, 1.5], "yes"),
        (Bound("≤", 1.5), [1.0, 1.4, 9.0], "yes, barely"),
        (Bound("≤", 1.5), [1.6, 1.7, 9.0], "NO"),
        (Bound("≥", 1.9), [1.0, 1.8, 2.0], "NO, barely"),
        (Bound(">", 0), [0.1, 0.0, 0.2], "yes, barely"),
    ],
)
def test_the_median_decides_and_the_table_says_when_repetitions_disagree(bound, values, met):
    row = Row(Figure("group.name", "title", bound, "×", lambda size: None), Outcome(values, "1 µs", "peer 2 µs"))
    line = render([row], {}).splitlines()[-1]
    assert line.endswith(f"{bound} ×  {met}")
    assert f"{min(values):.3g} … {max(values):.3g}" in line


@pytest.mark.parametrize(("inverse", "ratio"), [(False, 0.25), (True, 4.0)])
def test_ours_and_the_peers_batches_take_turns_and_the_ratio_is_of_one_operation(inverse, ratio):
    order = []

    def takes(name, seconds):
        def run(count):
            order.append(name)
            return count * seconds

        return run

    size = Size(repetitions=4, seconds=1.0, keys=0)
    outcome = compare(takes("ours", 0.001), takes("peer", 0.004), size, peer_is="peer", inverse=inverse)
    assert outcome.values == pytest.approx([ratio] * 4)
    assert (outcome.ours, outcome.peer) == ("1 ms", "peer 4 ms")
    turns = order[-8:]
    assert sorted(turns[::2]) == sorted(turns[1::2]) == ["ours", "ours", "peer", "peer"]
    assert all(set(pair) == {"ours", "peer"} for pair in zip(turns[::2], turns[1::2], strict=True))


def test_a_name_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(SystemExit, match=r"nonsense; there are: .*reads, reads\.changed"):
        main(["--only", "nonsense"])
