"""A price board: three feeds write quotes, four readers show boards that are never half-way between ticks.

A tick changes two keys, a pair of currencies and its inverse, in one commit; then a keyed task counts it. A
reader takes snapshots: all keys at one version. Run it: ``python examples/price_board.py``.
"""

import sys

from strictflow_mp import StrictFlow, write

PAIRS = {"EUR/USD": 1.08, "GBP/USD": 1.27, "CHF/JPY": 171.5}
TICKS = 200


def inverse(pair):
    return "/".join(reversed(pair.split("/")))


def quotes(pair, tick):
    rate = PAIRS[pair] * (1 + tick / 10_000)
    return {pair: {"rate": rate, "tick": tick}, inverse(pair): {"rate": 1 / rate, "tick": tick}}


first = {"ticks": dict.fromkeys(PAIRS, 0)}
for each in PAIRS:
    first |= quotes(each, 0)
flow = StrictFlow("price-board", state=first)


@write(flow, key="ticks")
def count(ticks, pair):
    """A keyed P1: it is given a copy of one value, and returns the new one."""
    ticks[pair] += 1
    return ticks


def feed(number):
    pair = list(PAIRS)[number - 1]
    for tick in range(1, TICKS + 1):
        flow.update(quotes(pair, tick))  # one commit for both keys
        count(pair).result()


def require(condition, what):
    if not condition:
        sys.exit(f"price board: {what}")


def show(reader):
    boards, seen = 0, dict.fromkeys(PAIRS, 0)
    while sum(seen.values()) < len(PAIRS) * TICKS:
        with flow.snapshot() as board:
            for pair in PAIRS:
                there, back = board[pair], board[inverse(pair)]
                require(there["tick"] == back["tick"], f"{pair} is half-way between two ticks")
                require(abs(there["rate"] * back["rate"] - 1) < 1e-9, f"{pair} does not match its inverse")
                require(0 <= there["tick"] - board["ticks"][pair] <= 1, f"{pair}: counted before its quote")
                require(there["tick"] >= seen[pair], f"{pair} went back in time")
                seen[pair] = there["tick"]
        boards += 1
    print(f"reader {reader} saw {boards} boards, each of them consistent")


if __name__ == "__main__":
    with flow, flow.spawn(show, processes=4) as readers, flow.spawn(feed, processes=len(PAIRS)) as feeds:
        feeds.join()
        ticks = flow.state["ticks"]
    require(ticks == dict.fromkeys(PAIRS, TICKS), f"ticks are missing: {ticks}")
    require(not any(feeds.exitcodes + readers.exitcodes), f"{feeds.exitcodes}, {readers.exitcodes}")
    print(f"ok: {len(PAIRS) * TICKS} ticks, {len(readers)} readers, no inconsistent board")
