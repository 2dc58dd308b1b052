"""Tokens become text at once, but never half a character, and in the end exactly the text that the tokenizer's own decoder gives."""

from __future__ import annotations

import tokenizers
from gantline_runtime.detokenizer import Detokenizer
from gantline_runtime.tokenizer import Tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from tests.runtime.server_fakes import byte_tokenizer

BYTES = Tokenizer(byte_tokenizer())


def _sentencepiece() -> Tokenizer:
    """Like Llama 2's: words with a marked space, unknown characters as bytes, the first space dropped when decoding."""
    words = ["▁Hello", "▁world", "▁", "a", "b", "c", "!", "▁a"]
    vocab = [("<unk>", 0.0), *((f"<0x{i:02X}>", -10.0) for i in range(256)), *((word, -1.0 - i) for i, word in enumerate(words))]
    backend = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    return Tokenizer(backend)


PIECES = _sentencepiece()


def _stream(tokenizer: Tokenizer, ids: list[int], **options: object) -> list[str]:
    detokenizer = Detokenizer(tokenizer, **options)  # type: ignore[arg-type]
    return [*(detokenizer.feed(token) for token in ids), detokenizer.finish()]


def test_a_character_of_several_tokens_appears_whole() -> None:
    ids = BYTES.encode("aé😀b", add_special_tokens=False)
    assert _stream(BYTES, ids) == ["a", "", "é", "", "", "", "😀", "b", ""]


def test_an_unfinished_character_at_the_end_is_replaced() -> None:
    ids = BYTES.encode("a😀", add_special_tokens=False)[:-1]
    assert "".join(_stream(BYTES, ids)) == "a\ufffd"


def test_bytes_that_are_no_text_are_let_go_after_three_tokens() -> None:
    ids = BYTES.encode("é", add_special_tokens=False)[1:] * 10
    out = _stream(BYTES, ids)
    assert "".join(out) == "\ufffd" * 10
    assert all(out[3:-1]), "text was held back although no character can be that long"


def test_the_space_between_the_prompt_and_the_answer_is_kept() -> None:
    prompt, answer = PIECES.encode("Hello"), PIECES.encode("world")
    assert "".join(_stream(PIECES, answer, prompt_ids=prompt)) == " world"
    assert "".join(_stream(PIECES, answer)) == "world"


def test_special_tokens_give_no_text_when_they_are_skipped() -> None:
    ids = [256, *BYTES.encode("hi", add_special_tokens=False), 257]
    assert "".join(_stream(BYTES, ids, skip=BYTES.special_ids)) == "hi"
    assert "".join(_stream(BYTES, ids)) == "<|begin|>hi<|end|>"


def test_a_long_run_of_silent_tokens_keeps_the_window_small() -> None:
    detokenizer = Detokenizer(BYTES)
    for _ in range(200):
        assert detokenizer.feed(10_000) == ""  # outside of the vocabulary: decodes to nothing
    assert len(detokenizer._window) <= 17


@given(st.text(max_size=60))
def test_any_text_comes_out_of_a_byte_tokenizer_as_it_went_in(text: str) -> None:
    ids = BYTES.encode(text, add_special_tokens=False)
    out = _stream(BYTES, ids)
    assert "".join(out) == text
    assert all("\ufffd" not in piece for piece in out if "\ufffd" not in text)


@given(st.lists(st.integers(0, 255), max_size=60))
def test_any_bytes_give_as_much_text_as_they_hold(ids: list[int]) -> None:
    out = "".join(_stream(BYTES, ids))
    whole = BYTES.decode(ids)
    assert out.replace("\ufffd", "") == whole.replace("\ufffd", "")


@given(st.text(alphabet="Helo wrdabc!é你😀", max_size=40))
def test_any_text_comes_out_of_a_sentencepiece_tokenizer_as_its_decoder_gives_it(text: str) -> None:
    ids = PIECES.encode(text)
    assert "".join(_stream(PIECES, ids)) == PIECES.decode(ids)
