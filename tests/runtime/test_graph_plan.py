"""Which batches run as CUDA graphs, and which graphs are made: from shapes alone."""

from __future__ import annotations

import random

import pytest
from gantline_runtime.batch import BatchShape
from gantline_runtime.capture_pacing import Captures
from gantline_runtime.graph_classes import GraphClasses
from gantline_runtime.graph_plan import GraphPlan


def make_plan(max_graphs: int = 256) -> GraphPlan:
    return GraphPlan(GraphClasses(max_sequences=256, max_tokens=8192, session_len=30_000), max_graphs=max_graphs)


def decodes(count: int, context: int = 1000) -> BatchShape:
    return BatchShape(count, count, count, count, 3, 1, context)


def mixed(num_decodes: int, chunk: int, context: int = 1000) -> BatchShape:
    return BatchShape(num_decodes + chunk, num_decodes + 1, num_decodes, num_decodes, 3, chunk, context)


def prepared(plan: GraphPlan) -> GraphPlan:
    while (shape := plan.foresee()) is not None:
        assert shape.capture and shape.padded and not shape.num_samples and not shape.num_updates
        plan.captured(shape.graph)
    return plan


def test_a_class_is_captured_when_it_is_met_again_and_only_where_a_step_may() -> None:
    plan = make_plan()
    assert plan.pad(mixed(60, 100), Captures.NONE) == mixed(60, 100), "without time for a capture the batch runs as it is, unpadded"
    first, second = (plan.pad(mixed(60, 100), Captures.ANY) for _ in range(2))
    assert (first.padded, first.capture, second.capture) == (1, 0, 1)
    plan.captured(second.graph)
    third = plan.pad(mixed(60, 90), Captures.NONE)
    assert (third.graph, third.capture) == (second.graph, 0)


def test_where_little_may_be_captured_it_is_the_class_that_fits_the_most_batches() -> None:
    plan = make_plan()
    wide = plan.pad(mixed(10, 100), Captures.WIDE)
    assert (wide.capture, wide.num_tokens, wide.num_decodes, wide.max_context_len) == (1, 128, 128, 30_000)
    plan.captured(wide.graph)
    for batch in (mixed(10, 100), mixed(100, 20, context=29_000), mixed(3, 118, context=500)):
        assert plan.pad(batch, Captures.NONE).graph == wide.graph
    assert not plan.pad(mixed(100, 40), Captures.NONE).padded, "more tokens than it has"
    assert not plan.pad(mixed(10, 40), Captures.NONE).padded, "far fewer: padding would cost more than a graph saves"
    assert not plan.pad(decodes(128), Captures.NONE).padded, "a batch of another kind"


def test_where_running_and_capturing_are_too_much_for_one_step_they_are_two() -> None:
    plan = make_plan()
    first, second = (plan.pad(mixed(10, 100), Captures.WIDE_AGAIN) for _ in range(2))
    assert (first.padded, first.capture, second.capture) == (1, 0, 1) and first.graph == second.graph
    assert first.max_context_len == 30_000


def test_where_launches_take_time_a_graph_of_more_tokens_is_worth_the_padding_until_there_is_a_better_one() -> None:
    plan = make_plan()
    for batch in (decodes(160), mixed(28, 130)):
        plan.captured(plan.pad(batch, Captures.WIDE).graph)
    for batch, size in ((decodes(90), 160), (decodes(40), 40), (mixed(10, 118), 160), (mixed(10, 80), 128)):
        assert plan.pad(batch, Captures.NONE) == batch, "a graph would gain nothing"
        padded = plan.pad(batch, Captures.LATER)
        assert (bool(padded.padded), padded.num_tokens) == (size != batch.num_tokens, size) and not padded.capture
        own = plan.pad(batch, Captures.WIDE)
        assert own.capture and own.num_tokens < 160
        plan.captured(own.graph)
        assert plan.pad(batch, Captures.LATER).graph == plan.pad(batch, Captures.NONE).graph == own.graph


def test_what_is_foreseen_covers_every_batch_of_up_to_2048_tokens_with_few_prompts() -> None:
    plan, rng = prepared(make_plan()), random.Random(0)
    for _ in range(300):
        count = rng.randint(1, 256)
        batches = [decodes(count, rng.randint(1, 30_000)), mixed(count, rng.randint(1, 2048 - count), rng.randint(2048, 30_000))]
        for exact in batches:
            padded = plan.pad(exact, Captures.NONE)
            assert padded.padded and not padded.capture
            assert all(getattr(padded, name) >= getattr(exact, name) for name in ("num_tokens", "num_sequences", "num_decodes"))
            assert padded.num_prompts >= exact.num_prompts and padded.max_context_len >= exact.max_context_len
            assert padded.is_decode == exact.is_decode
            assert (padded.num_samples, padded.num_updates) == (exact.num_samples, exact.num_updates)
    assert len(plan._captured) < 128, "half of the graphs are left for what is met"


def test_a_batch_takes_its_own_class_once_a_step_has_time_to_capture_it() -> None:
    plan = prepared(make_plan())
    batch = mixed(10, 100, context=1500)
    for _ in range(2):
        own = plan.pad(batch, Captures.ANY)
    assert own.capture and own.max_context_len == 2048
    plan.captured(own.graph)
    assert plan.pad(batch, Captures.NONE).graph == own.graph


def test_requests_that_share_a_prefix_are_padded_only_to_classes_that_have_groups() -> None:
    plan = prepared(make_plan())
    grouped = decodes(100)._replace(max_own_len=300)
    assert not plan.pad(grouped, Captures.NONE).padded
    wide = plan.pad(grouped, Captures.WIDE)
    assert wide.capture and wide.max_own_len == 30_000
    plan.captured(wide.graph)
    assert plan.pad(grouped, Captures.NONE).graph == wide.graph
    assert plan.pad(decodes(100), Captures.NONE).graph != wide.graph


@pytest.mark.parametrize("captures", Captures)
def test_past_the_most_graphs_nothing_more_is_captured(captures: Captures) -> None:
    plan = prepared(make_plan(max_graphs=5))
    for _ in range(3):
        assert plan.pad(mixed(200, 1000), captures) == mixed(200, 1000)


def test_batches_whose_prompts_are_read_are_never_padded() -> None:
    plan = prepared(make_plan())
    batch = mixed(10, 100)._replace(num_reads=4)
    assert all(plan.pad(batch, captures) == batch for captures in Captures)
