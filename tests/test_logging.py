"""The log: every process writes lines that tell time, level, place and priority, once it is asked to."""

from __future__ import annotations

import re
import textwrap

import pytest

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
