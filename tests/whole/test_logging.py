"""The log: every process writes lines that tell time, level, place and priority, once it is asked to."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import textwrap
from pathlib import Path

import pytest

from strictflow_mp import StrictFlow, read, write
from strictflow_mp.core import FIELDS, logger
from strictflow_mp.system.place import Place

LOGGING = """
    import sys
    from strictflow_mp import StrictFlow, read, setup_logging, write
    from strictflow_mp.core import logger

    setup_logging("INFO")
    setup_logging("DEBUG" if len(sys.argv) > 1 else "INFO")
    flow = StrictFlow("logged", state={"n": 0})

    @write(flow)
    def p1():
        logger.info("in a P1")
        logger.debug("hidden at INFO")

    @read(flow)
    async def p2():
        logger.warning("in a P2")

    @read(flow, where="worker")
    def p2_here():
        logger.info("in a P2 here")

    def worker():
        logger.info("in a worker")

    if __name__ == "__main__":
        with flow:
            p1().result(), p2().result(), p2_here().result()
            logger.info("outside")
            flow.spawn(worker).join()
"""
LINE = r"\[\d\d:\d\d:\d\d\.\d\d\d\] {} +{} +\({}\) {}"
LINES = [
    ("INFO", "SF-LOOP", "P1", "in a P1"),
    ("WARNING", "SF-LOOP", "P2", "in a P2"),
    ("INFO", "MainProcess", "P2", "in a P2 here"),
    ("INFO", "MainProcess", "P-", "outside"),
    ("INFO", "worker-1", "P-", "in a worker"),
]


@pytest.mark.parametrize("args", [[], ["DEBUG"]], ids=["INFO", "DEBUG"])
def test_log_lines_tell_time_level_place_and_priority_from_every_process(run_python, args):
    ran = run_python(textwrap.dedent(LOGGING), *args)
    assert (ran.returncode, ran.stderr) == (0, "")
    lines = ran.stdout.splitlines()
    for fields in LINES:
        assert sum(bool(re.fullmatch(LINE.format(*fields), line)) for line in lines) == 1, (
            fields,
            ran.stdout,
        )
    assert ("hidden at INFO" in ran.stdout) == bool(args)
    assert all(re.match(LINE.format(r"\w+", r"\S+", "P[12-]", ".*"), line) for line in lines), ran.stdout


def test_nothing_is_logged_without_setup_logging(run_python):
    ran = run_python(textwrap.dedent(LOGGING).replace("setup_logging(", "str("))
    assert (ran.returncode, ran.stderr, ran.stdout) == (0, "", "")


class Fields(logging.Handler):
    """Writes each record's fields to a file, a line for each."""

    def __init__(self, path) -> None:
        super().__init__()
        self.path = path

    def emit(self, record: logging.LogRecord) -> None:
        fields = {"text": record.getMessage(), **{name: getattr(record, name) for name in FIELDS}}
        with open(self.path, "a") as file:
            file.write(json.dumps(fields) + "\n")


def listen(path) -> None:
    logger.addHandler(Fields(path))
    logger.setLevel(logging.DEBUG)


def lines(path, text: str) -> list[dict]:
    """The fields of the lines that say that; but those that say nothing."""
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [
        {name: value for name, value in fields.items() if value is not None and name != "text"}
        for fields in found
        if text in fields["text"]
    ]


def test_records_of_sf_loop_carry_their_fields(tmp_path):
    path = tmp_path / "lines"
    with StrictFlow("fields", state={"n": 0}) as flow:
        slot = flow._client.attach().slot

        @write(flow)
        def begin():
            listen(path)

        @write(flow)
        def fail():
            logger.info("said by a task")
            raise ValueError("no")

        @read(flow)
        async def look():
            logger.info("said by a P2")

        begin().result()
        assert type(fail().exception()) is ValueError
        look().result()
    p1, p2 = {"flow": "fields", "priority": 1}, {"flow": "fields", "priority": 2}
    assert lines(path, "fail starts") == [{**p1, "task": "fail"}]
    assert lines(path, "said by a task") == [p1]
    me = {"peer": os.getpid(), "slot": slot}
    assert lines(path, "fail failed") == [{**p1, "task": "fail", "error": "ValueError", **me}]
    assert lines(path, "look ends") == [{**p2, "task": "look"}]
    assert lines(path, "said by a P2") == [p2]
    [ended] = lines(path, "has ended")
    assert ended == {"flow": "fields", "version": ended["version"]}
    assert ended["version"] >= 3


def test_records_of_other_processes_carry_their_fields(tmp_path):
    path = tmp_path / "lines"
    level = logger.level
    listen(path)
    try:
        with StrictFlow("fields", state={"n": 0}) as flow:
            flow.state["n"] = 1
            former = Place.of("fields").resident().pid
            os.kill(former, signal.SIGKILL)
            flow.state["n"] = 2
            now = Place.of("fields").resident().pid
            logger.info("said outside")
    finally:
        logger.removeHandler(logger.handlers[-1])
        logger.setLevel(level)
    assert lines(path, "its coordinator ended with") == [
        {"flow": "fields", "peer": former, "exit_code": -signal.SIGKILL}
    ]
    assert lines(path, "came back") == [{"flow": "fields", "peer": now, "restarts": 1}]
    assert lines(path, "said outside") == [{}]


def test_the_fields_are_those_that_the_documents_name():
    text = (Path(__file__).parents[2] / "docs" / "tracing.md").read_text()
    rows = text.split("| field | meaning |\n| --- | --- |\n")[1].split("\n\n")[0].splitlines()
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])} == set(FIELDS)
