"""The machine: what all of this stands on, and a sentence where that is missing."""

from __future__ import annotations

import sys

from ..errors import StrictFlowError

__all__ = ["FREE_THREADED", "check_machine"]

FREE_THREADED = "t" in getattr(sys, "abiflags", "")
"""Whether this interpreter is built without the GIL. It may be on all the same: what follows from this does no harm."""

WORD_BITS = 64


def check_machine() -> None:
    """Refuse to work where no promise could be kept.

    Raises:
        StrictFlowError: this is another system than Linux, a 32-bit interpreter, or not CPython.
    """
    if sys.platform != "linux":
        raise StrictFlowError(
            f"a flow cannot be used on {sys.platform!r}: strictflow_mp needs Linux (epoll, process descriptors and "
            "/proc tell it who lives); run it in a container or a virtual machine"
        )
    if sys.maxsize.bit_length() + 1 < WORD_BITS:
        raise StrictFlowError(
            "a flow cannot be used by a 32-bit Python, which stores a 64-bit word in two halves: others would read one "
            "without the other; use a 64-bit Python"
        )
    if sys.implementation.name != "cpython":
        raise StrictFlowError(
            f"a flow cannot be used by {sys.implementation.name!r}: strictflow_mp needs CPython, where one call of a "
            "function in C is not interrupted by signal handlers"
        )
