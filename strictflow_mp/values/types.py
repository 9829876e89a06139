"""The types that msgpack lacks: how each becomes a msgpack extension, and comes back.

====  ==============  =========================================================================
code  type            payload ("fields" are a msgpack array)
====  ==============  =========================================================================
-2    tuple           fields: its items
-3    set             fields: its members, in the order of their packed bytes
-4    frozenset       the same
-5    int             outside of 64 bits: two's complement, big endian, as few bytes as hold it
-6    complex         fields: real, imaginary
-7    Decimal         str() of it, ASCII
-8    UUID            its 16 bytes
-9    Enum member     fields: module, qualified name of the class, and the name of the member,
                      or its value where it has no name: a combination of flags
-10   datetime        fields: year, month, day, hour, minute, second, microsecond, fold, zone
-11   date            fields: year, month, day
-12   time            fields: hour, minute, second, microsecond, fold, zone
-13   timedelta       fields: days, seconds, microseconds
-14   NumPy array     fields: see `arrays`, where its elements are kept too
-15   NumPy scalar    fields: see `arrays`
====  ==============  =========================================================================

The zone is nothing at all for a naive time; the key of a `ZoneInfo`; or the offset of a `timezone` in
microseconds, then its name where it was given one.

The codes are negative because msgpack's own `ExtType` can only be made with codes from 0: one that a user
stores is never taken for one of these, and comes back as it was. So does msgpack's `Timestamp`, code -1.
"""

from __future__ import annotations

import importlib
import reprlib
import sys
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from enum import Enum, Flag
from functools import partial
from typing import Any

from msgpack import ExtType, Packer, unpackb

from ..errors import SerializationError
from . import arrays
from .culprit import MAX_NESTED, TOO_DEEP, advice, name_of, too_deep
from .faults import FAULTS
from .frozen import FrozenDict, FrozenList, FrozenSet

__all__ = ["NAMES", "Decode", "DecodeAsIs", "Encoder", "encoder"]

TUPLE, SET, FROZENSET, INT, COMPLEX, DECIMAL, UUID, ENUM = range(-2, -10, -1)
DATETIME, DATE, TIME, TIMEDELTA, ARRAY, SCALAR = range(-10, -16, -1)

_NAMES = (
    "Timestamp tuple set frozenset int complex Decimal UUID Enum datetime date time timedelta ndarray numpy.generic"
)
NAMES = dict(enumerate(_NAMES.split()[::-1], SCALAR))
"""Code -> name of the type."""

# Packing

Encoder = tuple[Callable[[Any], bytes], arrays.Parts]
"""What packs, and where it puts the elements of the arrays that it meets."""


def encoder(*, errors: str | None = None, depth: int = 0, parts: arrays.Parts | None = None) -> Encoder:
    """A new encoder; *errors* as for `str.encode`, *depth* in tuples and sets."""
    parts = [] if parts is None else parts
    default = _Extend(depth, errors, parts)
    return Packer(autoreset=True, strict_types=True, unicode_errors=errors, default=default).pack, parts


class _Extend:
    """What a Packer calls for a value of a type that it does not know.

    A Packer must not be entered twice, so payloads are packed by one of their own, one for each depth.
    """

    __slots__ = ("_inner", "depth", "errors", "parts")

    def __init__(self, depth: int, errors: str | None, parts: arrays.Parts) -> None:
        self.depth = depth  # in tuples and sets; at most MAX_NESTED
        self.errors = errors
        self.parts = parts  # one list for all depths: an array is written into the area of the whole value
        self._inner: Callable[[Any], bytes] | None = None  # for the next depth, made when the first payload is met

    def __call__(self, value: Any) -> Any:
        encode = _ENCODERS.get(type(value)) or _late_encoder(type(value))
        if encode is None:
            raise SerializationError(advice(value))
        return encode(self, value)

    @property
    def inner(self) -> Callable[[Any], bytes]:
        """Packs a payload."""
        if self._inner is None:
            self._inner, _ = encoder(errors=self.errors, depth=self.depth + 1, parts=self.parts)
        return self._inner

    def fields(self, code: int, fields: list[Any]) -> Any:
        return _extension((code, self.inner(fields)))

    def enter(self, container: Any) -> None:
        """Keep the C stack from overflowing: msgpack counts the depth of every payload from 0.

        A level takes 440 bytes of it. Five payloads of the full depth fit; from there on all levels are counted.
        """
        if self.depth >= MAX_NESTED or (self.depth == 4 and too_deep(container)):
            raise SerializationError(TOO_DEEP)


# An ExtType without its own __new__, which takes three times as long and refuses negative codes.
_extension = partial(tuple.__new__, ExtType)


def _encode_tuple(extend: _Extend, value: tuple[Any, ...]) -> Any:
    extend.enter(value)
    return extend.fields(TUPLE, list(value))


def _encode_set(code: int, extend: _Extend, value: set[Any] | frozenset[Any]) -> Any:
    extend.enter(value)
    # Sorted because a set's own order depends on its history and, for str, on the process.
    members = sorted(map(extend.inner, value))
    size = len(members)
    header = bytes([0x90 | size]) if size < 16 else b"\xdd" + size.to_bytes(4, "big")
    return _extension((code, header + b"".join(members)))


def _encode_int(extend: _Extend, value: int) -> Any:
    return _extension((INT, value.to_bytes((value.bit_length() + 8) // 8, "big", signed=True)))


def _encode_enum(extend: _Extend, member: Enum) -> Any:
    kind = type(member)
    if "<locals>" in kind.__qualname__:
        raise SerializationError(
            f"a member of {name_of(kind)} cannot be stored, because other processes do not find a class "
            "that is defined in a function: define it in a module"
        )
    name: Any = member._name_  # not `.name`, which a class may define anew
    if kind.__members__.get(name) is not member:
        if not isinstance(member, Flag):
            raise SerializationError(
                f"{reprlib.repr(member)} cannot be stored, because its class does not list it: store its value"
            )
        name = member._value_
    # A spawned child has imported the main module under this other name.
    module = "__main__" if kind.__module__ == "__mp_main__" else kind.__module__
    return extend.fields(ENUM, [module, kind.__qualname__, name])


def _encode_datetime(extend: _Extend, value: datetime) -> Any:
    return extend.fields(DATETIME, [value.year, value.month, value.day, *_clock(value)])


def _clock(value: datetime | time) -> list[Any]:
    return [value.hour, value.minute, value.second, value.microsecond, value.fold, *_zone(value.tzinfo)]


def _zone(zone: Any) -> list[Any]:
    kind = type(zone)
    if zone is None:
        return []
    if kind is timezone:
        offset, *name = zone.__reduce__()[1]  # holds a name only if the constructor was given one
        return [offset // timedelta(microseconds=1), *name]
    if kind is getattr(sys.modules.get("zoneinfo"), "ZoneInfo", None) and zone.key:
        return [zone.key]
    raise SerializationError(
        f"a time whose tzinfo is of type {name_of(kind)} cannot be stored: "
        "use a zoneinfo.ZoneInfo that has a key, or datetime.timezone"
    )


_ENCODERS: dict[type, Callable[[_Extend, Any], Any]] = {
    FrozenDict: lambda _, value: dict(value),
    FrozenList: lambda _, value: list(value),
    FrozenSet: partial(_encode_set, SET),
    tuple: _encode_tuple,
    set: partial(_encode_set, SET),
    frozenset: partial(_encode_set, FROZENSET),
    int: _encode_int,
    complex: lambda extend, value: extend.fields(COMPLEX, [value.real, value.imag]),
    datetime: _encode_datetime,
    date: lambda extend, value: extend.fields(DATE, [value.year, value.month, value.day]),
    time: lambda extend, value: extend.fields(TIME, _clock(value)),
    timedelta: lambda extend, value: extend.fields(TIMEDELTA, [value.days, value.seconds, value.microseconds]),
}

# Types of modules that are not imported for their sake: a process that has such a value has imported them.
_LATE: dict[tuple[str, str], Callable[[_Extend, Any], Any]] = {
    ("decimal", "Decimal"): lambda _, value: _extension((DECIMAL, str(value).encode())),
    ("uuid", "UUID"): lambda _, value: _extension((UUID, value.bytes)),
    ("numpy", "ndarray"): lambda extend, value: extend.fields(ARRAY, arrays.array_fields(value, extend.parts)),
    ("numpy", "generic"): lambda extend, value: extend.fields(SCALAR, arrays.scalar_fields(value)),
}


def _late_encoder(kind: type) -> Callable[[_Extend, Any], Any] | None:
    if issubclass(kind, Enum):
        return _encode_enum
    for (module, name), encode in _LATE.items():
        known = getattr(sys.modules.get(module), name, None)
        scalar = name == "generic" and known and issubclass(kind, known) and name_of(kind)[:6] == "numpy."
        if kind is known or scalar:
            return _ENCODERS.setdefault(kind, encode)
    return None


# Unpacking


class Decode:
    """What msgpack calls for an extension; payloads have one of their own, one for each depth.

    It must not be part of a reference cycle: *area* may be shared memory, which is to be let go in time.
    """

    __slots__ = ("_inner", "area", "depth", "frozen", "hold")

    def __init__(
        self,
        *,
        frozen: bool,
        area: memoryview | None = None,
        hold: Callable[[Any], object] | None = None,
        depth: int = 0,
    ) -> None:
        self.frozen = frozen
        self.area = area  # where the arrays' elements lie; None until the value turns out to have a frame
        self.hold = hold
        self.depth = depth  # in tuples and sets, so that damaged data cannot overflow the C stack
        self._inner: Decode | None = None  # for the next depth, made when the first payload is met

    def __call__(self, code: int, data: bytes) -> Any:
        decode = _DECODERS.get(code)
        # What is not ours is the user's, or damaged if the code is negative: ExtType refuses that.
        return ExtType(code, data) if decode is None else decode(self, data)

    def unpack(self, data: bytes | memoryview) -> Any:
        """Unpack msgpack that may hold extensions."""
        hooks = {"object_hook": FrozenDict, "list_hook": FrozenList} if self.frozen else {}
        return unpackb(data, ext_hook=self, strict_map_key=False, unicode_errors="surrogatepass", **hooks)

    def fields(self, data: bytes) -> list[Any]:
        """Unpack a payload."""
        inner = self._inner
        if inner is None:
            if self.depth > MAX_NESTED + 1:  # the innermost tuple may hold a Flag whose value is a long int
                raise ValueError("tuples nest too deeply")
            inner = type(self)(frozen=self.frozen, area=self.area, hold=self.hold, depth=self.depth + 1)
            self._inner = inner
        fields = inner.unpack(data)
        if not isinstance(fields, list):
            raise ValueError("the payload of an extension is no array")
        return fields


class DecodeAsIs(Decode):
    """As `Decode`, for somebody who only looks whether the bytes are sound: an Enum member stays three names.

    Its module is not imported, for that may do anything.
    """

    __slots__ = ()

    def __call__(self, code: int, data: bytes) -> Any:
        return _names_of_enum(self, data) if code == ENUM else super().__call__(code, data)


def _decode_decimal(_: Decode, data: bytes) -> Any:
    from decimal import Decimal

    return Decimal(data.decode("ascii"))


def _decode_uuid(_: Decode, data: bytes) -> Any:
    import uuid

    return uuid.UUID(bytes=data)


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except FAULTS:
        raise
    except Exception as error:  # the module's own code runs, and may raise anything: `OSError`, `SyntaxError`
        raise ImportError(f"{type(error).__name__}: {error}") from error


def _names_of_enum(decode: Decode, data: bytes) -> tuple[str, str, Any]:
    module, qualname, name = decode.fields(data)
    if type(module) is not str or type(qualname) is not str or type(name) not in {str, int}:
        raise ValueError("an Enum member is damaged")
    return module, qualname, name


def _decode_enum(decode: Decode, data: bytes) -> Any:
    module, qualname, name = _names_of_enum(decode, data)
    try:
        found: Any = sys.modules.get(module) or _imported(module)
        for part in qualname.split("."):
            found = getattr(found, part)
        if not (isinstance(found, type) and issubclass(found, Enum)):
            raise TypeError(f"{qualname} is not an Enum")
        return found[name] if type(name) is str else found(name)
    except (*FAULTS, SystemExit) as error:  # argparse at the top of a module exits, for one
        instead = (
            "define its class in a module that every process can import, not in the main program"
            if module == "__main__"
            else "let every process that reads it have the same version of that module"
        )
        raise SerializationError(
            f"the Enum member {module}.{qualname}.{name} is not found in this process "
            f"({type(error).__name__}: {error}): {instead}"
        ) from error


def _decode_datetime(decode: Decode, data: bytes) -> datetime:
    year, month, day, *clock = decode.fields(data)
    return datetime.combine(date(year, month, day), _time(clock))


def _time(clock: list[Any]) -> time:
    hour, minute, second, microsecond, fold, *zone = clock
    return time(hour, minute, second, microsecond, _decode_zone(*zone), fold=fold)


def _decode_zone(zone: object = None, *name: str) -> tzinfo | None:
    if zone is None:
        return None
    if type(zone) is int:
        return timezone(timedelta(microseconds=zone), *name)
    if type(zone) is not str or name:
        raise ValueError("a time zone is damaged")
    try:
        import zoneinfo

        return zoneinfo.ZoneInfo(zone)
    except Exception as error:
        raise SerializationError(
            f"the time zone {zone!r} is not found on this machine: "
            "install the system's time zones, or pip install tzdata"
        ) from error


def _decode_array(decode: Decode, data: bytes) -> Any:
    if decode.area is None:
        raise ValueError("there is an array, and no place of its elements")
    return arrays.array_from(decode.fields(data), decode.area, private=not decode.frozen, hold=decode.hold)


_DECODERS: dict[int, Callable[[Decode, bytes], Any]] = {
    TUPLE: lambda decode, data: tuple(decode.fields(data)),
    SET: lambda decode, data: (FrozenSet if decode.frozen else set)(decode.fields(data)),
    FROZENSET: lambda decode, data: frozenset(decode.fields(data)),
    INT: lambda _, data: int.from_bytes(data, "big", signed=True),
    COMPLEX: lambda decode, data: complex(*decode.fields(data)),
    DECIMAL: _decode_decimal,
    UUID: _decode_uuid,
    ENUM: _decode_enum,
    DATETIME: _decode_datetime,
    DATE: lambda decode, data: date(*decode.fields(data)),
    TIME: lambda decode, data: _time(decode.fields(data)),
    TIMEDELTA: lambda decode, data: timedelta(*decode.fields(data)),
    ARRAY: _decode_array,
    SCALAR: lambda decode, data: arrays.scalar_from(decode.fields(data), private=not decode.frozen),
}
