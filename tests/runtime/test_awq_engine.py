"""AWQ checkpoints run in the engine as their dequantized weights would: on one rank and two, all layers quantized or only some.

Random 4-bit weights, zero points and scales in the public `gemm` layout; the reference is the same model with the weights dequantized by
the kernels' reference, run by transformers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gantline_kernels import reference as kernels
from gantline_runtime.config import EngineConfig
from gantline_runtime.engine import LLMEngine
from gantline_runtime.errors import ConfigurationError
from safetensors.torch import load_file, save_file

from tests.runtime.checkpoints import VOCAB, write_checkpoint
from tests.runtime.engine_support import drain, request, tokens_of
from tests.runtime.reference import NEW_TOKENS, Reference, make_prompts

GROUP = 32
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def quantize_randomly(plain: Path, folder: Path, *, skipped: tuple[str, ...]) -> Path:
    """Replace linear layers of `plain` by random AWQ weights in `folder`, and by their dequantized values in `plain` itself."""
    shutil.copytree(plain, folder)
    random = torch.Generator().manual_seed(4)
    dense, packed = load_file(plain / "model.safetensors"), {}
    for name, weight in dense.items():
        module = name.removesuffix(".weight")
        if not module.endswith(LINEARS) or any(part in module for part in skipped):
            packed[name] = weight
            continue
        outputs, inputs = weight.shape
        qweight = torch.randint(-(2**31), 2**31 - 1, (inputs, outputs // 8), dtype=torch.int32, generator=random)
        qzeros = torch.full((inputs // GROUP, outputs // 8), -2004318072, dtype=torch.int32)  # 8 in every nibble
        qzeros += torch.randint(0, 2, qzeros.shape, dtype=torch.int32, generator=random)
        scales = ((torch.rand(inputs // GROUP, outputs, generator=random) + 0.5) * 0.25 * inputs**-0.5).half()
        packed |= {f"{module}.qweight": qweight, f"{module}.qzeros": qzeros, f"{module}.scales": scales}
        dense[name] = kernels.awq_dequantize(qweight, qzeros, scales.float(), GROUP).t().contiguous()
    save_file(dense, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    config["quantization_config"]["modules_to_not_convert"] = [*skipped, "lm_head"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=[("llama", ()), ("qwen2-tied", ("k_proj", "layers.0.mlp"))], ids=["all", "some"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    torch.set_num_threads(1)
    family, skipped = request.param
    folder = tmp_path_factory.mktemp("awq")
    plain = write_checkpoint(family, folder / "plain", intermediate_size=192)
    quantized = quantize_randomly(plain, folder / "awq", skipped=skipped)
    return quantized, Reference(plain)


def config(**settings: Any) -> EngineConfig:
    defaults: dict[str, Any] = {"dtype": "float32", "block_size": 16, "num_cache_blocks": 512, "session_len": 512, "max_batch_size": 32}
    return EngineConfig(**{**defaults, **settings})


@pytest.mark.parametrize("tp", [1, 2])
def test_quantized_and_dequantized_weights_give_the_same_tokens(models: tuple[Path, Reference], tp: int) -> None:
    folder, reference = models
    prompts = make_prompts(24, 300, VOCAB)
    engine = LLMEngine(folder, config(tp=tp))
    for i, prompt in enumerate(prompts):
        engine.add_request(request(str(i), prompt, count=NEW_TOKENS))
    outputs = drain(engine, checked=False)
    engine.close()
    reference.verify(prompts, [tokens_of(outputs[str(i)]) for i in range(len(prompts))])


def test_groups_that_ranks_would_cut_are_refused(models: tuple[Path, Reference]) -> None:
    folder, _ = models
    with pytest.raises(ConfigurationError, match="multiple of the quantization group"):
        LLMEngine(folder, config(tp=4))
