"""The flow: the handle that users hold, and what it starts.

`StrictFlow` is the handle: by name, so that any process may make one, and cheap, because what costs something belongs
to the process's one client. Tasks are functions bound to a handle by ``@read`` and ``@write``; workers are processes
that a handle starts and watches; a watch yields changes. One process owns the coordinator: it starts it, again after a
crash, and stops it.
"""

from .handle import StrictFlow

__all__ = ["StrictFlow"]
