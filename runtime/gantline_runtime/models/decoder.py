"""The dense decoder that all families share: pre-norm blocks of attention and a gated MLP.

Queries, keys and values are one matrix, gate and up another. The residual stream is carried beside the normed input, so that adding and
norming are one operation. In the last layer, only rows whose logits are wanted go past attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from gantline_kernels import api

from gantline_runtime.checkpoint import Checkpoint, ModelShape, quantized_linears
from gantline_runtime.errors import CheckpointError
from gantline_runtime.layers.attention import AttentionContext, LayerCache, PagedAttention
from gantline_runtime.layers.embedding import VocabularyMatrix
from gantline_runtime.layers.linear import ColumnLinear, GatedLinear, Part, RowLinear
from gantline_runtime.layers.rope import RopeConfig, cos_sin_table, parse_rope
from gantline_runtime.layers.weights import BuildContext, Target, vector_target
from gantline_runtime.loader import Progress, WeightLoading
from gantline_runtime.parallel import Parallel

__all__ = ["Decoder", "DecoderConfig"]


@dataclass(frozen=True)
class DecoderConfig:
    """`windows`: each layer's sliding window, 0 for none. `quantized`: full names of the matrices stored in 4 bits."""

    shape: ModelShape
    rope: RopeConfig
    rms_norm_eps: float
    windows: tuple[int, ...]
    quantized: frozenset[str] = frozenset()

    @staticmethod
    def make(checkpoint: Checkpoint, *, windows: tuple[int, ...]) -> DecoderConfig:
        shape, config = checkpoint.shape, checkpoint.config
        eps = config.get("rms_norm_eps", 1e-6)
        if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps < 1:
            raise CheckpointError(
                f"config.json: rms_norm_eps is {str(eps)[:64]!r}, expected a small positive number", cure="Correct config.json."
            )
        return DecoderConfig(
            shape=shape,
            rope=parse_rope(config, shape.head_dim, shape.max_position_embeddings),
            rms_norm_eps=float(eps),
            windows=windows,
            quantized=frozenset(quantized_linears(shape)),
        )

    def group_size(self, module: str) -> int | None:
        """Group size of a quantized matrix, None for a plain one."""
        return self.shape.awq.group_size if self.shape.awq is not None and module in self.quantized else None


class _Attention:
    def __init__(
        self, prefix: str, window: int, cos_sin: torch.Tensor, config: DecoderConfig, parallel: Parallel, build: BuildContext
    ) -> None:
        shape = config.shape
        dim = shape.head_dim
        queries, keys = parallel.shard(shape.num_heads * dim), parallel.shard_heads(shape.num_kv_heads, dim)
        self._prefix = prefix
        self._head_dim = dim
        self.width = queries.size
        """Columns of what attention gives."""
        self._heads = [shard.size // dim for shard in (queries, keys, keys)]
        names = [(f"{prefix}{name}_proj", shard) for name, shard in (("q", queries), ("k", keys), ("v", keys))]
        self.qkv = ColumnLinear(
            shape.hidden_size, [Part(name, shard, config.group_size(name)) for name, shard in names], bias=shape.qkv_bias, build=build
        )
        output = f"{prefix}o_proj"
        self.output = RowLinear(
            output, queries, shape.hidden_size, bias=shape.o_bias, group_size=config.group_size(output), parallel=parallel, build=build
        )
        self.q_norm = build.empty(dim) if shape.qk_norm else None
        self.k_norm = build.empty(dim) if shape.qk_norm else None
        self.attend = PagedAttention(head_dim=dim, sliding_window=window, cos_sin=cos_sin, eps=config.rms_norm_eps, backend=build.backend)

    def __call__(self, x: torch.Tensor, cache: LayerCache, context: AttentionContext) -> torch.Tensor:
        """[T, hidden] -> [T, this rank's heads * head_dim]; the output projection is the caller's."""
        q, k, v = self.qkv(x).unflatten(-1, (-1, self._head_dim)).split(self._heads, dim=1)
        return self.attend(q, k, v, cache, context, self.q_norm, self.k_norm).flatten(1)

    def targets(self) -> Iterator[Target]:
        yield from self.qkv.targets()
        yield from self.output.targets()
        for name, weight in (("q_norm", self.q_norm), ("k_norm", self.k_norm)):
            if weight is not None:
                yield from vector_target(f"{self._prefix}{name}.weight", weight)


class _Mlp:
    def __init__(self, prefix: str, config: DecoderConfig, parallel: Parallel, build: BuildContext) -> None:
        shape = config.shape
        inner = parallel.shard(shape.intermediate_size)
        gate, up = (Part(name, inner, config.group_size(name)) for name in (f"{prefix}gate_proj", f"{prefix}up_proj"))
        self.gated = GatedLinear(shape.hidden_size, gate, up, bias=shape.mlp_bias, build=build)
        down = f"{prefix}down_proj"
        self.down = RowLinear(
            down, inner, shape.hidden_size, bias=shape.mlp_bias, group_size=config.group_size(down), parallel=parallel, build=build
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.gated(x))

    def targets(self) -> Iterator[Target]:
        yield from self.gated.targets()
        yield from self.down.targets()


class _Layer:
    def __init__(self, index: int, cos_sin: torch.Tensor, config: DecoderConfig, parallel: Parallel, build: BuildContext) -> None:
        prefix = f"model.layers.{index}."
        self._prefix = prefix
        self._eps = config.rms_norm_eps
        self._backend = build.backend
        self.input_norm = build.empty(config.shape.hidden_size)
        self.attention = _Attention(f"{prefix}self_attn.", config.windows[index], cos_sin, config, parallel, build)
        self.mlp_norm = build.empty(config.shape.hidden_size)
        self.mlp = _Mlp(f"{prefix}mlp.", config, parallel, build)

    def __call__(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        cache: LayerCache,
        context: AttentionContext,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, hidden] twice -> the block's output and the residual stream that it must still be added to; of `rows` only, if given."""
        if residual is None:
            x, residual = api.rms_norm(x, self.input_norm, self._eps, backend=self._backend), x
        else:
            x, residual = api.add_rms_norm(x, residual, self.input_norm, self._eps, backend=self._backend)
        x = self.attention(x, cache, context)
        if rows is not None:
            x, residual = x[rows], residual[rows]
        x = self.attention.output(x)
        x, residual = api.add_rms_norm(x, residual, self.mlp_norm, self._eps, backend=self._backend)
        return self.mlp(x), residual

    def targets(self) -> Iterator[Target]:
        yield from vector_target(f"{self._prefix}input_layernorm.weight", self.input_norm)
        yield from self.attention.targets()
        yield from vector_target(f"{self._prefix}post_attention_layernorm.weight", self.mlp_norm)
        yield from self.mlp.targets()


class Decoder:
    capturable = True
    """Decode steps may run as CUDA graphs: nothing here waits for the device."""

    def __init__(self, config: DecoderConfig, *, session_len: int, parallel: Parallel, build: BuildContext) -> None:
        shape = config.shape
        self._config = config
        self._backend = build.backend
        self.kv_heads = max(1, shape.num_kv_heads // parallel.size)
        """Key/value heads of this rank."""
        self.embedding = VocabularyMatrix("model.embed_tokens", shape.vocab_size, shape.hidden_size, parallel=parallel, build=build)
        self.head = self.embedding
        if not shape.tie_word_embeddings:
            self.head = VocabularyMatrix("lm_head", shape.vocab_size, shape.hidden_size, parallel=parallel, build=build)
        cos_sin = cos_sin_table(config.rope, session_len, build.device)
        self.layers = [_Layer(index, cos_sin, config, parallel, build) for index in range(shape.num_layers)]
        self.norm = build.empty(shape.hidden_size)

    def start_loading(self, checkpoint: Checkpoint, on_progress: Callable[[Progress], None] | None = None) -> WeightLoading:
        """Have this rank's part of the weights read; steps may run meanwhile. Raises CheckpointError."""
        return WeightLoading(checkpoint, self.targets(), on_progress)

    def forward(self, ids: torch.Tensor, caches: list[LayerCache], context: AttentionContext, rows: torch.Tensor | None) -> torch.Tensor:
        """Token numbers [T] -> final hidden states of `rows` (None: all), normed."""
        return self._run(self.layers, ids, caches, context, rows)

    def load_kernels(self, ids: torch.Tensor, caches: list[LayerCache], context: AttentionContext) -> None:
        """As `forward`, through one layer of each kind, with all rows."""
        kinds = dict(zip(self._config.windows, self.layers, strict=True))
        self._run(list(kinds.values()), ids, caches[: len(kinds)], context, None)

    def forward_briefly(
        self, ids: torch.Tensor, caches: list[LayerCache], context: AttentionContext, rows: torch.Tensor | None
    ) -> torch.Tensor:
        """As `forward`, through few layers: the first, which adds nothing yet to what came before, one of each kind, and the last, which
        goes on with `rows` alone. What a layer takes is free when the next begins, so more of them take no more memory."""
        kinds = dict(zip(self._config.windows, self.layers, strict=True))
        layers = [self.layers[0], *kinds.values(), self.layers[-1]]
        if len(self.layers) <= len(layers):
            layers = self.layers
        return self._run(layers, ids, caches[:1] * len(layers), context, rows)

    def _run(
        self, layers: list[_Layer], ids: torch.Tensor, caches: list[LayerCache], context: AttentionContext, rows: torch.Tensor | None
    ) -> torch.Tensor:
        x, residual = self.embedding.embed(ids), None
        last = len(layers) - 1
        for index, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
            x, residual = layer(x, residual, cache, context, rows if index == last else None)
        normed, _ = api.add_rms_norm(x, residual, self.norm, self._config.rms_norm_eps, backend=self._backend)
        return normed

    def logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """[rows, hidden] -> [rows, vocabulary] on rank 0, None on others."""
        return self.head.logits(hidden)

    def targets(self) -> Iterator[Target]:
        """Every tensor that this rank needs from the checkpoint."""
        yield from self.embedding.targets()
        if self.head is not self.embedding:
            yield from self.head.targets()
        for layer in self.layers:
            yield from layer.targets()
        yield from vector_target("model.norm.weight", self.norm)
