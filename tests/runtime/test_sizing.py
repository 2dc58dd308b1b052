"""The memory formula against hand-made arithmetic, and what may be split into how many parts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from gantline_kernels import prefill_split
from gantline_runtime import sizing
from gantline_runtime.config import EngineConfig
from gantline_runtime.errors import CheckpointError
from gantline_runtime.model_facts import ModelFacts, Quantization
from gantline_runtime.sizing import GIB
from hypothesis import given
from hypothesis import strategies as st


def make_facts(**changes: object) -> ModelFacts:
    """Llama 3 8B, with changes."""
    base = ModelFacts(
        architecture="LlamaForCausalLM", family="llama", supported=True, num_layers=32, hidden_size=4096, intermediate_size=14336,
        num_heads=32, num_kv_heads=8, head_dim=128, vocab_size=128256, max_position_embeddings=131072, sliding_window=None,
        tie_word_embeddings=False, dtype="bfloat16", weight_bytes=16_060_522_496, quantization=None, name="llama-8b", revision="main",
        fingerprint="sha256:0",
    )  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


QWEN_32B = make_facts(family="qwen2", num_layers=64, hidden_size=5120, intermediate_size=27648, num_heads=40, weight_bytes=65_527_752_704)
LLAMA_70B = make_facts(num_layers=80, hidden_size=8192, intermediate_size=28672, num_heads=64, weight_bytes=141_107_412_992)
QWEN_72B = make_facts(family="qwen2", num_layers=80, hidden_size=8192, intermediate_size=29568, num_heads=64, weight_bytes=145_412_407_296)
AWQ = Quantization(method="awq", bits=4, group_size=128, version="gemm")


def smallest(facts: ModelFacts, gpu_gib: float) -> int | None:
    """The smallest legal split that holds eight sessions of 8192 tokens."""
    for tp in sizing.TENSOR_PARALLEL:
        if sizing.legal_tensor_parallel(facts, tp) is None and _estimate(facts, tp, gpu_gib).fits:
            return tp
    return None


def _estimate(facts: ModelFacts, tp: int, gpu_gib: float) -> sizing.MemoryEstimate:
    memory = int(gpu_gib * GIB)
    workspace = sizing.workspace_bytes(facts, tp=tp, dtype_bytes=2, max_batch_size=256, device="cuda")
    return sizing.estimate(
        facts, tp=tp, session_len=8192, concurrency=8, dtype_bytes=2, kv_bytes=2, gpu_memory_bytes=memory, workspace_bytes=workspace
    )


@pytest.mark.parametrize(
    ("facts", "gpu_gib", "expected"),
    [
        (make_facts(), 22.5, 2), (make_facts(), 79.6, 1), (make_facts(), 140.0, 1),
        (QWEN_32B, 22.5, 8), (QWEN_32B, 79.6, 2), (QWEN_32B, 140.0, 1),
        (LLAMA_70B, 22.5, None), (LLAMA_70B, 79.6, 4), (LLAMA_70B, 140.0, 2),
        (sizing.awq_facts(LLAMA_70B), 22.5, 4), (sizing.awq_facts(LLAMA_70B), 79.6, 1), (sizing.awq_facts(LLAMA_70B), 140.0, 1),
    ],
)  # fmt: skip
def test_the_smallest_split_is_the_one_worked_out_by_hand(facts: ModelFacts, gpu_gib: float, expected: int | None) -> None:
    assert smallest(facts, gpu_gib) == expected


def test_the_terms_of_the_estimate_are_those_of_the_formula() -> None:
    got = _estimate(make_facts(), 2, 24.0)
    assert got.cache_bytes_per_token == 2 * 32 * 4 * 128 * 2
    assert got.cache == 8192 * 8 * got.cache_bytes_per_token
    assert got.weights == pytest.approx((16_060_522_496 + 65 * 4096 * 2) / 2 * 1.01), "the norms are on both"
    assert got.total == got.weights + got.workspace + got.cache
    assert got.usable == int(24 * GIB * 0.9)
    assert got.capacity_tokens == (got.usable - got.weights - got.workspace) // got.cache_bytes_per_token


def test_a_single_kv_head_is_replicated_and_not_divided() -> None:
    norms, keys_and_values = 65 * 4096 * 2, 32 * 2 * 4096 * 128 * 2
    mqa = make_facts(num_kv_heads=1, weight_bytes=16_060_522_496 - 7 * keys_and_values)
    assert [sizing.cache_bytes_per_token(mqa, tp, 2) for tp in (1, 2, 4, 8)] == [2 * 32 * 128 * 2] * 4
    assert all(sizing.legal_tensor_parallel(mqa, tp) is None for tp in (1, 2, 4, 8))
    assert sizing.weight_bytes(mqa, 8, 2) == (mqa.weight_bytes + 7 * norms + 7 * keys_and_values) / 8


@pytest.mark.parametrize(
    ("facts", "tp", "clause"),
    [
        (make_facts(num_heads=14, num_kv_heads=2), 4, "14 attention heads cannot be divided by 4"),
        (make_facts(num_heads=25, num_kv_heads=5), 2, "25 attention heads"),
        (make_facts(num_heads=24, num_kv_heads=3), 2, "3 key/value heads can be neither divided nor replicated over 2"),
        (make_facts(intermediate_size=14338), 4, "intermediate size 14338 cannot be divided by 4"),
        (replace(QWEN_72B, quantization=AWQ), 2, "29568 over 2 is 14784, not a multiple of the quantization group 128"),
        (make_facts(num_heads=14, num_kv_heads=2, head_dim=64, quantization=AWQ), 2, "attention output 896 over 2 is 448"),
    ],
)
def test_an_illegal_split_says_why(facts: ModelFacts, tp: int, clause: str) -> None:
    assert clause in (sizing.legal_tensor_parallel(facts, tp) or "")


def test_the_same_sizes_without_groups_can_be_split() -> None:
    assert sizing.legal_tensor_parallel(QWEN_72B, 2) is None
    assert sizing.legal_tensor_parallel(replace(QWEN_72B, quantization=AWQ), 1) is None
    assert sizing.legal_tensor_parallel(replace(QWEN_72B, quantization=replace(AWQ, group_size=32)), 2) is None


def test_the_predicted_bytes_after_awq_are_those_worked_out_by_hand() -> None:
    """Linear weights at 4 bits, a zero point of 4 and a scale of 16 bits for each group of 128; embedding, head and norms at 16 bits."""
    linear, rest = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336), 2 * 128256 * 4096 + 65 * 4096
    assert sizing.awq_weight_bytes(make_facts()) == linear * (4 + 20 / 128) / 8 + rest * 2
    assert sizing.awq_weight_bytes(LLAMA_70B) == pytest.approx(39.77e9, rel=0.001)


def test_parameters_of_the_linear_layers_and_the_embeddings_make_the_whole() -> None:
    embeddings = 2 * 128256 * 4096
    norms = (2 * 32 + 1) * 4096
    assert (sizing.linear_parameters(make_facts()) + embeddings + norms) * 2 == 16_060_522_496


def test_loading_in_another_width_changes_only_what_is_not_packed() -> None:
    facts = make_facts()
    assert sizing.loaded_weight_bytes(facts, 4) == 2 * facts.weight_bytes
    awq = sizing.awq_facts(facts)
    rest = 2 * (facts.weight_bytes // 2 - sizing.linear_parameters(facts))
    assert sizing.loaded_weight_bytes(awq, 2) == awq.weight_bytes
    assert sizing.loaded_weight_bytes(awq, 4) - awq.weight_bytes == pytest.approx(rest, abs=8)


@pytest.mark.parametrize(
    ("facts", "clause"),
    [
        (make_facts(hidden_size=4100), "hidden size 4100"),
        (make_facts(intermediate_size=14337), "intermediate size 14337"),
        (make_facts(quantization=AWQ), "quantized already"),
        (make_facts(family="transformers", architecture="XForCausalLM"), "XForCausalLM has no layer table"),
    ],
)
def test_a_model_that_awq_cannot_group_says_why(facts: ModelFacts, clause: str) -> None:
    assert clause in (sizing.illegal_quantization(facts, 128) or "")


def test_a_long_session_asks_for_one_of_it_and_eight_typical_ones() -> None:
    assert sizing.required_cache_tokens(2048, 256) == 8 * 2048
    assert sizing.required_cache_tokens(8192, 256) == 8 * 8192
    assert sizing.required_cache_tokens(131072, 256) == 131072
    assert sizing.required_cache_tokens(131072, 1) == 131072
    assert sizing.required_cache_tokens(4096, 2) == 2 * 4096


def test_session_length_and_concurrency_follow_from_the_tokens_that_fit() -> None:
    assert sizing.max_session_len(make_facts(), 10_000) == 10_000
    assert sizing.max_session_len(make_facts(), 1 << 30) == 131072
    assert sizing.max_concurrency(100_000, 8192) == 12


def test_the_workspace_grows_with_the_model_and_shrinks_with_the_split() -> None:
    def of(facts: ModelFacts, tp: int = 1, device: str = "cuda") -> int:
        return sizing.workspace_bytes(facts, tp=tp, dtype_bytes=2, max_batch_size=256, device=device)

    small = make_facts(hidden_size=256, intermediate_size=768, num_heads=4, num_kv_heads=2, head_dim=64, vocab_size=4096)
    assert of(small) > sizing.context_bytes(1, "cuda")
    assert sizing.CPU_WORKSPACE_BYTES < of(small, device="cpu") < 1.2 * GIB
    assert of(small) < of(make_facts()) < of(LLAMA_70B) < 5 * GIB
    assert of(LLAMA_70B, 8) < of(LLAMA_70B, 2) < of(LLAMA_70B)
    awq = sizing.awq_facts(make_facts())
    assert of(awq, device="cpu") - of(make_facts(), device="cpu") == 2 * (2 * 4096 * 14336) * 2, "gate and up, unpacked, twice"


def test_what_the_engine_reserves_is_worked_out_from_shapes() -> None:
    """Llama 3 8B: steps of 8192 tokens hold the last output, residual, input, gate, up and product at once; graphs of 2048 tokens hold
    less of that than partial results of attention over 131072 tokens in 64 parts."""
    step, logits = 8192 * (3 * 4096 + 3 * 14336) * 2, 256 * 128256 * 4
    attention = 2048 * (3 * 4096 + 3 * 4096 + 2 * 1024) * 2 + (256 * 64 + 512) * 32 * 129 * 4
    tables = 131072 * 128 * 4 + 256 * 2048 * 5 * 4
    requests = 256 * (128256 * 3 + 12 * 6144)
    expected = step + 3 * logits + requests + int(1.2 * attention) + 256 * 32 * (40 << 10) + tables + (64 << 20) + (10 << 20)
    assert sizing.reserved_bytes(make_facts(), tp=1, dtype_bytes=2, max_batch_size=256, device="cuda") == expected


def test_chunks_of_prompts_that_see_much_take_room_for_their_parts() -> None:
    """Contexts of 2048 are not split for decoding, but for chunks of prompts: 512 parts of 128 rows, once more in the graphs."""

    def reserved(session_len: int) -> int:
        facts = make_facts(num_heads=8, intermediate_size=1024)
        return sizing.reserved_bytes(facts, tp=1, dtype_bytes=2, max_batch_size=1, device="cuda", session_len=session_len)

    parts, positions = 512 * 128 * 129 * 4, 1024 * 128 * 4 + 16 * 5 * 4
    growth = reserved(2048) - reserved(1024) - positions
    assert parts + int(1.2 * parts) - 1 <= growth <= parts + int(1.2 * parts) + 1


def test_parts_of_chunks_are_the_kernels() -> None:
    assert prefill_split.SLOTS == sizing._CHUNK_PARTS
    assert prefill_split.num_slots(4, 8, sizing._LEAST_CUT, 132) == 0
    assert prefill_split.num_slots(4, 8, sizing._LEAST_CUT + 1, 132) == sizing._CHUNK_PARTS


def test_the_largest_step_is_the_engines() -> None:
    assert EngineConfig().max_prefill_token_num == sizing.STEP_TOKENS


def test_more_weights_take_longer_to_load_and_more_ranks_never_less() -> None:
    small, large = sizing.load_seconds(make_facts(), tp=1, device="cuda"), sizing.load_seconds(LLAMA_70B, tp=1, device="cuda")
    assert 60 < small < large
    assert sizing.load_seconds(LLAMA_70B, tp=4, device="cuda") >= large


def test_facts_survive_the_termination_message_and_stay_small() -> None:
    facts = make_facts(quantization=AWQ, sliding_window=4096, name="n" * 200, revision="f" * 40, fingerprint="sha256:" + "0" * 64)
    text = json.dumps(facts.to_json())
    assert len(text) < 1500
    assert ModelFacts.from_json(json.loads(text)) == facts


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"numLayers": 0}, "numLayers"), ({"numLayers": "32"}, "numLayers"), ({"numHeads": True}, "numHeads"),
        ({"dtype": "int8"}, "dtype"), ({"family": "gpt"}, "family"), ({"extra": 1}, "extra"), ({"name": "a\nb"}, "name"),
        ({"quantization": {"method": "gptq", "bits": 4, "groupSize": 128, "version": "gemm"}}, "quantization.method"),
        ({"quantization": []}, "quantization"), ({"headDim": 1 << 60}, "headDim"), ({"numKvHeads": 5}, "numKvHeads"),
        ({"weightBytes": 1 << 61}, "weightBytes"), ({"supported": 1}, "supported"), ({"hiddenSize": None}, "hiddenSize"),
    ],
)  # fmt: skip
def test_facts_that_lie_are_refused_by_field(change: dict[str, object], field: str) -> None:
    with pytest.raises(CheckpointError, match=field.replace(".", r"\.")):
        ModelFacts.from_json({**make_facts().to_json(), **change})


SCALARS = st.none() | st.booleans() | st.floats() | st.integers() | st.text()
JSON = st.recursive(SCALARS, lambda v: st.lists(v) | st.dictionaries(st.text(), v))


@given(JSON, st.sampled_from(sorted(make_facts(sliding_window=1, quantization=AWQ).to_json())))
def test_any_json_is_facts_or_a_checkpoint_error(value: object, key: str) -> None:
    for candidate in (value, {**make_facts().to_json(), key: value}):
        try:
            facts = ModelFacts.from_json(candidate)
        except CheckpointError as error:
            assert error.cure
        else:
            assert sizing.cache_bytes_per_token(facts, 1, 2) > 0


@pytest.mark.parametrize("kv_heads", [1, 2, 8, 32])
def test_parts_of_few_contexts_have_their_memory(kv_heads: int) -> None:
    """What `hopper_decode` cuts is within what is counted for any kernel's parts."""
    from gantline_kernels.hopper_decode import plan_hopper_decode

    facts = make_facts(num_kv_heads=kv_heads)
    for batch in range(1, 132 // kv_heads + 1):
        for context in (2048, 8192, 32768, 131072):
            plan = plan_hopper_decode(batch, kv_heads, facts.head_dim, context, 132)
            taken = batch * facts.num_heads * plan.parts * (facts.head_dim + 2) * 4 if plan.parts > 1 else 0
            assert taken <= sizing._attention_part_bytes(facts, 1, batch, context), (batch, context)
