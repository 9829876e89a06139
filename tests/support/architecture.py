"""What can be seen of a package's architecture in its source, without running it."""

from __future__ import annotations

import ast
import dis
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import CodeType

Graph = dict[str, set[str]]
"""Module -> the modules that it imports."""

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def modules_of(package: Path) -> dict[str, Path]:
    """The package's modules by their dotted names; a folder's is its `__init__`."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = [package.name, *path.relative_to(package).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def entries(package: Path) -> set[str]:
    """What a reader sees first: files and folders of the package's top."""
    return {path.name for path in package.iterdir()} - {"py.typed", "__pycache__"}


def long_modules(package: Path, limit: int) -> dict[str, int]:
    """The modules of more lines than that."""
    lines = {name: len(path.read_text().splitlines()) for name, path in modules_of(package).items()}
    return {name: count for name, count in lines.items() if count > limit}


def rooms_without_a_paragraph(package: Path, least: int = 3) -> set[str]:
    """The folders whose docstring has no paragraph after its first line, or one of fewer lines than *least*."""
    found = set()
    for path in package.glob("*/__init__.py"):
        _, _, paragraph = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n\n")
        if len(paragraph.splitlines()) < least:
            found.add(path.parent.name)
    return found


# Imports


def imported_by(nodes: Iterable[ast.AST], known: Collection[str], package: str = "") -> Iterator[tuple[str, str]]:
    """(name that it has here, dotted name) of all that these nodes import and that is one of the *known* modules, or in
    one. *package* is what a leading dot stands for.
    """
    parents = package.split(".")
    for node in nodes:
        if isinstance(node, ast.Import):
            for each in node.names:
                if each.name in known:
                    name = each.name if each.asname else each.name.partition(".")[0]
                    yield each.asname or name, name
        elif isinstance(node, ast.ImportFrom):
            up = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join([*up, *filter(None, [node.module])])
            for each in node.names:
                if base in known or f"{base}.{each.name}" in known:
                    yield each.asname or each.name, f"{base}.{each.name}"


def _package_of(module: str, path: Path) -> str:
    return module if path.name == "__init__.py" else module.rpartition(".")[0]


def imports(package: Path) -> Graph:
    """What each module imports, for annotations only and within functions, too. Of ``from a import b`` that is *a.b*
    alone where that is a module: *a* is only passed.
    """
    known = modules_of(package)
    graph: Graph = {}
    for module, path in known.items():
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {name for _, name in imported_by(nodes, known, _package_of(module, path))}
        names |= {each.name for node in nodes if isinstance(node, ast.Import) for each in node.names}
        found = {name if name in known else name.rpartition(".")[0] for name in names}
        graph[module] = (found & known.keys()) - {module}
    return graph


def cycles(graph: Mapping[str, Iterable[str]]) -> list[set[str]]:
    """The sets of modules that all lead to each other."""
    reached = {module: _reach(graph, module) for module in graph}
    circles = {frozenset(other for other in reached[module] if module in reached[other]) for module in graph}
    return sorted((set(circle) for circle in circles if circle), key=sorted)


def _reach(graph: Mapping[str, Iterable[str]], start: str) -> set[str]:
    found: set[str] = set()
    left = list(graph[start])
    while left:
        module = left.pop()
        if module not in found:
            found.add(module)
            left += graph.get(module, ())
    return found


# Patches


def globals_loaded(package: Path) -> dict[str, set[str]]:
    """The globals of each module that code loads when it runs: its own functions, and those of other modules, as
    ``module.NAME`` or by ``from module import NAME``.

    What is loaded once, when the module is imported, is not among them, nor are the defaults of parameters: a patch
    comes too late for these.
    """
    known = modules_of(package)
    found: dict[str, set[str]] = {module: set() for module in known}
    for module, path in known.items():
        source = path.read_text()
        found[module] |= set(_loaded_in(compile(source, str(path), "exec"), is_function=False))
        nodes = list(ast.walk(ast.parse(source)))
        here = dict(imported_by(nodes, known, _package_of(module, path)))
        inner = [node for function in nodes if isinstance(function, FUNCTIONS) for node in _within(function)]
        for node in inner:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                found.get(here.get(node.value.id, ""), set()).add(node.attr)
        for _, name in imported_by(inner, known, _package_of(module, path)):
            found.get(name.rpartition(".")[0], set()).add(name.rpartition(".")[2])
    return found


def _within(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[ast.AST]:
    for statement in function.body:
        yield from ast.walk(statement)


def _loaded_in(code: CodeType, is_function: bool) -> Iterator[str]:
    if is_function:
        for instruction in dis.get_instructions(code):
            if instruction.opname == "LOAD_GLOBAL":
                yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _loaded_in(constant, is_function=True)


class Patches(ast.NodeVisitor):
    """The globals of a package's modules that some source patches: (line, module, name).

    Seen are ``module.NAME = ...``; ``setattr(module, "NAME", ...)`` of whatever object; the same with
    ``"package.module.NAME"``; a call with the name of a module as text and settings in capitals, ``tell(flow,
    "room.module", NAME=...)``; and all that in source that is a text.
    """

    def __init__(self, known: Iterable[str], package: str) -> None:
        self.known = set(known)
        self.package = package
        self.found: list[tuple[int, str, str]] = []
        self._scopes: list[dict[str, str | None]] = []

    def of(self, source: str) -> list[tuple[int, str, str]]:
        """Those in *source*."""
        self._enter(ast.parse(source))
        return self.found

    def _enter(self, scope: ast.AST) -> None:
        names = _bound_in(scope)
        names.update(imported_by(_own(scope), self.known))
        self._scopes.append(names)
        self.generic_visit(scope)
        self._scopes.pop()

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _enter

    def _module(self, node: ast.AST) -> str | None:
        """The module that an expression stands for."""
        if isinstance(node, ast.Name):
            name = next((scope[node.id] for scope in reversed(self._scopes) if node.id in scope), None)
            return name if name in self.known else None
        if isinstance(node, ast.Attribute) and (module := self._module(node.value)) is not None:
            return f"{module}.{node.attr}" if f"{module}.{node.attr}" in self.known else None
        return None

    def _note(self, node: ast.AST, module: str | None, name: str) -> None:
        if module is not None:
            self.found.append((node.lineno, module, name))

    def _visit_assignment(self, node: ast.Assign | ast.AugAssign | ast.AnnAssign) -> None:
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Attribute):
                self._note(node, self._module(target.value), target.attr)
        self.generic_visit(node)

    visit_Assign = visit_AugAssign = visit_AnnAssign = _visit_assignment

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        texts = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        if function == "setattr" and texts:
            first = node.args[0]
            if isinstance(first, ast.Constant):
                module, _, name = str(first.value).rpartition(".")
                self._note(node, module if module in self.known else None, name)
            elif len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
                self._note(node, self._module(first), texts[0])
        for text in texts:
            for setting in node.keywords:
                if f"{self.package}.{text}" in self.known and (setting.arg or "").isupper():
                    self._note(node, f"{self.package}.{text}", setting.arg or "")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and f"{self.package}." in node.value:
            try:
                inner = ast.parse(textwrap.dedent(node.value))
            except SyntaxError:
                return
            before = len(self.found)
            self._enter(inner)
            self.found[before:] = [(node.lineno, module, name) for _, module, name in self.found[before:]]


def _own(scope: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a scope that are not in a scope within it."""
    for node in ast.iter_child_nodes(scope):
        yield node
        if not isinstance(node, (*FUNCTIONS, ast.Lambda, ast.ClassDef)):
            yield from _own(node)


def _bound_in(scope: ast.AST) -> dict[str, str | None]:
    """The names that a scope binds otherwise than by importing a module."""
    names: dict[str, str | None] = {}
    for node in _own(scope):
        if isinstance(node, ast.arg):
            names[node.arg] = None
        elif isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            names[node.name] = None
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names[node.id] = None
    return names


def patches_that_reach_nothing(package: Path, sources: Mapping[str, str]) -> list[str]:
    """Patches of globals that nothing loads afterwards, so that they break nothing: "file:line module.NAME"."""
    known = modules_of(package)
    loaded = globals_loaded(package)
    return [
        f"{file}:{line} {module}.{name}"
        for file, source in sources.items()
        for line, module, name in Patches(known, package.name).of(source)
        if name not in loaded[module]
    ]
