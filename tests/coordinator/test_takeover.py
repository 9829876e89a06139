"""The takeover: in which order others see what it stores."""

from __future__ import annotations

import secrets

from strictflow_mp.coordinator import takeover
from strictflow_mp.memory.gatekeeper import GateKeeper
from strictflow_mp.memory.segment import W_EPOCH, W_RESTARTS, W_VERSION, Segment
from strictflow_mp.store import StoreWriter
from strictflow_mp.system.identity import Identity


def test_a_takeover_moves_restarts_then_epoch_then_version(monkeypatch):
    """Each behind a fence: who has bound the new EPOCH knows of the takeover, and a new VERSION tells of the EPOCH."""
    token = secrets.token_hex(6)
    segment = Segment.create(token, "taken over", capacity=1 << 20, slots=2, identity=Identity.mine())
    try:
        StoreWriter(segment, "taken over").create()
        words, seen = segment.words, []
        before = [words[word] for word in (W_RESTARTS, W_EPOCH, W_VERSION)]

        def note() -> None:
            now = [words[word] for word in (W_RESTARTS, W_EPOCH, W_VERSION)]
            seen.append([new - old for new, old in zip(now, before, strict=True)])

        def recover(writer: StoreWriter, *args: object) -> None:
            note()
            recovered(writer, *args)

        recovered = StoreWriter.recover
        monkeypatch.setattr(takeover, "publish_fence", note)
        monkeypatch.setattr(StoreWriter, "recover", recover)  # it has a fence of its own
        keeper = GateKeeper(segment, token)
        takeover.take_over(segment, StoreWriter(segment, "taken over"), keeper, "taken over", Identity.mine())
        note()
        assert seen == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    finally:
        segment.unlink()
        segment.close()
