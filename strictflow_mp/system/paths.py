"""Paths: where a process looks for modules, said so that another process looks in the very same places.

A `sys.path` may hold anything. The import system passes over what is no string; '' and other relative entries mean
something else in another directory; a name with a NUL, or one that no file can have, ends every import that comes to
it.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["fitting", "own_path", "told_path", "usable"]


def own_path() -> list[str]:
    """This process's `sys.path`, for another process."""
    return usable(sys.path)


def told_path(entries: Iterable[str]) -> list[str]:
    """That of another process, as it has told it: what is relative would mean something else here."""
    return usable(path for path in entries if os.path.isabs(path))


def usable(entries: Iterable[object]) -> list[str]:
    """Those at which modules may be found, each once, in order, and absolute: from the current directory."""
    try:
        here = os.getcwd()
    except OSError:
        here = ""  # it has been removed: nothing is found there
    found: dict[str, None] = {}
    for entry in entries:
        if not isinstance(entry, str):
            continue
        path = str.__str__(entry)  # a subclass's would not travel
        if not os.path.isabs(path):
            path = os.path.join(here, path) if here and path else here
        if path and _is_file_name(path):
            found[path] = None
    return list(found)


def _is_file_name(path: str) -> bool:
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        return False


def fitting(paths: list[str], number: int, size: int) -> list[str]:
    """As many of them as fit into that number and into *size* bytes: first those that are there, in order."""
    if _fits(paths, number, size):
        return paths
    paths = list(filter(os.path.exists, paths))
    while not _fits(paths, number, size):
        del paths[min(number, len(paths) - 1) :]
    return paths


def _fits(paths: list[str], number: int, size: int) -> bool:
    return len(paths) <= number and sum(len(path.encode("utf-8", "surrogatepass")) for path in paths) <= size
