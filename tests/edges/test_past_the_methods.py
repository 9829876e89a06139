"""A value that was read is changed past its methods, by C code that does not ask them: the state never is."""

from __future__ import annotations

import heapq

import pytest

from strictflow_mp import StrictFlow

FIRST = {"queue": [5, 1, 4], "names": {"a": 1, "b": 2}, "set": {1, 2}}

CHANGES = {
    "heapq": ("queue", lambda value: heapq.heappush(value, 0)),
    "eval": ("names", lambda value: eval("a + b", value)),
    "init": ("names", lambda value: value.__init__(c=3)),
    "the type's method": ("queue", lambda value: list.append(value, 9)),
    "a set's init": ("set", lambda value: value.__init__([7])),
}

OTHER = """
from strictflow_mp import StrictFlow

print(StrictFlow("past").state[{key!r}])
"""


@pytest.mark.parametrize("how", CHANGES)
def test_the_state_and_other_processes_never_see_it_and_the_next_write_mends_it_here(run_python, how):
    key, change = CHANGES[how]
    with StrictFlow("past", state=FIRST) as flow:
        change(flow.state[key])
        with flow.snapshot() as snapshot:
            assert snapshot[key] == FIRST[key]
        assert eval(run_python(OTHER.format(key=key)).stdout) == FIRST[key]
        flow.put(key, FIRST[key]).result(30)
        assert flow.state[key] == FIRST[key]
