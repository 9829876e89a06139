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

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # `benchmarks` lies beside the package; the package itself may be installed

from benchmarks.__main__ import GROUPS, main  # noqa: E402
from benchmarks.alternatives import ALTERNATIVES  # noqa: E402
from benchmarks.measure import FIGURES, SHARES, Bound, Figure, Outcome, Size, compare, quantiles  # noqa: E402
from benchmarks.plots import PLOTS, draw  # noqa: E402
from benchmarks.table import BEGIN, END, Row, fill_in, markdown, read_json, render, write_json  # noqa: E402

TINY = Size(repetitions=2, seconds=0.001, keys=300, large=100_000, processes=(1, 2, 3), tasks=10)
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


PEERS = {
    "alternatives.dirty_stash": ["gunicorn.dirty"],
    "alternatives.easyglobals": ["EasyGlobals"],
    "alternatives.lmdb": ["lmdb"],
    "alternatives.redis": ["redis", "redis-server"],
    "alternatives.sharedbox": ["sharedbox", "numpy"],
    "alternatives.ultradict": ["UltraDict", "atomics"],
    "large": ["numpy"],
    "reads": ["lmdb"],
    "writes.lmdb": ["lmdb"],
    "writes.pipelined": ["redis", "redis-server"],
}
"""What is needed by the figures whose names begin like that."""


def is_missing(peer):
    if peer == "redis-server":
        return not shutil.which(peer)
    try:
        return not importlib.util.find_spec(peer)
    except ModuleNotFoundError:
        return True


def peer_is_missing(name):
    return any(name.startswith(begin) and any(map(is_missing, needed)) for begin, needed in PEERS.items())


@pytest.mark.once
@pytest.mark.timeout(300)  # a minute on a machine that has nothing else to do
def test_one_run_measures_every_figure_and_prints_each(benchmarks):
    found, printed = benchmarks()
    assert list(found) == [figure.name for group in GROUPS for figure in FIGURES if figure.group == group]
    assert {figure.group for figure in FIGURES} == set(GROUPS)
    for figure in FIGURES:
        row = found[figure.name]
        if figure.group != "alternatives":
            assert figure.title in printed
        if "skipped" in row:
            if figure.name.endswith("_on_two_cores"):
                assert len(os.sched_getaffinity(0)) == 1, row
            else:
                assert peer_is_missing(figure.name), row
                assert "not installed" in row["skipped"]
            assert row["skipped"] in printed
        else:
            assert row["values"], row
            assert all(math.isfinite(value) and value > 0 for value in row["values"]), row
            assert row["bound"] == (str(figure.bound) if figure.bound else None)
            assert figure.group == "alternatives" or row["ours"] in printed
    for alternative in ALTERNATIVES:
        assert f"\n{alternative.name} " in printed


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


def alternative_rows():
    """Rows as of a run in which one peer was measured and one was missing; the others were not asked for."""
    times = [1e-6, 2e-6, 3e-6]
    series = {"ours": [1e-6], "peer": [4e-6], "ours, distribution": times, "peer, distribution": times}
    figures = {figure.name: figure for figure in FIGURES}
    return [
        Row(figures["alternatives.manager_read"], Outcome([4.0, 5.0, 6.0], "1 µs", "Manager 4 µs", "", series)),
        Row(figures["alternatives.ultradict_read"], None, "skipped: UltraDict is not installed"),
    ]


def test_alternatives_stand_side_by_side_with_what_they_do_not_do():
    lines = render(alternative_rows(), {}).splitlines()
    assert lines[2].split()[:3] == ["alternative", "read", "÷"]
    ours, manager, ultradict = (" ".join(line.split()) for line in lines[4:])
    assert ours.startswith("strictflow-mp 1 µs 1 – 1 a P1 task")
    assert manager.startswith("Manager 4 µs 5 × (4 … 6) – – RLock, get, set no no no: a killed holder")
    assert ultradict.startswith("UltraDict – – – – skipped: UltraDict is not installed no yes")


def test_what_was_written_as_json_can_be_shown_again(tmp_path, capsys):
    rows = alternative_rows()
    file = tmp_path / "run.json"
    write_json(file, rows, {"cores": 2})
    assert read_json(file) == (rows, {"cores": 2})
    page = tmp_path / "page.md"
    page.write_text(f"# Before\n{BEGIN}\nold\n{END}\nafter\n")
    assert main(["--from", str(file), "--markdown", str(page)]) == 0
    assert capsys.readouterr().out == render(rows, {"cores": 2})
    assert page.read_text() == f"# Before\n{BEGIN}\n\n{markdown(rows, {'cores': 2})}\n{END}\nafter\n"
    assert main(["--from", str(file), "--markdown", str(page), "--only", "reads"]) == 0
    assert page.read_text() == f"# Before\n{BEGIN}\n\ncores 2.\n\n{END}\nafter\n"


def test_the_markdown_tables_are_tables():
    lines = markdown(alternative_rows(), {"cores": 2}).splitlines()
    assert lines[:2] == ["cores 2.", ""]
    assert {line.count("|") for line in lines[2:]} == {10}
    assert set(lines[3]) == set("|- ")


def test_a_page_without_marks_is_left_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing here")
    with pytest.raises(ValueError, match="no place for the figures"):
        fill_in(page, [], {})
    assert page.read_text() == "nothing here"


def test_the_page_has_its_marks_and_shows_every_plot():
    page = (ROOT / "docs" / "performance.md").read_text()
    assert page.index(BEGIN) < page.index(END)
    for name in PLOTS:
        assert f"]({name})" in page


def test_plots_are_small_and_those_without_figures_are_not_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    words = draw(alternative_rows(), tmp_path / "plots")
    assert [file.name for file in (tmp_path / "plots").iterdir()] == ["latency.svg"]
    assert 1000 < (tmp_path / "plots" / "latency.svg").stat().st_size < 100_000
    assert sum("not drawn" in word for word in words) == len(PLOTS) - 1


def test_quantiles_go_as_far_as_so_few_operations_can_tell():
    assert quantiles([3.0, 1.0, 2.0, 4.0]) == [1.0] * 13 + [2.0] * 12 + [3.0] * 13
    assert len(quantiles([1.0] * 10**5)) == len(SHARES)


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
