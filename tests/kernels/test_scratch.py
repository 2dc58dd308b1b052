"""Scratch memory that launches hand on is made outside of graphs, and graphs have their own."""

from __future__ import annotations

import pytest
import torch
from gantline_kernels.scratch import kept


def test_memory_is_never_made_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    capturing, made = False, 0
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    def make(index: int) -> tuple[int, int]:
        nonlocal made
        assert not capturing
        made += 1
        return index, made

    capturing = True
    with pytest.raises(RuntimeError, match="run once before it is captured"):
        kept(make, 0, 7)
    capturing = False
    of_stream = kept(make, 0, 7)
    assert kept(make, 0, 7) is of_stream and kept(make, 0, 8) is not of_stream and made == 3  # two streams and the graphs
    capturing = True
    of_graphs = kept(make, 0, 9)  # a stream of the capture's own
    assert of_graphs is kept(make, 0, 7) and of_graphs != of_stream and made == 3
