"""Readers never see a half-done, mixed or stale state; and this very check sees when one of the rules is broken."""

from __future__ import annotations

import re
import statistics
from itertools import chain

import pytest
import sabotage
from strictness import (
    READERS,
    WRITERS,
    Board,
    check,
    first_state,
    read_and_time,
    write_without_pause,
)

from strictflow_mp import StrictFlow
from strictflow_mp.memory.segment import Segment
from strictflow_mp.memory.slot import PIN_WORDS

pytestmark = pytest.mark.once

ATTEMPTS = 3


@pytest.fixture
def flow():
    return StrictFlow("strictness", state=first_state())


@pytest.fixture
def board(tmp_path):
    return Board(tmp_path)


@pytest.mark.parametrize(
    ("reads", "hardships"),
    [
        (100_000, {}),
        (20_000, {"in_coordinator": sabotage.reuse_memory_at_once, "in_readers": sabotage.dawdle}),
    ],
    ids=["as it is", "memory reused at once, slow readers"],
)
def test_no_reader_sees_a_torn_mixed_or_stale_state(flow, board, reads, hardships):
    done = check(flow, board, reads, **hardships)
    assert board.faults() == []
    assert done >= reads
    assert min(board.returned) > 0


@pytest.mark.proof
@pytest.mark.parametrize(
    ("seen", "broken"),
    [
        ("stale", {"in_readers": sabotage.open_the_gate}),
        ("stale", {"in_writers": sabotage.raise_no_flag}),
        ("stale", {"in_coordinator": sabotage.finish_before_publishing}),
        ("torn|stale", {"in_readers": sabotage.skip_the_horizon, "in_coordinator": sabotage.reuse_memory_at_once}),
        ("torn|mixed", {"in_coordinator": sabotage.ignore_the_pins}),
        ("mixed", {"in_readers": sabotage.read_the_newest_for_each_key}),
    ],
    ids=lambda value: next(iter(value.values())).__name__ if isinstance(value, dict) else value,
)
def test_the_check_sees_every_sabotage(flow, tmp_path, seen, broken):
    for attempt in range(ATTEMPTS):
        board = Board(tmp_path / str(attempt))
        check(flow, board, 60_000, **broken)
        if faults := board.faults():
            break
    assert any(re.match(rf"\S+: ({seen}): ", fault) for fault in faults), faults


def test_gated_reads_keep_finishing_under_a_steady_stream_of_writes(flow, board, record_property):
    reads = 300
    with flow, flow.spawn(write_without_pause, flow, board, processes=WRITERS) as writers:
        with flow.spawn(read_and_time, flow, board, reads, processes=READERS) as readers:
            readers.join(30)
            board.end()
        writers.join()
    assert readers.exitcodes + writers.exitcodes == [0] * (READERS + WRITERS)
    assert board.read.tolist() == [reads] * READERS, "some reads did not finish while the writers went on"
    seconds = sorted(chain.from_iterable(board.kept()))
    p50, p99 = statistics.median(seconds), seconds[len(seconds) * 99 // 100]
    record_property("gated_read_p50_ms", round(p50 * 1e3, 2))
    record_property("gated_read_p99_ms", round(p99 * 1e3, 2))
    print(f"under {sum(board.returned):,} P1, a gated read took p50 {p50 * 1e3:.2f} ms, p99 {p99 * 1e3:.2f} ms")


def test_a_snapshot_that_outlives_its_handle_keeps_its_pin_and_takes_nobody_elses(flow, tmp_path, eventually):
    over = tmp_path / "over"

    def hold():
        with flow.snapshot():
            eventually(over.exists, timeout=60)

    with flow:
        segment = Segment.open(flow._client.attach().segment.name)
        pins = segment.words[segment.pins : segment.pins + segment.slots * PIN_WORDS]
        snapshot = flow.snapshot()
        pin = snapshot.version + 1
        flow.close()
        with flow.spawn(hold):
            eventually(lambda: pins.tolist().count(pin) == 2)
            snapshot.close()
            assert pins.tolist().count(pin) == 1
            over.touch()
        pins.release()
        segment.close()
