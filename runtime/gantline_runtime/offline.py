"""Use a model from Python, without a server: offline batches, streams and chat sessions.

    from gantline_runtime import GenerationConfig, pipeline

    with pipeline("examples/tiny-model") as pipe:
        print(pipe("What does os.path.join do?").text)                             # one prompt, one Response
        for response in pipe(["Hello!", "Who are you?"]): ...                      # a batch, answered in the order of its prompts
        for part in pipe.stream_infer("Hello!", GenerationConfig(do_sample=True)): ...   # pieces of text as they are made
        session = pipe.session()
        session.chat("Hello!"); session.chat("And now?")                           # turns over one history
        pipe.get_ppl(["A likely text.", "Text likely a."])                         # how unlikely the model finds texts

The shape is LMDeploy's: prompts are texts (a user's message where the model has a chat template), lists of messages as OpenAI has them, or
lists of token numbers; `do_preprocess=False` takes a text as it stands. Prompts of a batch run together in the engine, and share what their
beginnings have in common. Not for several threads: one thread at a time uses a pipeline.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

import msgspec

from gantline_runtime.chat_template import ChatTemplate, TemplateError
from gantline_runtime.commands.display import LoadingDisplay
from gantline_runtime.config import EngineConfig
from gantline_runtime.engine import LLMEngine
from gantline_runtime.errors import CheckpointError, ConfigurationError
from gantline_runtime.generation_config import GenerationConfig
from gantline_runtime.generation_defaults import GenerationDefaults
from gantline_runtime.messages import EngineRequest, SamplingParams, TokenOutput
from gantline_runtime.offline_answers import Answer, Response, Score, append, build_reading
from gantline_runtime.request import QueueFull
from gantline_runtime.server import smoke
from gantline_runtime.server.output import ChoiceOutput
from gantline_runtime.tokenizer import Tokenizer

__all__ = ["GenerationConfig", "Pipeline", "Response", "Session", "pipeline"]

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]
Reader = TypeVar("Reader", Answer, Score)
"""Takes what the engine tells of one prompt."""


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
        self._closed = False
        try:
            self._judge()
        except BaseException:
            self.close()
            raise

    def __call__(
        self, prompts: Prompt | Sequence[Prompt], gen_config: GenerationConfig | None = None, *, do_preprocess: bool = True
    ) -> Response | list[Response]:
        """One `Response` for one prompt, a list in the order of the prompts for a list of them."""
        batch, single = _as_batch(prompts)
        answers = [Response(index=i) for i in range(len(batch))]
        for part in self.stream_infer(batch, gen_config, do_preprocess=do_preprocess):
            append(answers[part.index], part)
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
        with closing(self._run(encoded, lambda index, ids: self._answer(index, ids, config))) as outputs:
            for answer, output in outputs:
                yield answer.take(output)

    def get_ppl(self, input_ids: str | Sequence[int] | Sequence[str | Sequence[int]]) -> list[float]:
        """The mean cross-entropy, in nats, of the tokens after the first of each input: LMDeploy calls it so. *e* to its power is the
        perplexity. Inputs are token numbers, or texts as they stand; one alone gets a list of one. Infinite where the model thinks a text
        impossible. Raises ConfigurationError for an input of fewer than two tokens, or of more than the context holds.
        """
        batch, _ = _as_batch(input_ids)
        encoded = [self._scorable(self.tokenizer.encode(given) if isinstance(given, str) else cast(list[int], given)) for given in batch]
        scores = [Score(index) for index in range(len(encoded))]
        for score, output in self._run(encoded, lambda index, ids: (scores[index], build_reading(ids))):
            score.take(output)
        return [score.loss for score in scores]

    def _judge(self) -> None:
        """Raises GantlineError (SmokeRequestFailed) where a first answer shows that the weights are damaged."""
        self._engine.add_request(smoke.judged_request([*self._engine.eos_token_ids[:1]] or [0]))
        outputs = list[TokenOutput]()
        while self._engine.has_work():
            outputs += self._engine.step()
        smoke.judge(outputs)

    def _run(
        self, prompts: Sequence[list[int]], begin: Callable[[int, list[int]], tuple[Reader, EngineRequest]]
    ) -> Generator[tuple[Reader, TokenOutput], None, None]:
        """Every output of every prompt's request, with who reads it, which it must have done when the next is asked for. As many requests
        wait in the engine as may. Leaving the loop ends what still runs."""
        if self._closed:
            raise ConfigurationError("the pipeline is closed", cure="Make another, or use it inside of its `with` block.")
        running: dict[str, Reader] = {}
        try:
            pending, room = deque(enumerate(prompts)), True
            while pending or running:
                if room:
                    self._fill(pending, running, begin)
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
        self._closed = True
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
        return self._known(ids, "a prompt")

    def _known(self, ids: Sequence[int], what: str) -> list[int]:
        vocab_size = self._engine.vocab_size
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            raise ConfigurationError(f"{what} has a token outside of 0 to {vocab_size - 1}", cure="Give tokens of this model.")
        return list(ids)

    def _scorable(self, ids: Sequence[int]) -> list[int]:
        limit = self._engine.session_len
        if not 2 <= len(ids) <= limit:
            cause = f"a text of {len(ids)} tokens cannot be scored; the context holds {limit}, and the first has no likelihood"
            raise ConfigurationError(cause, cure="Give texts of at least two tokens that fit the context.")
        return self._known(ids, "a text")

    def _fill(
        self,
        pending: deque[tuple[int, list[int]]],
        running: dict[str, Reader],
        begin: Callable[[int, list[int]], tuple[Reader, EngineRequest]],
    ) -> None:
        """Hand the engine as many of `pending` as may wait there; the rest follows when some have ended."""
        while pending:
            reader, request = begin(*pending[0])
            name = f"pipeline-{next(self._names)}"
            try:
                self._engine.add_request(msgspec.structs.replace(request, request_id=name))
            except QueueFull:
                return
            running[name] = reader
            pending.popleft()

    def _answer(self, index: int, ids: list[int], config: GenerationConfig) -> tuple[Answer, EngineRequest]:
        output = ChoiceOutput(
            self.tokenizer, ids, stop=config.stop_words, min_tokens=config.min_new_tokens, skip_special_tokens=config.skip_special_tokens,
            stop_ids=frozenset((() if config.ignore_eos else self._engine.eos_token_ids) + config.stop_token_ids),
        )  # fmt: skip
        return Answer(index, len(ids), output), EngineRequest(request_id="", prompt_ids=ids, sampling=self._sampling(config))

    def _sampling(self, config: GenerationConfig) -> SamplingParams:
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        chosen = {name: getattr(self._defaults, name) if getattr(config, name) is None else getattr(config, name) for name in names}
        return SamplingParams(
            max_new_tokens=config.max_new_tokens, min_new_tokens=config.min_new_tokens, ignore_eos=config.ignore_eos,
            stop_token_ids=config.stop_token_ids, seed=config.random_seed, num_logprobs=config.logprobs,
            **(chosen if config.do_sample else {"temperature": 0.0}),
        )  # fmt: skip

    def _advance(self, running: dict[str, Reader]) -> Iterator[tuple[Reader, TokenOutput]]:
        """One step of the engine; who has read all leaves `running`."""
        for output in self._engine.step():
            reader = running.get(output.request_id)
            if reader is None:
                continue
            if output.finish_reason == "error":
                raise RuntimeError(f"prompt {reader.index} could not be answered: {output.error}")
            yield reader, output
            if reader.ended:
                del running[output.request_id]
                if output.finish_reason is None:  # a stop word, which the engine does not know of
                    self._engine.abort(output.request_id)


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """(prompts, whether it was one): a text, a list of messages and a list of token numbers are one prompt."""
    _check_kind(prompts)
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], (int, Mapping))):
        return [cast(Prompt, prompts)], True
    for prompt in prompts:
        _check_kind(prompt)
    return cast(list[Prompt], list(prompts)), False


def _check_kind(given: object) -> None:
    if isinstance(given, (bytes, bytearray)) or not isinstance(given, Sequence):
        raise ConfigurationError(
            f"a prompt is of the type {type(given).__name__}", cure="Give a text, a list of messages or a list of token numbers."
        )


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
            append(answer, part)
            yield part
        self.response = answer
        self.history = [*messages, {"role": "assistant", "content": answer.text}]

    def chat(self, prompt: str, gen_config: GenerationConfig | None = None) -> Response:
        """One turn, whole."""
        for _ in self.stream(prompt, gen_config):
            pass
        return self.response

    __call__ = chat
