"""With `batch_invariant`, tokens and their log-probabilities do not depend on anything but the request, to the last bit."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from gantline_kernels import api, invariant_backend
from gantline_runtime.config import EngineConfig
from gantline_runtime.engine import LLMEngine
from gantline_runtime.errors import ConfigurationError

from tests.runtime.checkpoints import VOCAB, write_checkpoint
from tests.runtime.invariance import ask_all
from tests.runtime.server_process import REAL, ROOT, running

DTYPES = {"qwen3": "float32", "mistral-window": "bfloat16", "llama-biases-linear-rope": "float32"}


@pytest.fixture(scope="module", params=DTYPES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(request.param, tmp_path_factory.mktemp("invariant") / request.param, intermediate_size=176)


def _prompts() -> list[list[int]]:
    rng = random.Random(11)
    shared = [rng.randrange(VOCAB) for _ in range(300)]
    lengths = (1, 2, 17, 40, 100, 257, 300)
    return [(shared[: length // 2] if i % 2 else []) + [rng.randrange(VOCAB) for _ in range(length)] for i, length in enumerate(lengths)]


def _run(model: Path, prompts: list[list[int]], *, together: bool, count: int = 10, **settings: Any) -> tuple[list[Any], LLMEngine]:
    """Of each prompt and its tokens all that is known."""
    defaults: dict[str, Any] = {"num_cache_blocks": 400, "session_len": 640, "max_batch_size": 16, "block_size": 16, "device": "cpu"}
    engine = LLMEngine(model, EngineConfig(**{**defaults, "batch_invariant": True, **settings}))
    results = ask_all(engine, prompts, count, together=together)
    engine.close()
    return results, engine


def test_answers_are_the_same_alone_together_in_chunks_and_from_the_cache(model: Path) -> None:
    prompts, dtype = _prompts(), DTYPES[model.name]
    alone, _ = _run(model, prompts, together=False, dtype=dtype, enable_prefix_caching=False)
    for settings in ({"enable_prefix_caching": False}, {"max_prefill_token_num": 37, "max_batch_size": 5}):
        together, engine = _run(model, prompts, together=True, dtype=dtype, **settings)
        assert together == alone, settings
    assert engine.stats().num_cached_tokens > 0


@pytest.mark.parametrize("model", ["qwen3"], indirect=True)
def test_answers_are_the_same_after_preemption(model: Path) -> None:
    prompts = [prompt[:40] for prompt in _prompts()]
    small: dict[str, Any] = {"session_len": 128, "count": 70, "enable_prefix_caching": False}
    alone, _ = _run(model, prompts, together=False, **small)
    together, engine = _run(model, prompts, together=True, **small, num_cache_blocks=12, max_prefill_token_num=48)
    assert engine.stats().num_preemptions > 0
    assert together == alone


@pytest.mark.parametrize("model", ["qwen3"], indirect=True)
def test_what_cannot_be_kept_is_refused_by_name(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(**settings: Any) -> None:
        LLMEngine(model, EngineConfig(device="cpu", batch_invariant=True, num_cache_blocks=64, session_len=64, **settings)).close()

    for settings, named in (({"tp": 2}, "ranks"), ({"backend": "triton"}, "triton backend cannot run on a CPU")):
        with pytest.raises(ConfigurationError, match=named):
            build(**settings)
    monkeypatch.setattr(invariant_backend, "find_variance", lambda *_: "the product with some matrix")
    with pytest.raises(ConfigurationError, match="some matrix depends on a row's place"):
        build()


def test_a_product_that_depends_on_a_rows_place_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    products = api.Products(((48, 80),), 4, 2, 16, torch.float32, torch.device("cpu"))
    assert api.find_variance(products, backend=api.INVARIANT) == ""
    places = torch.arange(invariant_backend.ROWS).unsqueeze(1)
    monkeypatch.setattr(invariant_backend.F, "linear", lambda x, weight: x @ weight.t() + 1e-7 * places)
    assert "48 inputs and 80 outputs" in api.find_variance(products, backend=api.INVARIANT)


def test_the_backend_is_that_of_the_device() -> None:
    assert api.select_invariant("torch", "cpu") == api.INVARIANT
    assert api.select_invariant("cuda", "cuda") == api.select_invariant("triton", "cuda") == api.INVARIANT_TRITON
    for backend, device in (("torch", "cuda"), ("cuda", "cpu"), ("triton", "cpu")):
        with pytest.raises(ValueError, match=backend):
            api.select_invariant(backend, device)


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
def test_attention_is_that_of_the_torch_backend(heads: int, kv_heads: int, window: int, softcap: float) -> None:
    torch.manual_seed(1)
    lengths, queries, dim, size = [1, 300, 513, 40], [1, 1, 200, 40], 32, 16
    blocks = [-(-length // size) for length in lengths]
    tables = torch.zeros(4, max(blocks), dtype=torch.int32)
    order = torch.randperm(sum(blocks)).int()
    for i, count in enumerate(blocks):
        tables[i, :count] = order[sum(blocks[:i]) : sum(blocks[:i]) + count]
    keys, values = torch.randn(2, sum(blocks), kv_heads, size, dim)
    q = torch.randn(sum(queries), heads, dim)
    starts = torch.tensor([0, 1, 2, 202, 242], dtype=torch.int32)
    arguments = (q, keys, values, tables, starts, torch.tensor(lengths, dtype=torch.int32), dim**-0.5)
    options: dict[str, Any] = {"max_query_len": 200, "max_context_len": 513, "num_decodes": 2}
    options |= {"sliding_window": window, "logit_softcap": softcap}
    got = api.paged_attention(*arguments, **options, backend=api.INVARIANT)
    expected = api.paged_attention(*arguments, **options, backend="torch")
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_a_server_gives_one_client_the_same_numbers_alone_and_in_a_crowd() -> None:
    folder = ROOT / "examples" / "tiny-model"
    if not (folder / "model.safetensors").exists():
        pytest.skip("the shipped model is not here")
    flags = ("--device=cpu", "--num-cache-blocks=64", "--drain-delay=0", "--batch-invariant", "--max-prefill-token-num=50")
    body = {"prompt": "A list is a " * 9, "max_tokens": 12, "logprobs": 3, "temperature": 0.8, "seed": 5}
    with running(folder, *flags, program=REAL) as server, ThreadPoolExecutor(6) as pool:

        def ask(number: int) -> Any:
            others = {"prompt": f"{number} words of another length. " * number, "ignore_eos": True}
            return server.post("/v1/completions", body if number == 3 else {**body, **others}).json()["choices"][0]

        alone = ask(3)
        crowd = list(pool.map(ask, range(1, 7)))
    assert crowd[2] == alone
