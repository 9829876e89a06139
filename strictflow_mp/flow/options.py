"""Options: what a flow is started with when nothing else is said, and which values are refused."""

from __future__ import annotations

from typing import Any

__all__ = ["CACHE_BYTES", "CAPACITY_BYTES", "MAX_PENDING_TASKS", "MAX_WORKERS", "checked"]

CAPACITY_BYTES = 1 << 30
MAX_WORKERS = 64
MAX_PENDING_TASKS = 4096
CACHE_BYTES = 1 << 26
GATE_SECONDS = 60.0
"""Seconds that a read waits at the gate, at least; twice as long as a task may run, if that is more."""


def checked(
    name: object,
    capacity: int,
    max_workers: int,
    max_pending: int,
    task_timeout: float | None,
    restart: bool,
    cache_bytes: int,
) -> dict[str, Any]:
    """What the coordinator is told of a handle's arguments.

    Raises:
        ValueError: one of them cannot be.
    """
    if name is not None and (type(name) is not str or not name or "\0" in name):
        raise ValueError(f"a flow's name must be a non-empty str, not {name!r}")
    for label, number, least in (
        ("capacity", capacity, 1),
        ("max_workers", max_workers, 1),
        ("max_pending", max_pending, 1),
        ("cache_bytes", cache_bytes, 0),
    ):
        if number < least:
            raise ValueError(f"{label} must be at least {least}, not {number}")
    if task_timeout is not None and task_timeout <= 0:
        raise ValueError(f"task_timeout must be more than 0 seconds, not {task_timeout}")
    return {
        "capacity": capacity,
        "max_workers": max_workers,
        "max_pending": max_pending,
        "task_timeout": task_timeout,
        "gate_timeout": max(GATE_SECONDS, 2 * (task_timeout or 0)),
        "restart": restart,
    }
