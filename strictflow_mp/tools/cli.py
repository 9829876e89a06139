"""The command line: ``strictflow-mp``. Its commands need the extra ``cli``; the demo does not."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

NEEDED = frozenset({"click", "rich"})
PROGRAM = "strictflow-mp"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 0 done, 1 failed, 2 called wrongly, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        try:
            return _run(given)
        except ModuleNotFoundError as missing:
            if missing.name is None or missing.name.partition(".")[0] not in NEEDED:
                raise
            return _run_without(given, missing.name)
    except KeyboardInterrupt:
        return 130


def _run(given: list[str]) -> int:
    import click

    from ..errors import StrictFlowError
    from .commands import group

    try:
        code = group.main(given, prog_name=PROGRAM, standalone_mode=False)
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.Abort:
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (StrictFlowError, ValueError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    return code if isinstance(code, int) else 0


def _run_without(given: list[str], missing: str) -> int:
    if given == ["demo"]:
        from .demo import run

        return run()
    print(
        f"{PROGRAM}: only `{PROGRAM} demo` runs without {missing}; for the other commands: "
        "python -m pip install 'strictflow-mp[cli]'",
        file=sys.stderr,
    )
    return 2
