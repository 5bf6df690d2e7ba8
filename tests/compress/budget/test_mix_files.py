"""Mixes of every kind of family as files: never larger than planned, of the types that were planned, and llama.cpp runs
them."""

import json
from pathlib import Path
from typing import Any

import every_family
import pytest
import tiny_models
from byte_tokenizer import byte_tokenizer
from gguf_families import DERIVED
from stage_runs import command

from moepress.converters.gguf.export import GgufRequest
from moepress.stages.export import gguf_stage
from moepress.stages.places import Output
from moepress.validation.quality.llama_cpp import open_llama

SHORT = ("--tokens", "1024", "--window", "64")
CHANGES: dict[str, dict[str, Any]] = {
    "gpt_oss": {},  # biases of experts
    "qwen3_5_moe": {  # columns of out_proj in another order, of which 128 stay together
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
    },
    "glm4_moe_lite": {},
}
ROWS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"mlp_only_layers": [], "tie_word_embeddings": True},  # llama.cpp wants its head all the same
    "olmoe": {"tie_word_embeddings": True},
}


def made(key: str, folder: Path) -> Path:
    if key in CHANGES:
        every_family.save(every_family.build(key, **DERIVED[key], **CHANGES[key]), folder)
    else:
        tiny_models.make(key, folder, **ROWS[key])
    byte_tokenizer(folder, merges=True)
    return folder


@pytest.mark.parametrize("key", [*CHANGES, *ROWS])
def test_no_file_is_larger_than_planned_and_each_runs(key: str, tmp_path: Path) -> None:
    model, plan, file = made(key, tmp_path / "model"), tmp_path / "plan.json", tmp_path / "x.gguf"
    said = command("profile", model, "-o", tmp_path / "p", "--grid-losses", *SHORT)
    assert said[0] == 0, said
    code, _, refused = command("plan", tmp_path / "p", "--to", "gguf", "--keep", "1", "--budget", "10")
    assert code == 2
    budget = round(1.3 * float(refused.split("takes ")[1].split()[0]) * 2**20)
    said = command("plan", tmp_path / "p", "--to", "gguf", "-o", plan, "--keep", "1", "--budget", str(budget))
    assert said[0] == 0, said
    said = command("quantize", model, "--plan", plan, "-o", tmp_path / "q", *SHORT)
    assert said[0] == 0, said
    gguf_stage(str(tmp_path / "q"), Output(folder=file), GgufRequest())
    planned = json.loads(plan.read_text())["sizes"]["after_bytes"]
    assert planned - 10_000 <= file.stat().st_size <= planned
    session = open_llama(file, context=64)
    assert session.logits([5, 6, 7]).isfinite().all()
    session.close()


def test_what_no_block_fills_is_refused_before_the_profile(tmp_path: Path) -> None:
    folder = tiny_models.make("qwen3_moe", tmp_path / "model", head_dim=20)  # o_proj has 80 columns
    byte_tokenizer(folder, merges=True)
    for words in (
        ("profile", folder, "-o", tmp_path / "p", "--grid-losses"),
        ("run", folder, "-o", tmp_path / "r", "--to", "gguf", "--budget", "1MiB"),
    ):
        code, _, said = command(*words, *SHORT)
        assert (code, said.count("\n")) == (2, 1), said
        assert "A matrix has 80 columns, which GGUF's blocks of 32 do not fill" in said
