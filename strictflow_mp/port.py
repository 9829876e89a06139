"""The port: what a future knows of the connection on which its answer comes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from .errors import StrictFlowError
from .future import TaskFuture

if TYPE_CHECKING:
    from .attachment import Attachment
    from .client import Client

__all__ = ["Port"]


class Port:
    """A `future.Port` that knows which process it is for."""

    __slots__ = ("_attachment", "_client", "_pid")

    def __init__(self, client: Client, attachment: Attachment) -> None:
        self._client = client
        self._attachment = attachment
        self._pid = os.getpid()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise StrictFlowError(
                "this future belongs to the parent process; in a forked child, submit the task again",
                flow=self._client.name,
            )

    def wait(self, future: TaskFuture[Any], timeout: float | None) -> None:
        self._check_process()
        attachment = self._attachment
        if attachment.is_traced and timeout != 0:
            with attachment.tracer.at_result(future):
                self._client.wait(attachment, future, timeout)
        else:
            self._client.wait(attachment, future, timeout)

    def serve(self) -> None:
        self._check_process()
        self._client.serve(self._attachment)

    def cancel(self, future: TaskFuture[Any], *, wait: bool) -> bool:
        self._check_process()
        return self._client.cancel(self._attachment, future, wait=wait)
