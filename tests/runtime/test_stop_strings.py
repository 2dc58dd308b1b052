"""Stop strings: the first to end wins, nothing of one is ever shown, however the text arrives."""

from __future__ import annotations

import pytest
from gantline_runtime.stop_strings import StopStrings
from hypothesis import given
from hypothesis import strategies as st


def _feed(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    machine = StopStrings(stops)
    shown = []
    for piece in pieces:
        shown.append(machine.feed(piece))
        if machine.stopped:
            return shown, True
    return [*shown, machine.finish()], False


def _expected(stops: list[str], text: str) -> tuple[str, bool]:
    """By trying every end, and for each the longest stop string."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            return text[: end - max(map(len, matches))], True
    return text, False


@pytest.mark.parametrize(
    ("stops", "text", "shown", "stopped"),
    [
        ([], "abc", "abc", False),
        (["b"], "abc", "a", True),
        (["abc"], "ababc", "ab", True),
        (["aab"], "aaaab", "aa", True),
        (["b", "abc"], "xabc", "xa", True),
        (["bc", "abc"], "xabc", "x", True),
        (["\n\n"], "a\nb\n\nc", "a\nb", True),
        (["xyz"], "abxy", "abxy", False),
        (["é"], "caf\u00e9!", "caf", True),
    ],
)
def test_text_ends_before_the_first_stop_string_that_ends(stops: list[str], text: str, shown: str, stopped: bool) -> None:
    for pieces in ([text], list(text)):
        out, hit = _feed(stops, pieces)
        assert ("".join(out), hit) == (shown, stopped)


_TEXTS = st.text(alphabet="abc", max_size=40)
_STOPS = st.lists(st.text(alphabet="abc", min_size=1, max_size=6), max_size=4)


@given(_STOPS, _TEXTS, st.data())
def test_any_split_of_the_text_gives_what_the_definition_gives(stops: list[str], text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    out, hit = _feed(stops, pieces)
    assert ("".join(out), hit) == _expected(stops, text)


@given(_STOPS, _TEXTS)
def test_what_is_shown_is_never_taken_back_and_holds_back_no_more_than_it_must(stops: list[str], text: str) -> None:
    machine, shown = StopStrings(stops), ""
    final, _ = _expected(stops, text)
    for i, char in enumerate(text):
        shown += machine.feed(char)
        assert final.startswith(shown)
        if machine.stopped:
            break
        held = text[: i + 1][len(shown) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_a_long_stop_string_costs_no_more_for_each_character() -> None:
    stop = "a" * 8000 + "b"
    out, hit = _feed([stop], ["a" * 50] * 400 + ["b", "c"])
    assert hit and "".join(out) == "a" * 12000


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings([""])
