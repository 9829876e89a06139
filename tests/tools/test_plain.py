"""Any value of a state, as scripts read it."""

from __future__ import annotations

import json
from datetime import date, timedelta
from decimal import Decimal
from enum import Enum

import pytest

from strictflow_mp.tools.plain import plain


class Colour(Enum):
    RED = 1


VALUES = [
    (None, None),
    (True, True),
    (1.5, 1.5),
    (1 << 53, 1 << 53),
    (1 << 60, str(1 << 60)),
    (Colour.RED, "RED"),
    (b"\xff", "/w=="),
    ({1: (2, [3])}, {"1": [2, [3]]}),
    (frozenset({2, 1}), [1, 2]),
    (date(2026, 1, 2), "2026-01-02"),
    (timedelta(seconds=1.5), 1.5),
    (1 + 2j, [1.0, 2.0]),
    (Decimal("1.10"), "1.10"),
]


@pytest.mark.parametrize(("value", "expected"), VALUES, ids=lambda value: repr(value)[:20])
def test_any_value_is_written_as_json(value, expected):
    assert plain(value) == expected
    assert json.loads(json.dumps(plain(value))) == expected


def test_arrays_are_written_as_json():
    numpy = pytest.importorskip("numpy")
    assert plain({"a": numpy.arange(3), "b": numpy.float64(0.5)}) == {"a": [0, 1, 2], "b": 0.5}
