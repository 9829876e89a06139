"""The pages that lead through the code: every name of a module, class or function on them is there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from strictflow_mp import StrictFlow

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "strictflow_mp"
DOCS = ROOT / "docs"
PAGES = [DOCS / "ways.md", DOCS / "design.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("protocols/*.md"))]
"""Those that are about the code. (The tables of others have tests of their own.)"""

ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
FILES = sorted(path.stem for path in PACKAGE.glob("[a-z]*.py"))
NAME = re.compile(rf"`((?:{'|'.join(ROOMS + FILES)})(?:\.\w+)+)")
"""Between backquotes, up to what is no part of a name: `store.trie.Trie.put(key)`."""


def names(page: str) -> list[str]:
    """Every name on the page that begins with a room or a file of the package."""
    return NAME.findall(re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL))


def find(name: str) -> object:
    """What a name stands for. `flow.` is a room, and what users call their handle.

    Raises:
        AttributeError: nothing.
    """
    room, *rest = name.split(".")
    found: object = importlib.import_module(f"strictflow_mp.{room}")
    if room in ROOMS:
        if (PACKAGE / room / f"{rest[0]}.py").exists():
            found = importlib.import_module(f"strictflow_mp.{room}.{rest.pop(0)}")
        elif room == "flow" and (rest[0] in StrictFlow.__annotations__ or hasattr(StrictFlow, rest[0])):
            return rest[0]
    for attribute in rest:
        found = getattr(found, attribute)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_name_on_the_page_is_there(page):
    for name in names(page.read_text()):
        assert find(name) is not None, name


def test_each_page_names_something():
    assert {page.stem for page in PAGES} >= {"gate", "commit", "takeover", "loop", "meeting"}
    assert all(names(page.read_text()) for page in PAGES)


@pytest.mark.parametrize(
    "name",
    [
        "store.trie.Tree",
        "store.trie.Trie.putt",
        "store.tree.Trie",
        "client.door",
        "flow.handle.StrictFlow.statte",
        "flow.statte",
        "core.nothing",
    ],
)
def test_a_name_that_is_made_up_is_found_out(name):
    assert names(f"one, `{name}(key)`, two") == [name]
    with pytest.raises(AttributeError):
        find(name)


@pytest.mark.parametrize("name", ["store.trie.Trie.put", "memory.semaphores", "flow.state", "flow.watch", "core.serve"])
def test_a_name_that_is_there_is_found(name):
    assert find(name)
