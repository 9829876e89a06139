"""Bursts: the runner without processes. What is committed is what succeeded, and each is told so, once.

A small store that tasks fill, so that commits fail; receipts that are looked at whenever a commit is about to be
published, and against what was sent.
"""

from __future__ import annotations

import math
import secrets
import sys
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strictflow_mp.coordinator import scheduler as schedulers
from strictflow_mp.coordinator.burst import CELL_OVERHEAD
from strictflow_mp.coordinator.calls import Call, Function, TaskCall
from strictflow_mp.coordinator.parts import Parts
from strictflow_mp.coordinator.runner import Runner
from strictflow_mp.coordinator.scheduler import Scheduler
from strictflow_mp.coordinator.slots import answers_of
from strictflow_mp.errors import StateFull
from strictflow_mp.memory.gatekeeper import GateKeeper
from strictflow_mp.memory.segment import Segment
from strictflow_mp.memory.suspect import Marker
from strictflow_mp.store import BURST_BYTES, Pins, Receipt, StoreReader, StoreWriter, commit, read_receipts
from strictflow_mp.system.identity import Identity
from strictflow_mp.values.codec import pack, unpack
from strictflow_mp.values.keys import pack_key, unpack_key
from strictflow_mp.wire import frames
from strictflow_mp.wire.arguments import pack_arguments

OLD = Receipt(99, 1, 1, 1, frames.pack_frame(frames.RESULT, 1, (pack("from a former coordinator"),)))
TENANT = 10
"""What is added to a slot to make its tenant."""


class Peer:
    """A process, as far as the runner knows it."""

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.tenant = TENANT + slot
        self.identity = Identity(100 + slot, 1, 0, 0)
        self.is_dead = self.said_goodbye = False
        self.is_open = True
        self.queued = 0
        self.seq = self.ticket = 0
        self.answers: dict[int, bytes] = {}  # by number
        self.portions = 0


class Future:
    """Of a task that a task has submitted; nobody looks at it."""

    seq = 0

    def settle(self, outcome: Any, failure: BaseException | None) -> None:
        pass


class Inside:
    """A flow in which no task submits another."""

    transaction: Any = None
    publish: Any = None

    def __init__(self, gate: GateKeeper) -> None:
        self.finish = gate.finish


class Loop:
    """SF-LOOP without a loop: a runner, three processes, and a store behind a takeover."""

    def __init__(self, capacity: int) -> None:
        token = secrets.token_hex(6)
        self.segment = Segment.create(token, "bursts", capacity=capacity, slots=4, identity=Identity(1, 1, 0, 0))
        former = StoreWriter(self.segment, "bursts")
        former.create()
        former.receipts.add(OLD)
        former.publish({})
        self.writer = StoreWriter(self.segment, "bursts")
        self.writer.recover()
        self.writer.publish({})
        self.reader = StoreReader(self.segment, Pins(self.segment, 1))
        self.gate = GateKeeper(self.segment, token)
        self.peers = [Peer(slot) for slot in range(1, 4)]
        self.inside = Inside(self.gate)
        self.has_leavers = False
        self.scheduler: Scheduler[Call] = Scheduler()
        unused: Any = None
        sessions: Any = self
        inside: Any = self.inside
        parts = Parts(
            flow="bursts",
            segment=self.segment,
            writer=self.writer,
            reader=self.reader,
            gate=self.gate,
            sessions=sessions,
            slots=unused,
            admission=unused,
            marker=Marker(self.segment),
            scheduler=self.scheduler,
            library=unused,
            stepper=unused,
        )
        self.runner = Runner(parts, inside)
        self.committed = self.stored()
        assert self.committed == [OLD]

    def close(self) -> None:
        self.segment.close()
        self.segment.unlink()

    def send(self, peer: Peer, data: bytes) -> None:
        """As `Sessions.send`."""
        unpacker = msgpack.Unpacker(raw=False, use_list=False)
        unpacker.feed(data)
        peer.portions += 1
        for frame in unpacker:
            kind, first, *_ = frame
            if kind == frames.RESULT:
                answers = [
                    (seq, frames.pack_frame(kind, seq, (payload,))) for seq, payload in enumerate(frame[2], first)
                ]
            else:
                answers = [(first, frames.pack_frame(*frame))]
            for seq, answer in answers:
                assert seq not in peer.answers or kind == frames.CANCELLED, "answered twice"
                assert peer.answers.setdefault(seq, answer) == answer

    def stored(self) -> list[Receipt]:
        return sorted(read_receipts(self.segment))

    def on_event(self, event: str) -> None:
        if event.endswith("commit.recorded"):
            assert self.stored() == self.committed, "somebody has written to the receipts of the last commit"
        elif event.endswith("commit.flipped"):
            self.committed = self.stored()

    def submit(self, peer: Peer | None, function: Callable[..., Any] | None, key: Any = None, *args: Any) -> Call:
        """A call; of a ready-made P1 if there is no function: then *args* is the changes, packed but for their keys."""
        made = None if function is None else Function(function, function.__name__, 1, key and pack_key(key), None)
        changes = None if function else {pack_key(key): packed for key, packed in args[0].items()}
        arguments = pack_arguments(args, {}, "arguments") if function else b""
        if peer is None:
            call = TaskCall(Future(), 0, made, arguments, 0, changes)  # type: ignore[arg-type]
        else:
            peer.queued += 1
            peer.seq += 1
            peer.ticket += 1
            call = Call(peer, peer.seq, peer.ticket, made, arguments, 0, changes)  # type: ignore[arg-type]
        self.scheduler.submit(call)
        return call

    def run(self) -> None:
        while self.scheduler.writes:
            self.runner.run_burst()

    def state(self) -> dict[Any, Any]:
        version = self.reader.pin()
        try:
            return {unpack_key(cell.key): unpack(bytes(cell.payload)) for cell in self.reader.cells(version)}
        finally:
            self.reader.unpin(version)


@pytest.fixture(autouse=True)
def whole_bursts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A burst ends when nothing is queued, however slow the machine is."""
    monkeypatch.setattr(schedulers, "BURST_SECONDS", math.inf)


@pytest.fixture
def new_loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Loop]]:
    loops: list[Loop] = []

    def new_loop(capacity: int = 4 << 20) -> Loop:
        close()
        loops.append(Loop(capacity))
        monkeypatch.setattr(commit, "audit", loops[-1].on_event)
        return loops[-1]

    def close() -> None:
        monkeypatch.setattr(commit, "audit", sys.audit)
        while loops:
            loops.pop().close()

    yield new_loop
    close()


# What tasks do: to a transaction, and to the dict that stands for it


class Failed(Exception):
    pass


def change(state: MutableMapping[Any, Any], what: str, key: str, size: int) -> Any:
    """What a task without a key does; it returns what it has seen."""
    seen = sorted(state), len(state), key in state
    if what == "replace":
        state[key] = bytes(size)
    elif what == "append":
        if isinstance(state.get(key), list):
            state[key].append(size)
        else:
            state[key] = [state.get(key), size]
    elif what == "delete":
        del state[key]
    elif what == "make and delete":
        state["brief"] = size
        del state["brief"]
    elif what == "spoil":
        state["other"] = 1
        state[key] = [state.pop(key, None)]
        raise Failed
    return seen


def keyed(value: Any, what: str, size: int) -> Any:
    """What a task with a key does."""
    if what == "replace":
        return bytes(size)
    if what in ("append", "spoil"):
        if isinstance(value, list):
            value.append(size)
        else:
            value = [value, size]
        if what == "spoil":
            raise Failed
        return value
    return value if what == "same" and value is not None else size


KEYS = ["a", "b", "c"]
TASKS = st.tuples(
    st.integers(0, 3),  # whose: 0, a task that a task has submitted
    st.sampled_from(["keyed", "free", "ready-made"]),
    st.sampled_from(["replace", "append", "delete", "same", "spoil", "make and delete", "number"]),
    st.sampled_from(KEYS),
    st.sampled_from([1, 1, 2, 3000, 100_000, 300_000, 1_100_000]),
    st.sampled_from([0, 0, 0, 0, 1, 2]),  # 1: a P2 was submitted ahead of it; 2: a task that was taken back
)


@given(
    st.lists(st.lists(TASKS, min_size=1, max_size=8), max_size=6),
    st.sampled_from([2 << 20, 3 << 20]),
    st.sampled_from(["", "dead", "gone"]),
)
def check_bursts(new_loop, bursts, capacity, end):
    loop = new_loop(capacity)
    expected: dict[Any, Any] = {}
    calls: list[tuple[Call, Any]] = []
    loop.peers[2].is_dead, loop.peers[2].said_goodbye = end == "dead", end == "gone"
    transaction = loop.runner._transaction
    light = True

    def free(what: str, key: str, size: int) -> Any:
        return change(transaction, what, key, size)

    for burst in bursts:
        first = len(calls)
        light = light and all(size < 3000 for *_, size, _ in burst)
        for owner, how, what, key, size, ahead in burst:
            peer = loop.peers[owner - 1] if owner else None
            if peer:
                peer.seq += ahead == 1
                peer.ticket += ahead == 2
            if how == "ready-made":
                changes = {key: None} if what == "delete" else {key: pack(bytes(size)), "other": pack(size)}
                calls.append((loop.submit(peer, None, None, changes), (how, changes)))
            elif how == "keyed":
                calls.append((loop.submit(peer, keyed, key, what, size), (how, what, key, size)))
            else:
                calls.append((loop.submit(peer, free, None, what, key, size), (how, what, key, size)))
        before, version = dict(expected), loop.writer.version
        loop.run()
        for call, (how, *what) in calls[first:]:
            if call.has_failed:
                assert isinstance(call.failure, (Failed, KeyError, StateFull))
                result = None
            elif how == "ready-made":
                result = None
                for key, packed in what[0].items():
                    if packed is None:
                        del expected[key]
                    else:
                        expected[key] = unpack(packed)
            elif how == "keyed":
                result = expected[what[1]] = keyed(_copy(expected.get(what[1])), what[0], what[2])
            else:
                result = change(expected, *what)
            if call.session is not None:
                answer = call.session.answers[call.seq]
                kind, number, *rest = frames.unpack_frame(answer)
                assert (kind, number) == (frames.FAILURE if call.has_failed else frames.RESULT, call.seq)
                assert call.has_failed or rest == [(pack(result),)]
                assert loop.gate.last_finished(call.slot) >= call.ticket
        assert loop.state() == expected
        assert not any(peer.queued for peer in loop.peers)
        ours = [call for call, _ in calls[first:] if call.session]
        if light:
            assert bool(ours or before != expected) <= loop.writer.version - version <= 1
        for peer in loop.peers:
            mine = [call for call, _ in calls if call.session is peer]
            assert peer.answers.keys() == {call.seq for call in mine}
            kept = loop.writer.receipts.of(peer.tenant)
            if peer.is_dead or peer.said_goodbye:
                assert kept == []
                continue
            assert answers_of(kept) == peer.answers
            flags = {call.seq: call.ticket for call in mine}
            told = {(r.seq + i, r.ticket + i) for r in loop.stored() if r.tenant == peer.tenant for i in range(r.tasks)}
            assert told <= flags.items()
            # Of each process, the first so many: or the next coordinator would run one behind a later one.
            assert sorted(number for number, _ in told) == sorted(flags)[: len(told)]
            assert {call.seq for call in mine if not call.has_failed} <= {number for number, _ in told}


def _copy(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


def test_what_succeeded_is_there_what_failed_is_not_and_each_has_one_answer_and_one_receipt(new_loop):
    check_bursts(new_loop)


@pytest.mark.parametrize("how", ["keyed", "free", "ready-made"])
@pytest.mark.parametrize("size", [100, 1000])
@pytest.mark.parametrize("over", [0, 1])
def test_a_burst_is_one_commit_as_long_as_its_keys_and_values_weigh_no_more_than_was_said(new_loop, how, size, over):
    loop = new_loop()
    transaction = loop.runner._transaction
    keys = [f"{number:03}" for number in range(100)]
    head = len(pack_key(keys[0])) + CELL_OVERHEAD
    rest = BURST_BYTES - (head + len(pack(bytes(size)))) * (len(keys) - 1) - head
    sizes = [size] * (len(keys) - 1) + [rest - len(pack(bytes(rest))) + rest + over]
    before = loop.writer.version

    def keyed(value: Any, size: int) -> Any:
        return bytes(size)

    def free(key: str, size: int) -> None:
        transaction[key] = bytes(size)

    for key, size in zip(keys, sizes, strict=True):
        if how == "keyed":
            loop.submit(loop.peers[0], keyed, key, size)
        elif how == "free":
            loop.submit(loop.peers[0], free, None, key, size)
        else:
            loop.submit(loop.peers[0], None, None, {key: pack(bytes(size))})
    loop.run()
    assert loop.writer.version - before == 1 + over
    assert loop.state() == {key: bytes(size) for key, size in zip(keys, sizes, strict=True)}
    assert loop.peers[0].portions == 1


@pytest.mark.parametrize("how", ["keyed", "free"])
def test_what_a_task_only_looks_at_is_not_committed_again(new_loop, how):
    loop = new_loop()
    transaction = loop.runner._transaction
    loop.submit(None, None, None, {"list": pack([1]), "number": pack(7), "array": pack(np.arange(3))})
    loop.run()
    before = loop.writer.version

    def keyed(value: Any) -> Any:
        return value

    def free() -> None:
        assert transaction["list"] == [1]
        assert transaction["number"] == 7
        assert "array" in transaction
        assert transaction["array"].tolist() == [0, 1, 2]

    for key in ("list", "number", "array"):
        loop.submit(None, keyed, key) if how == "keyed" else loop.submit(None, free)
    loop.run()
    assert loop.runner.counters[1].failed == 0
    assert loop.writer.version == before


def test_who_waits_for_a_key_is_told_of_its_change_and_of_no_other_in_one_portion_with_its_answers(new_loop):
    loop = new_loop()
    waiting, changing = loop.peers[:2]
    loop.runner.notices.wait(waiting, 5, loop.writer.version, (pack_key("a"),), loop.writer.version)
    waiting.seq = 10
    for key, told in (("b", False), ("a", True), ("a", True)):
        portions = waiting.portions
        for peer in (waiting, changing):
            loop.submit(peer, None, None, {key: pack(1)})
        loop.run()
        assert (5 in waiting.answers) == told
        assert waiting.portions == portions + 1
    assert waiting.answers[5] == frames.pack_frame(frames.RESULT, 5, (pack(None),))
    assert sorted(waiting.answers) == [5, 11, 12, 13]


def test_what_is_made_and_deleted_within_one_burst_has_never_been_there(new_loop):
    loop = new_loop()
    peer = loop.peers[0]
    for keys in ((), ("there",), ("there", "a", "b", "c")):
        for key in keys:
            loop.submit(peer, None, None, {key: pack(1)})
        loop.run()
        before = loop.writer.bytes_used, loop.writer.tree[1], loop.state()
        loop.submit(peer, None, None, {"brief": pack(2), "there": pack(1)} if keys else {"brief": pack(2)})
        loop.submit(peer, None, None, {"brief": None})
        loop.run()
        loop.writer._reclaim_all()
        assert all(frames.unpack_frame(answer)[0] == frames.RESULT for answer in peer.answers.values())
        assert (loop.writer.tree[1], loop.state()) == before[1:]
        assert loop.writer.tree[1] == len(keys)


@pytest.mark.parametrize("size", [1000, 100_000])
def test_in_a_full_store_each_task_is_told_what_became_of_it_though_nobody_acknowledges_anything(new_loop, size):
    """Every receipt stays, so that in the end there is no room for those of the tasks that find none, either."""
    loop = new_loop(1 << 20)
    peer = loop.peers[0]
    calls: list[Call] = []
    refused: list[Call] = []
    while len(refused) < 100:
        assert len(calls) < 5000, "a megabyte holds no more"
        calls += [
            loop.submit(peer, None, None, {number: pack(bytes(size))}) for number in range(len(calls), len(calls) + 8)
        ]
        calls.append(loop.submit(None, None, None, {len(calls): pack(bytes(size))}))
        calls.append(loop.submit(None, None, None, {"missing": None}))
        taken_back = loop.scheduler.cancel(peer.slot, peer.seq)
        assert taken_back is calls[-3]
        loop.runner.take_back(taken_back)
        loop.run()
        refused = [call for call in calls if isinstance(call.failure, StateFull)]
    missing = {id(call) for call in calls if call.changes == {pack_key("missing"): None}}
    assert missing == {id(call) for call in calls if isinstance(call.failure, KeyError)}
    for call in calls:
        if call.session is not None:
            kind = frames.unpack_frame(peer.answers[call.seq])[0]
            if call.state is schedulers.State.CANCELLED:
                assert kind == frames.CANCELLED
            else:
                assert kind == (frames.FAILURE if call.has_failed else frames.RESULT)
    done = [call for call in calls if call.state is not schedulers.State.CANCELLED and not call.has_failed]
    assert loop.state() == {unpack_key(key): bytes(size) for call in done for key in call.changes or ()}
    kept = loop.writer.receipts.of(peer.tenant)
    assert answers_of(kept) == peer.answers
    told = {receipt.seq + index for receipt in loop.stored() for index in range(receipt.tasks)}
    assert {call.seq for call in done if call.session} <= told
    loop.writer.receipts.acknowledge(peer.tenant, peer.seq)
    last = loop.submit(peer, None, None, {0: None})
    loop.run()
    assert not last.has_failed
    assert [receipt.seq for receipt in loop.writer.receipts.of(peer.tenant)] == [last.seq]


def test_what_was_committed_ahead_of_a_heavy_task_that_fails_is_answered_and_kept(new_loop):
    loop = new_loop(1 << 20)
    first, second = loop.peers[:2]
    for peer in (first, second):
        loop.submit(peer, None, None, {f"light-{peer.slot}": pack(1)})
    heavy = loop.submit(first, None, None, {"heavy": pack(bytes(2 << 20))})
    loop.run()
    assert isinstance(heavy.failure, StateFull)
    kinds = [[frames.unpack_frame(answer)[0] for answer in peer.answers.values()] for peer in (first, second)]
    assert kinds == [[frames.RESULT, frames.FAILURE], [frames.RESULT]]
    assert loop.state() == {"light-1": 1, "light-2": 1}
    assert sorted((r.tenant, r.seq) for r in loop.stored()) == [
        (TENANT + 1, 1),
        (TENANT + 1, 2),
        (TENANT + 2, 1),
        (99, 1),
    ]


def test_tasks_that_follow_each_other_in_one_process_are_written_down_together(new_loop):
    loop = new_loop()
    peer, other = loop.peers[:2]
    for number in range(12):
        peer.seq += number == 4  # a P2
        peer.ticket += number == 7  # a task that was taken back
        if number == 9:
            loop.submit(other, None, None, {"a": pack(number)})
        loop.submit(peer, None, None, {"missing": None} if number == 10 else {"a": pack(number)})
    loop.run()
    runs = [(receipt.ticket, receipt.seq, receipt.tasks) for receipt in loop.stored() if receipt.tenant == peer.tenant]
    assert runs == [(1, 1, 4), (5, 6, 3), (9, 9, 2), (11, 11, 1), (12, 12, 1), (13, 13, 1)]
