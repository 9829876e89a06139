"""Changes: what a P1 does to the state, packed: the keys that it sets or deletes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import StrictFlowError
from .codec import pack
from .keys import pack_key, packed_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["Changes", "pack_change", "pack_changes", "pack_deletes", "path_of"]

Changes = dict[bytes, bytes | None]
"""Packed key -> packed value, or None to delete."""


def path_of(key: Any) -> str:
    """What the value of a key is called in an error."""
    return key if type(key) is str else f"state[{key!r}]"


def pack_deletes(keys: Iterable[Any], flow: str) -> Changes:
    """Keys to delete, packed, as a ready-made P1 takes them."""
    return {packed_key(key, flow): None for key in keys}


def pack_change(key: Any, value: Any, flow: str) -> Changes:
    """As `pack_changes`, of one key. (No dict could be made of a key without a hash, to be refused here.)"""
    try:
        return {pack_key(key): pack(value, path_of(key))}
    except StrictFlowError as error:
        error.key = key
        raise error.of(flow) from None


def pack_changes(changes: Mapping[Any, Any], flow: str) -> Changes:
    """Keys and values, packed, as a ready-made P1 takes them.

    Raises:
        SerializationError: one of them cannot be stored; says where.
    """
    packed: Changes = {}
    for key, value in changes.items():
        try:
            packed[pack_key(key)] = pack(value, path_of(key))
        except StrictFlowError as error:
            error.key = key
            raise error.of(flow) from None
    return packed
