"""A gunicorn configuration whose master owns the flow: no other process to start.

gunicorn --config gunicorn_owner.py --workers 4 gunicorn_flags:app

Each worker has a thread that sets its log level when somebody changes it, from wherever:
``strictflow_mp.StrictFlow("flags").state["log-level"] = "DEBUG"``.
"""

import logging
import threading

from strictflow_mp import StrictFlow

flow = StrictFlow("flags", state={"log-level": "INFO"})


def on_starting(server):
    flow.start_loop()


def on_exit(server):
    flow.stop_loop()


def post_worker_init(worker):
    """In each worker, after the fork: threads of the master are not there any more."""
    threading.Thread(target=follow, args=(worker.log,), daemon=True).start()


def follow(log):
    with flow.watch("log-level") as changes:  # what changes from here on; so look behind it
        set_level(log, flow.state["log-level"])
        for change in changes:
            set_level(log, change.value)


def set_level(log, level):
    log.error_log.setLevel(level)
    logging.getLogger("app").setLevel(level)
