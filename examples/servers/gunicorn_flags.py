"""Feature flags that all gunicorn workers see at once.

strictflow-mp serve flags &
gunicorn --workers 4 gunicorn_flags:app
curl localhost:8000/dark-mode            # {"on": false, ...}, from whichever worker
curl -X PUT localhost:8000/dark-mode     # when this has answered, no worker says false any more
"""

import json
import os

from strictflow_mp import StrictFlow

flow = StrictFlow("flags")  # it attaches at first use, in each worker


def app(environ, start_response):
    flag = environ["PATH_INFO"].strip("/")
    if environ["REQUEST_METHOD"] in {"PUT", "DELETE"}:
        flow.state[flag] = environ["REQUEST_METHOD"] == "PUT"
    answer = {"flag": flag, "on": flow.state.get(flag, False), "pid": os.getpid()}
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(answer).encode()]
