"""`from gantline_runtime import pipeline` and `gantline chat`: batches, streams, sessions, over the shipped model."""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from gantline_runtime import GenerationConfig, cli, pipeline
from gantline_runtime.config import EngineConfig
from gantline_runtime.errors import CheckpointError, ConfigurationError
from gantline_runtime.offline import Pipeline, Response
from safetensors.torch import load_file, save_file

TINY = Path(__file__).parents[2] / "examples/tiny-model"
QUESTIONS = ["What does os.path.join do?", "Hello!", "The licence"]
SHORT = GenerationConfig(max_new_tokens=24)


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with pipeline(TINY, EngineConfig(device="cpu", num_cache_blocks=64, session_len=512), progress=False) as made:
        yield made


def test_a_prompt_gets_a_response_and_a_list_a_list_in_its_order(pipe: Pipeline) -> None:
    single = pipe(QUESTIONS[0], SHORT)
    assert isinstance(single, Response) and "path" in single.text and single.finish_reason in ("stop", "length")
    batch = pipe(QUESTIONS, SHORT)
    assert isinstance(batch, list) and [answer.index for answer in batch] == [0, 1, 2]
    assert batch[0].text == single.text and len({answer.text for answer in batch}) == 3
    assert all(answer.generate_token_len == len(answer.token_ids) <= 24 and answer.input_token_len > 0 for answer in batch)


def test_texts_messages_and_tokens_of_one_prompt_are_answered_alike(pipe: Pipeline) -> None:
    messages = [{"role": "user", "content": QUESTIONS[1]}]
    ids = pipe.tokenizer.encode(pipe.render(messages), add_special_tokens=False)
    answers = pipe.batch_infer([QUESTIONS[1], messages, ids], SHORT)
    assert len({answer.text for answer in answers}) == 1
    assert pipe.batch_infer([QUESTIONS[1]], SHORT, do_preprocess=False)[0].input_token_len < answers[0].input_token_len


def test_a_streams_pieces_are_the_whole_answer(pipe: Pipeline) -> None:
    parts = list(pipe.stream_infer(QUESTIONS, SHORT))
    whole = pipe.batch_infer(QUESTIONS, SHORT)
    for i, answer in enumerate(whole):
        assert "".join(part.text for part in parts if part.index == i) == answer.text
    assert len(parts) > len(whole)


def test_a_batch_longer_than_the_queue_is_answered_whole_and_in_order() -> None:
    config = EngineConfig(device="cpu", num_cache_blocks=64, session_len=512, max_batch_size=2, max_waiting=1)
    with pipeline(TINY, config, progress=False) as small:
        answers = small.batch_infer([f"Number {i}" for i in range(12)], GenerationConfig(max_new_tokens=2, ignore_eos=True))
    assert [answer.index for answer in answers] == list(range(12)) and {answer.generate_token_len for answer in answers} == {2}


def test_a_stream_that_is_left_early_ends_its_requests(pipe: Pipeline) -> None:
    stream = pipe.stream_infer(QUESTIONS, GenerationConfig(max_new_tokens=200, ignore_eos=True))
    next(stream)
    stream.close()
    while pipe.engine.has_work():
        pipe.engine.step()
    stats = pipe.engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.cache_usage) == (0, 0, 0.0)


def test_stop_words_seeds_and_log_probabilities_are_honoured(pipe: Pipeline) -> None:
    whole = pipe.batch_infer([QUESTIONS[0]], SHORT)[0].text
    word = whole.split()[3]
    stopped = pipe.batch_infer([QUESTIONS[0]], GenerationConfig(max_new_tokens=24, stop_words=(word,)))[0]
    assert stopped.text == whole[: whole.index(word)] and stopped.finish_reason == "stop"
    sampled = GenerationConfig(max_new_tokens=16, do_sample=True, temperature=1.5, random_seed=7, logprobs=2, ignore_eos=True)
    one, two = (pipe.batch_infer([QUESTIONS[1]], sampled)[0] for _ in range(2))
    assert one.text == two.text and one.logprobs is not None and len(one.logprobs) == 16
    assert all(entry.chosen <= 0 and len(entry.top_ids) == 2 for entry in one.logprobs)


def test_the_loss_of_texts_is_what_the_server_tells_of_them(pipe: Pipeline) -> None:
    ids = pipe.tokenizer.encode("The licence of the work is that of its licensor.")
    alone, again, shuffled = pipe.get_ppl([ids, "The licence of the work is that of its licensor.", sorted(ids)])
    assert pipe.get_ppl(ids) == [pytest.approx(alone)] and again == pytest.approx(alone) and 0 < alone < shuffled
    echoed = pipe([ids], GenerationConfig(max_new_tokens=1))
    assert isinstance(echoed, list) and pipe.engine.stats().num_running == 0
    for wrong in ([5], "", [5] * 513, [pipe.tokenizer.vocab_size, 1]):
        with pytest.raises(ConfigurationError):
            pipe.get_ppl([ids, wrong])
    assert not pipe.engine.has_work()


def test_a_session_remembers_its_turns_and_forgets_one_that_was_left(pipe: Pipeline) -> None:
    session = pipe.session(SHORT, system="Be brief.")
    first = session.chat(QUESTIONS[1])
    assert [message["role"] for message in session.history] == ["system", "user", "assistant"]
    stream = session.stream(QUESTIONS[0])
    next(stream)
    stream.close()
    assert len(session.history) == 3
    assert pipe.chat(QUESTIONS[0], session) is session
    assert session.response.input_token_len > first.input_token_len and session.response.cached_tokens >= 0
    assert [message["content"] for message in session.history[1:3]] == [QUESTIONS[1], first.text]


def test_bad_prompts_and_settings_are_refused_before_anything_runs(pipe: Pipeline) -> None:
    with pytest.raises(ConfigurationError, match="600 tokens"):
        pipe([QUESTIONS[0], [5] * 600])
    with pytest.raises(ConfigurationError, match="temperature is 3"):
        GenerationConfig(temperature=3)
    with pytest.raises(CheckpointError):
        pipe([[{"role": "nobody"}]])
    with pytest.raises(ConfigurationError, match="stop_words is 'end'"):
        GenerationConfig(stop_words="end")  # type: ignore[arg-type]
    for strange in (b"bytes", 5, None, ["a", b"b"], {"role": "user", "content": "Hello!"}):
        with pytest.raises(ConfigurationError, match="a prompt is of the type"):
            pipe(strange)  # type: ignore[arg-type]
    for read in (pipe, pipe.get_ppl):
        with pytest.raises(ConfigurationError, match="has a token outside of 0 to 4095"):
            read([[1, 2, 3], [1, 4096]])
    assert not pipe.engine.has_work()


def test_a_pipeline_that_is_closed_says_so() -> None:
    with pipeline(TINY, EngineConfig(device="cpu", num_cache_blocks=8, session_len=512), progress=False) as made:
        pass
    with pytest.raises(ConfigurationError, match="the pipeline is closed"):
        made("Hello!")


def test_weights_that_are_no_numbers_are_found_out_before_anything_is_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"] * math.nan}, tmp_path / "model/model.safetensors")
    assert cli.main(["generate", str(tmp_path / "model"), "Hello!", "--device", "cpu", "--num-cache-blocks", "32"]) == 65
    captured = capsys.readouterr()
    assert not captured.out and "the smoke request failed: the log-probability of its token is no such number: [nan]" in captured.err


@pytest.mark.parametrize("declares", [True, False])
def test_an_answer_ends_at_the_tokenizers_end_where_the_configuration_names_another_token(declares: bool, tmp_path: Path) -> None:
    """As a base model's configuration does after fine-tuning for chats."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("generation_config.json"))
    for name, changes in (
        ("config.json", {"eos_token_id": 0}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"2": {"content": "<|im_end|>"}}} if declares else {}),
    ):
        (folder / name).write_text(json.dumps({**json.loads((TINY / name).read_text()), **changes}))
    with pipeline(folder, EngineConfig(device="cpu", num_cache_blocks=16, session_len=512), progress=False) as made:
        answer = made("Hello!", GenerationConfig(max_new_tokens=100))
        assert isinstance(answer, Response) and (answer.finish_reason, answer.token_ids[-1]) == ("stop", 2)
        assert made.engine.eos_token_ids == (0, 2)


def test_gantline_chat_holds_a_conversation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [QUESTIONS[0], "/nonsense", "", "/reset", QUESTIONS[0], "/system Be brief.", QUESTIONS[1], "/exit", "never read"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    arguments = ["--temperature", "0", "--max-tokens", "16", "--num-cache-blocks", "16", "--session-len", "512", "--device", "cpu"]
    assert cli.main(["chat", str(TINY), *arguments]) == 0
    captured = capsys.readouterr()
    answers = captured.out.strip().split("\n")
    assert len(answers) == 3 and answers[0] == answers[1] and "path" in answers[0]
    assert "no command /nonsense" in captured.err and captured.err.count("begins anew") == 2


def test_a_model_without_a_chat_template_cannot_chat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in ("config.json", "tokenizer.json"):
        (tmp_path / file).write_bytes((TINY / file).read_bytes())
    assert cli.main(["chat", str(tmp_path)]) == 65
    assert "gantline generate --raw" in capsys.readouterr().err


def test_the_documents_example_runs_as_it_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    document = (TINY.parents[1] / "docs/python.md").read_text()
    code = document.split("```python\n")[1].split("```")[0]
    code = code.replace("max_batch_size=64", "max_batch_size=4, device='cpu', num_cache_blocks=32")
    monkeypatch.chdir(TINY.parents[1])
    exec(compile(code, "docs/python.md", "exec"), {})
    assert "path" in capsys.readouterr().out
