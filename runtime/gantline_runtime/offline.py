"""Use a model from Python, without a server: offline batches, streams and chat sessions.

    from gantline_runtime import GenerationConfig, pipeline

    with pipeline("examples/tiny-model") as pipe:
        print(pipe("What does os.path.join do?").text)                             # one prompt, one Response
        for response in pipe(["Hello!", "Who are you?"]): ...                      # a batch, answered in the order of its prompts
        for part in pipe.stream_infer("Hello!", GenerationConfig(do_sample=True)): ...   # pieces of text as they are made
        session = pipe.session()
        session.chat("Hello!"); session.chat("And now?")                           # turns over one history

The shape is LMDeploy's: prompts are texts (a user's message where the model has a chat template), lists of messages as OpenAI has them, or
lists of token numbers; `do_preprocess=False` takes a text as it stands. Prompts of a batch run together in the engine, and share what their
beginnings have in common. Not for several threads: one thread at a time uses a pipeline.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from gantline_runtime.chat_template import ChatTemplate, TemplateError
from gantline_runtime.commands.display import LoadingDisplay
from gantline_runtime.config import EngineConfig
from gantline_runtime.engine import LLMEngine
from gantline_runtime.errors import CheckpointError, ConfigurationError
from gantline_runtime.generation_config import GenerationConfig
from gantline_runtime.generation_defaults import GenerationDefaults
from gantline_runtime.messages import EngineRequest, FinishReason, SamplingParams, TokenLogprobs
from gantline_runtime.request import QueueFull
from gantline_runtime.server.output import ChoiceOutput
from gantline_runtime.tokenizer import Tokenizer

__all__ = ["GenerationConfig", "Pipeline", "Response", "Session", "pipeline"]

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]


@dataclass
class Response:
    """An answer, or in a stream the piece that was added: `text`, `token_ids` and `logprobs` are the piece's, counts are those so far."""

    text: str = ""
    generate_token_len: int = 0
    input_token_len: int = 0
    finish_reason: FinishReason | None = None
    """`stop`, `length`; None while the answer goes on."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    index: int = 0
    """Which prompt of the batch it answers."""
    cached_tokens: int = 0
    """Tokens of the prompt that the prefix cache had."""


def pipeline(model_path: str | Path, backend_config: EngineConfig | None = None, *, progress: bool = True) -> Pipeline:
    """Load the model in the folder `model_path`; `progress` shows how that goes on standard error.

    Raises GantlineError (cause and cure) if it cannot be served.
    """
    return Pipeline(model_path, backend_config or EngineConfig(), progress=progress)


class Pipeline:
    """One loaded model. A context manager; `close` gives its memory back."""

    def __init__(self, model_path: str | Path, config: EngineConfig, *, progress: bool = True) -> None:
        self.tokenizer = Tokenizer.load(model_path)
        self._defaults = GenerationDefaults.load(model_path)
        source = self.tokenizer.chat_template
        self._template = None if source is None else ChatTemplate(source, self.tokenizer.special_tokens)
        with LoadingDisplay() as display:
            self._engine = LLMEngine(model_path, config, on_progress=display.show if progress else None)
        self._names = count()

    def __call__(
        self, prompts: Prompt | Sequence[Prompt], gen_config: GenerationConfig | None = None, *, do_preprocess: bool = True
    ) -> Response | list[Response]:
        """One `Response` for one prompt, a list in the order of the prompts for a list of them."""
        batch, single = _as_batch(prompts)
        answers = [Response(index=i) for i in range(len(batch))]
        for part in self.stream_infer(batch, gen_config, do_preprocess=do_preprocess):
            _append(answers[part.index], part)
        return answers[0] if single else answers

    infer = __call__

    def batch_infer(
        self, prompts: Sequence[Prompt], gen_config: GenerationConfig | None = None, *, do_preprocess: bool = True
    ) -> list[Response]:
        """As calling the pipeline with a list."""
        return cast(list[Response], self(list(prompts), gen_config, do_preprocess=do_preprocess))

    def stream_infer(
        self, prompts: Prompt | Sequence[Prompt], gen_config: GenerationConfig | None = None, *, do_preprocess: bool = True
    ) -> Iterator[Response]:
        """Pieces of all answers as they are made, each with its `index`. Leaving the loop ends what still runs.

        Raises ConfigurationError for a prompt that is empty or leaves no token of the context, before anything runs.
        """
        batch, _ = _as_batch(prompts)
        config = gen_config or GenerationConfig()
        encoded = [self._encode(prompt, do_preprocess) for prompt in batch]
        running: dict[str, _Answer] = {}
        try:
            pending, room = deque(enumerate(encoded)), True
            while pending or running:
                if room:
                    self._fill(pending, running, config)
                before = len(running)
                yield from self._advance(running)
                room = len(running) < before
        finally:
            for name in running:
                self._engine.abort(name)

    def session(self, gen_config: GenerationConfig | None = None, *, system: str = "") -> Session:
        """A conversation that remembers its turns."""
        return Session(self, gen_config or GenerationConfig(), system)

    def chat(self, prompt: str, session: Session | None = None, gen_config: GenerationConfig | None = None) -> Session:
        """One turn of `session` (a new one by default), which is returned; its `response` is the answer."""
        session = session or self.session(gen_config)
        session.chat(prompt, gen_config)
        return session

    @property
    def engine(self) -> LLMEngine:
        return self._engine

    def close(self) -> None:
        self._engine.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def render(self, messages: Sequence[Message]) -> str:
        """`messages` through the model's chat template. Raises CheckpointError if there is none, or if it refuses them."""
        if self._template is None:
            raise CheckpointError("the model has no chat template", cure="Give texts, not messages.")
        try:
            return self._template.render(messages)
        except TemplateError as error:
            raise CheckpointError(str(error), cure="Change the messages, or give a text with do_preprocess=False.") from None

    def _encode(self, prompt: Prompt, do_preprocess: bool) -> list[int]:
        if isinstance(prompt, str):
            if not do_preprocess or self._template is None:
                return self._checked(self.tokenizer.encode(prompt))
            prompt = [{"role": "user", "content": prompt}]
        if prompt and isinstance(prompt[0], int):
            return self._checked([int(cast(int, token)) for token in prompt])
        return self._checked(self.tokenizer.encode(self.render(cast(Sequence[Message], prompt)), add_special_tokens=False))

    def _checked(self, ids: list[int]) -> list[int]:
        limit = self._engine.session_len
        if not 0 < len(ids) < limit:
            cause = f"a prompt has {len(ids)} tokens; the context holds {limit}, with at least one to generate"
            raise ConfigurationError(cause, cure="Shorten the prompt, or raise session_len if the model allows it.")
        return ids

    def _fill(self, pending: deque[tuple[int, list[int]]], running: dict[str, _Answer], config: GenerationConfig) -> None:
        """Hand the engine as many of `pending` as may wait there; the rest follows when some have ended."""
        while pending:
            name, (index, ids) = f"pipeline-{next(self._names)}", pending[0]
            try:
                running[name] = self._begin(name, index, ids, config)
            except QueueFull:
                return
            pending.popleft()

    def _begin(self, name: str, index: int, ids: list[int], config: GenerationConfig) -> _Answer:
        sampling = self._sampling(config)
        self._engine.add_request(EngineRequest(request_id=name, prompt_ids=ids, sampling=sampling))
        output = ChoiceOutput(
            self.tokenizer, ids, stop=config.stop_words, min_tokens=config.min_new_tokens, skip_special_tokens=config.skip_special_tokens,
            stop_ids=frozenset((() if config.ignore_eos else self._engine.eos_token_ids) + config.stop_token_ids),
        )  # fmt: skip
        return _Answer(index, len(ids), output)

    def _sampling(self, config: GenerationConfig) -> SamplingParams:
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        chosen = {name: getattr(self._defaults, name) if getattr(config, name) is None else getattr(config, name) for name in names}
        return SamplingParams(
            max_new_tokens=config.max_new_tokens, min_new_tokens=config.min_new_tokens, ignore_eos=config.ignore_eos,
            stop_token_ids=config.stop_token_ids, seed=config.random_seed, num_logprobs=config.logprobs,
            **(chosen if config.do_sample else {"temperature": 0.0}),
        )  # fmt: skip

    def _advance(self, running: dict[str, _Answer]) -> Iterator[Response]:
        """One step of the engine; answers that ended leave `running`."""
        for output in self._engine.step():
            answer = running.get(output.request_id)
            if answer is None:
                continue
            if output.finish_reason == "error":
                raise RuntimeError(f"prompt {answer.index} could not be answered: {output.error}")
            part = answer.take(output)
            if answer.output.finish_reason is not None:
                del running[output.request_id]
                if output.finish_reason is None:  # a stop word, which the engine does not know of
                    self._engine.abort(output.request_id)
            yield part


@dataclass
class _Answer:
    index: int
    num_prompt_tokens: int
    output: ChoiceOutput

    def take(self, output: Any) -> Response:
        delta = self.output.feed([output])
        return Response(
            text=delta.text,
            generate_token_len=self.output.num_tokens,
            input_token_len=self.num_prompt_tokens,
            finish_reason=delta.finish_reason,
            token_ids=list(output.token_ids),
            logprobs=[entry.logprobs for entry in delta.entries if entry.logprobs is not None] if output.logprobs else None,
            index=self.index,
            cached_tokens=self.output.num_cached_tokens,
        )


def _append(answer: Response, part: Response) -> None:
    answer.text += part.text
    answer.token_ids += part.token_ids
    if part.logprobs is not None:
        answer.logprobs = [*(answer.logprobs or []), *part.logprobs]
    for name in ("generate_token_len", "input_token_len", "finish_reason", "cached_tokens"):
        setattr(answer, name, getattr(part, name))


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """(prompts, whether it was one): a text, a list of messages and a list of token numbers are one prompt."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], (int, Mapping))):
        return [cast(Prompt, prompts)], True
    return cast(list[Prompt], list(prompts)), False


class Session:
    """A conversation: `history` is its messages, `response` the last answer."""

    def __init__(self, pipe: Pipeline, gen_config: GenerationConfig, system: str = "") -> None:
        self._pipe = pipe
        self.gen_config = gen_config
        self.history: list[Message] = [{"role": "system", "content": system}] if system else []
        self.response = Response()

    def stream(self, prompt: str, gen_config: GenerationConfig | None = None) -> Iterator[Response]:
        """The pieces of the answer to `prompt`. The turn is remembered when its answer is whole, and forgotten where it was left early."""
        messages = [*self.history, {"role": "user", "content": prompt}]
        answer = Response()
        for part in self._pipe.stream_infer([messages], gen_config or self.gen_config):
            _append(answer, part)
            yield part
        self.response = answer
        self.history = [*messages, {"role": "assistant", "content": answer.text}]

    def chat(self, prompt: str, gen_config: GenerationConfig | None = None) -> Response:
        """One turn, whole."""
        for _ in self.stream(prompt, gen_config):
            pass
        return self.response

    __call__ = chat
