"""Setpoints of a controller: flows that must add up, changed one after the other, seen all at once.

Two operators set the mix of a dosing station. A check at the end of the P1 refuses a mix that the plant must
not run, and takes every change of it back. Three watchers see old or new setpoints, never a mixture of them.
Run it: ``python examples/setpoints.py``.
"""

import random
import sys

from strictflow_mp import StrictFlow, read, write

MOST_ACID = 300  # litres per hour
MIXES = 60

FIRST = {"total": 1000, "acid": 100, "water": 900, "pump": {"speed": 2000, "changes": 0}}
flow = StrictFlow("setpoints", state=FIRST | {"accepted": 0, "running": True})


@write(flow)
def set_mix(total, percent):
    state = flow.state
    state["total"] = total
    state["acid"] = total * percent // 100
    state["water"] = total - state["acid"]
    state["pump"]["speed"] = 2 * total  # a change in place counts too
    state["pump"]["changes"] += 1
    if state["acid"] > MOST_ACID:
        raise ValueError(f"{state['acid']} l/h of acid are too much")


@write(flow, key="accepted")
def report(accepted, more):
    return accepted + more


@read(flow, where="worker")
def look():
    """Runs in the watcher's own process; its ``flow.state`` is one version throughout."""
    return dict(flow.state)


def operate(operator):
    dice = random.Random(operator)
    refused = 0
    for _ in range(MIXES):
        mix = set_mix(dice.randrange(500, 2001, 10), dice.randrange(5, 30))
        refused += isinstance(mix.exception(), ValueError)
    report(MIXES - refused).result()
    print(f"operator {operator}: {MIXES - refused} mixes set, {refused} refused")


def watch(watcher):
    now = {"running": True}
    while now["running"]:
        now = look().result()
        if now["water"] + now["acid"] != now["total"] or now["pump"]["speed"] != 2 * now["total"]:
            sys.exit(f"watcher {watcher} saw a mixture: {now}")
        if now["acid"] > MOST_ACID:
            sys.exit(f"watcher {watcher} saw a mix that was refused: {now}")


if __name__ == "__main__":
    with flow, flow.spawn(watch, processes=3) as watchers, flow.spawn(operate, processes=2) as operators:
        operators.join()
        flow.state["running"] = False
        accepted, changes = flow.state["accepted"], flow.state["pump"]["changes"]
    if any(operators.exitcodes + watchers.exitcodes) or not 0 < changes == accepted < 2 * MIXES:
        sys.exit(f"{accepted} mixes accepted, {changes} set; {operators.exitcodes}, {watchers.exitcodes}")
    print(f"ok: {changes} mixes set, {2 * MIXES - changes} refused and taken back, nobody saw a mixture")
