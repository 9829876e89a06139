"""The documents: their tables say what the code says."""

from __future__ import annotations

import ast
import importlib
import os
import re
import secrets
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from strictflow_mp.memory import segment
from strictflow_mp.memory.segment import Segment
from strictflow_mp.store import StoreWriter, trie
from strictflow_mp.system.identity import Identity
from strictflow_mp.values import types as extensions

try:
    import tomllib
except ImportError:  # before Python 3.11; pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "strictflow_mp"
MODEL = (ROOT / "docs" / "memory-model.md").read_text()
DESIGN = (ROOT / "docs" / "design.md").read_text()
FENCES = ("fence", "publish_fence", "read_fence")


def table(text: str, *header: str) -> list[list[str]]:
    """The rows of the one table whose header begins like that, without backquotes."""
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in text.splitlines()]
    [start] = [number for number, row in enumerate(rows) if row[: len(header)] == list(header)]
    found = []
    for row in rows[start + 2 :]:
        if row == [""]:
            break
        found.append(row)
    return found


@pytest.fixture
def shared() -> Iterator[Segment]:
    made = Segment.create(
        secrets.token_hex(6), "flow", capacity=1 << 20, slots=65, identity=Identity(os.getpid(), 1, 0, 0)
    )
    yield made
    made.unlink()
    made.close()


def test_every_control_word_is_where_the_table_says():
    said = {name: int(word) for word, name, *_ in table(MODEL, "word", "name")}
    assert said == {name[2:]: value for name, value in vars(segment).items() if name.startswith("W_")}


def test_every_word_of_a_record_is_where_the_table_says():
    said = {name: int(offset) for offset, name in table(MODEL, "offset", "name")}
    assert said == {name[2:]: value for name, value in vars(segment).items() if name.startswith("R_")}


def test_the_slots_arrays_begin_where_the_table_says(shared):
    rows = table(MODEL, "begins at", "array")
    assert {name: int(begin) for begin, name, *_ in rows} == {
        name: getattr(shared, name.lower()) for _, name, *_ in rows
    }
    ends = [int(begin) for begin, *_ in rows[1:]]
    for (begin, name, words, *_), end in zip(rows, ends, strict=False):
        size = shared.slots * int(words)
        assert size <= end - int(begin) < size + (8 if name != "PINS" else segment.PAGE_BYTES // 8)


def test_the_drawing_of_the_segment_has_every_control_word():
    lines = [re.match(r" *(\d+) +(\d+) \| *(\S+?)[ ,]", line) for line in MODEL.splitlines()]
    drawn = [(int(found[1]), int(found[2]), found[3]) for found in lines if found]
    assert all(byte == 8 * word for word, byte, _ in drawn)
    assert MODEL.count("'S'  'F'  'L'  'O'  'W'  'M'  'P'   1 |  MAGIC") == 1
    assert segment.MAGIC.to_bytes(8, "little") == b"SFLOWMP\1"
    named = {(int(word), name) for word, name, *_ in table(MODEL, "word", "name")}
    expected = named - {(0, "MAGIC")} | {(0, "'S'")}
    assert {(word, name) for word, _, name in drawn if name.isupper()} == expected


def test_every_constant_has_the_value_in_the_table():
    for name, value, _ in table(MODEL, "constant", "value"):
        module, _, constant = name.rpartition(".")
        found = getattr(importlib.import_module(f"strictflow_mp.{module}"), constant)
        assert (name, found) == (name, int(value))


def test_every_extension_has_the_code_in_the_table():
    said = {int(code): kind for code, kind, _ in table(MODEL, "code", "type")}
    assert said == extensions.NAMES


def test_a_committed_cell_lies_in_memory_as_it_is_drawn(shared):
    writer = StoreWriter(shared, "flow")
    writer.create()
    first, second, payload = b"\xa5first", b"\xa6second", b"\xa8a payload"
    writer.publish({first: payload})
    writer.publish({second: b"\x01"})
    words = shared.words
    record = segment.W_RING + 2 % segment.RING_RECORDS * segment.RECORD_WORDS
    assert words[segment.W_VERSION] == words[record + segment.R_VERSION] == 2
    assert words[record + segment.R_COUNT] == 2
    root = words[record + segment.R_ROOT]
    assert root & 1 == 0  # two keys: a node
    node = root >> 1
    assert words[node - 1] == 2
    digest = writer.hash(first)
    level = 0
    while not (pointer := words[node + (digest >> 5 * level & 31)]) & 1:
        node, level = pointer >> 1, level + 1
    cell = pointer >> 1
    assert words[cell] == 1
    assert words[cell + 1] == digest
    assert words[cell + 2] == len(first) << 44 | len(payload)
    assert words[cell + 3] == 0
    key = (cell + 4) * 8
    assert bytes(shared.buffer[key : key + len(first)]) == first
    assert bytes(shared.buffer[key + 8 : key + 8 + len(payload)]) == payload
    assert trie.cell_words(len(first), len(payload)) == 4 + 1 + 2
    writer.publish({first: b"\x02"})
    assert words[words[cell + 3] >> 1] == 3


def test_a_payload_with_arrays_has_the_frame_that_is_drawn():
    numpy = pytest.importorskip("numpy")
    from strictflow_mp.values.codec import pack

    array = numpy.arange(3)
    packed = pack([array, array])
    length = int.from_bytes(packed[4:8], "little")
    area = -(-(8 + length) // 16) * 16
    assert packed[:4] == b"\xc1\0\0\0"
    assert packed[8 + length : area] == bytes(area - 8 - length)
    assert packed[area : area + 24] == packed[area + 32 :] == array.tobytes()


def fences_in(path: Path) -> Iterator[tuple[str, str]]:
    """(fence, module and function) for each call of one."""
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)

    def visit(node: ast.AST, scope: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            inner = scope
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                inner = f"{scope}.{child.name}"
            elif isinstance(child, ast.Call) and isinstance(child.func, ast.Name) and child.func.id in FENCES:
                yield child.func.id, scope
            yield from visit(child, inner)

    return visit(ast.parse(path.read_text()), module)


def test_every_fence_in_the_code_is_argued_in_the_table():
    said = Counter((fence, where) for fence, where, *_ in table(MODEL, "fence", "where"))
    assert said == Counter(found for path in PACKAGE.rglob("*.py") for found in fences_in(path))


def modules() -> set[str]:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    return {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} | packages


def test_the_rooms_in_the_design_are_those_that_are_checked():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    [layers] = [contract["layers"] for contract in contracts if contract["name"] == "Rooms"]
    rows = table(DESIGN, "row", "rooms")
    assert [row.split("` `") for _, row, _ in rows] == [layer.split(" | ") for layer in layers]
    assert [int(number) for number, *_ in rows] == list(range(len(rows), 0, -1))
    assert {name for layer in layers for name in layer.split(" | ")} == modules()


def test_every_file_that_the_documents_link_to_exists():
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / link).exists(), f"{path.name}: {link}"
