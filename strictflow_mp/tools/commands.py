"""The commands of ``strictflow-mp``, on click and rich (the extra ``cli``)."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import threading
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import __version__
from ..core import setup_logging
from ..errors import FlowNotRunning, StrictFlowError
from ..flow.handle import StrictFlow
from ..memory.leftovers import sweep
from ..system import outlet
from ..system.place import Place, places
from ..values.keys import unpack_key
from .demo import run as run_demo
from .glance import glance
from .looks import ATTACH_SECONDS
from .plain import describe, plain
from .readiness import has_terminal, tell
from .top import watch

__all__ = ["group"]

LINGER_SECONDS = 10.0
"""That a flow waits for the next `serve` when this one was killed and nobody is attached."""
EXPLAIN_SECONDS = 1.5
"""After these a person who waits is told what for."""
LAST_LINES_SECONDS = 0.5
"""That a slow reader of the log has at the end."""


if TYPE_CHECKING:
    from collections.abc import Iterator

    ParamType = click.ParamType[str]
else:
    ParamType = click.ParamType  # no generic before 8.4


class FlowName(ParamType):
    """The name of a flow; the shell completes it."""

    name = "flow"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """As it is, unless it is empty."""
        return value or self.fail("a flow has a name", param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The flows of this user on this machine."""
        names = {resident.name for place in places() if (resident := place.resident()) is not None}
        return [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]


class Key(ParamType):
    """A key of a flow; the shell completes it."""

    name = "key"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The keys of the flow that was named before."""
        try:
            with closing(StrictFlow.attach(ctx.params["name"], timeout=ATTACH_SECONDS)) as flow:
                keys = sorted(map(str, flow.snapshot(gated=False)))
        except (StrictFlowError, KeyError):
            return []
        return [CompletionItem(key) for key in keys if key.startswith(incomplete)]


@contextmanager
def _served(name: str) -> Iterator[None]:
    """When the flow is not served, say whether its state is still there."""
    try:
        yield
    except FlowNotRunning:
        place = Place.of(name)
        if place.is_inhabited() or place.resident() is None:
            raise
        raise FlowNotRunning(
            f"it is dead, and its state is still there: `strictflow-mp serve {shlex.quote(name)}` goes on from it, "
            "`strictflow-mp clean` removes it",
            flow=name,
        ) from None


@contextmanager
def _attached(name: str) -> Iterator[StrictFlow]:
    """A flow; when it lets us wait, a line says why."""

    def explain() -> None:
        try:
            seen = glance(Place.of(name))
        except StrictFlowError:
            return
        if seen is not None and seen.busy is not None:
            click.echo(f"strictflow-mp: waiting: SF-LOOP runs a task of process {seen.busy}", err=True)

    patience = threading.Timer(EXPLAIN_SECONDS, explain)
    patience.daemon = True
    patience.start()
    try:
        with _served(name), closing(StrictFlow.attach(name, timeout=ATTACH_SECONDS)) as flow:
            yield flow
    finally:
        patience.cancel()


def _print(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 1000).print(table)


def _table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _examples(*lines: str) -> str:
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_examples(
        "strictflow-mp demo",
        "strictflow-mp serve flags --state flags.json",
        "strictflow-mp show flags",
        "strictflow-mp top flags",
    ),
)
@click.version_option(__version__, message="%(version)s")
def group() -> None:
    """Look after the flows of this user on this machine: one live state that many processes share.

    Exit codes: 0 done, 1 failed, 2 called wrongly, 130 interrupted.
    """


@group.command("demo")
def demo_command() -> int:
    """Show a coordinator and four workers, and check what the readers saw.

    Exits with 1 if any reader saw a stale or a half-done state.
    """
    return run_demo()


@group.command(
    "ls", epilog=_examples("strictflow-mp ls", "strictflow-mp ls --json | jq '.[] | select(.status == \"stale\")'")
)
@json_option
def ls_command(as_json: bool) -> None:
    """List the flows of this user on this machine, alive or stale."""
    flows = [_entry(place) for place in places()]
    if as_json:
        click.echo(json.dumps(flows))
        return
    if not flows:
        click.echo("no flow is here; `strictflow-mp serve NAME` starts one", err=True)
        return
    columns = ("name", "status", "pid", "version", "keys", "workers", "bytes")
    table = _table(*columns, right=columns[2:])
    for flow in flows:
        figures = (flow.get(column) for column in columns[3:])
        shown = ("-" if figure is None else f"{figure:,}" for figure in figures)
        table.add_row(Text(flow["name"]), flow["status"], str(flow["pid"] or "-"), *shown)
    _print(table)
    for flow in flows:
        if "error" in flow:
            click.echo(f"strictflow-mp: flow {flow['name']!r}: {flow['error']}", err=True)
    if any(flow["status"] == "stale" for flow in flows):
        click.echo("`strictflow-mp clean` removes what is stale; starting it under its name goes on from it", err=True)


def _entry(place: Place) -> dict[str, Any]:
    resident = place.resident()
    is_alive = place.is_inhabited()
    entry: dict[str, Any] = {
        "name": resident.name if resident else place.directory.name,
        "status": "alive" if is_alive else "stale",
        "pid": resident.pid if resident else None,
    }
    try:
        seen = glance(place)
    except StrictFlowError as error:
        return entry | {"error": str(error)}
    if seen is not None:
        workers = len(seen.workers) if is_alive else 0
        entry |= {"version": seen.version, "keys": seen.keys, "workers": workers, "bytes": seen.bytes}
    return entry


@group.command(
    "show",
    epilog=_examples(
        "strictflow-mp show flags",
        "strictflow-mp show flags dark_mode",
        "strictflow-mp show flags limits --json | jq .low",
    ),
)
@click.argument("name", type=FlowName())
@click.argument("key", type=Key(), required=False)
@json_option
def show_command(name: str, key: str | None, as_json: bool) -> int:
    """Show the keys of a flow with type and size, or the value of one.

    KEY is a key as it is printed: 7 or (1, 'a') finds a number or a tuple where there is no such string;
    `-- -7` a negative number.
    """
    with _attached(name) as flow, flow.snapshot() as snapshot:
        if key is not None:
            found = [key] if key in snapshot else [other for other in snapshot if key in (str(other), repr(other))]
            if not found:
                click.echo(
                    f"strictflow-mp: flow {name!r} has no key {key!r}; `strictflow-mp show {name}` lists them", err=True
                )
                return 1
            value = snapshot[found[0]]
            click.echo(json.dumps(plain(value)) if as_json else repr(value))
            return 0
        rows = [
            (unpack_key(cell.key), describe(bytes(cell.payload[:64])), len(cell.payload)) for cell in snapshot.cells()
        ]
    rows.sort(key=lambda row: (str(row[0]), repr(row[0])))
    if as_json:
        click.echo(json.dumps([{"key": plain(key), "type": kind, "bytes": size} for key, kind, size in rows]))
        return 0
    table = _table("key", "type", "bytes", right=("bytes",))
    for key_, kind, size in rows:
        table.add_row(Text(repr(key_)), kind, f"{size:,}")  # no markup
    _print(table)
    return 0


@group.command(
    "top",
    epilog=_examples(
        "strictflow-mp top flags", "strictflow-mp top flags --once", "strictflow-mp top flags --json --interval 5"
    ),
)
@click.argument("name", type=FlowName())
@click.option(
    "--interval", type=click.FloatRange(min=0.1), default=1.0, show_default=True, help="Seconds between two looks."
)
@click.option("--once", is_flag=True, help="Look for one interval, print, and end.")
@json_option
def top_command(name: str, interval: float, once: bool, as_json: bool) -> None:
    """Watch a flow: rates, queues, latencies, readers that wait, workers, memory.

    Latencies are from a task's arrival at the coordinator to its answer, over the last 2,048. q ends it.
    """
    with _served(name):
        watch(name, interval=interval, once=once, json_lines=as_json)


@group.command(
    "serve",
    epilog=_examples("strictflow-mp serve flags", "strictflow-mp serve flags --state flags.json --capacity 64000000"),
)
@click.argument("name", type=FlowName())
@click.option(
    "--state", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="The first state: a JSON object."
)
@click.option("--capacity", type=click.IntRange(min=1), help="Bytes for the state.")
@click.option("--max-workers", type=click.IntRange(min=1), help="Processes that may attach.")
@click.option("--discard", is_flag=True, help="Do not go on from the state that a dead flow left.")
@click.option(
    "--log",
    type=click.Choice(["debug", "info", "warning", "error", "critical"], case_sensitive=False),
    default="info",
    show_default=True,
    help="What is logged, to stdout.",
)
def serve_command(
    name: str, state: Path | None, capacity: int | None, max_workers: int | None, discard: bool, log: str
) -> int:
    """Run a flow that no application owns: for gunicorn, uvicorn, Celery, systemd.

    Says on stdout when it is ready, and tells systemd (Type=notify). SIGTERM, Ctrl-C and the end of
    the terminal end it, with 0. SIGHUP reloads it, as `strictflow-mp reload` does.
    """
    first: Any = {}
    if state is not None:
        try:
            first = json.loads(state.read_text())
        except ValueError as error:
            raise click.BadParameter(f"{state} is not JSON: {error}", param_hint="--state") from None
        if not isinstance(first, dict):
            raise click.BadParameter(f"{state} must hold a JSON object", param_hint="--state")
    outlet.install()  # a log that nobody reads holds up neither the next coordinator nor the end
    setup_logging(log.upper())
    given: dict[str, Any] = {"capacity": capacity, "max_workers": max_workers}
    flow = StrictFlow(name, state=first, **{option: value for option, value in given.items() if value is not None})
    ended, reloading = threading.Event(), threading.Event()
    has_begun_in_terminal = has_terminal()

    def end(*_: object) -> None:
        ended.set()

    def hang_up(*_: object) -> None:
        (ended if has_begun_in_terminal and not has_terminal() else reloading).set()

    for number, handler in ((signal.SIGTERM, end), (signal.SIGINT, end), (signal.SIGHUP, hang_up)):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup, and a script's `&`, leave them to us
            signal.signal(number, handler)
    flow.start_loop(recover=not discard, linger=LINGER_SECONDS)
    with suppress(OSError):  # a full disk, or nobody at the other end: no reason not to serve
        click.echo(f"flow {name!r} is ready")
    tell("READY=1")
    while not ended.wait(0.2):
        if reloading.is_set():
            reloading.clear()
            _reload(flow)
        if not flow.is_running:
            click.echo(f"strictflow-mp: flow {name!r} has ended", err=True)
            outlet.drain(LAST_LINES_SECONDS)
            return 1
    tell("STOPPING=1")
    flow.stop_loop()
    outlet.drain(LAST_LINES_SECONDS)
    return 0


def _reload(flow: StrictFlow) -> None:
    """For `serve`, which goes on whatever comes of it."""
    try:
        click.echo(_reloaded(flow.name, flow.reload()))
    except StrictFlowError as error:
        click.echo(f"strictflow-mp: {error}", err=True)
    finally:
        flow.close()  # its place is for those who use the flow


@group.command("reload", epilog=_examples("strictflow-mp reload flags", "strictflow-mp reload flags --json"))
@click.argument("name", type=FlowName())
@json_option
def reload_command(name: str, as_json: bool) -> None:
    """Have the next coordinator of a flow go on, with the code of today.

    For after a deploy: a fresh interpreter on the same state. No task is lost, those that are queued run in the
    next one, and reads go on. Prints the pause in which nobody ran tasks.
    """
    with _attached(name) as flow:
        pause = flow.reload()
    click.echo(json.dumps({"name": name, "pause": pause}) if as_json else _reloaded(name, pause))


def _reloaded(name: str, pause: float) -> str:
    return f"flow {name!r} is reloaded: a pause of {pause:.3f} s"


@group.command("clean", epilog=_examples("strictflow-mp clean", "strictflow-mp clean --json"))
@json_option
def clean_command(as_json: bool) -> None:
    """Remove what dead flows left behind: their state, too. Never touches a live one."""
    removed = sweep()
    if as_json:
        entries = [
            {"name": resident.name if resident else None, "directory": directory, "objects": objects}
            for directory, resident, objects in removed
        ]
        click.echo(json.dumps(entries))
        return
    for directory, resident, objects in removed:
        what = f"{len(objects)} shared object{'' if len(objects) == 1 else 's'}"
        click.echo(f"removed flow {repr(resident.name) if resident else directory}: {what}")
    if not removed:
        click.echo("nothing to remove", err=True)
