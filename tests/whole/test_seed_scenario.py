"""The scenario of strictflow 0.1.0, the thread library: an async read, a write of 1.5 s, another async read.

Its code as it stands, but for three things: the configuration lives in the state, since a global variable is
not shared by processes; events go to a file too; and where the original slept until others would be ready,
it waits for them.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time

import pytest

from strictflow_mp import StrictFlow, read, write

SCRIPT = '''
import threading
import time
import asyncio
import logging
import os
import sys
from strictflow_mp import StrictFlow, read, write, setup_logging
from strictflow_mp.core import logger

setup_logging(logging.DEBUG)

GLOBAL_CONFIG = {"version": 0, "status": "stable"}

def main(events):
    flow = StrictFlow(state={"config": GLOBAL_CONFIG})
    loop_thread = threading.Thread(target=flow.run_loop, daemon=True, name="FlowLoop")
    loop_thread.start()

    def tell(text):
        print(text)
        with open(events, "a") as file:
            print(time.monotonic(), text, file=file)

    @write(flow)
    def update_config(new_version: int, new_status: str):
        """P1 Write: Simulates a critical, blocking update."""
        config = flow.state["config"]
        tell(f"   [P1] Working: Simulating 1.5s write for V{new_version}...")
        config['version'] = new_version
        time.sleep(1.5)
        config['status'] = new_status
        tell(f"   [P1] Complete: Config updated to V{new_version}.")

    @read(flow)
    async def fetch_data_async(reader_id: str):
        """P2 Read: Can run concurrently but MUST wait for P1."""
        for i in range(3):
            await asyncio.sleep(0.3)
            current_config = flow.state["config"].copy()
            tell(f"   [P2] Reader {reader_id} read | V{current_config['version']} | Iteration {i+1}")

    # --- SIMULATION ---
    tasks = [fetch_data_async(reader_id="R-A")]

    while not os.path.getsize(events):
        time.sleep(0.01)

    tasks.append(update_config(new_version=1, new_status="deploying"))

    tasks.append(fetch_data_async(reader_id="R-B"))

    for task in tasks:
        task.result()
    logger.info("all tasks have finished")
    flow.stop_loop()
    loop_thread.join()

if __name__ == "__main__":
    main(sys.argv[1])
'''


@pytest.fixture
def run_scenario(run_python, tmp_path):
    """Run the script; return what it printed, and the events in its file."""

    def run_scenario(script):
        (tmp_path / "scenario.py").write_text(script)
        events = tmp_path / "events"
        events.touch()
        child = run_python(tmp_path / "scenario.py", events)
        assert (child.returncode, child.stderr) == (0, "")
        return child.stdout, [line.split(maxsplit=1) for line in events.read_text().splitlines()]

    return run_scenario


def test_the_first_read_sees_v0_none_happens_during_the_write_and_all_after_it_see_v1(run_scenario):
    output, events = run_scenario(SCRIPT)
    printed = re.findall(r"^   (\[P.*)$", output, re.MULTILINE)
    moments = [float(moment) for moment, _ in events]
    assert moments == sorted(moments)
    assert [text for _, text in events] == printed
    assert printed[:3] == [
        "[P2] Reader R-A read | V0 | Iteration 1",
        "[P1] Working: Simulating 1.5s write for V1...",
        "[P1] Complete: Config updated to V1.",
    ]
    assert sorted(printed[3:]) == [
        "[P2] Reader R-A read | V1 | Iteration 2",
        "[P2] Reader R-A read | V1 | Iteration 3",
        "[P2] Reader R-B read | V1 | Iteration 1",
        "[P2] Reader R-B read | V1 | Iteration 2",
        "[P2] Reader R-B read | V1 | Iteration 3",
    ]


def hurried(script):
    return script.replace("sleep(1.5)", "sleep(0)").replace("sleep(0.3)", "sleep(0.01)")


def logged(output, level, place, priority, message):
    return re.search(rf"^\[[\d:.]+\] {level} +{place} +\({priority}\) .*{message}", output, re.MULTILINE)


def test_lines_that_tasks_log_name_sf_loop_and_the_priority(run_scenario):
    output, _ = run_scenario(hurried(SCRIPT.replace("print(text)", "logger.warning(text)")))
    assert logged(output, "WARNING", "SF-LOOP", "P1", r"\[P1\] Working")
    assert logged(output, "WARNING", "SF-LOOP", "P2", r"\[P2\] Reader R-A")
    assert logged(output, "INFO", "MainProcess", "P-", "all tasks have finished")


def test_lines_that_the_library_logs_name_the_task_and_its_priority(run_scenario):
    output, _ = run_scenario(hurried(SCRIPT))
    assert logged(output, "DEBUG", "SF-LOOP", "P1", "update_config")
    assert logged(output, "DEBUG", "SF-LOOP", "P2", "fetch_data_async")


def test_the_tasks_say_the_same_by_their_own_clock(tmp_path, eventually):
    begun = tmp_path / "begun"
    flow = StrictFlow(state={"config": {"version": 0, "status": "stable"}})
    loop = threading.Thread(target=flow.run_loop, daemon=True)
    loop.start()

    @write(flow)
    def update_config(version, status):
        began = time.monotonic()
        config = flow.state["config"]
        config["version"] = version
        time.sleep(1.5)
        config["status"] = status
        return began, time.monotonic()

    @read(flow)
    async def fetch_data():
        reads = []
        for _ in range(3):
            await asyncio.sleep(0.3)
            reads.append((time.monotonic(), dict(flow.state["config"])))
            begun.touch()
        return reads

    first = fetch_data()
    eventually(begun.exists)
    writing = update_config(1, "deploying")
    second = fetch_data()
    began, ended = writing.result()
    before, *after = first.result()
    after += second.result()
    flow.stop_loop()
    loop.join(15)

    assert not loop.is_alive()
    assert before[0] < began
    assert before[1] == {"version": 0, "status": "stable"}
    assert all(moment > ended for moment, _ in after)
    assert all(config == {"version": 1, "status": "deploying"} for _, config in after)
