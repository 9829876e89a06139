"""Arguments: a call's arguments as bytes, and back. They are values as those of the state are (`values.codec`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..values.codec import pack, unpack
from . import frames

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["pack_arguments", "unpack_arguments"]

_NO_KEYWORDS: dict[str, Any] = {}
"""Shared by all calls without keywords: nobody changes it, because a call spreads it out (``**``)."""


def pack_arguments(args: tuple[Any, ...], kwargs: dict[str, Any], path: str = "value") -> bytes:
    """The arguments, packed: b"" for none, a list without keywords, else a dict.

    Raises:
        SerializationError: one of them cannot travel, or they are too long together.
    """
    if kwargs:
        return pack({"args": list(args), "kwargs": kwargs}, path, frames.MAX_BODY_BYTES)
    return pack(list(args), path, frames.MAX_BODY_BYTES) if args else b""


def unpack_arguments(data: bytes) -> tuple[Sequence[Any], dict[str, Any]]:
    """What `pack_arguments` packed."""
    if not data:
        return (), _NO_KEYWORDS
    packed = unpack(data)
    return (packed, _NO_KEYWORDS) if type(packed) is list else (packed["args"], packed["kwargs"])
