"""A `concurrent.futures` pool whose jobs obey a setting that changes while they run.

Run it: ``python executor.py``.
"""

from concurrent.futures import ProcessPoolExecutor

from strictflow_mp import StrictFlow

flow = StrictFlow("executor", state={"factor": 1})


def job(number):
    return number * flow.state["factor"]


if __name__ == "__main__":
    with flow, ProcessPoolExecutor(4) as pool:
        print(sum(pool.map(job, range(100))))
        flow.state["factor"] = 2  # every job that begins from now on sees it
        print(sum(pool.map(job, range(100))))
