"""The architecture: what docs/design.md and the contracts in pyproject.toml do not say of the package is checked here.

Each check is a function over source (`architecture`), and is seen to fail on a small house that breaks the rule.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from architecture import (
    Patches,
    cycles,
    entries,
    imports,
    long_modules,
    modules_of,
    patches_that_reach_nothing,
    rooms_without_a_paragraph,
)

import strictflow_mp

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "strictflow_mp"

MOST_ENTRIES = 16
"""On the package's top: seven files that are public paths, and nine rooms."""

MOST_LINES = 400

LONG: dict[str, str] = {}
"""Modules that may be longer, and why."""

CIRCLES: list[set[str]] = []


# The house


def test_the_top_can_be_seen_at_a_glance():
    assert len(entries(PACKAGE)) <= MOST_ENTRIES


def test_each_room_says_in_a_paragraph_what_lives_there():
    assert rooms_without_a_paragraph(PACKAGE) == set()


def test_no_module_is_too_long_without_a_reason():
    assert long_modules(PACKAGE, MOST_LINES).keys() == LONG.keys()


def test_no_module_leads_back_to_itself_not_even_for_annotations():
    assert cycles(imports(PACKAGE)) == CIRCLES


def sources(*folders: str) -> dict[str, str]:
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths}


def test_whatever_a_test_patches_is_loaded_where_it_patches_it():
    programs = sources("tests", "benchmarks")
    known = modules_of(PACKAGE)
    seen = [patch for source in programs.values() for patch in Patches(known, "strictflow_mp").of(source)]
    assert len(seen) > 60  # the check sees what there is
    assert patches_that_reach_nothing(PACKAGE, programs) == []


def test_what_is_imported_late_is_there_and_not_before():
    late = ["FlowStats", "Trace", "Worker", "WorkerGroup"]
    assert set(late) <= set(strictflow_mp.__all__) <= set(dir(strictflow_mp))
    assert [getattr(strictflow_mp, name).__name__ for name in late] == late
    with pytest.raises(AttributeError, match="'strictflow_mp' has no attribute 'Werker'"):
        strictflow_mp.Werker  # noqa: B018
    code = "import sys, strictflow_mp; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT, text=True).stdout
    assert {"strictflow_mp.trace", "cloudpickle", "dataclasses"}.isdisjoint(loaded.split())


# The checks themselves


def build(package: Path, **files: str) -> Path:
    """A package of these files; two underscores in a name stand for a slash."""
    for name, source in files.items():
        path = package.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    for folder in {package, *(path.parent for path in package.rglob("*.py"))}:
        (folder / "__init__.py").touch()
    return package


@pytest.fixture
def house(tmp_path):
    return tmp_path / "house"


def test_a_top_is_counted_without_what_is_no_part_of_it(house):
    build(house, door="", room__bed="")
    (house / "py.typed").touch()
    (house / "__pycache__").mkdir()
    assert entries(house) == {"__init__.py", "door.py", "room"}


@pytest.mark.parametrize(
    ("docstring", "is_one"),
    [
        ("", False),
        ('"""A bed."""', False),
        ('"""A bed.\n\nIt is soft.\n"""', False),
        ('"""A bed.\n\nIt is soft.\nIt is wide.\nTwo sleep in it.\n"""', True),
    ],
)
def test_a_room_without_a_paragraph_is_found(house, docstring, is_one):
    build(house, room__bed="")
    (house / "room" / "__init__.py").write_text(docstring)
    assert rooms_without_a_paragraph(house) == (set() if is_one else {"room"})


def test_a_module_that_is_too_long_is_found(house):
    build(house, room__bed="\n" * 11, room__chair="\n" * 10)
    assert long_modules(house, 10) == {"house.room.bed": 11}


@pytest.mark.parametrize(
    "back",
    [
        "from .bed import sheet",
        "from . import bed",
        "from house.room import bed as it",
        "import house.room.bed",
        "from ..door import handle",
        "def late():\n    from .bed import sheet",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .bed import sheet",
    ],
)
def test_two_modules_that_lead_to_each_other_are_found(house, back):
    there = "import house.door\nfrom .chair import seat"
    build(house, room__bed=there, room__chair=back, door="from .room.bed import sheet")
    circle = {"house.room.bed", "house.room.chair"}
    found = cycles(imports(house))
    assert found == [circle | {"house.door"}]
    build(house, door="")
    assert cycles(imports(house)) == ([] if "door" in back else [circle])


def test_passing_a_room_is_no_import_of_it_and_importing_from_it_is(house):
    build(house, room__bed="from . import chair", room__chair="", door="from .room import bed, sheet")
    (house / "room" / "__init__.py").write_text("from .bed import sheet\n")
    assert imports(house) == {
        "house": set(),
        "house.door": {"house.room", "house.room.bed"},
        "house.room": {"house.room.bed"},
        "house.room.bed": {"house.room.chair"},
        "house.room.chair": set(),
    }
    assert cycles(imports(house)) == []


BED = """
from .chair import SEAT
WIDTH = 2
TWICE = 2 * WIDTH
def lie(length=TWICE):
    return SEAT
def sit():
    from .chair import LATE
    return chair.LEGS, LATE
from . import chair
"""


@pytest.mark.parametrize(
    ("patch", "reaches"),
    [
        ("bed.SEAT = 1", True),
        ("bed.WIDTH = 1", False),  # loaded when the module was imported
        ("bed.TWICE = 1", False),  # so is a default
        ("chair.SEAT = 1", False),  # the bed has its own
        ("chair.LEGS = 1", True),
        ("chair.LATE = 1", True),
        ("it.WIDTH = 1", False),
        ("bed.SEAT = chair.SEAT = 1", False),
        ("monkeypatch.setattr(bed, 'SEAT', 1)", True),
        ("monkeypatch.setattr(bed, 'WIDTH', 1)", False),
        ("setattr(house.room.bed, 'WIDTH', 1)", False),
        ("monkeypatch.setattr('house.room.bed.SEAT', 1)", True),
        ("monkeypatch.setattr('house.room.bed.WIDTH', 1)", False),
        ("def test(patch):\n    patch.setattr(bed, 'WIDTH', 1)", False),
        ("def test():\n    from house.room import chair as bed\n    bed.LEGS = 1", True),
        ("def test(bed):\n    bed.WIDTH = 1", True),  # another bed
        ("def test():\n    bed = object()\n    bed.WIDTH = 1", True),
        ("tell(flow, 'room.bed', SEAT=1)", True),
        ("tell(flow, 'room.bed', WIDTH=1)", False),
        ("run('''\n    from house.room import bed\n    bed.WIDTH = 1\n''')", False),
        ("run('''\n    from house.room import bed\n    bed.SEAT = 1\n''')", True),
        ("run('house.room.bed: this is no source')", True),
    ],
)
def test_a_patch_that_reaches_nothing_is_found(house, patch, reaches):
    build(house, room__bed=BED, room__chair="SEAT = LEGS = LATE = 4")
    source = f"import house.room.bed\nimport house.room.bed as it\nfrom house.room import bed, chair\n{patch}\n"
    found = patches_that_reach_nothing(house, {"test": source})
    assert len(found) == (0 if reaches else 1), found
    if not reaches:
        assert found[0].startswith("test:")
        assert "house.room." in found[0]
