"""Celery's prefork pool, a Jupyter kernel, pools, and every start method."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from jupyter_client.manager import start_new_kernel
from servers import EXAMPLES, PATIENCE

from strictflow_mp import StrictFlow
from strictflow_mp.system.place import Place


def test_celery_counts_every_task_though_its_processes_are_replaced(serve, launch, tmp_path, eventually):
    serve("counters")
    (tmp_path / "queue").mkdir()
    options = ["--pool", "prefork", "--concurrency", 3, "--max-tasks-per-child", 10, "--without-mingle"]
    worker = launch("celery", "--app", "celery_counters", "worker", *options, "--without-gossip")
    sender = subprocess.run(
        [sys.executable, EXAMPLES / "celery_counters.py"],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert sender.returncode == 0, sender.stderr + worker.says()
    assert "'red': 50" in sender.stdout
    flow = StrictFlow("counters")
    assert flow.state["words"] == {"red": 50, "green": 25, "blue": 25}
    eventually(lambda: len(flow.stats().workers) <= 1 + 3)
    assert worker.stop() == 0, worker.says()
    eventually(lambda: len(flow.stats().workers) == 1)
    flow.close()


def test_functions_that_are_defined_in_cells_run_in_sf_loop_and_in_workers(tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    _, *cells = (EXAMPLES / "notebook_cells.py").read_text().split("# %%\n")
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(tmp_path))
    try:
        shown = []
        for cell in cells:
            said = []
            reply = client.execute_interactive(
                cell,
                timeout=PATIENCE,
                output_hook=lambda message: said.append(message["content"]),  # noqa: B023
            )
            assert reply["content"]["status"] == "ok", reply["content"]
            shown += [content["data"]["text/plain"] for content in said if "data" in content]
        assert shown == ["['worker 1', 'worker 2', 'worker 3']"]
    finally:
        client.stop_channels()
        manager.shutdown_kernel()
        manager.cleanup_resources()


def test_after_a_kernel_was_killed_the_flow_can_be_started_again(tmp_path, monkeypatch, eventually):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(tmp_path))
    _, first, *_ = (EXAMPLES / "notebook_cells.py").read_text().split("# %%\n")
    try:
        reply = client.execute_interactive(first, timeout=PATIENCE, output_hook=lambda message: None)
        assert reply["content"]["status"] == "ok", reply["content"]
        assert Place.of("notebook").is_inhabited()
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()
    eventually(lambda: not Place.of("notebook").is_inhabited(), PATIENCE)
    with StrictFlow("notebook", state={"seen": []}) as flow:
        assert flow.state["seen"] == []


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("start_methods.py", r"written by a process made by fork\n.* spawn\n.* forkserver\n"),
        ("executor.py", r"4950\n9900\n"),
    ],
)
def test_an_example_without_a_server_runs(name, printed, run_python):
    result = run_python(EXAMPLES / name, env={"OPENBLAS_NUM_THREADS": "1"})
    assert (result.returncode, result.stderr) == (0, "")
    assert re.fullmatch(printed, result.stdout)
    assert not os.path.exists(os.environ["STRICTFLOW_MP_DIR"])  # nothing left, and so the directory is gone too
