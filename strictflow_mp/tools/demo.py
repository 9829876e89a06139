"""The demo: a coordinator and four workers, their timeline, and a check of all that the readers saw.

Every process logs what it does on one monotonic clock. Afterwards each read is held against every write: it
must be whole, and not older than any write whose submission had returned, anywhere, before the read began.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from ..flow.handle import StrictFlow
from ..flow.tasks import read, write

__all__ = ["Verdict", "check", "run"]

WORKERS = 4
ROUNDS = 3
STEP_SECONDS = 0.1
"""Seconds that a P1 leaves its state half done."""
COLUMNS = 72


def play(log: Path, *, workers: int = WORKERS, rounds: int = ROUNDS, step: float = STEP_SECONDS) -> None:
    """Run the scenario, and log it to a file."""
    flow = StrictFlow(state={"config": {"version": 0, "status": "v0"}})

    def note(who: str, event: str, **details: Any) -> None:
        line = json.dumps({"time": time.monotonic(), "who": who, "event": event, **details}) + "\n"
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(descriptor, line.encode())  # one short append: whole lines, whoever else writes
        finally:
            os.close(descriptor)

    @write(flow)
    def update_config(author: int) -> int:
        note("SF-LOOP", "P1 begins", author=author)
        config = flow.state["config"]
        config["version"] += 1
        time.sleep(step)  # version and status disagree: nobody may see it
        config["status"] = f"v{config['version']}"
        note("SF-LOOP", "P1 ends", author=author, version=config["version"])
        version: int = config["version"]
        return version

    @read(flow)
    def audit_config() -> None:
        config = flow.state["config"]
        note("SF-LOOP", "P2 reads", began=time.monotonic(), **config)

    def worker(number: int) -> None:
        who = f"worker-{number}"

        def look() -> None:
            began = time.monotonic()
            note(who, "read", began=began, **flow.state["config"])

        for _ in range(rounds):
            look()
            future = update_config(number)
            note(who, "submit", returned=time.monotonic(), seq=future.seq)
            audit_config()
            look()
            version = future.result()
            note(who, "committed", version=version, seq=future.seq)
        look()

    with flow, flow.spawn(worker, processes=workers) as group:
        note("SF-LOOP", "serves", pid=flow.stats().coordinator_pid)
    note("SF-LOOP", "stopped")
    failed = [code for code in group.exitcodes if code]
    if failed:
        raise RuntimeError(f"workers ended with exit codes {failed}")


@dataclass
class Verdict:
    """What the check found."""

    reads: int = 0
    writes: int = 0
    faults: list[str] = field(default_factory=list)


def check(events: list[dict[str, Any]]) -> Verdict:
    """Hold every read against every write."""
    verdict = Verdict()
    submitted: dict[tuple[str, int], float] = {}
    writes: list[tuple[float, int]] = []
    for event in events:
        if event["event"] == "submit":
            submitted[event["who"], event["seq"]] = event["returned"]
        elif event["event"] == "committed":
            writes.append((submitted[event["who"], event["seq"]], event["version"]))
    verdict.writes = len(writes)
    for event in events:
        if "began" not in event:
            continue
        verdict.reads += 1
        seen = event["version"]
        if event["status"] != f"v{seen}":
            verdict.faults.append(f"{event['who']} saw a half-done state: version {seen}, status {event['status']}")
        due = max((version for returned, version in writes if returned < event["began"]), default=0)
        # A P2 task in SF-LOOP begins when it is run; it is held to what was submitted before its submit.
        if event["who"] != "SF-LOOP" and seen < due:
            verdict.faults.append(f"{event['who']} saw version {seen} after the submission of {due} had returned")
    return verdict


def draw(events: list[dict[str, Any]], out: TextIO) -> None:
    """Print the timeline: a line for each event, then a lane for each process."""
    begin = min(event["time"] for event in events)
    scale = (COLUMNS - 1) / max(event["time"] - begin for event in events)

    def column(moment: float) -> int:
        return max(0, int((moment - begin) * scale))

    lanes = {name: [" "] * COLUMNS for name in ["SF-LOOP", *sorted({e["who"] for e in events} - {"SF-LOOP"})]}
    running = waiting = 0.0
    for event in events:
        lane, now = lanes[event["who"]], event["time"]
        details = ", ".join(
            f"{key} {value}" for key, value in event.items() if key not in ("time", "who", "event", "began", "returned")
        )
        print(f"{now - begin:7.3f}  {event['who']:9}  {event['event']:10}  {details}", file=out)
        if event["event"] == "P1 begins":
            running = now
        elif event["event"] == "P1 ends":
            lane[column(running) : column(now) + 1] = "#" * (column(now) + 1 - column(running))
        elif event["event"] == "submit":
            lane[column(now)] = "w"
        elif event["event"] == "read":
            waiting = event["began"]
            if column(now) > column(waiting) + 1:
                lane[column(waiting) + 1 : column(now)] = "." * (column(now) - column(waiting) - 1)
            lane[column(now)] = "r"
    print(file=out)
    for name, lane in lanes.items():
        print(f"{name:9} |{''.join(lane)}|", file=out)
    print("\n#  a P1 runs, its state half done   w  submits a P1   .  a read waits at the gate   r  reads", file=out)


def run(out: TextIO = sys.stdout) -> int:
    """Play, draw, judge. Returns the exit code: 0, or 1 if a reader saw what it must not see."""
    print(f"A coordinator and {WORKERS} workers: each writes {ROUNDS} times and reads in between ...\n", file=out)
    with tempfile.NamedTemporaryFile(prefix="strictflow-demo-") as file:
        play(Path(file.name))
        events = [json.loads(line) for line in Path(file.name).read_text().splitlines()]
    events.sort(key=lambda event: event["time"])
    draw(events, out)
    verdict = check(events)
    print(f"\n{verdict.reads} reads, {verdict.writes} writes, {len(verdict.faults)} faults", file=out)
    for fault in verdict.faults:
        print(f"FAULT: {fault}", file=out)
    if not verdict.faults:
        print("no reader saw a stale or a half-done state", file=out)
    return 1 if verdict.faults else 0
