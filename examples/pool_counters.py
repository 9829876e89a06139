"""Counters in a process pool: jobs count what they do, nobody waits for it, and the total is exact.

The handle goes to the pool as an argument, by pickle; any start method will do. A job only submits its P1.
The read at the end waits for every P1 that was submitted before it, by any process. Run it:
``python examples/pool_counters.py``.
"""

import multiprocessing
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from strictflow_mp import StrictFlow, write

PROCESSES = 4
WORDS = ["red", "green", "blue", "red", "green", "red"] * 200

flow = StrictFlow("pool-counters", state={"words": {}, "letters": 0})


@write(flow)
def add(word):
    words = flow.state["words"]
    words[word] = words.get(word, 0) + 1
    flow.state["letters"] += len(word)


def job(handle, word):
    add(word)
    return handle.name, len(handle.peek("words"))


if __name__ == "__main__":
    with flow:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
            results = list(pool.map(job, [flow] * len(WORDS), WORDS, chunksize=10))
        with flow.snapshot() as final:
            words, letters = final["words"], final["letters"]
    if {name for name, _ in results} != {"pool-counters"}:
        sys.exit(f"the jobs counted in other flows: {results}")
    if words != Counter(WORDS) or letters != len("".join(WORDS)):
        sys.exit(f"miscounted: {words}, {letters} letters")
    print(f"ok: {len(WORDS)} words and {letters} letters, counted by {PROCESSES} processes, none lost")
