"""Checkpoints that are sound are understood; any other is turned down with the reason, the file and the tensor."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gantline_runtime.checkpoint import LocalFiles, open_checkpoint, quantized_linears
from gantline_runtime.errors import CheckpointError, GantlineError, SourceError
from gantline_runtime.model_facts import ModelFacts
from gantline_runtime.termination import Reason

from tests.runtime.checkpoint_files import (
    AWQ,
    CONFIG,
    LFS_POINTER,
    build_header,
    encode,
    model_files,
    safetensors_bytes,
    tensors_of,
    write_files,
)
from tests.runtime.checkpoints import CONFIGURATIONS, write_checkpoint

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def refused(folder: Path, reason: Reason, *words: str) -> CheckpointError:
    with pytest.raises(GantlineError) as caught:
        open_checkpoint(folder)
    assert caught.value.reason == reason, caught.value
    for word in words:
        assert word in str(caught.value)
    assert caught.value.cure
    return caught.value  # type: ignore[return-value]


def sharded_files() -> dict[str, bytes]:
    tensors = tensors_of(CONFIG)
    halves = [dict(list(tensors.items())[:9]), dict(list(tensors.items())[9:])]
    placed = {name: shard for shard, half in zip(SHARDS, halves, strict=True) for name in half}
    return {
        "config.json": json.dumps(CONFIG).encode(),
        INDEX: json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}).encode(),
        **{shard: safetensors_bytes(half) for shard, half in zip(SHARDS, halves, strict=True)},
    }


# What is sound


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_what_transformers_saves_is_understood(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(name, tmp_path / "model"))
    assert checkpoint.unused == ()
    assert checkpoint.facts.family == CONFIGURATIONS[name][0]
    assert ModelFacts.from_json(json.loads(json.dumps(checkpoint.facts.to_json()))) == checkpoint.facts


def test_a_tensor_is_found_at_its_offsets(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    checkpoint = open_checkpoint(write_checkpoint("qwen3", tmp_path / "model"))
    info = checkpoint.tensors["model.layers.1.self_attn.k_norm.weight"]
    data = checkpoint.path(info.name).read_bytes()[info.start : info.end]
    expected = load_file(checkpoint.path(info.name))[info.name]
    assert torch.equal(torch.frombuffer(bytearray(data), dtype=torch.float32), expected)


def test_facts_count_the_bytes_of_all_shards(tmp_path: Path) -> None:
    whole = open_checkpoint(write_files(tmp_path / "one", model_files())).facts
    sharded = open_checkpoint(write_files(tmp_path / "two", sharded_files()))
    assert sharded.facts.weight_bytes == whole.weight_bytes
    assert sharded.shards == SHARDS


def test_awq_checkpoints_are_understood_with_the_modules_they_spare(tmp_path: Path) -> None:
    config = {"quantization_config": {**AWQ, "modules_to_not_convert": ["layers.1.mlp"]}}
    checkpoint = open_checkpoint(write_files(tmp_path, model_files(config)))
    assert checkpoint.facts.quantization is not None and checkpoint.facts.quantization.group_size == 32
    assert len(list(quantized_linears(checkpoint.shape))) == 7 + 4


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    def fingerprint(name: str, files: dict[str, bytes]) -> str:
        return open_checkpoint(write_files(tmp_path / name, files)).facts.fingerprint

    base = fingerprint("base", model_files())
    assert fingerprint("copy", model_files()) == base
    assert fingerprint("finetune", model_files(seed=5)) != base
    assert fingerprint("longer", model_files({"max_position_embeddings": 128})) != base


def test_a_snapshot_of_a_hugging_face_cache_is_read_through_its_links(tmp_path: Path) -> None:
    blobs = write_files(
        tmp_path / "models--org--name" / "blobs", {"a1": model_files()["config.json"], "b2": model_files()["model.safetensors"]}
    )
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for link, blob in (("config.json", "a1"), ("model.safetensors", "b2")):
        (snapshot / link).symlink_to(os.path.relpath(blobs / blob, snapshot))
    assert open_checkpoint(snapshot).facts.num_layers == 2
    assert str(snapshot) in refused(tmp_path / "models--org--name", Reason.NOT_A_MODEL).cure


def test_reading_a_checkpoint_imports_no_torch(tmp_path: Path) -> None:
    write_files(tmp_path, model_files())
    code = (
        f"import sys; from gantline_runtime.checkpoint import open_checkpoint; open_checkpoint({str(tmp_path)!r});"
        "print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# Not a model, or one we lack


def test_a_missing_folder_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist") as caught:
        open_checkpoint(tmp_path / "nothing")
    assert caught.value.reason == Reason.MODEL_NOT_FOUND


@pytest.mark.parametrize(
    ("name", "address"),
    [("hf://org/name", "hf://org/name"), ("s3://bucket/a/b", "s3://bucket/a/b"), ("org/name-1.5", "hf://org/name-1.5"), ("/a/b", "")],
)
def test_a_hubs_name_in_place_of_a_folder_is_told_how_it_is_downloaded(name: str, address: str) -> None:
    with pytest.raises(SourceError, match="does not exist") as caught:
        open_checkpoint(Path(name))
    assert (f"gantline fetch {address} " in caught.value.cure) == bool(address)


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"x")
    refused(tmp_path / "weights", Reason.NOT_A_MODEL)


@pytest.mark.parametrize(
    ("files", "cure"),
    [
        ({}, "config.json"),
        ({"notes.txt": b"hello"}, "config.json"),
        ({"adapter_config.json": b"{}"}, "base model"),
        ({"model.Q4.gguf": b"GGUF"}, "GGUF"),
        ({"config.json": json.dumps(CONFIG).encode()}, "safetensors"),
        ({"config.json": b'{"hello": 1}', "model.safetensors": b""}, "language model"),
    ],
)
def test_a_folder_that_holds_no_model_says_so(files: dict[str, bytes], cure: str, tmp_path: Path) -> None:
    assert cure in refused(write_files(tmp_path, files), Reason.NOT_A_MODEL).cure


@pytest.mark.parametrize(("hidden", "heads", "dim"), [(288, 6, 48), (3200, 32, 100)])
def test_heads_that_attention_is_not_built_for_are_refused_before_anything_is_loaded(
    hidden: int, heads: int, dim: int, tmp_path: Path
) -> None:
    """Those of stories15M and of OpenLLaMA 3B: they were loaded whole, and the first step failed."""
    changes = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": heads}
    files = model_files() | {"config.json": json.dumps(CONFIG | changes).encode()}
    error = refused(write_files(tmp_path, files), Reason.UNSUPPORTED_ARCHITECTURE, f"dimension {dim}")
    assert "64, 80, 96" in error.cure


def test_the_dimensions_of_heads_that_pass_here_are_those_of_the_kernels() -> None:
    from gantline_kernels import api
    from gantline_runtime.checkpoint import shape

    assert shape.HEAD_DIMS == api.HEAD_DIMS


def test_a_variant_without_an_implementation_of_ours_is_left_to_transformers(tmp_path: Path) -> None:
    files = model_files() | {"config.json": json.dumps(CONFIG | {"hidden_act": "gelu", "head_dim": 16}).encode()}
    assert open_checkpoint(write_files(tmp_path, files)).facts.family == "transformers"


def test_the_rotary_embeddings_that_pass_here_are_those_of_the_engine() -> None:
    from gantline_runtime.checkpoint.shape import ROPE_TYPES
    from gantline_runtime.layers.rope import parse_rope

    for kind in ROPE_TYPES:
        section = {
            "rope_type": kind,
            "factor": 2.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
        assert parse_rope({"rope_parameters": section}, 16, 64).kind == kind


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt", "model.pkl"])
def test_weights_that_are_pickles_are_unsafe(name: str, tmp_path: Path) -> None:
    files = {"config.json": json.dumps(CONFIG).encode(), name: b"\x80\x02"}
    refused(write_files(tmp_path, files), Reason.UNSAFE_WEIGHTS, name)


# Damage


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": None}, ["hidden_size"]),
        ({"hidden_size": -4}, ["hidden_size", "-4"]),
        ({"hidden_size": True}, ["hidden_size"]),
        ({"hidden_size": "32"}, ["hidden_size"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers"]),
        ({"num_hidden_layers": 1}, ["model.layers.1"]),
        ({"num_hidden_layers": 3}, ["model.layers.2", "missing"]),
        ({"vocab_size": 17}, ["embed_tokens", "[16, 32]", "[17, 32]"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings"]),
        ({"head_dim": 7}, ["head_dim"]),
        ({"torch_dtype": "int4"}, ["int4"]),
        ({"attention_bias": True}, ["bias", "missing"]),
        ({"architectures": ["Qwen3ForCausalLM"], "head_dim": 16}, ["q_norm", "missing"]),
    ],
)
def test_a_configuration_that_contradicts_the_weights_names_the_field_or_the_tensor(
    changes: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    files = model_files() | {"config.json": json.dumps(CONFIG | changes).encode()}
    refused(write_files(tmp_path, files), Reason.INVALID_CHECKPOINT, *words)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"null",
        b'{"a": 1',
        b"\xff\xfe",
        b'{"hidden_size": NaN}',
        b'{"a": 1, "a": 2}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"n": 1' + b"0" * 9999 + b"}",
    ],
)
def test_a_configuration_that_is_no_json_object_is_turned_down(text: bytes, tmp_path: Path) -> None:
    refused(write_files(tmp_path, model_files() | {"config.json": text}), Reason.INVALID_CHECKPOINT, "config.json")


@pytest.mark.parametrize(
    ("section", "word"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({**AWQ, "bits": 3}, "bits"),
        ({**AWQ, "bits": True}, "bits"),
        ({**AWQ, "group_size": 48}, "group_size"),
        ({**AWQ, "zero_point": False}, "zero_point"),
        ({**AWQ, "version": "gemv"}, "version"),
        ({**AWQ, "group_size": 128}, "group_size 128"),
        ({**AWQ, "modules_to_not_convert": "all"}, "modules_to_not_convert"),
        (["awq"], "no" + "t an object"),
    ],
)
def test_a_quantization_that_is_not_served_says_which(section: Any, word: str, tmp_path: Path) -> None:
    files = model_files() | {"config.json": json.dumps(CONFIG | {"quantization_config": section}).encode()}
    refused(write_files(tmp_path, files), Reason.INVALID_QUANTIZATION, word)


def test_a_quantized_configuration_over_plain_weights_names_the_missing_tensor(tmp_path: Path) -> None:
    files = model_files() | {"config.json": json.dumps(CONFIG | {"quantization_config": AWQ}).encode()}
    refused(write_files(tmp_path, files), Reason.INVALID_CHECKPOINT, "qweight", "missing")


def test_packed_weights_of_another_type_are_turned_down(tmp_path: Path) -> None:
    config = CONFIG | {"quantization_config": AWQ}
    tensors = tensors_of(config)
    name = "model.layers.0.mlp.up_proj.qzeros"
    tensors[name] = ("F32", tensors[name][1])
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": safetensors_bytes(tensors)}
    refused(write_files(tmp_path, files), Reason.INVALID_CHECKPOINT, name, "F32")


def test_a_bias_that_the_configuration_does_not_know_is_not_dropped_silently(tmp_path: Path) -> None:
    tensors = tensors_of(CONFIG) | {"model.layers.0.self_attn.q_proj.bias": ("BF16", (32,))}
    refused(
        write_files(tmp_path, model_files() | {"model.safetensors": safetensors_bytes(tensors)}), Reason.INVALID_CHECKPOINT, "q_proj.bias"
    )


def test_buffers_of_old_versions_are_ignored(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors = tensors_of(CONFIG) | {name: ("F32", (4,))}
    assert open_checkpoint(write_files(tmp_path, model_files() | {"model.safetensors": safetensors_bytes(tensors)})).unused == (name,)


@pytest.mark.parametrize("cut", [1, 100, 5000])
def test_a_truncated_file_is_named_with_the_tensor(cut: int, tmp_path: Path) -> None:
    files = model_files()
    files["model.safetensors"] = files["model.safetensors"][:-cut]
    refused(write_files(tmp_path, files), Reason.INVALID_CHECKPOINT, "model.safetensors", "truncated", "tensor")


def lying_headers() -> dict[str, bytes]:
    header, size = build_header(tensors_of(CONFIG))
    data = b"\0" * size
    name = "model.norm.weight"

    def changed(**entry: Any) -> bytes:
        lying = copy.deepcopy(header)
        lying[name] |= entry
        return encode(lying, data)

    begin, end = header[name]["data_offsets"]
    raw = json.dumps(header).encode()
    return {
        "length past the end": (1 << 40).to_bytes(8, "little") + raw + data,
        "length of everything": ((1 << 64) - 1).to_bytes(8, "little") + raw + data,
        "header cut": encode(raw[:-40], data),
        "not JSON": encode(b"\0" * 64, data),
        "a list": encode(b"[]" + b" " * 64, data),
        "empty file": b"",
        "eight bytes": b"\0" * 8,
        "duplicate name": encode(raw[:-1] + b"," + json.dumps({name: header[name]}).encode()[1:], data),
        "overlap": changed(data_offsets=[begin - 2, end - 2]),
        "past the end": changed(data_offsets=[size, size + end - begin]),
        "negative": changed(data_offsets=[-2, end - begin - 2]),
        "reversed": changed(data_offsets=[end, begin]),
        "floats": changed(data_offsets=[float(begin), float(end)]),
        "huge": changed(shape=[1 << 61, 1 << 61]),
        "bytes that do not fit the shape": changed(shape=[31]),
        "negative shape": changed(shape=[-1]),
        "boolean shape": changed(shape=[True]),
        "unknown dtype": changed(dtype="Q4_K"),
        "list as dtype": changed(dtype=["F32"]),
        "extra key": changed(more=1),
        "trailing bytes": encode(header, data + b"tail"),
        "hole": encode(header | {"x": {"dtype": "U8", "shape": [1], "data_offsets": [size + 8, size + 9]}}, data + b"\0" * 9),
    }


@pytest.mark.parametrize("kind", lying_headers())
def test_a_header_that_lies_is_caught(kind: str, tmp_path: Path) -> None:
    files = model_files() | {"model.safetensors": lying_headers()[kind]}
    refused(write_files(tmp_path, files), Reason.INVALID_CHECKPOINT, "model.safetensors")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    files = sharded_files()
    del files[SHARDS[1]]
    refused(write_files(tmp_path, files), Reason.INVALID_CHECKPOINT, SHARDS[1])


def test_a_tensor_in_two_shards_is_turned_down(tmp_path: Path) -> None:
    files = sharded_files()
    files[SHARDS[1]] = files[SHARDS[0]]
    refused(write_files(tmp_path, files), Reason.INVALID_CHECKPOINT, *SHARDS)


def test_an_index_that_misplaces_a_tensor_is_turned_down(tmp_path: Path) -> None:
    files = sharded_files()
    index = json.loads(files[INDEX])
    index["weight_map"]["model.norm.weight"] = SHARDS[1] if index["weight_map"]["model.norm.weight"] == SHARDS[0] else SHARDS[0]
    refused(write_files(tmp_path, files | {INDEX: json.dumps(index).encode()}), Reason.INVALID_CHECKPOINT, "model.norm.weight")


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin", "x\0.safetensors", 7, None])
def test_an_index_cannot_lead_out_of_the_folder(place: Any, tmp_path: Path) -> None:
    files = sharded_files()
    index = json.loads(files[INDEX])
    index["weight_map"]["model.norm.weight"] = place
    write_files(tmp_path, {"secret.safetensors": files[SHARDS[0]]})
    refused(write_files(tmp_path / "model", files | {INDEX: json.dumps(index).encode()}), Reason.INVALID_CHECKPOINT, INDEX)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_link_that_leads_out_of_the_folder_is_not_followed(name: str, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "model", model_files())
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    refused(folder, Reason.INVALID_CHECKPOINT, name, "link")


def test_a_link_to_nothing_is_named_with_where_it_leads(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "model", model_files())
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../../blobs/b2")
    error = refused(folder, Reason.INVALID_CHECKPOINT, "model.safetensors", "'../../blobs/b2', where nothing is")
    assert "cp -L" in error.cure


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pointer_of_git_lfs_in_place_of_a_file_is_told_from_a_truncated_one(name: str, tmp_path: Path) -> None:
    folder = write_files(tmp_path, {**model_files(), name: LFS_POINTER})
    assert "git lfs pull" in refused(folder, Reason.INVALID_CHECKPOINT, name, "pointer of Git LFS").cure


def test_a_pipe_in_place_of_the_weights_is_never_opened(tmp_path: Path) -> None:
    folder = write_files(tmp_path, {"config.json": model_files()["config.json"]})
    os.mkfifo(folder / "model.safetensors")
    refused(folder, Reason.NOT_A_MODEL)


def test_several_files_without_an_index_are_turned_down(tmp_path: Path) -> None:
    files = sharded_files()
    del files[INDEX]
    refused(write_files(tmp_path, files), Reason.INVALID_CHECKPOINT, INDEX)


def test_an_unreadable_file_is_an_error_with_a_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_files(tmp_path, model_files())
    real = Path.open

    def denied(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == "model.safetensors":
            raise PermissionError(13, "Permission denied")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", denied)
    refused(folder, Reason.INVALID_CHECKPOINT, "Permission denied")


def test_names_from_files_are_escaped_and_cut_in_messages(tmp_path: Path) -> None:
    tensors = tensors_of(CONFIG) | {"model.layers.0." + "\x1b[31m" * 200: ("BF16", (1,))}
    error = refused(write_files(tmp_path, model_files() | {"model.safetensors": safetensors_bytes(tensors)}), Reason.INVALID_CHECKPOINT)
    assert "\x1b" not in str(error) and len(str(error)) < 400


# Five hundred mutations


def mutate(files: dict[str, bytes], rng: random.Random) -> dict[str, bytes]:
    """One to three random changes to one file's structure: its bytes, its length, its header's values, or the file itself."""
    files = dict(files)
    name = rng.choice(sorted(files))
    content = bytearray(files[name])
    head = min(len(content), 3000)
    for _ in range(rng.randint(1, 3)):
        kind = rng.randrange(8)
        if kind == 0 and content:
            content[rng.randrange(head or 1) % len(content)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[rng.randrange(len(content) + 1) :]
        elif kind == 2:
            at = rng.randrange(head + 1)
            content[at:at] = rng.randbytes(rng.randint(1, 9))
        elif kind == 3 and len(content) > 8:
            content[:8] = rng.choice([0, 2, len(content), 1 << 33, (1 << 64) - 1, rng.getrandbits(24)]).to_bytes(8, "little")
        elif kind == 4:
            digits = [i for i in range(head) if i < len(content) and chr(content[i]).isdigit()]
            if digits:
                content[rng.choice(digits)] = ord(rng.choice("0123456789-.e"))
        elif kind == 5 and head:
            at = rng.randrange(head)
            del content[at : at + rng.randint(1, 40)]
        elif kind == 6:
            content += rng.randbytes(rng.randint(1, 20))
        else:
            content = bytearray(
                bytes(content).replace(
                    rng.choice([b'"F16"', b'"BF16"', b"[", b"{", b":", b"0"]), rng.choice([b'"F64"', b"1", b"{", b"null"]), 1
                )
            )
    files[name] = bytes(content)
    if rng.random() < 0.05:
        del files[rng.choice(sorted(files))]
    return files


@pytest.mark.timeout(60)
def test_five_hundred_mutated_checkpoints_are_each_read_or_refused_with_a_reason(tmp_path: Path) -> None:
    rng = random.Random(20261121)
    sources = [model_files(), sharded_files(), model_files({"quantization_config": AWQ})]
    outcomes: dict[str, int] = {}
    for number in range(500):
        folder = write_files(tmp_path / str(number), mutate(rng.choice(sources), rng))
        try:
            checkpoint = open_checkpoint(folder)
        except GantlineError as error:
            assert error.cure and len(str(error)) < 1000
            outcomes[error.reason] = outcomes.get(error.reason, 0) + 1
        else:
            # What survived is sound as far as headers can tell: every tensor lies inside its file.
            files = LocalFiles(folder)
            assert all(tensor.end <= files.sizes[tensor.file] for tensor in checkpoint.tensors.values())
            outcomes["read"] = outcomes.get("read", 0) + 1
    assert outcomes[Reason.INVALID_CHECKPOINT] > 300, outcomes
    assert set(outcomes) <= {*(r.value for r in Reason), "read"}
