"""Patterns of module names, from a config that anybody may have written."""

import contextlib
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moepress.converters.safetensors.patterns import LONGEST, matches
from moepress.errors import InvalidInputError

NAME = "model.layers.12.mlp.experts.101.gate_proj"
LONG_NAME = f"model.layers.0.mlp.{'a' * 40}!"


@pytest.mark.parametrize(
    "target",
    [
        NAME,
        "re:.*gate_proj",
        "re:.*mlp.*",
        "re:.*layers.*mlp.*experts.*",
        r"re:^model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj$",
        "re:model.layers.12",
        r"re:model\.layers\.(" + "|".join(map(str, range(61))) + r")\..*",
        "re:^(?!.*self_attn).*",
        r"re:(?i:MODEL)\.layers(\.\d+)?\.[\w.]+$",
        "re:.{5}(?=.layers)",
        "re:",
    ],
)
def test_names_and_the_patterns_of_real_configs_match_as_in_python(target: str) -> None:
    assert matches(target, NAME)
    other = NAME.replace("layers", "blocks").replace("gate", "o")
    assert matches(target, other) == (target.startswith("re:") and re.match(target[3:], other) is not None)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        ".*(a+)+$",
        ".*(?:a*)*$",
        ".*(a|a)*$",
        ".*(a|a){20}$",
        ".*" + "(a|a)" * 25 + "$",
        ".*" + "a?" * 30 + "a" * 30,
        ".*(a?){30}$",
        ".*([a-z]+)*$",
        r".*(\w+\.?)+$",
        ".*.*.*.*.*.*b$",
        r".*(a+)\1$",
        ".*(?P<x>a+)(?P=x)+$",
        ".*(?=(a+)+$)",
        ".*(?:(?:a+))+$",
        ".*(a+) +$(?x)",
        "(?x).*(a+) +$",
        ".*(a+)(?#)+$",
        "(?:){999999999}",
        "(?:(?:(?:){999}){999}){999}",
        "((a{1,20}){1,20}){1,20}$",
        "a" * (LONGEST + 1),
        "(" * 4000,
        "[",
        "*",
        "a{99999999999999999999}",
    ],
)
def test_what_could_take_for_ever_or_is_no_pattern_is_refused_at_once(pattern: str) -> None:
    before = time.thread_time()
    with pytest.raises(InvalidInputError, match=r"config\.json holds"):
        matches(f"re:{pattern}", LONG_NAME)
    assert time.thread_time() - before < 1


@settings(max_examples=300, deadline=None)
@given(st.text("a.*+?|(){}[]12,^$\\d:=!", max_size=24))
def test_any_pattern_ends_in_time_with_what_python_says_or_is_refused(pattern: str) -> None:
    before = time.thread_time()
    with contextlib.suppress(InvalidInputError):
        matches(f"re:{pattern}", "a" * 60 + "!")
    assert time.thread_time() - before < 2
