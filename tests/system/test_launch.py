"""What a process keeps of those that it started."""

from __future__ import annotations

from strictflow_mp.system import launch as launching
from strictflow_mp.system.launch import launch


def test_children_that_have_ended_are_dropped_when_the_next_one_is_started():
    before = len(launching._children)
    for _ in range(4):
        child = launch("builtins:len", {})
        assert child.wait(60) == 0
        assert launching._children[-1] is child
    assert len(launching._children) <= before + 1
