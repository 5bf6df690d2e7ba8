"""A shared run gives the bytes of the plain one, whoever does its tasks and in whichever order."""

from pathlib import Path

import every_family
import mtp_models
import pytest
import r1_models
import tiny_models
import torch
from shared_runs import assert_same, both, in_turns, moepress, small_shards, text_of, with_tokenizer

OPTIONS = ("--bits", "4", "--group-size", "32")


@pytest.fixture(autouse=True)
def _shards(monkeypatch: pytest.MonkeyPatch) -> None:
    small_shards(monkeypatch)  # three of them


def model_of(key: str, folder: Path) -> Path:
    """A tiny model by its key, with a tokenizer."""
    if key == "mtp":
        mtp_models.make("deepseek_v3", folder)
    elif key in tiny_models.KEYS:
        tiny_models.make(key, folder)
    else:
        every_family.save(every_family.build(key), folder)
    return with_tokenizer(folder)


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("mtp", ("--match", "original", "--include", "shared", "--include", "lm_head")),
        ("qwen2_moe", ("--match", "own")),
        ("gpt_oss", ()),  # biases
        ("afmoe", ("--match", "original")),  # experts' outputs are not simply added
        pytest.param("deepseek_v4", (), marks=pytest.mark.slow),  # several streams
        pytest.param(
            "glm_moe_dsa", ("--match", "original"), marks=pytest.mark.slow
        ),  # layers hand on more than one value
        pytest.param("zaya", (), marks=pytest.mark.slow),
    ],
)
def test_every_kind_of_model(tmp_path: Path, key: str, options: tuple[str, ...]) -> None:
    model = model_of(key, tmp_path / "model")
    did = both(model, tmp_path, [*OPTIONS, *options, *text_of(tmp_path)], 3)
    assert all(did)


@pytest.mark.parametrize(
    "options",
    [
        ("--include", "lm_head", "--independent-layers"),
        ("--effort", "max"),
        ("--scheme", "nvfp4"),
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                ("--effort", "max", "--independent-layers"),
                ("--effort", "fast", "--asymmetric"),
                ("--scheme", "mxfp4", "--match", "original"),
                ("--grid", "q4_0", "--include", "lm_head"),
                ("--grid", "q4_0", "--include", "lm_head", "--independent-layers"),
            )
        ),
    ],
    ids=" ".join,
)
def test_every_kind_of_solving(tmp_path: Path, options: tuple[str, ...]) -> None:
    model = model_of("deepseek_v3", tmp_path / "model")
    given = options if {"--scheme", "--grid"} & {*options} else (*OPTIONS, *options)
    both(model, tmp_path, [*given, *text_of(tmp_path)], 3, seed=1)


def test_a_pruned_model(tmp_path: Path) -> None:
    model = model_of("mtp", tmp_path / "model")
    text = text_of(tmp_path)
    moepress("profile", model, *text, "-o", tmp_path / "profile")
    moepress("plan", tmp_path / "profile", "--experts", "12", *OPTIONS, "-o", tmp_path / "plan.json")
    both(model, tmp_path, ["--plan", tmp_path / "plan.json", "--match", "original", *text], 3, seed=2)


@pytest.mark.slow
def test_a_layer_of_r1_s_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of 7,168 columns, whose sums a library cuts up by their sizes and by its threads."""
    small_shards(monkeypatch, 512)
    few = {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 1, "vocab_size": 2048}
    few |= {"moe_intermediate_size": 512, "num_attention_heads": 16, "num_key_value_heads": 16}
    r1_models.make_r1.make_r1(tmp_path / "model", dense_layers=0, moe_layers=1, experts=2, **few)
    text = ("--tokens", "1536", "--window", "128", "--effort", "fast", "--include", "none", "--max-memory", "2GiB")
    torch.set_num_threads(2)
    try:
        moepress("quantize", tmp_path / "model", "--bits", "4", *text, "-o", tmp_path / "plain")
    finally:
        torch.set_num_threads(1)
    moepress("plan-work", tmp_path / "model", "--store", tmp_path / "store", "--bits", "4", *text)
    assert [len(did) > 0 for did in in_turns(tmp_path / "store", tmp_path, 2)] == [True, True]
    moepress("work", "--store", tmp_path / "store", "-o", tmp_path / "shared")
    assert_same(tmp_path / "shared", tmp_path / "plain")


@pytest.mark.parametrize(
    ("key", "options", "window"),
    [
        ("mtp", (), "16"),
        ("gpt_oss", ("--no-loo",), "16"),
        ("afmoe", ("--no-bit-losses",), "20"),  # shards are no whole blocks
        pytest.param("deepseek_v3", ("--no-loo", "--no-bit-losses"), "24", marks=pytest.mark.slow),
        pytest.param("deepseek_v4", (), "16", marks=pytest.mark.slow),
    ],
)
def test_a_profile(tmp_path: Path, key: str, options: tuple[str, ...], window: str) -> None:
    model, store = model_of(key, tmp_path / "model"), tmp_path / "store"
    given = [*options, *text_of(tmp_path), "--window", window]
    moepress("profile", model, *given, "-o", tmp_path / "plain")
    moepress("plan-work", model, "--stage", "profile", "--store", store, *given)
    did = in_turns(store, tmp_path, 3, seed=2)
    assert all(did)
    moepress("work", "--store", store, "-o", tmp_path / "shared")
    assert_same(tmp_path / "shared", tmp_path / "plain")
