"""The cells of a notebook: functions that are defined in a cell run in SF-LOOP and in worker processes.

Copy each cell into Jupyter, in this order.
"""

# %%
from strictflow_mp import StrictFlow, write

flow = StrictFlow("notebook", state={"seen": []})
flow.start_loop()


# %%
@write(flow)
def remember(what):
    flow.state["seen"].append(what)


def worker(number):
    remember(f"worker {number}").result()


# %%
workers = flow.spawn(worker, processes=3)
workers.join()
sorted(flow.state["seen"])

# %%
flow.stop_loop()
