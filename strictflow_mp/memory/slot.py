"""A slot's words, by name: for all that is not on the way of a read or a submit.

Owns: nothing. What each word means and who may store it is said in the table of `segment`; in which order, where it is
    stored (`gatekeeper`, `leftovers`).
Read by: the coordinator, and a process that only looks (`tools.glance`).
Order: none of its own: each attribute is one load or one store, when it is used.
Invariants: nothing is kept here. What is read is what the word says at that moment, so two attributes may be of two
    moments.
"""

from __future__ import annotations

__all__ = ["PIN_WORDS", "SLOT_ARRAYS", "SlotWords"]

SLOT_ARRAYS = 10
"""Arrays with a word for each slot, beside the pins."""
PIN_WORDS = 16
"""Pin words for each slot: the last one is a floor (`store.pins`)."""


def _word(array: int, meaning: str) -> property:
    """The slot's word in that array, as an attribute."""

    def load(slot: SlotWords) -> int:
        return int(slot.words[slot.first + array * slot.stride])

    def store(slot: SlotWords, value: int) -> None:
        slot.words[slot.first + array * slot.stride] = value

    return property(load, store, doc=meaning)


class SlotWords:
    """The words of one slot.

    Attributes:
        words: every word of the segment.
        number: which slot it is.
        first: where its word in the first array is.
        stride: from there to its word in the next array.
        first_pin: where its `PIN_WORDS` pin words begin.
    """

    __slots__ = ("first", "first_pin", "number", "stride", "words")

    def __init__(self, words: memoryview, number: int, arrays: int, stride: int, pins: int) -> None:
        self.words = words
        self.number = number
        self.first = arrays + number
        self.stride = stride
        self.first_pin = pins + number * PIN_WORDS

    submitted = _word(0, "Ticket of the last P1 that the slot's process has counted.")
    finished = _word(1, "Ticket up to which its P1 tasks are finished.")
    waiting = _word(2, "1 while one of its threads sleeps on the slot's semaphore.")
    pid = _word(3, "Whose the slot is; 0 when it is free.")
    start = _word(4, "Start time of that process.")
    space = _word(5, "Its pid namespace; 0 when that is not known.")
    tenant = _word(6, "Which admission gave it the slot.")
    waits = _word(7, "How many of its gated reads had to wait.")
    waited = _word(8, "Nanoseconds that they waited in all.")
    semaphore = _word(9, "The random part of its semaphore's name; 0 when it has none.")

    @property
    def pins(self) -> memoryview:
        """The slot's pin words."""
        return self.words[self.first_pin : self.first_pin + PIN_WORDS]

    def __repr__(self) -> str:
        return f"<SlotWords of slot {self.number}, pid {self.pid}>"
