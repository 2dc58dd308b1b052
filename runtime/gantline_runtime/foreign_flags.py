"""Flags of vLLM, SGLang and LMDeploy that have another name here, or none for a reason: what a person who comes from there types first."""

from __future__ import annotations

__all__ = ["FOREIGN_FLAGS", "cure_of_foreign"]

_NO_CODE = "nothing: code that comes with a checkpoint is never run"
_NO_ADAPTERS = "nothing: adapters (LoRA) are not served"
_FROM_CHECKPOINT = "nothing: the checkpoint's config.json says it, and `gantline quantize` makes an AWQ checkpoint"
_NO_KV_TYPES = "nothing: the KV cache has the type of --dtype"

FOREIGN_FLAGS: dict[str, str] = {
    "--model": "DIR, without a flag",
    "--model-path": "DIR, without a flag",
    "--model-name": "--served-model-name",
    "--server-name": "--host",
    "--server-port": "--port",
    "--api-key": "--api-keys FILE",
    "--ssl-certfile": "--tls-cert",
    "--ssl-keyfile": "--tls-key",
    "--allowed-origins": "--cors-origins",
    "--otlp-traces-endpoint": "--otlp-endpoint",
    "--api-server-count": "--api-workers",
    "--tensor-parallel-size": "--tp",
    "--tp-size": "--tp",
    "--max-model-len": "--session-len",
    "--context-length": "--session-len",
    "--max-num-seqs": "--max-batch-size",
    "--max-running-requests": "--max-batch-size",
    "--max-queued-requests": "--max-waiting",
    "--max-num-batched-tokens": "--max-prefill-token-num",
    "--chunked-prefill-size": "--max-prefill-token-num",
    "--gpu-memory-utilization": "--cache-max-entry-count, a share of the memory that is free once the weights are there",
    "--mem-fraction-static": "--cache-max-entry-count, a share of the memory that is free once the weights are there",
    "--num-gpu-blocks-override": "--num-cache-blocks",
    "--page-size": "--block-size",
    "--cache-block-seq-len": "--block-size",
    "--enforce-eager": "--eager-mode",
    "--disable-cuda-graph": "--eager-mode",
    "--disable-radix-cache": "--no-enable-prefix-caching",
    "--enable-deterministic-inference": "--batch-invariant",
    "--enable-auto-tool-choice": "nothing: a model whose template knows tools may always call them",
    "--quantization": _FROM_CHECKPOINT,
    "--model-format": _FROM_CHECKPOINT,
    "--kv-cache-dtype": _NO_KV_TYPES,
    "--quant-policy": _NO_KV_TYPES,
    "--trust-remote-code": _NO_CODE,
    "--enable-lora": _NO_ADAPTERS,
    "--lora-modules": _NO_ADAPTERS,
    "--adapters": _NO_ADAPTERS,
    "--enable-chunked-prefill": "nothing: long prompts are always read in chunks",
}
"""Their flag -> ours, or a sentence on why there is none."""


def cure_of_foreign(arguments: str) -> str:
    """What to write instead of the first flag of other engines among unknown `arguments`; empty where there is none."""
    for argument in arguments.split():
        flag = argument.partition("=")[0].replace("_", "-")
        if flag in FOREIGN_FLAGS:
            return f"For {flag} of other engines give {FOREIGN_FLAGS[flag]}."
    return ""
