"""A block of a console on a page: what is typed, and what must be printed then.

A line behind ``$`` is typed, those below it are printed. In these ``...`` stands for anything within a line, and for
any lines when it is alone on one. A run of spaces is as good as another: columns are as wide as their values.
"""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["Typed", "is_shown", "typed"]


class Typed(NamedTuple):
    """A command, and what the page shows below it."""

    command: str
    shown: str


def typed(block: str) -> list[Typed]:
    found: list[Typed] = []
    for line in block.splitlines(keepends=True):
        if line.startswith("$ "):
            found.append(Typed(line[2:].rstrip("\n"), ""))
        elif found[-1].command.endswith("\\"):
            found[-1] = Typed(f"{found[-1].command}\n{line.rstrip()}", "")
        else:
            found[-1] = found[-1]._replace(shown=found[-1].shown + line)
    return found


def is_shown(printed: str, shown: str) -> bool:
    """Whether what was printed is what the page shows, neither more nor less."""
    lines = [re.escape(line).replace(r"\.\.\.", ".*") + "\n" for line in _narrow(shown)]
    pattern = "".join(r"(?:.*\n)*" if line == ".*\n" else line for line in lines)
    return re.fullmatch(pattern, "".join(line + "\n" for line in _narrow(printed))) is not None


def _narrow(text: str) -> list[str]:
    return [re.sub(" +", " ", line).rstrip() for line in text.splitlines()]
