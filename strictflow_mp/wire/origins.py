"""Origins: which code a name stands for: the files of modules as this process has loaded them.

A function that travels by reference is a name, and two processes may have loaded different code under one: another
program's module, or last week's. So with a function goes what is known of each module that it leads to: its file, and
a digest of that file when it was loaded. The coordinator compares it with what it has loaded itself
(`coordinator.library`), and tells in the place what that is, so that a process that has loaded something else sends its
function by value at once (`stale`).

It is the files that are compared, and not the bytecode of the function: a constant of the module, a helper, a base
class or a module that it imports may have changed, and the function's own code is still the same.

A file is looked at when the first task of its module is decorated; that of another module, when a function that leads
to it travels first. What has changed since this process began may have been loaded before or after that. Of a module
with tasks it can be told: it is just being executed when they are decorated, and its code is what the file compiles
to, or it is not. Else nobody knows what was loaded, and `digest` is empty: it equals nothing.

Not looked at: the standard library, this library, packages that are installed (but for the function's own), what is
compiled, and what a module has imported by a name that is computed.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from ..system.identity import start_time
from .references import MAINS, function_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = [
    "Entry",
    "Seen",
    "differs",
    "entries_of",
    "is_current",
    "known_of",
    "look",
    "modules_of",
    "note",
    "stale",
]

MAX_MODULES = 512
"""Modules that a function leads to, at most: further ones are not looked at."""
MAX_FRAMES = 8
"""Frames between a decorator and the module that it stands in, at most."""
OURS = frozenset({"strictflow_mp", "cloudpickle"})
"""What both ends have, wherever it lies: a frozen program has it beside its own modules. Pickles name it."""
INSTALLED = frozenset({"site-packages", "dist-packages"})
"""Folders in which packages are installed."""
SOURCES = (".py", ".pyc")

Entry = tuple[str, str, bytes]
"""Of a module: name, file, digest."""


def _began() -> int:
    now, started = time.time_ns(), start_time(os.getpid())
    if not started:
        return now
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    return now - int(age * 1e9)


BEGAN = _began()
"""When this process began (ns since the epoch), or the one that has forked it with this module. Nothing was loaded
before, so that a file that has not changed since is what was loaded. The kernel gives files times that are up to a tick
(10 ms) old; no interpreter imports anything in its first."""


class Seen(NamedTuple):
    """A module's file, as it was looked at."""

    module: ModuleType
    file: str
    digest: bytes
    """Empty: the file has changed since it was loaded, or may have."""
    stamp: tuple[int, ...]
    """Of the file that has this digest."""


class _Imported(NamedTuple):
    """What a module's code names."""

    module: ModuleType
    names: frozenset[str]
    """Whatever it has names for."""
    loaded: int
    """How many modules were loaded when it was looked which of these are modules."""
    found: frozenset[str]
    """Those."""


# By the module's name. Threads may do it twice, with the same result.
_seen: dict[str, Seen] = {}
# By the module's name.
_imported: dict[str, _Imported] = {}


def note(function: Any) -> None:
    """A task is being decorated: if that is in its module's own code, look at the file that is being executed."""
    name = _home(function)
    # Not the function's own globals: those of what a decorator has made are its decorator's, and a cache has none.
    space = getattr(sys.modules.get(name), "__dict__", None)
    if space is None or name in MAINS:
        return
    try:
        frame = sys._getframe(2)
    except ValueError:
        return
    for _ in range(MAX_FRAMES):
        if frame.f_globals is space:
            if frame.f_code.co_name == "<module>":
                _note(name, frame.f_code)
            return
        if frame.f_back is None:
            return
        frame = frame.f_back


def _note(name: str, code: CodeType) -> None:
    """That code of a module is being executed."""
    seen = _seen.get(name)
    if seen is not None and not is_current(seen):
        _seen.pop(name, None)  # it is executed anew (`importlib.reload`)
    seen = look(name)
    if seen is not None and not seen.digest:
        try:
            source, stamp = _read(seen.file)
            is_that = compile(source, seen.file, "exec", dont_inherit=True) == code
        except (OSError, SyntaxError, ValueError):
            return
        if is_that:
            _seen[name] = Seen(seen.module, seen.file, _digest(source), stamp)


def look(name: str, began: int = BEGAN) -> Seen | None:
    """What is known of a module's file; None when there is no module of that name, or no file of its source.

    Args:
        began: it was not loaded before that (ns since the epoch): a file that has not changed since is what was loaded.
    """
    module = sys.modules.get(name)
    if module is None:
        return None
    seen = _seen.get(name)
    if seen is not None and seen.module is module:
        return seen
    file = _file_of(module)
    if file is None:
        return None
    digest = b""
    stamp: tuple[int, ...] = ()
    try:
        source, stamp = _read(file)
        if stamp[0] < began:
            digest = _digest(source)
    except OSError:
        pass  # it has been removed since: who knows
    seen = _seen[name] = Seen(module, file, digest, stamp)
    return seen


def _file_of(module: ModuleType) -> str | None:
    spec = getattr(module, "__spec__", None)
    file = getattr(spec, "origin", None)
    if not getattr(spec, "has_location", False) or not isinstance(file, str) or not file.endswith(SOURCES):
        return None
    return os.path.abspath(file)


def _stamp(file: str) -> tuple[int, ...]:
    status = os.stat(file)
    return status.st_ctime_ns, status.st_mtime_ns, status.st_size, status.st_ino, status.st_dev


def _read(file: str) -> tuple[bytes, tuple[int, ...]]:
    """What is in it, and the stamp that it had before that was read."""
    stamp = _stamp(file)
    with open(file, "rb") as source:
        return source.read(), stamp


def _digest(source: bytes) -> bytes:
    from importlib.util import source_hash  # without hashlib, 6 ms that an import does not need

    return source_hash(source)


def is_current(seen: Seen) -> bool:
    """Whether a fresh interpreter would load from its file what is loaded here."""
    if not seen.digest:
        return False
    try:
        return _stamp(seen.file) == seen.stamp or _digest(_read(seen.file)[0]) == seen.digest
    except OSError:
        return False


def is_same_file(one: str, other: str) -> bool:
    """Whether two paths lead to one file, as far as can be seen from here."""
    if one == other:
        return True
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


# Which modules


def modules_of(target: Any, named: Iterable[str] = ()) -> dict[str, frozenset[str]]:
    """The modules that a function leads to, its own first; of each, those of them that it names.

    Args:
        named: modules of what the function is made of (`byvalue.pickled`).
    """
    function = function_of(target)
    home = _home(function)
    own = home.partition(".")[0]
    space = getattr(function, "__globals__", None)
    found: dict[str, frozenset[str]] = {}
    left = [home]
    if (home in MAINS or _file_of_name(home) is None) and isinstance(space, dict):
        # Of what has no file, all that it can name.
        left = list(_modules_in(space.values()))
    left += sorted(named)
    while left and len(found) < MAX_MODULES:
        name = left.pop(0)
        if name in found or not _is_followed(name, own):
            continue
        found[name] = others = frozenset(other for other in _imports(name) if _is_followed(other, own))
        left += sorted(others)
    return {name: others & found.keys() for name, others in found.items()}


def _home(function: Any) -> str:
    """The module that a function is of; a partial is of its function's."""
    while isinstance(function, functools.partial):
        function = function_of(function.func)
    name = getattr(function, "__module__", None)
    return name if isinstance(name, str) else ""


def _file_of_name(name: str) -> str | None:
    module = sys.modules.get(name)
    return _file_of(module) if module is not None else None


def _modules_in(values: Iterable[Any]) -> set[str]:
    names = set()
    for value in list(values):
        name = value.__name__ if isinstance(value, ModuleType) else getattr(function_of(value), "__module__", None)
        if isinstance(name, str):
            names.add(name)
    return names


def _is_followed(name: str, own: str) -> bool:
    top = name.partition(".")[0]
    if top in MAINS or top in OURS or top in sys.stdlib_module_names:
        return False
    file = _file_of_name(name)
    return file is not None and (top == own or INSTALLED.isdisjoint(file.split(os.sep)))


def _imports(name: str) -> frozenset[str]:
    """The modules that are loaded here and that a module's code names, in an import or elsewhere."""
    module, count = sys.modules[name], len(sys.modules)
    known = _imported.get(name)
    names = known.names if known is not None and known.module is module else _names_in(_code_of(name, module))
    if known is not None and names is known.names and known.loaded == count:
        return known.found
    package = getattr(module, "__package__", None) or ""
    packages = [package.rsplit(".", depth)[0] for depth in range(package.count(".") + 1)] if package else []
    found = {full for one in names for full in (one, *(f"{above}.{one}" for above in packages)) if full in sys.modules}
    for above in list(found):
        if hasattr(sys.modules[above], "__path__"):  # from package import module
            found.update(full for one in names if (full := f"{above}.{one}") in sys.modules)
    found.discard(name)
    _imported[name] = _Imported(module, names, count, frozenset(found))
    return frozenset(found)


def _code_of(name: str, module: ModuleType) -> CodeType | None:
    try:
        loader: Any = module.__spec__.loader if module.__spec__ is not None else None
        if hasattr(loader, "get_code"):
            code = loader.get_code(name)
        else:
            with open(module.__file__ or "", "rb") as source:
                code = compile(source.read(), "<source>", "exec", dont_inherit=True)
    except Exception:
        return None  # what it is by now cannot be compiled; the digest will tell
    return code if isinstance(code, CodeType) else None


def _names_in(code: CodeType | None) -> frozenset[str]:
    names: set[str] = set()
    left = [code] if code is not None else []
    while left:
        one = left.pop()
        names.update(one.co_names)
        left += [constant for constant in one.co_consts if isinstance(constant, CodeType)]
    return frozenset(names)


# What the other end has


def stale(modules: Mapping[str, frozenset[str]], known: Mapping[str, tuple[str, bytes]]) -> set[str]:
    """Those modules whose code is not what the other end has loaded, or would load; and all that lead to one.

    Args:
        modules: as `modules_of` gives them.
        known: by module, file and digest of what the other end has loaded already.
    """
    found = set()
    for name in modules:
        seen = look(name)
        if seen is None:
            continue
        there = known.get(name)
        is_same = is_current(seen) if there is None else not differs(seen, *there)
        if not is_same:
            found.add(name)
    while more := {name for name, named in modules.items() if name not in found and named & found}:
        found |= more
    return found


def differs(seen: Seen, file: str, digest: bytes) -> bool:
    """Whether a module that is loaded here is not that one."""
    return not seen.digest or seen.digest != digest or not is_same_file(seen.file, file)


def entries_of(modules: Iterable[str]) -> tuple[Entry, ...]:
    """What the other end is told of these modules."""
    found = [(name, look(name)) for name in modules]
    return tuple((name, seen.file, seen.digest) for name, seen in found if seen is not None)


def known_of(text: bytes) -> dict[str, tuple[str, bytes]]:
    """What a coordinator has written down of the modules that it has loaded (`coordinator.library`)."""
    import json

    try:
        return {name: (file, bytes.fromhex(digest)) for name, (file, digest) in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError):
        return {}
