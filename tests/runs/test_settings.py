"""What a refused resume says: the option as the user typed it, or plain words."""

from typing import Any

import pytest

from moepress.runs.settings import changes

BEFORE: dict[str, Any] = {
    "command": "quantize",
    "moepress": "0.1.0",
    "torch": "2.8.0",
    "model": "abc",
    "corpus": "abc",
    "keep": {"0": [1, 2]},
    "scheme": {"bits": 4, "group_size": 128},
    "layer_bits": None,
    "include": ["attention"],
    "hessian": {"asymmetry": 0.0, "least_tokens": 0, "end_weight": 1.0},
    "memory_bytes": 1 << 30,
    "batch_windows": 8,
    "leave_one_out": True,
    "allow_nonfinite": False,
    "groups": "balanced",
    "target": "gptq",
    "recipe.keep": 0.75,
    "recipe.target": None,
    "recipe.budget": 12 << 30,
    "recipe.domain_weight": {},
    "recipe.mixed_bits": False,
    "recipe.model": "demo",
}


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"scheme": {"bits": 3, "group_size": 128}}, "--bits was 4, now 3"),
        ({"scheme": {"bits": 4, "group_size": 64}}, "--group-size was 128, now 64"),
        ({"include": []}, "--include was attention, now not given"),
        ({"include": ["attention", "dense"]}, "--include was attention, now attention dense"),
        ({"memory_bytes": 100 << 20}, "--max-memory was 1.0 GiB, now 100.0 MiB"),
        ({"batch_windows": 4}, "the number of windows at once (it follows from --max-memory) was 8, now 4"),
        ({"hessian": BEFORE["hessian"] | {"end_weight": 4.0}}, "--end-weight was 1.0, now 4.0"),
        ({"leave_one_out": False}, "--no-loo was not given, now given"),
        ({"allow_nonfinite": True}, "--allow-nonfinite was not given, now given"),
        ({"groups": "degroup"}, "--groups was balanced, now degroup"),
        ({"target": "onnx"}, "--to was gptq, now onnx"),
        ({"moepress": "0.2.0"}, "the version of moepress was 0.1.0, now 0.2.0"),
        ({"torch": "2.9.0"}, "the version of torch was 2.8.0, now 2.9.0"),
        ({"model": "abd"}, "the model is another one, or its files changed"),
        ({"keep": None}, "the plan keeps other experts"),
        ({"layer_bits": {"0": 2}}, "the plan has other bits by layer"),
        ({"command": "profile"}, "it was made by another command"),
        ({"recipe.keep": 0.5}, "--keep was 0.75, now 0.5"),
        ({"recipe.target": "rtx-3090"}, "--target was not given, now rtx-3090"),
        ({"recipe.budget": None}, "--budget was 12.0 GiB, now not given"),
        ({"recipe.mixed_bits": True}, "--mixed-bits was not given, now given"),
        ({"recipe.model": "other"}, "MODEL was demo, now other"),
        ({"recipe.domain_weight": {"python": 3.0}}, '--domain-weight was not given, now {"python": 3.0}'),
    ],
    ids=str,
)
def test_a_setting_is_named_as_it_was_typed(now: dict[str, Any], said: str) -> None:
    assert changes(BEFORE, BEFORE | now) == [said]


def test_what_follows_from_another_option_comes_last() -> None:
    now = {
        "scheme": {"bits": 3, "group_size": 128},
        "hessian": {"asymmetry": 1.0, "least_tokens": 0, "end_weight": 1.0},
    }
    assert changes(BEFORE, BEFORE | now) == [
        "--bits was 4, now 3",
        "--match (auto follows --bits) was own, now original",
    ]


def test_long_values_are_cut_and_equal_settings_say_nothing() -> None:
    (said,) = changes(BEFORE, BEFORE | {"groups": "x" * 500})
    assert len(said) < 120
    assert changes(BEFORE, BEFORE) == []
