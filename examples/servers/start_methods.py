"""One flow, and processes of every start method: the handle is an argument, and finds the flow by itself.

Run it: ``python start_methods.py``.
"""

import multiprocessing

from strictflow_mp import StrictFlow


def work(flow, method):
    flow.state[method] = f"written by a process made by {method}"


if __name__ == "__main__":
    with StrictFlow("start-methods") as flow:
        for method in multiprocessing.get_all_start_methods():
            process = multiprocessing.get_context(method).Process(target=work, args=(flow, method))
            process.start()
            process.join()
            print(flow.state[method])
