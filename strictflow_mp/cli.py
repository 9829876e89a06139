"""The command line: ``strictflow-mp``."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from . import __version__
from .core import setup_logging
from .demo import run as run_demo
from .errors import StrictFlowError
from .flow import StrictFlow
from .leftovers import sweep
from .rendezvous import places
from .values import describe, unpack_key

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 0 done, 1 failed, 2 called wrongly."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    try:
        code: int = chosen.run(chosen)
    except StrictFlowError as error:
        print(f"strictflow-mp: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="strictflow-mp", description="Strict read and write flow across processes.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(run=run)
        return made

    command("demo", lambda _: run_demo(), "Show a coordinator and four workers, and check what the readers saw.")
    listing = command("ls", _list, "List the flows of this user on this machine.")
    listing.add_argument("--json", action="store_true", help="print JSON")
    show = command("show", _show, "Show a flow's keys with type and size, or one value.")
    show.add_argument("name")
    show.add_argument("key", nargs="?")
    show.add_argument("--json", action="store_true", help="print JSON")
    serve = command("serve", _serve, "Run a flow that no application owns. Says when it is ready; SIGTERM ends it.")
    serve.add_argument("name")
    serve.add_argument("--state", type=Path, metavar="FILE", help="first state: a JSON object")
    serve.add_argument("--discard", action="store_true", help="do not go on from the state that a dead flow left")
    serve.add_argument("--log", default="INFO", metavar="LEVEL", help="log level (default: INFO)")
    command("clean", _clean, "Remove what dead flows left behind. Never touches a live one.")
    return parser


def _list(chosen: argparse.Namespace) -> int:
    flows = []
    for place in places():
        resident = place.resident()
        name = resident.name if resident else place.directory.name
        entry: dict[str, Any] = {"name": name, "pid": resident.pid if resident else None, "status": "stale"}
        if place.is_inhabited():
            with closing(StrictFlow.attach(name, timeout=1.0)) as flow:
                stats = flow.stats()
            # We are attached too, for this moment.
            entry |= {
                "status": "alive",
                "version": stats.version,
                "keys": stats.keys,
                "workers": len(stats.workers) - 1,
                "bytes": stats.bytes_used,
            }
        flows.append(entry)
    if chosen.json:
        print(json.dumps(flows))
        return 0
    columns = ("name", "status", "pid", "version", "keys", "workers", "bytes")
    rows = [columns, *(tuple(str(flow.get(column, "-")) for column in columns) for flow in flows)]
    widths = [max(len(row[index]) for row in rows) for index in range(len(columns))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _show(chosen: argparse.Namespace) -> int:
    with closing(StrictFlow.attach(chosen.name, timeout=1.0)) as flow:
        if chosen.key is not None:
            keys = {str(key): key for key in flow.state}
            if chosen.key not in keys:
                print(f"strictflow-mp: flow {chosen.name!r} has no key {chosen.key!r}", file=sys.stderr)
                return 1
            value = flow.state[keys[chosen.key]]
            print(json.dumps(value, default=repr) if chosen.json else repr(value))
            return 0
        with flow.snapshot() as snapshot:
            rows = [
                {"key": unpack_key(cell.key), "type": describe(bytes(cell.payload[:64])), "bytes": len(cell.payload)}
                for cell in snapshot.cells()
            ]
    rows.sort(key=lambda row: str(row["key"]))
    if chosen.json:
        print(json.dumps(rows, default=repr))
        return 0
    for row in rows:
        print(f"{row['key']!r:40} {row['type']:12} {row['bytes']:>12,}")
    return 0


def _serve(chosen: argparse.Namespace) -> int:
    state = json.loads(chosen.state.read_text()) if chosen.state else {}
    if not isinstance(state, dict):
        print(f"strictflow-mp: {chosen.state} must hold a JSON object", file=sys.stderr)
        return 2
    setup_logging(chosen.log.upper())
    flow = StrictFlow(chosen.name, state=state)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    flow.start_loop(recover=not chosen.discard)
    print(f"flow {chosen.name!r} is ready", flush=True)
    while not ended.wait(0.2):
        if not flow.is_running:
            print(f"strictflow-mp: flow {chosen.name!r} has ended", file=sys.stderr)
            return 1
    flow.stop_loop()
    return 0


def _clean(chosen: argparse.Namespace) -> int:
    for directory, resident, removed in sweep():
        name = repr(resident.name) if resident else directory
        print(f"removed flow {name}: {len(removed)} shared objects")
    return 0
