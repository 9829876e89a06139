"""What the library costs, beside what a user would pick instead: ``python -m benchmarks``.

`measure` times batches of ours and of a peer's in turns, `peers` has the peers, `table` prints; every other
module measures one group of figures, each in one small function that says what both sides do.
"""
