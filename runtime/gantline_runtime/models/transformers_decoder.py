"""Any other decoder: transformers' own implementation, with our paged cache in the place of its attention.

transformers lets attention be exchanged by name. Ours finds the step's context and its layer of the cache on the module that calls,
writes the new keys and values to their slots and attends over the sequence's blocks, by the same kernels as every other model. All tokens
of a step are one row of a batch to transformers: nothing but attention may look from one token to another. Once loaded, a few tokens are
therefore run both ways, in two chunks over the cache and at once by transformers alone; a model whose answers differ is refused.

Slower than an implementation of ours: matrices are not packed, small operations are not fused, steps run without CUDA graphs and on one
device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from gantline_kernels import api
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

from gantline_runtime import logs
from gantline_runtime.checkpoint import Checkpoint
from gantline_runtime.errors import CheckpointError
from gantline_runtime.layers.attention import AttentionContext, LayerCache
from gantline_runtime.layers.weights import BuildContext
from gantline_runtime.loader import Loaded, Progress
from gantline_runtime.models.transformers_trace import AttentionLayer, fix_rotary, quiet, read_config, trace
from gantline_runtime.termination import Reason

__all__ = ["TransformersDecoder"]

log = logging.getLogger("gantline.engine")

_PAGED = "gantline_paged"
_VERIFIED_TOKENS, _VERIFIED_BLOCK = 24, 64
_ALLOWED_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Of the logits, as a share of their norm. Rounding makes 1e-6 and 0.02; a state that is lost makes about 1."""
_FAULTS = {"missing_keys": "is missing", "mismatched_keys": "has another shape", "unexpected_keys": "is not the model's"}
_CURE = "config.json and weights do not belong together, or the checkpoint is incomplete: copy or download it again."


class TransformersDecoder:
    capturable = False
    """Whether decode steps may be captured as CUDA graphs: nobody promises that transformers' code never waits for the device."""

    def __init__(self, checkpoint: Checkpoint, session_len: int, build: BuildContext) -> None:
        """`session_len` in tokens decides between the frequencies of a model that has some for short and some for long contexts."""
        log.warning("transformers' own implementation runs this model, slower than one of Gantline's", extra=logs.fields(
            architecture=checkpoint.shape.architecture, reason=checkpoint.shape.fallback_reason
        ))  # fmt: skip
        self._build = build
        self._session_len = session_len
        self._config = read_config(checkpoint.config)
        self._layers = trace(self._config)
        self.kv_heads = self._layers[0].num_kv_heads
        self._step: _Step = _Step()

    def start_loading(self, checkpoint: Checkpoint, on_progress: Callable[[Progress], None] | None = None) -> Loaded:
        """Read the weights, all of them: there is no model before. Raises CheckpointError if the files hold too few tensors, or others."""
        total = checkpoint.facts.weight_bytes
        report = on_progress or (lambda _: None)
        report(Progress("weights", 0, total))
        self._model = self._read(checkpoint)
        self._inner, self._prefix = self._model.base_model, self._model.base_model_prefix
        modules = dict(self._model.named_modules())
        for index, layer in enumerate(self._layers):
            modules[layer.module].gantline_paged = _PagedLayer(index, layer, self._build, self._step)
        self._verify(checkpoint)
        report(Progress("weights", total, total))
        parameters = {tensor.data_ptr(): tensor for tensor in (*self._model.parameters(), *self._model.buffers())}
        return Loaded(sum(tensor.numel() * tensor.element_size() for tensor in parameters.values()))

    def _read(self, checkpoint: Checkpoint) -> Any:
        folder = checkpoint.path(next(iter(checkpoint.tensors))).parent
        try:
            with quiet():
                model, found = AutoModelForCausalLM.from_pretrained(
                    folder, config=self._config, dtype=self._build.dtype, attn_implementation=_PAGED, use_safetensors=True,
                    local_files_only=True, trust_remote_code=False, ignore_mismatched_sizes=True,  # they are reported, and named below
                    output_loading_info=True,
                )  # fmt: skip
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"transformers cannot load {checkpoint.label}: {str(error)[:300]}", cure=_CURE) from None
        for kind, what in _FAULTS.items():
            if found[kind]:
                raise CheckpointError(f"the tensor {str(sorted(map(str, found[kind]))[0])[:200]!r} {what}", cure=_CURE)
        fix_rotary(model, self._session_len)
        model.config.pad_token_id = None  # or each step waits for the device: tokens are searched for it, to warn of missing masks
        return model.eval().to(self._build.device)

    def forward(self, ids: torch.Tensor, caches: list[LayerCache], context: AttentionContext, rows: torch.Tensor | None) -> torch.Tensor:
        """Token numbers [T] -> final hidden states of `rows` (None: all)."""
        self._step.caches, self._step.context = caches, context
        positions = context.positions.long()[None]
        output = self._inner(input_ids=ids[None], position_ids=positions, use_cache=False)
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden if rows is None else hidden[rows]

    def forward_briefly(
        self, ids: torch.Tensor, caches: list[LayerCache], context: AttentionContext, rows: torch.Tensor | None
    ) -> torch.Tensor:
        """As `forward`: what one layer is, the model's own code knows alone."""
        return self.forward(ids, caches, context, rows)

    def load_kernels(self, ids: torch.Tensor, caches: list[LayerCache], context: AttentionContext) -> None:
        """Nothing: what one layer is, the model's own code knows alone."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] -> float32 [rows, vocabulary], with the scales and caps that the model's own code applies after its head.

        The decoder under the head is exchanged for one that answers with `hidden`, so whatever the class does with hidden states is done.
        """
        setattr(self._model, self._prefix, _Given(hidden))
        try:
            logits: torch.Tensor = self._model(input_ids=None, inputs_embeds=hidden[None], use_cache=False).logits[0]
        finally:
            setattr(self._model, self._prefix, self._inner)
        return logits.float()

    @torch.inference_mode()
    def _verify(self, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError where the cache gives other logits than transformers' own attention (recurrent or convolved states)."""
        device, shape = self._build.device, checkpoint.shape
        count = min(_VERIFIED_TOKENS, shape.max_position_embeddings)
        ids = (torch.arange(count, device=device) * 7919 + 1) % shape.vocab_size
        with quiet():
            self._model.set_attn_implementation("eager")
            expected = self._model(input_ids=ids[None], use_cache=False).logits[0].float()
            self._model.set_attn_implementation(_PAGED)
        size = (1, self.kv_heads, _VERIFIED_BLOCK, shape.head_dim)
        caches = [LayerCache(*(torch.zeros(size, dtype=self._build.dtype, device=device) for _ in "kv")) for _ in self._layers]
        chunks = [range((count + 1) // 2), range((count + 1) // 2, count)]
        hidden = [self.forward(ids[c.start : c.stop], caches, _one_chunk(c, device), None) for c in chunks if c]
        error = (self.logits(torch.cat(hidden)) - expected).norm() / expected.norm()
        allowed = _ALLOWED_ERROR[self._build.dtype]
        if not error <= allowed:
            raise CheckpointError(
                f"{shape.architecture} gives other answers over a paged cache than alone (error {error:.2g} of its logits, not {allowed})",
                reason=Reason.UNSUPPORTED_ARCHITECTURE,
                cure="It keeps more of earlier tokens than keys and values; serve a decoder with standard attention.",
            )


def _one_chunk(chunk: range, device: torch.device) -> AttentionContext:
    """Tokens `chunk` of one sequence in block 0."""
    positions = torch.arange(chunk.start, chunk.stop, dtype=torch.int32, device=device)
    return AttentionContext(
        positions=positions,
        slots=positions.long(),
        block_tables=torch.zeros((1, 1), dtype=torch.int32, device=device),
        query_starts=torch.tensor([0, len(chunk)], dtype=torch.int32, device=device),
        context_lens=torch.tensor([chunk.stop], dtype=torch.int32, device=device),
        max_query_len=len(chunk),
        max_context_len=chunk.stop,
        num_decodes=0,
    )


class _Step:
    """What attention must know of the step under way."""

    context: AttentionContext
    caches: list[LayerCache]


class _PagedLayer:
    """One layer's attention over the paged cache. Queries and keys arrive rotated, so the cache's writer is told to rotate by nothing."""

    def __init__(self, index: int, layer: AttentionLayer, build: BuildContext, step: _Step) -> None:
        self._index = index
        self._layer = layer
        self._backend = build.backend
        self._step = step
        half = layer.head_dim // 2
        self._unrotated = torch.cat([torch.ones(1, half), torch.zeros(1, half)], dim=1).to(build.device)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [1, heads, T, D], k and v [1, kv_heads, T, D] -> [1, T, heads, D]."""
        context, cache, layer = self._step.context, self._step.caches[self._index], self._layer
        queries, keys, values = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
        queries = api.rope_and_cache_write(
            queries, keys, values, self._unrotated, torch.zeros_like(context.positions), cache.keys, cache.values, context.slots,
            backend=self._backend,
        )  # fmt: skip
        attended = api.paged_attention(
            queries, cache.keys, cache.values, context.block_tables, context.query_starts, context.context_lens, layer.scale,
            max_query_len=context.max_query_len, max_context_len=context.max_context_len, num_decodes=context.num_decodes,
            sliding_window=layer.sliding_window, logit_softcap=layer.logit_softcap, shared=context.shared, backend=self._backend,
        )  # fmt: skip
        return attended[None]


class _Given(torch.nn.Module):
    """Stands where a decoder stands, and has its answer already."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self._output = _Output(last_hidden_state=hidden[None])

    @property
    def decoder(self) -> _Given:
        """Some classes (OPT's) reach through to a part of this name."""
        return self

    def forward(self, *_: Any, **__: Any) -> _Output:
        return self._output


class _Output(BaseModelOutputWithPast):
    def __getattr__(self, name: str) -> None:
        """Whatever else a class passes on from its decoder (router logits, cross attentions) is not there."""
        if name.startswith("__"):
            raise AttributeError(name)


def _paged_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **_: Any
) -> tuple[torch.Tensor, None]:
    """transformers' interface of attention. What models ask for beside the tensors was read when the model was traced."""
    del attention_mask
    paged = module.gantline_paged
    assert isinstance(paged, _PagedLayer)
    return paged(query, key, value), None


AttentionInterface.register(_PAGED, _paged_attention)
