"""Descriptors: 0 to 2 are the standard streams, and nothing else may have these numbers.

Where a process runs with one of them closed (``>&-``, a daemon), the next file that it opens gets the number, and
whatever is printed goes there: into a connection, into the lock's file, into shared memory.
"""

from __future__ import annotations

import errno
import os

__all__ = ["fill_standard"]


def fill_standard() -> None:
    """Open ``/dev/null`` under each of the numbers 0 to 2 that is free, for children too.

    Called before anything is opened that a stray ``print`` could harm.
    """
    try:
        while (descriptor := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) <= 2:  # the lowest that is free
            os.set_inheritable(descriptor, True)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        return  # then none is free, and so none of them
    os.close(descriptor)
