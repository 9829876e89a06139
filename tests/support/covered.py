"""Whether enough of the package ran: `python tests/support/covered.py REPORT`, where `coverage json -o REPORT` put it.

coverage's own limit, `fail_under`, is for lines and branches taken together.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

LINES = 95.0
BRANCHES = 90.0


def main(report: str) -> int:
    totals = json.loads(Path(report).read_text())["totals"]
    lines = 100 * totals["covered_lines"] / totals["num_statements"]
    branches = 100 * totals["covered_branches"] / totals["num_branches"]
    print(f"lines {lines:.2f} % (at least {LINES:g}), branches {branches:.2f} % (at least {BRANCHES:g})")
    return int(lines < LINES or branches < BRANCHES)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
