"""Arguments: a call's arguments as bytes, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .values import pack, unpack

__all__ = ["pack_arguments", "unpack_arguments"]

_NONE: dict[str, Any] = {}


def pack_arguments(args: tuple[Any, ...], kwargs: dict[str, Any], path: str = "value") -> bytes:
    """The arguments, packed: b"" for none, a list without keywords, else a dict.

    Raises:
        SerializationError: one of them cannot travel.
    """
    if kwargs:
        return pack({"args": list(args), "kwargs": kwargs}, path)
    return pack(list(args), path) if args else b""


def unpack_arguments(data: bytes) -> tuple[Sequence[Any], dict[str, Any]]:
    """What `pack_arguments` packed."""
    if not data:
        return (), _NONE
    packed = unpack(data)
    return (packed, _NONE) if type(packed) is list else (packed["args"], packed["kwargs"])
