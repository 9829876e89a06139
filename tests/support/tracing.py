"""Tracing: a trace function for as long as a block lasts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def traced(trace: Callable[..., Any]) -> Iterator[None]:
    """Every frame that the block enters in this thread is traced; then whatever traced before does so again."""
    former = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(former)
