"""Values of options: sizes, weights, and lists that must agree with the code behind them."""

from typing import get_args

import pytest

from moepress.commands.options import CRITERIA, INCLUDES, PARTS, parse_weights
from moepress.commands.plan import plan
from moepress.commands.quantize import quantize
from moepress.commands.run import run
from moepress.compress.gptq.include import AUTO, NONE, Include
from moepress.compress.pruning.scoring import Criterion
from moepress.converters.safetensors.scheme import FLOAT_GROUPS
from moepress.errors import UsageError
from moepress.runs.byte_sizes import parse_bytes
from moepress.stages.run.recipe import Recipe


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 << 30),
        ("8gib", 8 << 30),
        ("12G", 12 << 30),
        ("500MB", 500_000_000),
        ("500 MiB", 500 << 20),
        (" 1.5k ", 1536),
        ("64kB", 64_000),
        ("4096", 4096),
        ("4096B", 4096),
        ("0.5GiB", 1 << 29),
    ],
)
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert parse_bytes(text) == size


def test_no_size_is_no_limit() -> None:
    assert parse_bytes(None) is None


@pytest.mark.parametrize(
    "text", ["", "GiB", "8 GiB free", "8XB", "-1GiB", "0", "0GiB", "1e9", "8,5GiB", "nan", "inf", "0.1"]
)
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size; write for example 8GiB") as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)


def test_weights_are_read_by_name() -> None:
    assert parse_weights(("python=3", "german=0.5", "a b=0")) == {"python": 3.0, "german": 0.5, "a b": 0.0}
    assert parse_weights(()) == {}
    assert parse_weights(("python=1", "python=2")) == {"python": 2.0}


@pytest.mark.parametrize("pair", ["python", "=3", "python=", "python=much", "python:3", "a=b=3"])
def test_what_is_no_weight_is_refused_with_an_example(pair: str) -> None:
    with pytest.raises(UsageError, match="not of the form NAME=NUMBER; write for example python=3") as caught:
        parse_weights((pair,))
    assert repr(pair) in str(caught.value)


def test_the_choices_on_the_command_line_are_those_of_the_code() -> None:
    assert set(CRITERIA) == {c.value for c in Criterion}
    assert set(PARTS) == {i.value for i in Include}
    assert (AUTO, NONE, *PARTS) == INCLUDES
    formats = {codes.value for codes in FLOAT_GROUPS}
    (in_recipes, nothing) = get_args(Recipe.model_fields["scheme"].annotation)
    assert set(get_args(in_recipes)) == formats
    assert nothing is type(None)
    for command in (plan, quantize, run):
        (choices,) = (option.type.choices for option in command.params if option.name == "scheme")
        assert set(choices) == formats
