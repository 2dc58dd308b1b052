"""Chat templates give the prompts that `transformers` gives, and cannot harm the server that renders them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import pytest
from gantline_runtime.chat_template import ChatTemplate, TemplateError
from gantline_runtime.server.template_process import TemplateRenderer

HELLO = [{"role": "user", "content": "<b>Hello</b>"}]
Start = Callable[..., TemplateRenderer]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Makes renderers, and ends their processes."""
    made: list[TemplateRenderer] = []

    def make(source: str, timeout_s: float = 10.0) -> TemplateRenderer:
        made.append(TemplateRenderer(source, {"bos_token": "<s>"}, timeout_s=timeout_s))
        return made[-1]

    yield make
    for renderer in made:
        await renderer.close()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m['content'] }}{% endfor %}", "<s>[user]<b>Hello</b>"),
        ("{% for m in messages %}\n  {% if true %}\nx\n  {% endif %}\n{% endfor %}", "x\n"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "<b>Hello</b>"}'),
        ("{% generation %}{{ messages[0].role }}{% endgeneration %}!", "user!"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% if add_generation_prompt %}A{% endif %}{% if tools %}T{% endif %}{{ think }}", "Ayes"),
        ("{{ strftime_now('%Y') | length }}", "4"),
    ],
)
def test_what_templates_rely_on_is_there(source: str, expected: str) -> None:
    assert ChatTemplate(source, {"bos_token": "<s>"}).render(HELLO, think="yes") == expected


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refused the messages: roles must alternate"),
        ("{{ messages[7].content }}", "refused the messages"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 1 / 0 }}", "division"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_what_a_template_refuses_or_must_not_do_is_an_error_with_its_cause(source: str, cause: str) -> None:
    with pytest.raises(TemplateError, match=cause):
        ChatTemplate(source, {}).render(HELLO)


def test_a_template_that_does_not_compile_is_named_with_its_line() -> None:
    with pytest.raises(TemplateError, match=r"invalid.*line 2"):
        ChatTemplate("a\n{% for %}", {})


async def test_the_renderers_process_gives_the_same_text(start: Start) -> None:
    renderer = start("{{ bos_token }}{{ messages[0].content }}{{ extra }}")
    assert await renderer.render(HELLO, {"extra": "é😀"}) == "<s><b>Hello</b>é😀"
    answers = await asyncio.gather(*(renderer.render(HELLO, {"extra": str(i)}) for i in range(50)))
    assert answers == [f"<s><b>Hello</b>{i}" for i in range(50)]


async def test_an_endless_template_is_ended_and_the_next_request_is_answered(start: Start) -> None:
    renderer = start(
        "{% if messages[0].content == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}ok",
        0.7,
    )
    await renderer.start()
    began = time.monotonic()
    with pytest.raises(TemplateError, match="longer than"):
        await renderer.render([{"role": "user", "content": "loop"}], {})
    assert time.monotonic() - began < 5
    assert await renderer.render(HELLO, {}) == "ok"


@pytest.mark.parametrize(
    "source", ["{% set x = namespace(s='x') %}{% for i in range(60) %}{% set x.s = x.s ~ x.s %}{% endfor %}", "{{ 'x' * n }}"]
)
async def test_a_template_that_grows_without_bound_is_stopped(start: Start, source: str) -> None:
    renderer = start(source)
    with pytest.raises(TemplateError, match=r"memory|crashed"):
        await renderer.render(HELLO, {"n": 1 << 40})


async def test_constants_that_explode_while_compiling_do_not_reach_the_server(start: Start) -> None:
    renderer = start("{{ 'x' * 1099511627776 }}")
    with pytest.raises(TemplateError):
        await renderer.start()
        await renderer.render(HELLO, {})


async def test_a_request_that_is_cancelled_leaves_the_renderer_usable(start: Start) -> None:
    renderer = start("{% for i in range(messages[0].content | int) %}{% endfor %}ok")
    await renderer.start()
    slow = asyncio.create_task(renderer.render([{"role": "user", "content": "99999"}], {}))
    await asyncio.sleep(0)
    slow.cancel()
    assert await renderer.render([{"role": "user", "content": "1"}], {}) == "ok"


async def test_lone_surrogates_that_a_template_makes_are_an_error(start: Start) -> None:
    renderer = start(r"{{ '\ud800' }}")
    with pytest.raises(TemplateError):
        await renderer.render(HELLO, {})
