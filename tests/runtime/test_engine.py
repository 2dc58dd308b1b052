"""The engine from the outside: what it loads, what it refuses, what it reports, how it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from gantline_runtime.batch import BatchLimits, BatchShape
from gantline_runtime.capture_pacing import Captures
from gantline_runtime.checkpoint import open_checkpoint
from gantline_runtime.config import EngineConfig
from gantline_runtime.distributed import RankError
from gantline_runtime.engine import LLMEngine, Progress
from gantline_runtime.errors import CapacityError, CheckpointError, ConfigurationError, SourceError
from gantline_runtime.graph_classes import GraphClasses
from gantline_runtime.kv_cache import prefix_groups
from gantline_runtime.layers.weights import BuildContext
from gantline_runtime.model_runner import ModelRunner
from gantline_runtime.parallel import Parallel
from gantline_runtime.workspace import largest_steps
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.runtime.checkpoints import write_checkpoint
from tests.runtime.engine_support import drain, request, tokens_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_checkpoint("llama", tmp_path_factory.mktemp("engine") / "model")


@pytest.fixture
def broken(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "broken"))


def config(**settings: Any) -> EngineConfig:
    return EngineConfig(**{"block_size": 16, "num_cache_blocks": 64, "session_len": 512, "max_batch_size": 8, **settings})


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# ---- loading


def test_loading_reports_its_progress_in_bytes(model: Path) -> None:
    seen: list[Progress] = []
    engine = LLMEngine(model, config(), seen.append)
    engine.close()
    assert list(dict.fromkeys(p.phase for p in seen)) == ["device", "weights", "workspace", "cache"]
    weights = [p for p in seen if p.phase == "weights"]
    assert [p.done for p in weights] == sorted(p.done for p in weights)
    assert weights[-1].done == weights[-1].total == engine.stats().memory.weight_bytes


def test_weights_of_another_type_are_converted(model: Path, broken: Path) -> None:
    edit_weights(broken, lambda tensors: tensors.update({name: t.to(torch.bfloat16) for name, t in tensors.items()}))
    edit_config(broken, dtype="bfloat16")
    for dtype in ("auto", "float32", "bfloat16"):
        engine = LLMEngine(broken, config(dtype=dtype))
        engine.add_request(request("a", [5, 6, 7], count=5))
        assert len(tokens_of(drain(engine)["a"])) == 5
        width = 2 if dtype == "bfloat16" else 4
        assert engine.stats().memory.cache_bytes_per_token == 2 * 2 * 2 * 16 * width
        engine.close()


@pytest.mark.parametrize(
    ("damage", "error", "named"),
    [
        (
            lambda f: edit_weights(f, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
            CheckpointError,
            "model.layers.1.mlp.up_proj.weight",
        ),
        (lambda f: edit_weights(f, lambda t: t.update({"model.norm.weight": torch.ones(65)})), CheckpointError, "model.norm.weight"),
        (lambda f: os.truncate(f / "model.safetensors", 100_000), CheckpointError, "model.safetensors"),
        (lambda f: edit_config(f, rms_norm_eps="small"), CheckpointError, "rms_norm_eps"),
        (lambda f: edit_config(f, rope_parameters={"rope_type": "spiral"}), CheckpointError, "spiral"),
        (lambda f: edit_config(f, rope_parameters={"rope_type": "linear"}), CheckpointError, "factor"),
        (lambda f: edit_config(f, eos_token_id="two") or (f / "generation_config.json").unlink(), CheckpointError, "eos_token_id"),
        (lambda f: edit_config(f, architectures=["GPT9"]), CheckpointError, "GPT9"),
        (lambda f: shutil.rmtree(f), SourceError, "broken"),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_the_culprit_named(broken: Path, damage: Any, error: type[Exception], named: str) -> None:
    damage(broken)
    with pytest.raises(error, match=named):
        LLMEngine(broken, config())


def test_a_file_that_shrinks_after_it_was_judged_is_named(broken: Path) -> None:
    checkpoint = open_checkpoint(broken)
    os.truncate(broken / "model.safetensors", 100_000)
    build = BuildContext(dtype=torch.float32, device=torch.device("cpu"), backend="torch")
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*truncated"):
        ModelRunner(checkpoint, session_len=64, build=build, parallel=Parallel())


# ---- padded batches, as CUDA graphs run them


class PaddedBatches:
    """What `StepGraphs` and its plan are to a runner, without a GPU: every batch is padded, none is captured."""

    def __init__(self, runner: ModelRunner, config: EngineConfig) -> None:
        assert config.session_len is not None
        self._runner = runner
        self._classes = GraphClasses(max_sequences=config.max_batch_size, max_tokens=64, session_len=config.session_len)
        self.shapes: list[BatchShape] = []
        self.plan = self
        self._foreseen = self._classes.foreseen()

    def pad(self, shape: BatchShape, _: Captures) -> BatchShape:
        return self._classes.pad(shape)

    def foresee(self) -> BatchShape | None:
        """A class that no step here falls into."""
        return self._foreseen.pop() if self._foreseen else None

    def release(self) -> None:
        pass

    def run(self, shape: BatchShape) -> None:
        self.shapes.append(shape)
        self._runner._forward_padded(shape)


@pytest.mark.parametrize("tp", [1, 2])
def test_padding_batches_to_the_classes_of_graphs_changes_no_token_and_no_logprob(model: Path, tp: int) -> None:
    """With two ranks, the second is told of the padded batch."""
    results = []
    for padded in (False, True):
        engine = LLMEngine(model, config(max_prefill_token_num=96, tp=tp if padded else 1))
        if padded:
            runner = engine._executor._runner  # type: ignore[attr-defined]
            runner._graphs = batches = PaddedBatches(runner, engine.config)
        for i in range(12):
            prompt = [3 + (7 * i + j) % 500 for j in range(1 + 9 * i)]
            engine.add_request(request(str(i), prompt, count=8 + i, num_logprobs=2))
        results.append(drain(engine))
        engine.close()
    assert {shape.is_decode for shape in batches.shapes} == {True, False}
    assert any(0 < shape.num_samples < shape.num_sequences for shape in batches.shapes)
    exact, padded_results = results
    for name, outputs in exact.items():
        assert tokens_of(padded_results[name]) == tokens_of(outputs)
        for ours, theirs in zip(padded_results[name], outputs, strict=True):
            assert ours.logprobs is not None and theirs.logprobs is not None
            assert ours.logprobs[0].chosen == pytest.approx(theirs.logprobs[0].chosen, abs=1e-4)


@pytest.mark.parametrize("tp", [1, 2])
def test_what_is_made_ready_while_nothing_runs_touches_nothing_that_requests_use(model: Path, tp: int) -> None:
    """The prompt's blocks stay in the cache meanwhile, and are read afterwards."""
    engine = LLMEngine(model, config(max_prefill_token_num=96, tp=tp))
    runner = engine._executor._runner  # type: ignore[attr-defined]
    runner._graphs = batches = PaddedBatches(runner, engine.config)
    prompt = [3 + 7 * j % 500 for j in range(80)]
    engine.add_request(request("before", prompt, count=12))
    before = tokens_of(drain(engine)["before"])
    num_steps = len(batches.shapes)
    while engine.prepare():
        pass
    prepared = batches.shapes[num_steps:]
    assert {shape.is_decode for shape in prepared} == {True, False} and len(prepared) > 2
    assert prepared[::2] == prepared[1::2], "what the first captures the second launches, which the first time takes longer"
    engine.add_request(request("after", prompt, count=12))
    assert not engine.prepare(), "requests go first"
    outputs = drain(engine)["after"]
    assert tokens_of(outputs) == before and outputs[-1].num_cached_tokens > 0
    engine.close()


@pytest.mark.parametrize(("max_batch_size", "session_blocks"), [(1, 32), (8, 32), (8, 2), (1, 1)])
def test_the_batches_that_memory_is_measured_with_run(model: Path, max_batch_size: int, session_blocks: int) -> None:
    """On a GPU their peak is what is kept free; here they only run, as a GPU's kernels would see them."""
    build = BuildContext(dtype=torch.float32, device=torch.device("cpu"), backend="torch")
    runner = ModelRunner(open_checkpoint(model), session_len=512, build=build, parallel=Parallel())
    limits = BatchLimits(max_tokens=96, max_slots=max_batch_size + 1, max_blocks=session_blocks)
    runner.allocate(1, 16, limits, graphs=False)
    with torch.inference_mode():
        runner._run_largest(limits, 16)
        runner.load_kernels(limits, 16)
        runner._run_largest_classes(limits, 16)
        runner._take_activations(limits, 16)


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made by operators inside of it held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self._storages[reference.cdata] = reference, storage.nbytes()
        self._storages = {key: kept for key, kept in self._storages.items() if not kept[0].expired()}
        self.peak = max(self.peak, sum(num_bytes for _, num_bytes in self._storages.values()))
        return result


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("qwen2-window-in-upper-layers", {"max_window_layers": 3})])
def test_few_layers_take_as_much_memory_as_all(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """A start measures with few."""
    folder = write_checkpoint(family, tmp_path / "model", num_hidden_layers=6, **changes)
    build = BuildContext(dtype=torch.float32, device=torch.device("cpu"), backend="torch")
    runner = ModelRunner(open_checkpoint(folder), session_len=512, build=build, parallel=Parallel())
    limits = BatchLimits(max_tokens=96, max_slots=9, max_blocks=32)
    runner.allocate(1, 16, limits, graphs=False)
    for shape, words in largest_steps(limits, 512):
        with torch.inference_mode(), LiveBytes() as whole:
            runner.execute(words, shape, None).read()
        with torch.inference_mode(), LiveBytes() as brief:
            runner._run_briefly(shape, words)
        assert brief.peak == whole.peak > 96 * 64 * 4


def test_requests_behind_one_prefix_read_it_together_and_answer_as_if_each_read_it_itself(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groupings: list[Any] = []
    find = prefix_groups.PrefixGroups.group

    def recorded(self: prefix_groups.PrefixGroups, slots: Any) -> Any:
        groupings.append(find(self, slots))
        return groupings[-1]

    monkeypatch.setattr(prefix_groups.PrefixGroups, "group", recorded)
    results = []
    for least, padded in ((1 << 30, False), (1, False), (1, True)):
        monkeypatch.setattr(prefix_groups, "LEAST_SAVING_ON_CPU", least)
        groupings.clear()
        engine = LLMEngine(model, config(max_prefill_token_num=96))
        if padded:
            runner = engine._executor._runner  # type: ignore[attr-defined]
            runner._graphs = batches = PaddedBatches(runner, engine.config)
        for i in range(6):
            engine.add_request(request(str(i), [5] * 64 * (i < 4) + [7 + i] * (3 + 20 * i), count=30, num_logprobs=1))
        results.append(drain(engine))
        engine.close()
        most = max(0 if grouping is None else len(grouping.members) for grouping in groupings)
        assert most == (4 if least == 1 else 0)
    assert {shape.is_decode for shape in batches.shapes if shape.max_own_len} == {True, False}
    alone, *grouped = results
    for together in grouped:
        for name, outputs in together.items():
            assert tokens_of(outputs) == tokens_of(alone[name])
            for ours, theirs in zip(outputs, alone[name], strict=True):
                assert ours.logprobs is not None and theirs.logprobs is not None
                assert ours.logprobs[0].chosen == pytest.approx(theirs.logprobs[0].chosen, abs=1e-4)


# ---- settings and memory


def test_auto_session_length_is_the_models_or_what_the_cache_holds(model: Path) -> None:
    for blocks, expected in ((128, 1024), (40, 640)):
        engine = LLMEngine(model, config(session_len=None, num_cache_blocks=blocks))
        assert engine.session_len == expected
        engine.close()


@pytest.mark.parametrize(
    ("settings", "error", "cause"),
    [
        ({"num_cache_blocks": 31}, CapacityError, "496 tokens"),
        ({"num_cache_blocks": 1 << 40}, CapacityError, "are free"),
        ({"num_cache_blocks": 8, "session_len": None}, CapacityError, "128 tokens"),
        ({"session_len": 2048}, ConfigurationError, "made for 1024"),
        ({"tp": 8}, ConfigurationError, "4 attention heads"),
        ({"device": "cpu", "backend": "cuda"}, ConfigurationError, "cuda backend"),
        ({"device": "cpu", "backend": "triton"}, ConfigurationError, "triton backend"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_cause_and_cure(model: Path, settings: dict[str, Any], error: Any, cause: str) -> None:
    with pytest.raises(error, match=cause) as raised:
        LLMEngine(model, config(**settings))
    assert raised.value.cure and ("num_cache_blocks" in raised.value.cure) == ("tokens" in cause)


def test_the_cache_is_sized_from_free_memory_and_never_larger_than_it_can_be_used(model: Path) -> None:
    engine = LLMEngine(model, config(num_cache_blocks=None, session_len=None))
    assert engine.stats().num_cache_blocks == 8 * 1024 // 16
    engine.close()


def test_stats_compare_the_planners_formula_with_what_was_allocated(model: Path) -> None:
    engine = LLMEngine(model, config())
    memory = engine.stats().memory
    assert memory.cache_bytes_per_token == memory.estimated_cache_bytes_per_token
    assert memory.weight_bytes <= memory.estimated_weight_bytes <= memory.weight_bytes * 1.08
    assert memory.cache_bytes == 64 * 16 * memory.cache_bytes_per_token
    engine.close()


@pytest.mark.parametrize("name", ["llama", "qwen2-tied"])
def test_the_estimate_holds_where_files_have_more_than_is_loaded(name: str, tmp_path: Path) -> None:
    """A head beside the embedding that is tied to it, old buffers, and float32 though config.json says bfloat16."""
    folder = write_checkpoint(name, tmp_path / "model")
    edit_config(folder, dtype="bfloat16", torch_dtype=None)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    if name == "qwen2-tied":
        extra["lm_head.weight"] = torch.zeros(512, 64)
    edit_weights(folder, lambda tensors: tensors.update(extra))
    engine = LLMEngine(folder, config(dtype="bfloat16"))
    memory = engine.stats().memory
    engine.close()
    assert memory.weight_bytes <= memory.estimated_weight_bytes <= memory.weight_bytes * 1.03


def test_stats_count_what_happened(model: Path) -> None:
    engine = LLMEngine(model, config())
    for name in ("a", "b"):
        engine.add_request(request(name, list(range(3, 40)), count=10))
        drain(engine)
    stats = engine.stats()
    assert (stats.num_queried_tokens, stats.num_generated_tokens, stats.num_finished) == (74, 20, 2)
    assert (stats.num_cached_tokens, stats.prefix_hit_rate) == (32, 32 / 74)
    assert stats.step_times.launch_s > 0
    engine.reset_prefix_cache()
    engine.add_request(request("c", list(range(3, 40)), count=10))
    assert engine.stats().num_queried_tokens == 74, "who waits has not been looked up"
    assert drain(engine)["c"][0].num_cached_tokens == 0
    engine.close()
    assert engine.stats().num_finished == 3, "the last figures can be read after the end"


def test_a_model_with_its_own_end_of_sequence_tokens_stops_there(model: Path, broken: Path) -> None:
    engine = LLMEngine(model, config())
    assert engine.eos_token_ids == (2,)
    engine.add_request(request("a", [5, 6, 7], count=20))
    tokens = tokens_of(drain(engine)["a"])
    engine.close()
    (broken / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokens[4], 2]}))
    engine = LLMEngine(broken, config())
    assert engine.eos_token_ids == (tokens[4], 2)
    engine.add_request(request("a", [5, 6, 7], count=20, ignore_eos=False))
    outputs = drain(engine)["a"]
    engine.close()
    assert tokens_of(outputs) == tokens[: tokens.index(tokens[4]) + 1]
    assert outputs[-1].finish_reason == "stop"


# ---- beyond the trained context


@pytest.mark.parametrize(
    ("name", "rope", "session_len"),
    [
        ("qwen3-biases-dynamic-rope", {"rope_type": "dynamic", "factor": 2.0}, 128),
        ("mistral-no-window-yarn", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, None),
    ],
)
def test_an_answer_goes_beyond_the_models_limit_as_transformers_generates(
    name: str, rope: dict[str, Any], session_len: int | None, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_checkpoint(name, tmp_path / "model")
    edit_config(folder, max_position_embeddings=64, rope_parameters={"rope_theta": 10000.0, **rope})
    prompt = list(range(10, 60))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([prompt])
    generated = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, eos_token_id=511)
    engine = LLMEngine(folder, config(session_len=session_len))
    assert engine.session_len == 128
    engine.add_request(request("a", prompt, count=40))
    tokens = tokens_of(drain(engine)["a"])
    engine.close()
    assert tokens == generated[0, 50:].tolist()


# ---- several ranks


def _children() -> set[int]:
    """Ranks of this process's engines that still run."""
    children = {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}
    return {pid for pid in children if b"gantline_runtime.rank_process" in Path(f"/proc/{pid}/cmdline").read_bytes()}


def test_a_rank_that_dies_ends_the_engine_with_its_reason_and_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = _children()
    engine = LLMEngine(model, config(tp=2))
    engine.add_request(request("a", [5, 6, 7], count=200))
    engine.step()
    (worker,) = _children() - before
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(RankError, match="rank 1 was ended by SIGKILL"):
        for _ in range(100):
            engine.step()
    assert engine.has_work(), "an idle engine must report it, too"
    engine.close()
    assert _children() == before
    assert not list(tmp_path.iterdir()), "where the ranks met is removed"


def test_an_idle_engine_notices_a_dead_rank(model: Path) -> None:
    before = _children()
    engine = LLMEngine(model, config(tp=2))
    assert not engine.has_work()
    (worker,) = _children() - before
    os.kill(worker, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while not engine.has_work() and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(RankError, match="rank 1"):
        engine.step()
    engine.close()


def test_an_error_while_ranks_load_ends_them_all(model: Path) -> None:
    before = _children()
    with pytest.raises(CapacityError):
        LLMEngine(model, config(tp=2, num_cache_blocks=31))
    assert _children() == before
