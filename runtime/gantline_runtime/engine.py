"""The engine: a model loaded on its devices, and the loop that serves it (`engine_loop.py`)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from gantline_runtime.checkpoint import open_checkpoint
from gantline_runtime.config import EngineConfig
from gantline_runtime.engine_loop import EngineLoop, EngineStats
from gantline_runtime.executor import Executor
from gantline_runtime.generation import read_eos_token_ids
from gantline_runtime.grammar.requests import Grammars
from gantline_runtime.loader import Progress
from gantline_runtime.ranks import Ranks
from gantline_runtime.request import QueueFull, RequestRejected

__all__ = ["EngineLoop", "EngineStats", "LLMEngine", "Progress", "QueueFull", "RequestRejected"]


class LLMEngine(EngineLoop):
    """One model, on one GPU or several, or on a CPU."""

    def __init__(
        self, model_dir: str | Path, config: EngineConfig, on_progress: Callable[[Progress], None] | None = None, ranks: Ranks | None = None
    ) -> None:
        """Loads the model and sizes the cache; `on_progress` hears of the weights' bytes. `ranks`: processes of the other ranks that have
        been started already, from now on this engine's.

        Raises CheckpointError, ConfigurationError, SourceError, CapacityError, or RankError.
        """
        started = time.monotonic()
        checkpoint = open_checkpoint(model_dir)
        eos_token_ids = read_eos_token_ids(checkpoint)
        executor = Executor(Path(model_dir), checkpoint, config, on_progress, ranks)
        load_seconds = time.monotonic() - started
        vocab_size = checkpoint.shape.vocab_size
        grammars = Grammars(
            Path(model_dir),
            vocab_size=vocab_size,
            eos_token_ids=eos_token_ids,
            max_rows=executor.limits.max_slots,
            pinned=executor.config.device == "cuda",
        )
        implementation = "transformers" if checkpoint.shape.family == "transformers" else "gantline"
        super().__init__(
            executor,
            vocab_size=vocab_size,
            eos_token_ids=eos_token_ids,
            load_seconds=load_seconds,
            grammars=grammars,
            about={
                "architecture": checkpoint.shape.architecture,
                "implementation": implementation,
                "reason": checkpoint.shape.fallback_reason,
            },
        )
