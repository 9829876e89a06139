"""A mutation run over one module: change one thing, run a command, see whether it fails. `docs/mutation.md` says more.

    python tests/support/mutants.py strictflow_mp/coordinator/scheduler.py --log LOG -- \
        python -m pytest -x -q tests/coordinator/test_scheduler.py

Run it in a clone of its own: while it runs the module on the disk is a mutant. It needs cosmic-ray, whose operators
it uses; one more takes out a statement. Left out is what no test should notice: annotations, `__repr__`, `__all__`,
`__slots__`, texts of errors and of the log, and what does not compile. With --again LOG only those that survived there.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import cache_from_source
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names


class Plain(ast.NodeTransformer):
    """A module without what no test should notice."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST | None:
        if node.name == "__repr__":
            return None
        node.returns = None
        self.generic_visit(node)
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Name("object")
        self.generic_visit(node)
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        names = {target.id for target in node.targets if isinstance(target, ast.Name)}
        if names & {"__all__", "__slots__", "__hash__"}:
            return None
        self.generic_visit(node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = ast.unparse(node.func)
        if name.startswith(("logger.", "sys.audit", "audit")) or name.endswith(("Error", "Full", "Crashed", "Timeout")):
            node.args, node.keywords = [], []
        return node

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        return ast.Pass()


def plain(source: str) -> str | None:
    """None: it does not compile."""
    try:
        compile(source, "mutant", "exec", dont_inherit=True)
        return ast.unparse(ast.fix_missing_locations(Plain().visit(ast.parse(source))))
    except (SyntaxError, ValueError):
        return None


def by_operators(source: str) -> Iterator[tuple[str, tuple[object, ...], str]]:
    """Name, place and text of each mutant by cosmic-ray's operators."""
    nodes = list(ast_nodes(get_ast(source)))
    for name in sorted(operator_names()):
        kind = get_operator(name)
        if kind.arguments():
            continue
        occurrence = 0
        for node in nodes:
            for place in kind().mutation_positions(node):
                yield f"{name.removeprefix('core/')} {occurrence}", tuple(map(tuple, place[:2])), name
                occurrence += 1


def without_a_statement(source: str) -> Iterator[tuple[str, tuple[object, ...], str]]:
    lines = source.splitlines(keepends=True)
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for node in ast.walk(function):
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            kinds = ast.Expr | ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Delete | ast.Raise
            if isinstance(node, kinds) and not is_docstring:
                text = [*lines[: node.lineno - 1], " " * node.col_offset + "pass\n", *lines[node.end_lineno :]]
                yield f"RemoveStatement {node.lineno}", (node.lineno, node.end_lineno), "".join(text)


def mutants(source: str, each: int, seed: int) -> tuple[list[tuple[str, str]], int, int]:
    """Name and text of those to be tried; how many there are in all; how many were left out as unnoticeable."""
    original = plain(source)
    places: defaultdict[object, list[tuple[str, str]]] = defaultdict(list)
    for name, place, operator in by_operators(source):
        places[place, name.partition("_")[0]].append((name, operator))
    draw = random.Random(seed)
    chosen: list[tuple[str, str]] = []
    total = left_out = 0
    for same in places.values():
        total += len(same)
        draw.shuffle(same)
        kept = 0
        for name, operator in same:
            if kept == each:
                break
            text = mutate_code(source, get_operator(operator)(), int(name.split()[1]))
            if text is None or (changed := plain(text)) is None or changed == original:
                left_out += 1
            else:
                kept += 1
                chosen.append((name, text))
    for name, _, text in without_a_statement(source):
        total += 1
        if (changed := plain(text)) is None or changed == original:
            left_out += 1
        else:
            chosen.append((name, text))
    return chosen, total, left_out


def difference(source: str, text: str) -> list[str]:
    lines = difflib.unified_diff(source.splitlines(), text.splitlines(), n=0, lineterm="")
    return [line for line in lines if not line.startswith(("---", "+++"))]


def run(command: list[str], timeout: float) -> tuple[str, str]:
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
    )
    try:
        output = process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return "late", ""
    text = output.decode(errors="replace")
    return ("survived" if process.returncode == 0 else "late" if process.returncode == 124 else "killed"), text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", type=Path)
    parser.add_argument(
        "--log", type=Path, required=True, help="a line of JSON for each; those in it are not tried again"
    )
    parser.add_argument("--again", type=Path, help="only those that survived in that log")
    parser.add_argument("--each", type=int, default=3, help="replacements at one place, at most")
    parser.add_argument("--sample", type=int, help="of cosmic-ray's only so many, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=120)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    source = options.module.read_text()
    chosen, total, left_out = mutants(source, options.each, options.seed)
    if options.again:
        before = [json.loads(line) for line in options.again.read_text().splitlines()]
        names = {entry["name"] for entry in before if entry.get("outcome") == "survived"}
        chosen = [(name, text) for name, text in chosen if name in names]
    else:
        random.Random(options.seed).shuffle(chosen)  # so that a run that is broken off was a sample, too
    if options.sample is not None:
        sampled = [one for one in chosen if not one[0].startswith("RemoveStatement")][: options.sample]
        chosen = [one for one in chosen if one in sampled or one[0].startswith("RemoveStatement")]
    done = options.log.read_text().splitlines() if options.log.exists() else []
    tried = {json.loads(line)["name"] for line in done}
    chosen = [(name, text) for name, text in chosen if name not in tried]
    print(f"{options.module}: {len(chosen)} of {total}; {left_out} cannot be noticed", flush=True)
    cached = Path(cache_from_source(str(options.module)))
    with options.log.open("a") as log:
        for name, text in chosen:
            began = time.monotonic()
            try:
                cached.unlink(missing_ok=True)
                options.module.write_text(text)
                outcome, output = run(options.command, options.timeout)
            finally:
                options.module.write_text(source)
                cached.unlink(missing_ok=True)
            change = difference(source, text)
            entry = {"name": name, "outcome": outcome, "change": change, "seconds": round(time.monotonic() - began, 1)}
            log.write(json.dumps(entry | {"tail": output[-600:]}) + "\n")
            log.flush()
            print(outcome, name, *change, sep="  ", flush=True)


if __name__ == "__main__":
    sys.exit(main())
