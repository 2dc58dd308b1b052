"""One choice's text and log-probabilities do not depend on how its tokens arrived."""

from __future__ import annotations

import pytest
from gantline_runtime.messages import FinishReason, TokenLogprobs, TokenOutput
from gantline_runtime.server.output import ChoiceOutput, Delta
from gantline_runtime.tokenizer import Tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runtime.server_fakes import byte_tokenizer
from tests.runtime.server_process import ROOT

TOKENIZER = Tokenizer(byte_tokenizer())
END = 257


def _ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def _outputs(ids: list[int], cuts: list[int], reason: FinishReason) -> list[TokenOutput]:
    groups = [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    return [
        TokenOutput(
            request_id="r",
            token_ids=group,
            logprobs=[TokenLogprobs(-float(token), [], []) for token in group],
            finish_reason=reason if i == len(groups) - 1 else None,
        )
        for i, group in enumerate(groups)
    ]


def _run(outputs: list[TokenOutput], **options: object) -> tuple[list[Delta], ChoiceOutput]:
    choice = ChoiceOutput(TOKENIZER, [256], stop_ids=frozenset({END}), **options)  # type: ignore[arg-type]
    deltas = []
    for output in outputs:
        deltas.append(choice.feed([output]))
        if choice.finish_reason is not None:
            break
    return deltas, choice


def _text(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


@given(
    st.text(alphabet="abé😀", max_size=20),
    st.lists(st.text(alphabet="abé😀", min_size=1, max_size=4), max_size=3),
    st.booleans(),
    st.data(),
)
def test_any_grouping_of_tokens_gives_the_same_text_and_logprobs(text: str, stops: list[str], ends: bool, data: st.DataObject) -> None:
    ids = _ids(text) + ([END] if ends else [])
    if not ids:
        return
    reason: FinishReason = "stop" if ends else "length"
    cuts = sorted(set(data.draw(st.lists(st.integers(1, len(ids)), max_size=6))) - {len(ids)})
    minimum = data.draw(st.integers(0, 4))
    whole, one = _run(_outputs(ids, [], reason), stop=stops, min_tokens=minimum)
    parts, many = _run(_outputs(ids, cuts, reason), stop=stops, min_tokens=minimum)
    single, each = _run(_outputs(ids, list(range(1, len(ids))), reason), stop=stops, min_tokens=minimum)
    assert _text(whole) == _text(parts) == _text(single)
    entries = [[entry for delta in deltas for entry in delta.entries] for deltas in (whole, parts, single)]
    assert entries[0] == entries[1] == entries[2]
    assert one.finish_reason == many.finish_reason == each.finish_reason is not None
    assert one.num_tokens == many.num_tokens == each.num_tokens


def test_a_stop_string_ends_the_text_and_takes_its_tokens_out_of_the_logprobs() -> None:
    deltas, choice = _run(_outputs(_ids("abcSTOPdef"), [], "length"), stop=["STOP"])
    assert _text(deltas) == "abc" and choice.finish_reason == "stop" and choice.num_tokens == 7
    assert [entry.start for delta in deltas for entry in delta.entries] == [0, 1, 2]


def test_tokens_that_may_begin_a_stop_string_are_not_told_by_their_logprobs() -> None:
    choice = ChoiceOutput(TOKENIZER, [], stop=["STOP"])
    shown = choice.feed(_outputs(_ids("abST"), [1, 2, 3], "length")[:3])
    assert shown.text == "ab" and [entry.start for entry in shown.entries] == [0, 1]


@pytest.mark.parametrize(("minimum", "text"), [(0, "a"), (3, "abcd"), (2, "abcd"), (9, "abcdbc")])
def test_no_stop_string_counts_before_the_least_number_of_tokens(minimum: int, text: str) -> None:
    deltas, _ = _run(_outputs(_ids("abcdbc"), list(range(1, 6)), "length"), stop=["bc"], min_tokens=minimum)
    assert _text(deltas) == text


def test_the_token_that_ends_a_choice_is_counted_but_not_shown() -> None:
    deltas, choice = _run(_outputs([*_ids("hi"), END], [], "stop"), skip_special_tokens=False)
    assert _text(deltas) == "hi" and choice.num_tokens == 3
    assert sum(len(delta.entries) for delta in deltas) == 2


def test_the_same_token_is_shown_where_it_does_not_end_the_choice() -> None:
    deltas, _ = _run(_outputs([*_ids("hi"), END, *_ids("!")], [], "length"), skip_special_tokens=False)
    assert _text(deltas) == "hi<|end|>!"


# ---- with a tokenizer that joins characters to words

TINY = ROOT / "examples" / "tiny-model"


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    if not (TINY / "tokenizer.json").exists():
        pytest.skip("the shipped model is not here")
    return Tokenizer.load(TINY)


_TEXTS = st.lists(
    st.sampled_from(["The ", "quick", " list", "\n\n", "  ", "é", "世界", "😀", "👩‍👩‍👧", "x", ".", "stop", "STOP", "\t", "<", "\u2028"]),
    max_size=14,
).map("".join)


@settings(max_examples=200)
@given(text=_TEXTS, data=st.data())
def test_stop_strings_of_any_length_end_the_text_where_it_says_whatever_tokens_they_cross(
    words: Tokenizer, text: str, data: st.DataObject
) -> None:
    ids = words.encode(text, add_special_tokens=False)
    text = words.decode(ids)
    if not ids:
        return
    cut = st.tuples(st.integers(0, len(text)), st.integers(1, 40)).map(lambda part: text[part[0] : part[0] + part[1]])
    stops = [stop for stop in data.draw(st.lists(cut | st.text(alphabet="e \n😀é", min_size=1, max_size=3), max_size=3)) if stop]
    found = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    expected = text[: min(found)[0] + min(found)[1]] if found else text
    cuts = sorted(set(data.draw(st.lists(st.integers(1, len(ids)), max_size=6))) - {len(ids)})
    for grouping in ([], cuts, list(range(1, len(ids)))):
        choice = ChoiceOutput(words, [], stop=stops)
        pieces = []
        for output in _outputs(ids, grouping, "length"):
            pieces.append(choice.feed([output]).text)
            assert expected.startswith("".join(pieces)), "nothing is shown that is not part of the answer"
            if choice.finish_reason is not None:
                break
        assert "".join(pieces) == expected and choice.finish_reason == ("stop" if found else "length")
        assert all("\ufffd" not in piece for piece in pieces)
