"""The soak: mixed load with deaths for many minutes, and whether memory stays flat in every process and in /dev/shm.

    python tests/whole/soak.py --minutes 20 --plot docs/soak.svg

One worker and the owner live through it all; the other workers and the coordinator are killed again and again.
Memory is flat when the median of the last third is at most `GROWTH` times that of the second, for each curve.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import time
from pathlib import Path

import psutil

from strictflow_mp import StrictFlow, StrictFlowError, write
from strictflow_mp.system.place import Place

NAME = "soak"
KEYS = 2_000
GROWTH = 1.1
SLACK = 1.0
"""MiB that a curve may rise besides: a page here and there is no leak."""
PERIOD = 2.0
MIB = 1 << 20


def work(number: int) -> None:
    flow = StrictFlow(NAME)
    dice = random.Random(os.getpid())

    @write(flow)
    def add(key, amount):
        flow.state["sum"] += amount
        flow.state[key] = {"amount": amount, "text": "x" * (amount % 500)}
        return amount

    @write(flow)
    def fail():
        flow.state["sum"] += 1
        raise ValueError("undone")

    while True:
        try:
            futures = [add(("key", dice.randrange(KEYS)), dice.randrange(1000)) for _ in range(dice.randrange(1, 40))]
            futures += [fail(), flow.put("large", bytes(dice.randrange(200_000)))]
            if dice.random() < 0.2:
                flow.put(("gone", number), 1)
                futures.append(flow.delete(("gone", number)))
            for _ in range(100):
                flow.state.get(("key", dice.randrange(KEYS)))
            with flow.snapshot() as snapshot:
                sum(1 for _ in snapshot)
            for future in futures:
                future.exception(60)
        except StrictFlowError as error:
            print(f"worker {number}: {error!r}", file=sys.stderr, flush=True)


def rss(pid: int) -> float:
    try:
        return float(psutil.Process(pid).memory_info().rss) / MIB
    except psutil.Error:
        return float("nan")


def private(pid: int) -> float:
    """Memory without what is shared, which every process has in its resident size as it touches it."""
    try:
        memory = psutil.Process(pid).memory_info()
        return float(memory.rss - memory.shared) / MIB
    except psutil.Error:
        return float("nan")


def shared_memory() -> float:
    resident = Place.of(NAME).resident()
    if resident is None:
        return float("nan")
    try:
        return os.stat(f"/dev/shm/sfmp-{resident.token}").st_blocks * 512 / MIB
    except FileNotFoundError:
        return float("nan")


def objects() -> float:
    resident = Place.of(NAME).resident()
    token = resident.token if resident else "?"
    return float(sum(token in name for name in os.listdir("/dev/shm")))


def soak(minutes: float) -> tuple[list[float], dict[str, list[float]], int, int]:
    flow = StrictFlow(NAME, state={"sum": 0}, capacity=64 * MIB)
    curves: dict[str, list[float]] = {name: [] for name in ("coordinator", "owner", "worker", "/dev/shm", "objects")}
    times: list[float] = []
    deaths = [0, 0]
    dice = random.Random(1)
    with flow:
        elder = flow.spawn(work, 0)
        group = flow.spawn(work, 1, processes=2, restart="always")
        began = time.monotonic()
        try:
            while (now := time.monotonic() - began) < minutes * 60:
                time.sleep(PERIOD)
                resident = Place.of(NAME).resident()
                if resident is None:
                    continue
                times.append(now)
                curves["coordinator"].append(private(resident.pid))
                curves["owner"].append(private(os.getpid()))
                curves["worker"].append(private(next(iter(elder)).pid))
                curves["/dev/shm"].append(shared_memory())
                curves["objects"].append(objects())
                if dice.random() < 0.5:
                    deaths[0] += 1
                    dice.choice(list(group)).kill()
                if dice.random() < 0.2:
                    deaths[1] += 1
                    os.kill(resident.pid, signal.SIGKILL)
        finally:
            group.terminate()
            elder.terminate()
    return times, curves, deaths[0], deaths[1]


def thirds(curve: list[float]) -> tuple[float, float]:
    sound = [value for value in curve if value == value]
    third = max(1, len(sound) // 3)
    return statistics.median(sound[third : 2 * third] or sound), statistics.median(sound[-third:])


def draw(times: list[float], curves: dict[str, list[float]], title: str) -> str:
    width, height, left, top = 860, 130, 110, 40
    colours = ("#1f77b4", "#2ca02c", "#9467bd", "#d62728", "#8c564b")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + left + 30}" '
        f'height="{top + len(curves) * (height + 20) + 30}" font-family="sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="white"/><text x="{left}" y="22" font-size="15">{title}</text>'
    ]
    end = times[-1]
    for row, (name, curve) in enumerate(curves.items()):
        base = top + row * (height + 20)
        most = max(value for value in curve if value == value) * 1.15
        unit = "" if name == "objects" else " MiB"
        points = " ".join(
            f"{left + x / end * width:.1f},{base + height - value / most * height:.1f}"
            for x, value in zip(times, curve, strict=True)
            if value == value
        )
        parts.append(
            f'<rect x="{left}" y="{base}" width="{width}" height="{height}" fill="none" stroke="#ccc"/>'
            f'<text x="10" y="{base + 20}">{name}</text>'
            f'<text x="{left - 6}" y="{base + 12}" text-anchor="end" fill="#666">{most:.0f}{unit}</text>'
            f'<text x="{left - 6}" y="{base + height}" text-anchor="end" fill="#666">0</text>'
            f'<polyline points="{points}" fill="none" stroke="{colours[row]}" stroke-width="1.2"/>'
        )
    bottom = top + len(curves) * (height + 20) + 5
    parts.append(
        f'<text x="{left}" y="{bottom}" fill="#666">0</text>'
        f'<text x="{left + width}" y="{bottom}" text-anchor="end" fill="#666">{end / 60:.0f} min</text></svg>'
    )
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description="mixed load with deaths; is memory flat?")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--plot", type=Path)
    chosen = parser.parse_args()
    times, curves, workers, coordinators = soak(chosen.minutes)
    title = f"Soak: {chosen.minutes:g} minutes, {workers} workers and {coordinators} coordinators killed"
    print(title)
    risen = []
    for name, curve in curves.items():
        second, last = thirds(curve)
        flat = last <= second * GROWTH + (0 if name == "objects" else SLACK)
        print(f"{name:12} second third {second:8.1f}   last third {last:8.1f}   {'flat' if flat else 'RISES'}")
        if not flat:
            risen.append(name)
    if chosen.plot:
        chosen.plot.write_text(draw(times, curves, title))
    return 1 if risen else 0


if __name__ == "__main__":
    raise SystemExit(main())
