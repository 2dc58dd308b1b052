"""Whatever a grammar holds a model to, its parser finds: plans compiled by xgrammar, followed by a model that proposes tokens at random."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from gantline_runtime.config import EngineConfig
from gantline_runtime.detokenizer import Detokenizer
from gantline_runtime.engine import EngineLoop
from gantline_runtime.grammar.requests import Grammars
from gantline_runtime.messages import EngineRequest, SamplingParams
from gantline_runtime.parsers.events import gather
from gantline_runtime.parsers.tool_formats import TOOL_FORMATS
from gantline_runtime.server.output_plan import ModelFormats, OutputPlan, plan_output
from gantline_runtime.server.protocol_formats import NamedChoice, ResponseFormat, Tool, ToolChoice
from gantline_runtime.server.structured import build_constraint
from gantline_runtime.server.tools import ToolUse, plan_tool_use
from gantline_runtime.tokenizer import Tokenizer

from tests.runtime.engine_support import VOCAB, FakeExecutor, drain, tokens_of
from tests.runtime.server_fakes import SPECIAL, byte_tokenizer, write_model

EOS = 257
_HALF = "\ufffd" * 3
"""Half a surrogate pair, in UTF-8's manner: one character to xgrammar, none to others. Only a model of random bytes says it."""
SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 4}, "b": {"enum": [1, None]}}, "required": ["a", "b"]}
TOOLS = [
    Tool.model_validate({"type": "function", "function": {"name": "first", "parameters": SCHEMA, "strict": True}}),
    Tool.model_validate({"type": "function", "function": {"name": "second", "parameters": {**SCHEMA, "additionalProperties": False}}}),
]
MARKERS = tuple(marker for kind in TOOL_FORMATS.values() for marker in kind.markers) + ("<think>", "</think>")


class Model:
    """A byte tokenizer, with the markers spelled or as special tokens, and an engine over the model that costs nothing."""

    def __init__(self, folder: Path, *, special: bool) -> None:
        write_model(folder)
        if special:
            byte_tokenizer((*SPECIAL, *dict.fromkeys(MARKERS))).save(str(folder / "tokenizer.json"))
        self.tokenizer = Tokenizer.load(folder)
        grammars = Grammars(folder, vocab_size=VOCAB, eos_token_ids=(EOS,), max_rows=9, pinned=False)
        config = EngineConfig(session_len=1024, num_cache_blocks=128, block_size=64, max_batch_size=8, max_prefill_token_num=64)
        self.engine = EngineLoop(FakeExecutor(config), vocab_size=VOCAB, eos_token_ids=(EOS,), grammars=grammars)

    def answers(self, plan: OutputPlan, count: int = 6) -> Iterator[tuple[str, str]]:
        """(text as the parser gets it, reason of the end) of some answers under the plan's grammar."""
        assert plan.constraint is not None
        for i in range(count):
            params = SamplingParams(max_new_tokens=900, temperature=0.0)
            self.engine.add_request(EngineRequest(request_id=str(i), prompt_ids=[i + 1], sampling=params, grammar=plan.constraint.grammar))
        for outputs in drain(self.engine, checked=False).values():
            assert not outputs[-1].error, outputs[-1].error
            detokenizer = Detokenizer(self.tokenizer, (), self.tokenizer.special_ids - plan.shown_ids)
            text = "".join(detokenizer.feed(token) for token in tokens_of(outputs)) + detokenizer.finish()
            yield text.replace(_HALF, "?"), outputs[-1].finish_reason or ""


@pytest.fixture(scope="module", params=[False, True], ids=["spelled", "special"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    model = Model(tmp_path_factory.mktemp("plan"), special=request.param)
    yield model
    model.engine.close()


def _parsed(plan: OutputPlan, text: str) -> tuple[str, str, list[tuple[str, str]]]:
    parser = plan.make_parser()
    assert parser is not None
    return gather([*(event for char in text for event in parser.feed(char)), *parser.finish()])


def _check_calls(calls: list[tuple[str, str]]) -> None:
    for name, arguments in calls:
        assert name in ("first", "second")
        jsonschema.validate(json.loads(arguments), SCHEMA)


CHOICES: list[tuple[ToolChoice, bool]] = [
    ("required", True),
    ("required", False),
    (NamedChoice.model_validate({"type": "function", "function": {"name": "second"}}), True),
]


@pytest.mark.parametrize(("choice", "parallel"), CHOICES)
@pytest.mark.parametrize("reasoning", ["none", "think"])
@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_calls_that_must_be_made_are_found(model: Model, name: str, reasoning: str, choice: ToolChoice, parallel: bool) -> None:
    formats = ModelFormats.of(model.tokenizer, name, reasoning)
    use = plan_tool_use(TOOLS, choice, parallel=parallel)
    plan = plan_output(None, formats=formats, use=use, prompt="...<think>\n" if parallel else "")
    complete = 0
    for text, reason in model.answers(plan, 4):
        content, thought, calls = _parsed(plan, text)
        assert not content and (reasoning == "think" or not thought)
        if reason == "stop":
            complete += 1
            assert calls and (parallel or len(calls) == 1)
            _check_calls(calls)
            if not isinstance(choice, str):
                assert [called for called, _ in calls] == ["second"]
    if reasoning == "none":
        assert complete > 0


@pytest.mark.parametrize("name", [name for name, kind in TOOL_FORMATS.items() if not kind.only_at_start])
def test_strict_tools_are_called_as_their_schemas_say_where_the_model_decides(model: Model, name: str) -> None:
    """Free text goes on for ever in a random model, so it is led to the marker: what follows is a call that matches its schema."""
    formats = ModelFormats.of(model.tokenizer, name, "none")
    plan = plan_output(None, formats=formats, use=plan_tool_use(TOOLS, "auto", parallel=False))
    assert plan.constraint is not None
    marker = formats.tools.begins[0]
    led = {"type": "sequence", "elements": [{"type": "regex", "pattern": "Well[.]"}, *_begin(formats, marker)]}
    rules = plan.constraint.format["rules"]
    held = OutputPlan(type(plan.constraint)({"type": "sequence", "elements": [led, rules[0][1]]}, "tools"), formats, plan.use)
    for text, reason in model.answers(held, 4):
        content, _, calls = _parsed(plan, text)
        assert reason == "stop" and content == "Well." and len(calls) == 1
        _check_calls(calls)
    assert all(reason in ("stop", "length") for _, reason in model.answers(plan, 2)), "the plan itself compiles and runs"


def _begin(formats: ModelFormats, marker: str) -> list[dict[str, Any]]:
    number = formats.special_tokens.get(marker)
    return [{"type": "const_string", "value": marker} if number is None else {"type": "token", "token": number}]


def test_a_format_beside_tools_allows_either(model: Model) -> None:
    wanted = ResponseFormat.model_validate({"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}})
    formats = ModelFormats.of(model.tokenizer, "hermes", "none")
    plan = plan_output(build_constraint(wanted, None), formats=formats, use=plan_tool_use(TOOLS, "auto", parallel=False))
    for text, _ in model.answers(plan):
        content, _, calls = _parsed(plan, text)
        assert bool(content) != bool(calls)
        jsonschema.validate(json.loads(content or calls[0][1]), SCHEMA)


def test_reasoning_is_free_and_what_follows_is_held(model: Model) -> None:
    wanted = ResponseFormat.model_validate({"type": "regex_schema", "regex_schema": "[0-9]{3}"})
    formats = ModelFormats.of(model.tokenizer, "hermes", "think")
    plan = plan_output(build_constraint(wanted, None), formats=formats, prompt="hello")
    found = [_parsed(plan, text) for text, reason in model.answers(plan, 8) if reason == "stop"]
    assert found and all(len(content) == 3 and content.isdigit() for content, _, _ in found)


@pytest.mark.parametrize("use", [None, plan_tool_use(TOOLS, "required", parallel=False)], ids=["format", "call"])
def test_where_the_template_has_ended_the_reasoning_an_answer_begins_with_what_is_held(model: Model, use: ToolUse | None) -> None:
    """A random model would begin to reason again if it might."""
    wanted = ResponseFormat.model_validate({"type": "regex_schema", "regex_schema": "[0-9]{3}"})
    formats = ModelFormats.of(model.tokenizer, "hermes", "think")
    constraint = build_constraint(wanted, None) if use is None else None
    plan = plan_output(constraint, formats=formats, use=use, prompt="hello<think>\n\n</think>\n\n")
    answers = [text for text, _ in model.answers(plan, 8)]
    assert answers and not any(formats.reasoning.begin in text for text in answers if formats.reasoning is not None)
    assert all(_parsed(plan, text)[1] == "" for text in answers)


@pytest.fixture
def formats() -> Callable[[str], ModelFormats]:
    def of(template: str) -> ModelFormats:
        return ModelFormats.of(Tokenizer(byte_tokenizer(), chat_template=template))

    return of


def test_what_a_template_tells_is_read_from_it(formats: Callable[[str], ModelFormats]) -> None:
    qwen = formats("{% if tools %}<tool_call>{% endif %}{{ content.split('</think>') }}{% if enable_thinking is false %}{% endif %}")
    assert qwen.tools is TOOL_FORMATS["hermes"] and qwen.takes_tools and qwen.reasoning is not None and qwen.switches_thinking
    assert qwen.variables("none") == {"enable_thinking": False} and qwen.variables(None) == {}
    plain = formats("{{ messages }}")
    assert not plain.takes_tools and plain.reasoning is None
