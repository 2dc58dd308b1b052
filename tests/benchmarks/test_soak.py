"""The soak that runs for minutes on a GPU, for a second on a model that costs nothing."""

from __future__ import annotations

import pytest

from benchmarks.soak import soak
from tests.runtime.engine_support import VOCAB, fake_engine


@pytest.mark.parametrize("padded", [False, True])
def test_a_soak_ends_with_every_request_accounted_for_and_every_block_free(padded: bool) -> None:
    engine, _ = fake_engine(padded=padded, session_len=512, num_cache_blocks=64, max_batch_size=12, max_prefill_token_num=128)
    ledger = soak(engine, seconds=1.0, vocab=VOCAB)
    assert ledger.finished and ledger.aborted
    assert engine.stats().num_preemptions > 0
    assert ledger.added == ledger.finished + ledger.aborted
