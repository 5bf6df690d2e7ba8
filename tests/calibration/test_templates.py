"""Chat templates: what transformers writes with them, in a child that may hang, grow or die."""

import subprocess
import sys
import time
from typing import Any

import pytest

from moepress.calibration import template_child
from moepress.calibration.records import Conversation
from moepress.calibration.templates import ChatTemplate, Refused, RenderLimits

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "größer <b>&amp;"},
    {"role": "assistant", "content": "ho", "reasoning_content": "so"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"ä": 1}}}]}
EACH = "{% for m in messages %}"
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
SAME = [
    EACH + "\n  <{{ m.role }}>{{ m['content'] }}\n{% endfor %}",
    "{{ bos_token }}" + EACH + "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content | trim }}{% endfor %}",
    "{% set n = namespace(a=1) %}" + EACH + "{% if n.a %}{% set n.a = 0 %}1{% endif %}{% endfor %}",
    "{{ messages | tojson(indent=2) }}{{ tools | tojson }}",
    EACH + "{% generation %}{{ m.content }}{% endgeneration %}{{ m.reasoning_content }}{{ m.thinking }}{% endfor %}",
    "{% macro f(m) %}{{ m.role ~ m.content }}{% endmacro %}{{ f(messages[0]) }}{{ add_generation_prompt }}",
    "{{ dict(a=1).items() | list }}{{ messages | length }}{{ strftime_now('%Y')[:2] }}{{ eos_token }}{{ documents }}",
    "{% if tools is none %}no{% else %}{{ tools[0].function.name }}{% endif %}",
]


def render(tokenizer: Any, template: str, turns: list[dict[str, Any]] = TURNS, **limits: Any) -> str | Refused:
    tokenizer.chat_template = template
    with ChatTemplate(tokenizer, RenderLimits(**limits)) as chat:
        (found,) = chat.render([Conversation(messages=turns)])
    return found


@pytest.mark.parametrize("template", SAME)
def test_templates_write_what_transformers_writes(template: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    with ChatTemplate(tokenizer) as chat:
        for tools in (None, TOOLS):
            for prompt in (False, True):
                options: dict[str, Any] = {"tools": tools, "tokenize": False, "add_generation_prompt": prompt}
                expected = tokenizer.apply_chat_template(TURNS, **options)
                (found,) = chat.render([Conversation(messages=TURNS, tools=tools)], add_generation_prompt=prompt)
                assert found == expected


def test_a_tokenizer_may_have_a_template_of_its_own_for_tools(tokenizer: Any) -> None:
    tokenizer.chat_template = {"default": "plain", "tool_use": "tools"}
    said, called = Conversation(messages=TURNS), Conversation(messages=TURNS, tools=TOOLS)
    with ChatTemplate(tokenizer) as chat:
        assert chat.render([said, called, called, said]) == ["plain", "tools", "tools", "plain"]


@pytest.mark.parametrize("stated", [{"ä": 1}, '{"ä": 1}'])
@pytest.mark.parametrize(
    "template",
    [
        "{{ call.arguments | tojson }}",
        "{{ '' + call['arguments'] + '' }}",
        "{{ call.arguments }}",
        "{% if call.arguments is string %}{{ call.arguments }}{% else %}{{ call.arguments | tojson }}{% endif %}",
        '{% for k, v in call.arguments.items() %}{"{{ k }}": {{ v }}}{% endfor %}',
    ],
)
def test_arguments_of_a_call_suit_templates_that_want_an_object_and_those_that_want_text(
    template: str, stated: Any, tokenizer: Any
) -> None:
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": stated}}]}
    whole = "{% set call = messages[0].tool_calls[0].function %}" + template
    assert render(tokenizer, whole, [call]) == '{"ä": 1}'


def test_a_template_that_asks_for_a_null_content_gets_one(tokenizer: Any) -> None:
    asks = "{% if messages[0]['content'] is none %}call{% else %}text{% endif %}"
    assert render(tokenizer, asks, [CALL]) == "call"
    assert render(tokenizer, "{{ messages[0].content }}", [CALL]) == ""


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must\n alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 3 }}", "TypeError: can only concatenate str"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ messages[9].content }}", "no element 9|has no attribute|undefined"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|access"),
        ("{{ messages.append(1) }}", "unsafe|not safely|immutable|access"),
        ("{{ '\\ud800' }}", "it writes a lone surrogate"),
        ("{% include 'other' %}", "no loader|TypeError"),
        ("{{ 'a' * 9000000 }}", "writes more than 4,"),
        ("{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}", "writes more than 4,"),
        ("{% for i in range(999999999) %}{% endfor %}", "OverflowError: Range too big"),
        ("{{ 'a' * 99999999999 }}", "too much memory|OverflowError"),
        ("{{ '%999999999999d' % 1 }}", "too much memory|too big|OverflowError|MemoryError|ValueError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError|ended with"),
    ],
)
def test_whatever_a_template_raises_is_a_sentence(template: str, words: str, tokenizer: Any) -> None:
    found = render(tokenizer, template)
    assert isinstance(found, Refused)
    assert any(word in found.reason for word in words.split("|")), found.reason
    assert "\n" not in found.reason
    assert len(found.reason) < 400


@pytest.mark.parametrize(
    "template",
    [
        LOOP,
        "{{ (9 ** 99999999) % 7 }}",
        "{{ 'a' * 999 in ('a' * 99999999) }}{{ ('a' * 50000000).replace('a', 'bb') | sort | length }}",
    ],
)
def test_a_template_that_takes_too_long_is_stopped(template: str, tokenizer: Any) -> None:
    started = time.monotonic()
    found = render(tokenizer, template, cpu_seconds=1, seconds=20)
    assert isinstance(found, Refused)
    assert time.monotonic() - started < 30
    if not found.reason.startswith("it needs too much memory"):
        assert found.reason == "it computes longer than 1 seconds"


def test_where_the_system_keeps_no_time_the_child_is_killed(tokenizer: Any) -> None:
    found = render(tokenizer, LOOP, seconds=0.5)
    assert found == Refused(reason="it takes longer than 0.5 seconds")


def test_a_template_that_is_slow_for_every_conversation_is_stopped_too(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for a in range(20000) %}{% for b in range(9) %}{% endfor %}{% endfor %}"
    limits = RenderLimits(seconds=2, average_seconds=0.001)
    with ChatTemplate(tokenizer, limits) as chat:
        found = chat.render([Conversation(messages=TURNS)] * 500)
    assert Refused(reason="it takes longer than 0.001 seconds for each conversation") in found


def test_one_child_writes_all_conversations_and_another_follows_one_that_was_stopped(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% if messages[0].content == 'loop' %}"
        + LOOP
        + "{% elif messages[0].content == 'raise' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
    )

    def said(text: str) -> Conversation:
        return Conversation(messages=[{"role": "user", "content": text}])

    with ChatTemplate(tokenizer, RenderLimits(seconds=2)) as chat:
        assert chat._child is None
        assert chat.render([said("a"), said("raise"), said("b")]) == ["a", Refused(reason="no"), "b"]
        child = chat._child
        assert chat.render([said("c")]) == ["c"]
        assert chat._child is child
        found = chat.render([said("d"), said("loop"), said("e")])
        assert found[:2] == ["d", Refused(reason="it takes longer than 2 seconds")]
        assert isinstance(found[2], Refused)
        assert chat.render([said("f")]) == ["f"]
        assert chat._child is not child
        last = chat._child
    assert last is not None
    assert last.poll() is not None


def test_the_child_imports_no_more_than_jinja() -> None:
    lines = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='child'); print('\\n'.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-I", "-c", lines, template_child.__file__], capture_output=True, text=True, check=True
    )
    heavy = {"torch", "transformers", "numpy", "moepress", "tokenizers", "huggingface_hub"}
    assert not heavy & {name.partition(".")[0] for name in done.stdout.split()}


def test_a_child_that_dies_is_a_sentence(tokenizer: Any) -> None:
    tokenizer.chat_template = "x"
    with ChatTemplate(tokenizer) as chat:
        assert chat.render([Conversation(messages=TURNS)]) == ["x"]
        assert chat._child is not None
        chat._child.kill()
        chat._child.wait()
        (found,) = chat.render([Conversation(messages=TURNS)])
        assert isinstance(found, Refused)
        assert "the process that runs it ended with -9" in found.reason
        assert chat.render([Conversation(messages=TURNS)]) == ["x"]
