import asyncio, time
from strictflow_mp import StrictFlow, read, write

flow = StrictFlow("quickstart", state={"config": {"version": 0, "status": "stable"}})


@write(flow)
def update_config(version, status):
    """P1: alone in SF-LOOP; committed when it returns, or not at all."""
    config = flow.state["config"]
    config["version"] = version
    time.sleep(1.5)  # a reader never sees this half-done state
    config["status"] = status


@read(flow)
async def poll_config(reader):
    """P2: overlaps with other async reads, paused while a P1 runs."""
    for _ in range(3):
        await asyncio.sleep(0.3)
        print(reader, flow.state["config"])


def worker(n):
    update_config(n, "deploying").result()
    print(flow.state["config"]["version"])


if __name__ == "__main__":
    with flow:  # start_loop() ... stop_loop()
        poll_config("R-A")
        flow.spawn(worker, processes=4).join()
