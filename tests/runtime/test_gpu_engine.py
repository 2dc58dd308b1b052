"""The engine on a GPU: graphs, overlap, preemption and prefix reuse against transformers; run with `pytest -m gpu tests/runtime`.

Small random models of head dimensions 64, 128 and 256 in bf16; what the engine generates is judged as in the benchmarks (`checks.py`):
errors of log-probabilities within 1.5 times those of transformers' own bf16. One engine a model does all the work, and the two reference
models are loaded once, since starting takes most of the time.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gantline_runtime.batch import BatchShape
from gantline_runtime.config import EngineConfig
from gantline_runtime.engine import EngineStats, LLMEngine
from gantline_runtime.graph_classes import GraphClasses
from gantline_runtime.graph_sizes import decode_sizes, token_sizes
from gantline_runtime.graphs import StepGraphs
from gantline_runtime.messages import EngineRequest, SamplingParams, TokenOutput

from benchmarks.checks import Sample, check
from tests.runtime.checkpoints import write_checkpoint
from tests.runtime.engine_support import drain, request, tokens_of

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
VOCAB = 32_000
LONGEST = 32_768
BATCHES = (1, 17, 256)
_SIZES = ("num_tokens", "num_sequences", "num_decodes", "max_query_len", "max_context_len", "padded")
MODELS: dict[int, tuple[str, dict[str, Any]]] = {
    64: ("llama", {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 1024}),
    128: ("qwen3", {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 2048}),
    256: ("mistral-no-window-yarn", {"hidden_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256}),
}

Outputs = list[list[TokenOutput]]


# ---- classes: no GPU


def test_decode_classes_waste_at_most_eight_rows_to_256_and_cover_every_size() -> None:
    for largest in (1, 3, 16, 100, 256, 512, 4096):
        sizes = decode_sizes(largest)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == min(largest, 512)
        for n in range(1, min(largest, 256) + 1):
            assert min(s for s in sizes if s >= n) - n < 8


def test_token_classes_waste_a_sixteenth_at_most_in_the_mean_and_never_exceed_a_step() -> None:
    for largest in (64, 500, 8192):
        sizes = token_sizes(largest)
        assert sizes == sorted(set(sizes)) and sizes[-1] <= largest
    sizes = token_sizes(8192)
    wasted = [min(s for s in sizes if s >= n) / n - 1 for n in range(256, 2049)]
    assert sum(wasted) / len(wasted) < 1 / 16


@pytest.mark.parametrize("max_sequences", [1, 7, 256, 1024])
def test_a_padded_batch_holds_the_batch_and_its_class_is_its_own(max_sequences: int) -> None:
    rng = random.Random(max_sequences)
    classes = GraphClasses(max_sequences=max_sequences, max_tokens=8192, session_len=40_000)
    for _ in range(500):
        decodes = rng.randint(0, max_sequences)
        prompts = rng.randint(0 if decodes else 1, min(80, max_sequences))
        chunks = [rng.randint(1, 40) for _ in range(prompts)]
        tokens = decodes + sum(chunks)
        longest = max(chunks, default=1)
        exact = BatchShape(tokens, decodes + prompts, decodes, decodes, 3, longest, rng.randint(longest, 40_000))
        padded = classes.pad(exact)
        if padded == exact:
            assert tokens > 2048 or prompts > 64 or (not prompts and decodes > 512)
            continue
        assert padded.is_decode == exact.is_decode and padded.num_decodes <= padded.num_tokens
        assert all(getattr(padded, name) >= getattr(exact, name) for name in BatchShape._fields)
        assert padded.num_decodes >= exact.num_decodes and padded.num_prompts >= exact.num_prompts
        assert (padded.num_samples, padded.num_updates) == (exact.num_samples, exact.num_updates)
        assert classes.pad(padded) == padded
        assert any(all(getattr(largest, name) >= getattr(padded, name) for name in _SIZES) for largest in classes.largest())
    assert all(classes.pad(largest) == largest for largest in classes.largest())


# ---- against transformers


def make_engine(model: Path, **settings: Any) -> LLMEngine:
    """Without a limit on a step's time, which would make the chunks of two runs differ."""
    defaults: dict[str, Any] = {
        "dtype": "bfloat16",
        "max_batch_size": 256,
        "max_waiting": 4096,
        "num_cache_blocks": 8192,
        "max_step_ms": 0.0,
    }
    return LLMEngine(model, EngineConfig(**{**defaults, **settings}))


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(length)] for length in lengths]


def run(engine: LLMEngine, prompts: list[list[int]], count: int) -> Outputs:
    for i, prompt in enumerate(prompts):
        engine.add_request(request(str(i), prompt, count=count, num_logprobs=0))
    outputs = drain(engine, checked=False)
    engine.check_integrity()
    return [outputs[str(i)] for i in range(len(prompts))]


def samples(prompts: list[list[int]], outputs: Outputs, chosen: list[int]) -> list[Sample]:
    return [Sample(prompts[i], tokens_of(outputs[i]), [o.logprobs[0].chosen for o in outputs[i] if o.logprobs]) for i in chosen]


def prompts_of_batch(batch: int) -> list[list[int]]:
    """Contexts of 1 to 32k among them, at block boundaries too."""
    lengths = [LONGEST - 64] if batch == 1 else [1, 2, 63, 64, 65, 1000, 4096, 16_000, LONGEST - 64]
    return prompts_of(lengths + [random.Random(i).randint(1, 600) for i in range(batch - len(lengths))])


@dataclass
class Work:
    """What one engine did: outputs by graph and eagerly at the same padded batches, and the verdict on each group."""

    by_graph: dict[int, Outputs] = field(default_factory=dict)
    eagerly: dict[int, Outputs] = field(default_factory=dict)
    hits: dict[int, Outputs] = field(default_factory=dict)
    verdicts: dict[str, dict[str, Any]] = field(default_factory=dict)
    stats: EngineStats | None = None
    captured: list[BatchShape] = field(default_factory=list)
    num_preemptions: int = 0


def run_eagerly(self: StepGraphs, shape: BatchShape) -> None:
    self._forward(shape)


def work_of(model: Path) -> Work:
    work, groups = Work(), {}
    engine = make_engine(model)
    for batch in BATCHES:
        prompts = prompts_of_batch(batch)
        chosen = list(range(min(9, batch)))
        for _ in range(2):  # classes are captured when they are met again
            engine.reset_prefix_cache()
            work.by_graph[batch] = run(engine, prompts, 24)
        work.hits[batch] = run(engine, prompts, 24)
        engine.reset_prefix_cache()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StepGraphs, "run", run_eagerly)
            work.eagerly[batch] = run(engine, prompts, 24)
        groups[f"{batch} running"] = samples(prompts, work.by_graph[batch], chosen)
        groups[f"{batch} running, after a hit"] = samples(prompts, work.hits[batch], chosen)
    work.stats = engine.stats()
    work.captured = list(engine._executor._runner._graphs._graphs)  # type: ignore[attr-defined]
    engine.close()
    engine = make_engine(model, num_cache_blocks=1024, session_len=512, max_prefill_token_num=2048)
    prompts = prompts_of([random.Random(i).randint(1, 300) for i in range(256)])
    outputs = run(engine, prompts, 200)
    work.num_preemptions = engine.stats().num_preemptions
    engine.close()
    groups["preempted"] = samples(prompts, outputs, list(range(8)))
    work.verdicts = check(model, groups)
    return work


@pytest.fixture(scope="module", params=MODELS)
def work(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Work]:
    family, sizes = MODELS[request.param]
    sizes = {"vocab_size": VOCAB, "max_position_embeddings": LONGEST + 64, **sizes}
    yield work_of(write_checkpoint(family, tmp_path_factory.mktemp("gpu") / "model", **sizes))


@pytest.mark.gpu
@on_a_gpu
class TestOnTheGpu:
    @pytest.mark.parametrize("batch", BATCHES)
    def test_contexts_of_1_to_32k_agree_with_transformers_through_graphs(self, work: Work, batch: int) -> None:
        verdict = work.verdicts[f"{batch} running"]
        assert verdict["passed"], verdict

    @pytest.mark.parametrize("batch", BATCHES)
    def test_so_they_do_after_a_prefix_hit(self, work: Work, batch: int) -> None:
        assert any(outputs[0].num_cached_tokens for outputs in work.hits[batch])
        verdict = work.verdicts[f"{batch} running, after a hit"]
        assert verdict["passed"], verdict

    def test_preempted_requests_agree_with_transformers(self, work: Work) -> None:
        assert work.num_preemptions > 0
        assert work.verdicts["preempted"]["passed"], work.verdicts["preempted"]

    @pytest.mark.parametrize("batch", BATCHES)
    def test_eager_and_graph_give_identical_tokens_at_the_same_padded_batch(self, work: Work, batch: int) -> None:
        by_graph, eagerly = work.by_graph[batch], work.eagerly[batch]
        assert [tokens_of(o) for o in by_graph] == [tokens_of(o) for o in eagerly]
        assert [[o.logprobs for o in outputs] for outputs in by_graph] == [[o.logprobs for o in outputs] for outputs in eagerly]

    def test_decodes_and_mixed_steps_were_captured_and_no_capture_took_a_tenth_of_a_second(self, work: Work) -> None:
        assert {shape.is_decode for shape in work.captured} == {True, False}
        assert work.stats is not None and 0 < work.stats.longest_capture_s < 0.1


@pytest.mark.gpu
@on_a_gpu
def test_the_heaviest_mixed_load_at_a_share_of_nine_tenths_stays_within_memory_and_the_estimate_is_right(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 128_256}
    sizes["num_hidden_layers"] = 4  # of two, neither holds all that a layer between others does
    folder = write_checkpoint("llama", tmp_path / "model", max_position_embeddings=8192, tie_word_embeddings=True, **sizes)
    engine = make_engine(folder, num_cache_blocks=None, cache_max_entry_count=0.9)
    rng = random.Random(0)
    for i in range(256):
        sampling = {"temperature": 1.0, "top_p": 0.9, "frequency_penalty": 0.1, "num_logprobs": 20} if i % 2 else {}
        prompt = rng.choices(range(128_256), k=rng.randint(1, 4000))
        engine.add_request(request(str(i), prompt, count=rng.randint(1, 60), **sampling))
    assert len(drain(engine, checked=False)) == 256
    memory = engine.stats().memory
    free, total = torch.cuda.mem_get_info()
    print(f"measured: {memory}; free at the end {free} of {total}")
    engine.close()
    assert free > 0.02 * total
    assert memory.estimated_weight_bytes == pytest.approx(memory.weight_bytes, rel=0.03)
    assert memory.estimated_workspace_bytes == pytest.approx(memory.workspace_bytes, rel=0.03)
    assert memory.estimated_cache_bytes_per_token == memory.cache_bytes_per_token


@pytest.mark.gpu
@on_a_gpu
def test_an_engine_that_has_rested_runs_by_the_graphs_of_wider_classes_and_agrees_with_transformers(tmp_path: Path) -> None:
    """With a limit that no step has time to capture in; among the requests some whose prompts' blocks were in the cache meanwhile."""
    family, sizes = MODELS[128]
    folder = write_checkpoint(family, tmp_path / "model", vocab_size=VOCAB, **sizes)
    engine = make_engine(folder, session_len=1024, max_step_ms=0.1)
    prompts = prompts_of([1, 63, 64, 65, *(random.Random(i).randint(1, 900) for i in range(36))])
    run(engine, prompts[:8], 1)
    captures = engine.stats().num_captures
    while engine.prepare():
        pass
    prepared = engine.stats().num_captures
    outputs = run(engine, prompts, 64)
    stats = engine.stats()
    engine.close()
    assert prepared - captures > 50 and stats.num_captures - prepared <= 8, "steps of many prompts, and those where nobody decodes, aside"
    assert stats.longest_capture_s < 0.1
    assert any(output[0].num_cached_tokens for output in outputs)
    verdicts = check(folder, {"rested": samples(prompts, outputs, list(range(12)))})
    assert verdicts["rested"]["passed"], verdicts


@pytest.mark.gpu
@on_a_gpu
def test_prompts_are_read_on_a_gpu_as_on_a_cpu_and_bad_words_keep_away(tmp_path: Path) -> None:
    """Log-probabilities and pooled states in bf16, with overlap and chunks, against the CPU's float32; then words that the device must
    know of, since their first tokens are still on it."""
    family, sizes = MODELS[128]
    folder = write_checkpoint(family, tmp_path / "model", vocab_size=VOCAB, **sizes)
    prompts = prompts_of([1, 2, 17, 300, 900])
    found = []
    for device, dtype in (("cuda", "bfloat16"), ("cpu", "float32")):
        engine = make_engine(folder, device=device, dtype=dtype, session_len=1024, num_cache_blocks=64, max_prefill_token_num=256)
        reading = SamplingParams(max_new_tokens=0)
        for i, prompt in enumerate(prompts):
            engine.add_request(EngineRequest(request_id=f"s{i}", prompt_ids=prompt, sampling=reading, num_prompt_logprobs=2))
            engine.add_request(EngineRequest(request_id=f"m{i}", prompt_ids=prompt, sampling=reading, pooling="mean"))
            engine.add_request(EngineRequest(request_id=f"l{i}", prompt_ids=prompt, sampling=reading, pooling="last"))
        found.append(drain(engine, checked=False))
        free = tokens_of(run(engine, [prompts[2]], 40)[0])
        for start, length in ((5, 1), (11, 2), (23, 3)):
            word = tuple(free[start : start + length])
            end = next(at for at in range(40) if tuple(free[at + 1 - length : at + 1]) == word)
            engine.add_request(request("bound", prompts[2], count=40, bad_words=(word,)))
            bound = tokens_of(drain(engine, checked=False)["bound"])
            assert bound[:end] == free[:end] and bound[end] != free[end]
            assert not [at for at in range(40) if tuple(bound[at : at + length]) == word]
        engine.close()
    for i, prompt in enumerate(prompts):
        on_gpu, on_cpu = ([x for o in outputs[f"s{i}"] if o.prompt_logprobs for x in o.prompt_logprobs.chosen] for outputs in found)
        assert len(on_gpu) == len(on_cpu) == len(prompt) - 1
        assert not on_gpu or float(np.abs(np.subtract(on_gpu, on_cpu)).mean()) < 0.1
        for kind in ("m", "l"):
            a, b = (np.frombuffer(outputs[f"{kind}{i}"][-1].embedding, dtype="<f4") for outputs in found)
            assert float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) > 0.99


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_ranks_over_nccl_agree_with_transformers(tmp_path: Path) -> None:
    family, sizes = MODELS[128]
    folder = write_checkpoint(family, tmp_path / "model", vocab_size=VOCAB, **sizes)
    prompts = prompts_of([random.Random(i).randint(1, 900) for i in range(40)])
    engine = make_engine(folder, tp=2, session_len=1024)
    outputs = run(engine, prompts, 64)
    engine.reset_prefix_cache()
    again = run(engine, prompts, 64)
    captured = list(engine._executor._runner._graphs._graphs)  # type: ignore[attr-defined]
    engine.close()
    assert {shape.is_decode for shape in captured} == {True, False}
    chosen = list(range(8))
    verdicts = check(folder, {"first": samples(prompts, outputs, chosen), "again": samples(prompts, again, chosen)})
    assert all(verdict["passed"] for verdict in verdicts.values()), verdicts
