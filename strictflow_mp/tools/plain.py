"""Plain: any value of a state as what JSON knows, for scripts; and what type a packed one has, for people.

Bytes are base64, times are ISO 8601, `Decimal`, `UUID` and integers that JSON's readers cut off are strings, an `Enum`
is its name, a complex number two floats, a set the sorted list of its items, and a NumPy array the list of its own.
"""

from __future__ import annotations

import base64
import enum
from datetime import date, datetime, time, timedelta
from struct import error as StructError
from typing import Any

from ..values import arrays
from ..values.codec import Packed, has_arrays
from ..values.types import NAMES

__all__ = ["describe", "plain"]

EXACT = 1 << 53
"""Integers beyond it become floats, and so other numbers, in many readers of JSON."""


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


KINDS = (
    (0x80, "int"),
    (0x90, "dict"),
    (0xA0, "list"),
    (0xC0, "str"),
    (0xC1, "None"),
    (0xC2, "damaged"),
    (0xC4, "bool"),
    (0xC7, "bytes"),
    (0xCA, "ext"),
    (0xCC, "float"),
    (0xD4, "int"),
    (0xD9, "fixext"),
    (0xDC, "str"),
    (0xDE, "list"),
    (0xE0, "dict"),
    (0x100, "int"),
)
"""What msgpack's first byte stands for when it is below this number, and not below the one before."""


def describe(data: Packed) -> str:
    """The name of a packed value's type, from its first bytes; "damaged" where these make no sense."""
    try:
        if has_arrays(data):
            data, _ = arrays.split(data)
        first = data[0]
        kind = next(name for limit, name in KINDS if first < limit)
        if kind.endswith("ext"):  # its code follows its length, which has 1, 2 or 4 bytes
            code = data[1] if kind == "fixext" else data[1 + (1 << (first - 0xC7))]
            return NAMES[code - 0x100] if code & 0x80 else "ExtType"
    except (ValueError, LookupError, StructError):
        return "damaged"
    return kind
