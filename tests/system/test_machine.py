"""Where no promise could be kept, a flow is refused with a sentence."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from strictflow_mp import StrictFlow, StrictFlowError
from strictflow_mp.system import machine

HERE = {"platform": sys.platform, "maxsize": sys.maxsize, "implementation": sys.implementation}


@pytest.mark.parametrize(
    ("elsewhere", "said"),
    [
        ({"platform": "darwin"}, "cannot be used on 'darwin': strictflow_mp needs Linux"),
        ({"platform": "win32"}, "cannot be used on 'win32': strictflow_mp needs Linux"),
        ({"maxsize": 2**31 - 1}, "cannot be used by a 32-bit Python, .*; use a 64-bit Python"),
        ({"implementation": SimpleNamespace(name="pypy")}, "cannot be used by 'pypy': strictflow_mp needs CPython"),
    ],
)
def test_a_machine_that_lacks_what_is_needed_is_told_so(elsewhere, said, monkeypatch):
    monkeypatch.setattr(machine, "sys", SimpleNamespace(**HERE | elsewhere))
    with pytest.raises(StrictFlowError, match=said):
        StrictFlow("nowhere")


def test_here_all_is_there():
    machine.check_machine()
