"""Models without an implementation of ours run by transformers' own over the paged cache, or are refused by name.

Random checkpoints of architectures that we did not write, as transformers itself writes them: multi-head and grouped attention, sliding
windows, capped scores and logits, learned positions, parallel residuals, scaled logits, experts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gantline_runtime import cli
from gantline_runtime.checkpoint import open_checkpoint
from gantline_runtime.checkpoint.shape import parse_shape
from gantline_runtime.config import EngineConfig
from gantline_runtime.engine import LLMEngine
from gantline_runtime.engine_process import build_report
from gantline_runtime.errors import CheckpointError, ConfigurationError
from gantline_runtime.termination import Reason

from tests.runtime.checkpoint_files import write_files
from tests.runtime.engine_support import drain, request, tokens_of
from tests.runtime.reference import NEW_TOKENS, Reference, make_prompts
from tests.runtime.server_fakes import byte_tokenizer
from tests.runtime.server_process import REAL, read_metric, running

VOCAB = 512
_SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": VOCAB, "max_position_embeddings": 320, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
_OLD = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 320, "vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2}
_WINDOW = {"head_dim": 16, "sliding_window": 40}
SERVED: dict[str, dict[str, Any]] = {
    "gpt2": _OLD,
    "opt": {**_SMALL, "word_embed_proj_dim": 64, "ffn_dim": 128},
    "gpt_neox": _SMALL,
    "phi3": {**_SMALL, "sliding_window": 40},
    "gemma2": {**_SMALL, **_WINDOW, "query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    "cohere": {**_SMALL, "logit_scale": 0.5},
    "olmo2": _SMALL,
    "granite": {**_SMALL, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "mixtral": {**_SMALL, "num_local_experts": 4},
    "qwen3_moe": {**_SMALL, "head_dim": 16, "num_experts": 4, "moe_intermediate_size": 64, "num_experts_per_tok": 2},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mamba": ({}, "recurrent layers"),
    "deepseek_v3": ({}, "latent attention"),
    "gpt_oss": ({"num_hidden_layers": 2}, "given s_aux"),
    "bloom": ({}, "no interface"),
    "bart": ({}, "it has an encoder"),
    "bert": ({}, "looks at later tokens"),
    "llama4_text": ({"num_hidden_layers": 2}, "chunks"),
    "gemma4_text": ({"num_hidden_layers": 6}, "differ in heads"),
}


def write_model(model_type: str, folder: Path, settings: dict[str, Any]) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(20261125)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.2 * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return folder


def make_engine(folder: Path, **settings: Any) -> LLMEngine:
    defaults: dict[str, Any] = {"device": "cpu", "dtype": "float32", "block_size": 16, "session_len": 320, "max_batch_size": 16}
    return LLMEngine(folder, EngineConfig(**{**defaults, "num_cache_blocks": 320, **settings}))


@pytest.mark.parametrize("model_type", SERVED)
def test_greedy_tokens_equal_those_of_transformers_in_chunks_with_prefixes_and_preempted(model_type: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    folder = write_model(model_type, tmp_path / "model", SERVED[model_type])
    reference, prompts = Reference(folder, is_ordinary=False), make_prompts(16, 120, VOCAB)
    for settings in ({"max_prefill_token_num": 64}, {"num_cache_blocks": 24, "enable_prefix_caching": False}):
        engine = make_engine(folder, **settings)
        for i, prompt in enumerate(prompts):
            engine.add_request(request(str(i), prompt, count=NEW_TOKENS))
        outputs = drain(engine, checked=False)
        engine.check_integrity()
        assert (engine.stats().num_preemptions > 0) == ("num_cache_blocks" in settings)
        engine.close()
        reference.verify(prompts, [tokens_of(outputs[str(i)]) for i in range(len(prompts))])


@pytest.mark.parametrize(("session_len", "factors"), [(128, "short_factor"), (320, "long_factor")])
def test_the_session_length_alone_decides_between_the_two_rotary_embeddings_of_a_long_context(
    session_len: int, factors: str, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    rotary = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + i / 8 for i in range(8)],
        "long_factor": [4.0 + i for i in range(8)],
    }
    folder = write_model("phi3", tmp_path / "model", {**_SMALL, "rope_parameters": rotary, "original_max_position_embeddings": 128})
    prompts = [prompt for prompt in make_prompts(16, 200, VOCAB) if len(prompt) < session_len]
    engine = make_engine(folder, session_len=session_len, max_prefill_token_num=64)
    for i, prompt in enumerate(prompts):
        engine.add_request(request(str(i), prompt, count=NEW_TOKENS))
    outputs = drain(engine, checked=False)
    engine.close()
    config = json.loads((folder / "config.json").read_text())
    both = dict.fromkeys(("short_factor", "long_factor"), config["rope_parameters"][factors])  # else transformers changes in the middle
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": {**config["rope_parameters"], **both}}))
    Reference(folder, is_ordinary=False).verify(prompts, [tokens_of(outputs[str(i)]) for i in range(len(prompts))])


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_standard_attention_cannot_run_is_refused_by_name(model_type: str, tmp_path: Path) -> None:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    changes, why = REFUSED[model_type]
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    config = {**AutoConfig.for_model(model_type, **changes).to_dict(), "architectures": [architecture]}
    with pytest.raises(CheckpointError, match=why) as caught:
        open_checkpoint(write_files(tmp_path, {"config.json": json.dumps(config).encode(), "model.safetensors": b""}))
    assert caught.value.reason is Reason.UNSUPPORTED_ARCHITECTURE and architecture in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "why"), [("mrope", "transformers knows no rotary embedding of the type 'mrope'"), ("dynamic", "longest of the sequences")]
)
def test_a_rotary_embedding_that_cannot_be_kept_is_refused_by_name(kind: str, why: str, tmp_path: Path) -> None:
    config = {**_SMALL, "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "rope_scaling": {"rope_type": kind, "factor": 2.0}}
    with pytest.raises(CheckpointError, match=why) as caught:
        open_checkpoint(write_files(tmp_path, {"config.json": json.dumps(config).encode(), "model.safetensors": b""}))
    assert caught.value.reason is Reason.UNSUPPORTED_ARCHITECTURE


def test_layers_that_keep_a_state_beside_the_cache_are_found_out_when_the_model_is_loaded(tmp_path: Path) -> None:
    folder = write_model("lfm2", tmp_path / "model", {**_SMALL, "layer_types": ["conv", "full_attention"]})
    with pytest.raises(CheckpointError, match="Lfm2ForCausalLM gives other answers over a paged cache than alone") as caught:
        make_engine(folder)
    assert caught.value.reason is Reason.UNSUPPORTED_ARCHITECTURE


def test_code_that_comes_with_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    config = {"architectures": ["FooForCausalLM"], "model_type": "foo", "auto_map": {"AutoModelForCausalLM": "foo.FooForCausalLM"}}
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": b"", "foo.py": b"open('ran', 'w')"}
    with pytest.raises(CheckpointError, match="never run"):
        open_checkpoint(write_files(tmp_path, files))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 7}, "cannot be traced|cannot read"),
        ({"n_layer": 10**9}, "num_hidden_layers"),
        ({"n_layer": "two"}, "num_hidden_layers"),
        ({"vocab_size": -1}, "cannot be|config.json"),
        ({"model_type": "llama"}, "is transformers' LlamaForCausalLM"),
        ({"model_type": ["gpt2"]}, "expected a text"),
        ({"activation_function": "foo"}, "transformers knows no 'foo', which config.json names"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized checkpoints"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_an_error_with_a_cure(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **_OLD, **changes}
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(write_files(tmp_path, {"config.json": json.dumps(config).encode(), "model.safetensors": b""}))
    assert caught.value.cure


def test_a_tensor_that_is_missing_or_of_another_shape_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_model("gpt2", tmp_path / "model", _OLD)
    tensors = load_file(folder / "model.safetensors")
    for change, what in ((None, "is missing"), (torch.zeros(3), "has another shape")):
        broken = {name: tensor for name, tensor in tensors.items() if not name.endswith("h.1.mlp.c_fc.bias")}
        if change is not None:
            broken["transformer.h.1.mlp.c_fc.bias"] = change
        save_file(broken, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"h.1.mlp.c_fc.bias.*{what}"):
            make_engine(folder)


def test_inspect_says_that_transformers_runs_it_and_two_ranks_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_model("gemma2", tmp_path / "model", SERVED["gemma2"])
    assert cli.main(["inspect", str(folder)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["family"], facts["architecture"], facts["numKvHeads"], facts["headDim"]) == ("transformers", "Gemma2ForCausalLM", 2, 16)
    reason = "Gantline has no implementation of Gemma2ForCausalLM"
    assert facts["fallbackReason"] == reason
    with pytest.raises(ConfigurationError, match="transformers' own implementation runs Gemma2ForCausalLM, on one device"):
        make_engine(folder, tp=2)
    with caplog.at_level("WARNING"):
        engine = make_engine(folder)
    assert [record.fields["reason"] for record in caplog.records if hasattr(record, "fields")] == [reason]
    assert build_report(engine.stats()).about == {"architecture": "Gemma2ForCausalLM", "implementation": "transformers", "reason": reason}
    engine.close()


def test_such_a_model_is_served_over_http(tmp_path: Path) -> None:
    """By an engine that imports torch in part, and transformers needs the whole."""
    folder = write_model("olmo2", tmp_path / "model", SERVED["olmo2"])
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    with running(folder, "--device=cpu", "--num-cache-blocks=64", "--drain-delay=0", program=REAL) as server:
        body = {"prompt": "Hello", "max_tokens": 4, "ignore_eos": True, "temperature": 0}
        assert server.post("/v1/completions", body).json()["usage"]["completion_tokens"] == 4
        assert read_metric(server.get("/metrics").text, "gantline_model_info", implementation="transformers") == 1


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"hidden_act": "gelu"}, "has the activation silu, not 'gelu'"),
        ({}, ""),
    ],
)
def test_a_model_of_a_family_of_ours_tells_what_ours_lacks(changes: dict[str, Any], why: str) -> None:
    from transformers import AutoConfig

    config = {**AutoConfig.for_model("llama", **_SMALL).to_dict(), "architectures": ["LlamaForCausalLM"]}
    shape = parse_shape({**config, "rope_parameters": None, **changes})
    assert (shape.family == "transformers") == bool(why) and why in shape.fallback_reason
    assert not why or "LlamaForCausalLM" in shape.fallback_reason
