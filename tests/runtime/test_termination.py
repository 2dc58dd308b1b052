"""A container's last word survives the round trip, is bounded, and is read with suspicion."""

from __future__ import annotations

from pathlib import Path

import pytest
from gantline_runtime import termination
from gantline_runtime.termination import Reason, TerminationMessage
from hypothesis import given
from hypothesis import strategies as st


@given(st.text(max_size=9000), st.sampled_from(list(Reason)))
def test_any_message_fits_and_keeps_its_reason(text: str, reason: Reason) -> None:
    encoded = termination.encode(TerminationMessage(reason, text, cure="Do it."))
    assert len(encoded.encode()) <= termination.MAX_BYTES
    parsed = termination.parse(encoded)
    assert parsed is not None and parsed.reason is reason and parsed.cure == "Do it."


@given(st.text(max_size=5000))
def test_any_text_of_another_program_is_not_taken_for_ours(text: str) -> None:
    assert termination.parse(text) is None


@pytest.mark.parametrize("text", ["[]", "null", '{"reason": 3}', '{"reason": "Nope"}', '{"reason": ["Completed"]}', "{" * 3000])
def test_malformed_json_is_none(text: str) -> None:
    assert termination.parse(text) is None


def test_an_answer_is_never_cut() -> None:
    with pytest.raises(ValueError, match="exceeds"):
        termination.encode(TerminationMessage(Reason.COMPLETED, facts={"x": "y" * 5000}))


def test_it_is_written_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GANTLINE_TERMINATION_LOG", str(tmp_path / "log"))
    termination.write(TerminationMessage(Reason.DISK_FULL, "no room"))
    assert termination.parse((tmp_path / "log").read_text()) == TerminationMessage(Reason.DISK_FULL, "no room")


def test_every_failure_ends_the_process_with_a_failure() -> None:
    good = {Reason.COMPLETED, Reason.DRAINED}
    assert all((termination.exit_code(r) == 0) == (r in good) for r in Reason)
