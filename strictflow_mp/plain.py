"""Plain: any value of a state as what JSON knows, for scripts.

Bytes are base64, times are ISO 8601, `Decimal`, `UUID` and integers that JSON's readers cut off are strings, an `Enum`
is its name, a complex number two floats, a set the sorted list of its items, and a NumPy array the list of its own.
"""

from __future__ import annotations

import base64
import enum
from datetime import date, datetime, time, timedelta
from typing import Any

__all__ = ["plain"]

EXACT = 1 << 53
"""Integers beyond it are floats, and others, to many readers of JSON."""


def plain(value: Any) -> Any:
    """*value* as `json.dumps` takes it."""
    if value is None or isinstance(value, (bool, float, str)):
        return value
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, int):
        return value if -EXACT <= value <= EXACT else str(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(value).decode()
    if isinstance(value, dict):
        return {key if isinstance(key, str) else str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return [plain(item) for item in sorted(value, key=repr)]
    if isinstance(value, (date, datetime, time)):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, complex):
        return [value.real, value.imag]
    if hasattr(value, "tolist"):  # NumPy
        return plain(value.tolist())
    return str(value)
