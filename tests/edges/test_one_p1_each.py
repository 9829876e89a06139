"""What ``flow.state`` offers besides reading and assigning is one P1 each: nobody comes in between."""

from __future__ import annotations

import itertools

import pytest

from strictflow_mp import ReadOnlyState, StrictFlow, read, write

COUNT = 300
PROCESSES = 3

flow = StrictFlow("one-p1-each")


def meet(number):
    """Return when all workers are there."""
    flow.put(f"there{number}", True).result(30)
    with flow.watch() as changes:
        while not all(f"there{other}" in flow.state for other in range(1, PROCESSES + 1)):
            next(changes)


def set_defaults(number):
    meet(number)
    won = sum(flow.state.setdefault(("once", job), number) == number for job in range(COUNT))
    flow.put(f"won{number}", won).result(30)


def pop(number):
    meet(number)
    won = [job for job in range(COUNT) if flow.state.pop(("job", job), None) is not None]
    flow.put(f"won{number}", won).result(30)


def run(work):
    with flow:
        flow.update({("job", job): job for job in range(COUNT)}).result(30)
        workers = flow.spawn(work, processes=PROCESSES)
        workers.join()
        assert workers.exitcodes == [0] * PROCESSES
        return [flow.state[f"won{number}"] for number in range(1, PROCESSES + 1)]


def test_setdefault_has_one_winner():
    assert sum(run(set_defaults)) == COUNT


def test_what_is_popped_nobody_else_has():
    assert sorted(itertools.chain(*run(pop))) == list(range(COUNT))


def test_they_give_what_a_dict_gives():
    with StrictFlow(state={"a": [1], "b": 2}) as flow:
        assert flow.state.setdefault("a", [9]) == [1]
        made = flow.state.setdefault("c", {"d": [1]})
        assert made == flow.state["c"] == {"d": [1]}
        with pytest.raises(ReadOnlyState):
            made["d"].append(2)  # it is the state's
        assert flow.state.setdefault("none") is None
        assert flow.state.pop("a") == [1]
        assert flow.state.pop("a", "absent") == "absent"
        with pytest.raises(KeyError, match="a"):
            flow.state.pop("a")
        before = flow.snapshot()
        with before:
            taken = dict([flow.state.popitem(), flow.state.popitem(), flow.state.popitem()])
            assert taken == dict(before)
        with pytest.raises(KeyError, match="popitem"):
            flow.state.popitem()


def test_clear_takes_what_is_there_at_its_turn():
    with StrictFlow(state={"a": 1}) as flow:
        version = flow.snapshot().version
        late = flow.put("late", 1)
        flow.state.clear()
        assert late.done()
        assert len(flow.state) == 0
        assert flow.snapshot().version <= version + 2
        flow.state.clear()


def test_within_a_p1_they_belong_to_it():
    with StrictFlow(state={"a": 1, "b": 2, "c": 3}) as flow:

        @write(flow)
        def change(fail):
            given = [flow.state.setdefault("a", 9), flow.state.setdefault("d", 9), flow.state.pop("b")]
            flow.state.clear()
            left = [len(flow.state), "a" in flow.state, flow.state.get("d")]
            flow.state["new"] = 1
            assert not fail
            return given, left

        with pytest.raises(AssertionError):
            change(True).result(30)
        assert dict(flow.state) == {"a": 1, "b": 2, "c": 3}
        assert change(False).result(30) == ([1, 9, 2], [0, False, None])
        assert dict(flow.state) == {"new": 1}


@pytest.mark.parametrize("where", ["loop", "worker"])
def test_within_a_p2_they_are_refused(where):
    with StrictFlow(state={"a": 1}) as flow:
        for change in (
            lambda: flow.state.setdefault("b", 1),
            lambda: flow.state.pop("a"),
            lambda: [flow.state.popitem()],
            lambda: [flow.state.clear()],
        ):
            with pytest.raises(ReadOnlyState):
                read(flow, where=where)(change)().result(30)
        assert read(flow, where=where)(lambda: flow.state.setdefault("a", 2))().result(30) == 1
        assert dict(flow.state) == {"a": 1}
