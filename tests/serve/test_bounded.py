"""``tests/bench/bench_serve.py`` in small: every kind of request gets its status, and memory stays bounded."""

import os
import runpy
from pathlib import Path
from typing import Any

import pytest


SCRIPT = Path(__file__).parents[1] / "bench" / "bench_serve.py"


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks of memory cannot be measured")
def test_mixed_requests_get_their_answers_within_bounded_memory(server: Any) -> None:
    script = runpy.run_path(str(SCRIPT))
    asks = script["draw_asks"](21)
    assert len({ask.kind for ask in asks}) == 21
    address = server.base_url.removesuffix("/v1")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what there is
    before = script["read_peak"]("self")
    found = script["send_all"](address, asks, threads=4)
    assert [(ask.kind, status) for ask, status in found if status != ask.status] == []
    assert script["read_peak"]("self") - before < 1.0  # GB; the requests' own bodies are a tenth
