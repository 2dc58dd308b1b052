"""Which Triton kernels a model's steps launch, found out and compiled where there is no GPU (`gantline prebuild-kernels`).

The engine's own `ModelRunner` runs steps of a model of two layers on GPUs that are not there (`gantline_kernels.absent_gpu`). Their kernels
follow from types and sizes alone, so few steps stand for all: of the many batches that can come, one for each choice that attention makes
about them (`serving_batches.py`), on each kind of GPU of an architecture. What that cannot foresee is compiled at run time as ever, and
counted (`gantline_triton_kernels_total`); tests compare with the kernels of batches drawn at random.

Steps run on the `triton` backend: what the `cuda` backend leaves to Triton are some of the same kernels.
"""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gantline_kernels import prebuilt
from gantline_kernels.absent_gpu import CHIPS, AbsentGpus, Chip, NotedLaunch, absent_gpus
from gantline_kernels.triton_kernels.early import MAX_ROWS
from gantline_kernels.triton_kernels.elementwise import MAX_EARLY_ACTIVATIONS
from triton import knobs
from triton.runtime.cache import FileCacheManager

from gantline_runtime.batch import BatchLimits, BatchShape
from gantline_runtime.checkpoint import Checkpoint, describe_checkpoint
from gantline_runtime.errors import ConfigurationError
from gantline_runtime.graph_sizes import decode_sizes
from gantline_runtime.kv_cache.prefix_groups import num_groups
from gantline_runtime.layers.weights import BuildContext
from gantline_runtime.model_runner import ModelRunner
from gantline_runtime.parallel import Parallel
from gantline_runtime.prebuilt_models import ModelVariant
from gantline_runtime.serving_batches import SAMPLINGS, all_decodes, attention_variant, decode_batch, prompt_batch

__all__ = ["Step", "look_up", "note_launches", "prebuild", "random_steps", "representative_steps", "run_steps"]

_BLOCK_SIZE = 64
_MAX_BATCH = 512
_MAX_TOKENS = 8192
_LONGEST = 131072
"""Longest context that steps are tried with; the parts it is cut into are as many as any longer one's."""
_PROMPTS = ((1, 1), (1, 2), (1, 16), (1, 17), (4, 64), (2, 4096))
"""(prompts, tokens of each) of steps without a decode."""


class _LoneRank(Parallel):
    """One rank of several whose collectives move nothing."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor | None:
        return torch.cat([x] * self.size, dim=-1)

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        return x


@dataclass(frozen=True)
class Step:
    """A batch that is to be run on a kind of GPU; sampling as `sampled` says."""

    shape: BatchShape
    chip: Chip
    sampled: str = "greedy"


Steps = Callable[[Checkpoint, int, Sequence[Chip]], Iterable[Step]]
"""The steps to run of a checkpoint, at a degree of tensor parallelism, on each of these kinds of GPU."""


def note_launches(
    variant: ModelVariant, targets: Iterable[int], steps: Steps | None = None, *, backend: str = "triton"
) -> list[NotedLaunch]:
    """The kernels that `variant` needs on GPUs of the architectures `targets` (90 for 9.0), each once, for these steps.

    `steps` None: `representative_steps`. Raises ConfigurationError for an architecture of which no GPU is known, and what a configuration
    that cannot be run raises.
    """
    prebuilt.use_version_as_key()
    found: dict[str, NotedLaunch] = {}
    for target in targets:
        with absent_gpus() as gpus:
            run_steps(gpus, variant, target, steps or representative_steps, backend)
        found |= {launch.key: launch for launch in gpus.launches}
    return list(found.values())


def look_up(variants: Iterable[ModelVariant], targets: Sequence[int]) -> dict[str, list[str]]:
    """The names of the kernels that each variant needs on these architectures and that $GANTLINE_TRITON_KERNELS lacks, by variant.

    Looks as a server does, and compiles nothing. Raises as `note_launches`.
    """
    return {
        f"{variant.name}, tp {variant.tp}, architecture {target}": [
            launch.name for launch in note_launches(variant, [target]) if not prebuilt.is_made(launch.key, launch.name)
        ]
        for variant in variants
        for target in targets
    }


def run_steps(gpus: AbsentGpus, variant: ModelVariant, target: int, steps: Steps, backend: str = "triton") -> None:
    """Run them on the absent GPUs of an architecture; raises as `note_launches`."""
    chips = [chip for chip in CHIPS if chip.target == target]
    if not chips:
        known = ", ".join(map(str, sorted({chip.target for chip in CHIPS})))
        raise ConfigurationError(f"no GPU of the architecture {target} is known", cure=f"Known architectures: {known}.")
    checkpoint = describe_checkpoint(_with_two_layers(variant.config), variant.name)
    runners = {chip: _make_runner(checkpoint, variant.tp, chip, backend) for chip in chips}
    for step in steps(checkpoint, variant.tp, chips):
        gpus.current = step.chip
        _run(runners[step.chip], step, checkpoint.shape.vocab_size)


def _with_two_layers(config: dict[str, Any]) -> dict[str, Any]:
    """Layers after the first launch what the second launches; where some have a sliding window and others not, one of each kind."""
    mixed = config.get("use_sliding_window") and config.get("sliding_window") is not None
    return {**config, "num_hidden_layers": 2} | ({"layer_types": ["full_attention", "sliding_attention"]} if mixed else {})


def _limits(checkpoint: Checkpoint) -> BatchLimits:
    return BatchLimits(max_tokens=_MAX_TOKENS, max_slots=_MAX_BATCH + 1, max_blocks=_longest(checkpoint) // _BLOCK_SIZE)


def _longest(checkpoint: Checkpoint) -> int:
    return max(_BLOCK_SIZE, min(_LONGEST, checkpoint.shape.max_position_embeddings) // _BLOCK_SIZE * _BLOCK_SIZE)


def _make_runner(checkpoint: Checkpoint, tp: int, chip: Chip, backend: str) -> ModelRunner:
    dtype = getattr(torch, checkpoint.facts.dtype)
    build = BuildContext(dtype=dtype, device=torch.device("cuda", chip.index), backend=backend)
    with torch.inference_mode():
        runner = ModelRunner(checkpoint, session_len=_longest(checkpoint), build=build, parallel=_LoneRank(0, tp), load=False)
        runner.allocate(16, _BLOCK_SIZE, _limits(checkpoint), graphs=False)
    return runner


def representative_steps(checkpoint: Checkpoint, tp: int, chips: Sequence[Chip]) -> Iterator[Step]:
    """Steps that between them launch every kernel which serving launches, as far as can be foreseen."""
    longest, first = _longest(checkpoint), chips[0]  # nothing but decoding depends on more than the architecture
    for prompts, tokens in _PROMPTS:
        yield Step(_prompts(prompts, min(tokens, longest)), first)
    for size in (1, 2, 17):
        for sampled in SAMPLINGS:
            yield Step(decode_batch(size, longest), first, sampled)
    yield Step(_mixed(16, min(64, longest), longest), first)
    seen: set[tuple[Any, ...]] = set()
    for chip in chips:
        for shape in all_decodes(decode_sizes(_MAX_BATCH), longest, _BLOCK_SIZE):
            kinds = {_rows_variant(shape.num_decodes), _attention_variant(checkpoint, tp, chip, shape)}
            if not kinds <= seen:
                seen |= kinds
                yield Step(shape, chip)


def _rows_variant(rows: int) -> tuple[Any, ...]:
    """Which number of rows this is to everything but attention: one, as many as start early, a multiple of 16."""
    return rows == 1, rows <= MAX_EARLY_ACTIVATIONS, rows <= MAX_ROWS, rows % 16 == 0


def _attention_variant(checkpoint: Checkpoint, tp: int, chip: Chip, shape: BatchShape) -> tuple[Any, ...]:
    element_bytes = getattr(torch, checkpoint.facts.dtype).itemsize
    return attention_variant(checkpoint.shape, tp, element_bytes, _BLOCK_SIZE, chip.multiprocessors, shape)


def random_steps(seed: int, count: int) -> Callable[[Checkpoint, int, Sequence[Chip]], Iterator[Step]]:
    """`count` steps on each kind of GPU as serving might meet them, to check `representative_steps` with."""

    def draw(checkpoint: Checkpoint, tp: int, chips: Sequence[Chip]) -> Iterator[Step]:
        random = np.random.default_rng(seed)

        def scaled(most: int) -> int:
            """1 to `most`, as often in each power of two."""
            return int(2 ** random.uniform(0, np.log2(most + 1)))

        longest = _longest(checkpoint)
        for chip in chips:
            for _ in range(count):
                size, context, tokens = scaled(_MAX_BATCH), scaled(longest), min(scaled(_MAX_TOKENS), longest)
                kind = random.choice(["decodes", "decodes", "shared", "prompts", "mixed"])
                if kind == "prompts":
                    shape = _prompts(1, tokens)
                elif kind == "mixed":
                    shape = _mixed(size, tokens, max(context, tokens))
                else:
                    shape = decode_batch(size, context, scaled(context) if kind == "shared" and num_groups(size) else 0)
                yield Step(shape, chip, str(random.choice(list(SAMPLINGS))))

    return draw


def _prompts(count: int, tokens: int) -> BatchShape:
    return prompt_batch(count, tokens, tokens)


def _mixed(decodes: int, tokens: int, context: int) -> BatchShape:
    """Those that decode beside one prompt."""
    return BatchShape(decodes + tokens, decodes + 1, decodes, decodes + 1, 0, tokens, context)


@torch.inference_mode()
def _run(runner: ModelRunner, step: Step, vocab_size: int) -> None:
    words = torch.zeros(step.shape.num_words, dtype=torch.int32)
    runner.execute(words, step.shape, SAMPLINGS[step.sampled](step.shape.num_samples, vocab_size))


# ---- compiling


def prebuild(
    variants: Sequence[ModelVariant],
    targets: Sequence[int],
    output: Path,
    *,
    jobs: int,
    reuse: Path | None = None,
    on_done: Callable[[ModelVariant, int, int, int], None] = lambda variant, target, done, total: None,
) -> None:
    """Fill the folder `output`, as `gantline_kernels.prebuilt` reads it, by `jobs` processes at most. Kernels that are in it are kept.

    `reuse` names a folder that outlives `output`: what an earlier run left there is copied instead of compiled, and what is compiled is
    left there too. Names are hashes of all that decides about a kernel, so nothing in it is ever wrong, only no longer asked for.

    `on_done` hears which variant is done on which architecture, and how many of how many are. Raises what `note_launches` raises, and what
    Triton's compiler does.
    """
    output.mkdir(parents=True, exist_ok=True)
    prebuilt.write_versions(output)
    _remove_claims(output)  # of a run that was ended
    work = [(variant, target, output, reuse) for variant in variants for target in targets]
    with tempfile.TemporaryDirectory() as scratch:
        context = multiprocessing.get_context("fork")  # has imported torch, which takes a fresh process two seconds
        with context.Pool(min(jobs, len(work)), _begin_worker, (scratch,)) as pool:
            for done, (variant, target) in enumerate(pool.imap_unordered(_prebuild_one, work), 1):
                on_done(variant, target, done, len(work))
    _remove_claims(output)


def _remove_claims(output: Path) -> None:
    for claim in output.glob(".*"):
        shutil.rmtree(claim)


def _begin_worker(scratch: str) -> None:
    torch.set_num_threads(1)
    knobs.cache.manager_class = FileCacheManager
    knobs.cache.dir = scratch
    knobs.compilation.store_binary_only = True
    knobs.compilation.disable_line_info = True  # of use to a profiler alone


def _prebuild_one(work: tuple[ModelVariant, int, Path, Path | None]) -> tuple[ModelVariant, int]:
    variant, target, output, reuse = work
    for launch in note_launches(variant, [target]):
        try:
            (output / f".{launch.key}").mkdir()  # whoever makes it compiles; other workers may need the same kernel
        except FileExistsError:
            continue
        if not (output / launch.key).is_dir():
            _provide(launch, output, reuse)
    return variant, target


def _provide(launch: NotedLaunch, output: Path, reuse: Path | None) -> None:
    kept = reuse / launch.key if reuse is not None else None
    if kept is not None and kept.is_dir():
        _put(kept.iterdir(), output / launch.key)
        return
    _put((Path(path) for path in launch.compile().metadata_group.values()), output / launch.key)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        try:
            _put((output / launch.key).iterdir(), kept)
        except OSError:
            if not kept.is_dir():  # else another build has put it there meanwhile
                raise


def _put(files: Iterable[Path], folder: Path) -> None:
    """Copy what a launch needs of a kernel; the folder appears whole."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as scratch:
        partial = Path(scratch, folder.name)
        partial.mkdir()
        for file in files:
            if file.suffix in prebuilt.KEPT:
                shutil.copyfile(file, partial / file.name)
        partial.rename(folder)
