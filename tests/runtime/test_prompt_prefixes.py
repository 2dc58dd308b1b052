"""Hashes of what prompts begin with: alike for alike beginnings, however JSON spells them, and bounded."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from gantline_runtime import prompt_prefixes
from gantline_runtime.prompt_prefixes import CUTS, NO_PREFIXES, PromptPrefixes, read_prefixes
from hypothesis import given, settings
from hypothesis import strategies as st

SYSTEM = "You are a patient teacher of mathematics. " * 100
TOOLS = [
    {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {"word": {"type": "string"}}}}}
]


def _all_prefixes(body: Any) -> list[PromptPrefixes]:
    return list(read_prefixes(json.dumps(body).encode()))


def first_prefixes(body: Any) -> PromptPrefixes:
    return prompt_prefixes.first_prefixes(body if isinstance(body, bytes) else json.dumps(body).encode())


def _chat(system: Any, user: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": system}, {"role": "user", "content": user}], **more}


def _num_shared(one: PromptPrefixes, other: PromptPrefixes) -> int:
    """Leading hashes that are the same; no later ones are."""
    same = [a == b for a, b in zip(one.hashes, other.hashes, strict=False)]
    count = sum(same)
    assert all(same[:count])
    return count


def test_cuts_lie_close_at_first_and_reach_a_megabyte() -> None:
    assert CUTS[:9] == (256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304) and 1_000_000 < CUTS[-1] < 2_000_000 and len(CUTS) == 64
    assert all(later - cut <= max(256, later / 8) for cut, later in itertools.pairwise(CUTS))


@given(shared=st.text(min_size=1), one=st.text(), other=st.text(), times=st.integers(1, 400))
def test_what_prompts_share_is_found_up_to_an_eighth(shared: str, one: str, other: str, times: int) -> None:
    common = len((shared * times).encode())
    found = _num_shared(first_prefixes({"prompt": shared * times + one}), first_prefixes({"prompt": shared * times + other}))
    assert found >= sum(cut <= common for cut in CUTS)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (_chat(SYSTEM, "a"), _chat([{"type": "text", "text": SYSTEM}], "a")),
        (_chat(SYSTEM, "a", tools=TOOLS), _chat(SYSTEM, "a", tools=[{"function": TOOLS[0]["function"], "type": "function"}])),
        (_chat(SYSTEM, "a", model="m", temperature=1, stream=True), _chat(SYSTEM, "a")),
        (json.dumps(_chat("é" * 300, "a")).encode(), json.dumps(_chat("é" * 300, "a"), ensure_ascii=False, indent=2).encode()),
        ({"prompt": SYSTEM}, {"prompt": [SYSTEM, "another"]}),
        ({"prompt": list(range(200))}, {"input_ids": list(range(200))}),
        ({"input": SYSTEM}, {"input": SYSTEM, "instructions": None}),
    ],
)
def test_prompts_that_are_the_same_have_the_same_hashes_however_they_are_written(one: Any, other: Any) -> None:
    assert first_prefixes(one) == first_prefixes(other) and first_prefixes(one).hashes


def test_prompts_that_differ_early_share_nothing_and_that_differ_late_share_their_beginning() -> None:
    base = first_prefixes(_chat(SYSTEM, "a"))
    assert _num_shared(base, first_prefixes(_chat(SYSTEM, "b"))) == len(base.hashes)  # the last cut lies before the question
    assert _num_shared(base, first_prefixes(_chat(SYSTEM, "a", tools=TOOLS))) == 0
    assert _num_shared(base, first_prefixes(_chat("No. " + SYSTEM, "a"))) == 0
    assert 5 < _num_shared(base, first_prefixes(_chat(SYSTEM[:2000] + "!" + SYSTEM, "a"))) < len(base.hashes)
    items = [{"role": "user", "content": [{"type": "input_text", "text": SYSTEM}]}]
    told = first_prefixes({"instructions": "Be brief.", "input": items})
    assert told.hashes and _num_shared(told, first_prefixes({"instructions": "Be long.", "input": items})) == 0


def test_several_prompts_have_theirs_and_a_hash_fits_a_json_number() -> None:
    several = list(_all_prefixes({"prompt": [SYSTEM, "short", [7] * 64, []]}))
    assert [len(prefixes.hashes) for prefixes in several] == [len(first_prefixes({"prompt": SYSTEM}).hashes), 0, 1, 0]
    assert all(0 <= name < 1 << 53 for name in several[0].hashes)
    assert len(first_prefixes({"prompt": "x" * 3_000_000}).hashes) == len(CUTS)


@settings(max_examples=60)
@given(body=st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9), lambda part: (
    st.lists(part, max_size=4) | st.dictionaries(st.sampled_from(["messages", "prompt", "input", "instructions", "tools", "role", "content",
                                                                  "text", "input_ids"]), part, max_size=5)), max_leaves=12))  # fmt: skip
def test_a_body_that_no_endpoint_takes_raises_nothing(body: Any) -> None:
    assert all(isinstance(prefixes, PromptPrefixes) for prefixes in _all_prefixes(body))
    assert first_prefixes([]) == NO_PREFIXES == first_prefixes({}) == first_prefixes(b"{") == first_prefixes(b"[" * 9999)


def test_tokens_before_each_cut_are_in_proportion() -> None:
    prefixes = first_prefixes({"prompt": "abcd" * 250})
    assert [tokens for tokens, _ in prefixes.marks(500)] == [128, 256, 384]
    assert [tokens for tokens, _ in prefixes.marks(250)] == [64, 128, 192]
