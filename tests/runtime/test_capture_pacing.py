"""When CUDA graphs are captured: from times alone, milliseconds here."""

from __future__ import annotations

import pytest
from gantline_runtime.capture_pacing import CapturePacer, Captures
from gantline_runtime.pacing import Pacer, StepLoad

DECODES = StepLoad(decodes=64, decode_context=64_000)


def taught(limit: float, decoding: float) -> Pacer:
    """Which knows that 64 decodes take `decoding`."""
    pacer = Pacer(limit / 1000)
    for _ in range(64):
        pacer.observe(DECODES, decoding / 1000)
        pacer.refit()
    return pacer


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(
    ("limit", "device", "capture", "launch", "expected"),
    [
        (0, 7, 30, 13, Captures.ANY),  # no limit
        (50, 7, 30, 13, Captures.ANY),  # both fit
        (50, 35, 30, 13, Captures.NONE),  # both do not, and launches hide behind the device
        (50, 35, 30, 33, Captures.LATER),  # they do not hide, but they fit: seldom
        (14, 7, 30, 13, Captures.LATER),  # the same with a low limit
        (14, 7, 30, 16, Captures.WIDE),  # without a graph the step is late too
        (14, 12.5, 30, 8, Captures.NONE),
        (30, 15, 75, 33, Captures.WIDE_AGAIN),  # a model so large that a step would be later than 100 ms
    ],
)
def test_a_step_captures_where_it_has_time_or_would_be_late_without(
    limit: float, device: float, capture: float, launch: float, expected: Captures, direct: bool
) -> None:
    captures = CapturePacer(taught(limit, device), [capture / 1000] * 3, [launch / 1000] * 3, (), direct=direct)
    captures.allow(DECODES)  # the captures so far count as the last
    assert captures.allow(DECODES) is expected


@pytest.mark.parametrize(("capture", "expected"), [(30, Captures.WIDE), (40, Captures.NONE)])
def test_a_capture_that_needs_no_run_before_it_takes_the_place_of_launches_where_both_hide(capture: float, expected: Captures) -> None:
    captures = CapturePacer(taught(50, 45), [capture / 1000], [33e-3], (), direct=True)
    assert captures.allow(DECODES) is expected
    assert CapturePacer(taught(50, 45), [capture / 1000], [33e-3], (), direct=False).allow(DECODES) is Captures.NONE


def test_where_launches_exceed_the_limit_the_pacer_keeps_to_few_numbers_of_tokens() -> None:
    """Those that have a graph, or else a power of two, which is captured then; where launches are short, to none."""
    pacer, graphs = taught(18, 9), set[int]()
    for i in range(40):
        load = StepLoad(decodes=64, decode_context=64_000)
        load.add_chunk(0, 100 + 10 * i)
        pacer.observe(load, 9.5e-3 + 20e-6 * (100 + 10 * i))
        pacer.refit()
    chunk = pacer.chunk(DECODES, 0, 8000)
    assert 320 < chunk + 64 < 512
    CapturePacer(pacer, [27e-3], [26e-3], graphs, direct=True).allow(DECODES)
    assert pacer.chunk(DECODES, 0, 8000) == 256 - 64
    graphs.add(320)
    assert pacer.chunk(DECODES, 0, 8000) == 320 - 64
    assert pacer.chunk(DECODES, 0, 50) == 50, "a prompt's end is padded"
    CapturePacer(pacer, [27e-3], [13e-3], graphs, direct=True).allow(DECODES)
    assert pacer.chunk(DECODES, 0, 8000) == chunk


def test_where_launches_exceed_the_limit_a_prompts_end_is_padded_to_a_graph_that_there_is() -> None:
    load = StepLoad(decodes=64, decode_context=64_000)
    load.add_chunk(20_000, 60)
    for graphs, expected in (({256}, Captures.LATER), ({512}, Captures.WIDE), (set[int](), Captures.WIDE)):
        assert CapturePacer(taught(18, 9), [27e-3], [26e-3], graphs, direct=True).allow(load) is expected
    assert CapturePacer(taught(18, 9), [27e-3], [26e-3], {256}, direct=True).allow(DECODES) is Captures.WIDE, "decodes alone"


def test_where_nobody_decodes_nobody_waits() -> None:
    captures = CapturePacer(taught(14, 7), [30e-3], [13e-3], (), direct=False)
    load = StepLoad()
    load.add_chunk(0, 100)
    assert captures.allow(load) is Captures.ANY


def test_fewer_than_one_step_in_a_hundred_is_late_for_a_capture_that_does_not_fit() -> None:
    """The first one, of unknown length, included: there is time for it at once."""
    made: list[float] = []
    captures = CapturePacer(taught(14, 7), made, [13e-3], (), direct=False)
    at = []
    for step in range(1000):
        if captures.allow(DECODES) is Captures.WIDE:
            at.append(step)
            made.append(30e-3)
    assert at[0] == 0 and 5 <= len(at) <= 10


def test_one_capture_that_took_long_does_not_change_what_the_next_is_taken_for() -> None:
    captures = CapturePacer(taught(50, 7), [30e-3, 30e-3, 2.0], [13e-3], (), direct=False)
    assert captures.allow(DECODES) is Captures.ANY


def test_where_decoding_alone_exceeds_the_limit_the_steps_allowance_counts() -> None:
    captures = CapturePacer(taught(50, 200), [30e-3], [190e-3], (), direct=False)
    assert captures.allow(DECODES) is Captures.ANY, "a step of 200 ms may take a quarter more"
