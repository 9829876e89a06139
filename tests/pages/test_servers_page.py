"""The page on servers shows the examples as they are."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "servers.md").read_text()
EXAMPLES = ROOT / "examples" / "servers"


def test_each_example_is_on_the_page_as_it_stands_and_nothing_else_is():
    shown = set(re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))
    assert shown == {path.read_text() for path in EXAMPLES.glob("*.py")}
