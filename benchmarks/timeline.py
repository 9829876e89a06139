"""``python -m benchmarks.timeline docs/trace.svg``: record the quick start, and draw its trace. Needs matplotlib.

What is drawn is what `flow.trace` wrote, and nothing else. ``--from FILE`` draws a trace that is there already.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .plots import COLOURS, INK, STYLE

EXAMPLES = Path(__file__).parent.parent / "examples"
BLUE, ORANGE, GREEN = COLOURS[:3]
KINDS = {
    "P1": ("P1 runs", BLUE),
    "gate": ("a read waits at the gate", ORANGE),
    "result": ("waits for its answer", "#80808060"),
}
"""Slices that are drawn, by category."""
HEIGHT = 0.56


def record(path: Path) -> None:
    """Run the quick start, and write its trace."""
    sys.path.insert(0, str(EXAMPLES))
    quickstart: Any = importlib.import_module("quickstart")
    with quickstart.flow as flow, flow.trace(path):
        poll = quickstart.poll_config("R-A")
        flow.spawn(quickstart.worker, processes=4).join()
        poll.result()


def draw(events: list[dict[str, Any]], file: Path) -> None:
    """Draw a trace: a track for each process, with one more for the async P2 tasks of SF-LOOP."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    names = {each["pid"]: each["args"]["name"].partition(" (")[0] for each in events if each["name"] == "process_name"}
    loop = next(pid for pid, name in names.items() if name.startswith("SF-LOOP"))
    workers = sorted((name, pid) for pid, name in names.items() if name.startswith("worker"))
    tracks: dict[Any, float] = {loop: 0, "P2": 1} | {pid: row for row, (_, pid) in enumerate(workers, 2)}
    labels = ["SF-LOOP", "async P2", *(name for name, _ in workers)]
    times = [each["ts"] for each in events if each.get("cat") in ("P1", "P2", "submit")]
    zero = min(times)

    def at(ts: float) -> float:
        return (ts - zero) / 1e6

    with matplotlib.rc_context({**STYLE, "axes.spines.left": False}):
        figure, axis = pyplot.subplots(figsize=(9, 3.9))
        for event in events:
            if event["ph"] == "X" and event.get("cat") in KINDS and event["pid"] in tracks:
                _, colour = KINDS[event["cat"]]
                row, left, width = tracks[event["pid"]], at(event["ts"]), event["dur"] / 1e6
                thin = event["cat"] == "result"
                axis.barh(row, width, HEIGHT / (3 if thin else 1), left, color=colour, linewidth=0, zorder=2)
                if event["cat"] == "P1":
                    text = f"{event['name'].partition(' ')[2]} of {names[event['args']['pid']]}"
                    axis.text(
                        left + width / 2, row, text, ha="center", va="center", color="white", fontsize=8, zorder=4
                    )
        begun = {each["id"]: each for each in events if each["ph"] == "b"}
        bursts = [each for each in events if each.get("cat") == "burst"]
        for end in (each for each in events if each["ph"] == "e"):
            left = begun[end["id"]]["ts"]
            for burst in (each for each in bursts if left < each["ts"] < end["ts"]):
                axis.barh(1, at(burst["ts"]) - at(left), HEIGHT, at(left), color=GREEN, linewidth=0, zorder=2)
                left = min(end["ts"], burst["ts"] + burst["dur"])
                width = at(left) - at(burst["ts"])
                axis.barh(1, width, HEIGHT, at(burst["ts"]), color=GREEN, alpha=0.3, linewidth=0, zorder=2)
            axis.barh(1, at(end["ts"]) - at(left), HEIGHT, at(left), color=GREEN, linewidth=0, zorder=2)
        ends = {(each["pid"], each["ts"]): each["ts"] + each["dur"] for each in events if each.get("cat") == "P1"}
        former: dict[int, dict[str, Any]] = {}
        for event in (each for each in events if each["ph"] in "stf" and each["pid"] in tracks):
            if begin := former.get(event["id"]):
                waits = event["name"] == "waits"
                axis.annotate(
                    "",
                    (at(event["ts"]), tracks[event["pid"]]),
                    (at(begin["ts"]), tracks[begin["pid"]]),
                    arrowprops={
                        "arrowstyle": "->",
                        "color": ORANGE if waits else INK,
                        "linewidth": 1.3 if waits else 0.8,
                    },
                    zorder=3,
                )
            # The answer leaves when the task has run; the arrow in the trace belongs to the whole slice.
            former[event["id"]] = {**event, "ts": ends.get((event["pid"], event["ts"]), event["ts"])}
        axis.set_yticks(range(len(labels)), labels)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="y", visible=False)
        axis.invert_yaxis()
        axis.set_xlabel("seconds")
        handles = [Patch(color=colour, label=label) for label, colour in KINDS.values()]
        handles.insert(1, Patch(color=GREEN, label="async P2 (pale: paused)"))
        figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9)
        figure.savefig(file, transparent=True, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Record and draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.timeline", description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="the picture, as SVG")
    parser.add_argument("--from", dest="trace", type=Path, metavar="FILE", help="draw this trace; record nothing")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        path = options.trace or Path(directory) / "quickstart.json"
        if not options.trace:
            record(path)
        draw(json.loads(path.read_text())["traceEvents"], options.file)


if __name__ == "__main__":
    main()
