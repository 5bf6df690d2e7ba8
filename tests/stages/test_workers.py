"""`quantize --workers`: processes of this machine, with the bytes of one."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from shared_runs import assert_same, moepress, text_of, with_tokenizer
from stage_runs import command

OPTIONS = ("--bits", "4", "--group-size", "32")


@pytest.fixture
def model(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    shutil.copytree(tiny_model("qwen2_moe"), tmp_path / "model")
    return with_tokenizer(tmp_path / "model")


def test_two_processes_give_the_bytes_of_one(model: Path, tmp_path: Path) -> None:
    text = text_of(tmp_path)
    moepress("quantize", model, *OPTIONS, *text, "-o", tmp_path / "one")
    moepress("quantize", model, *OPTIONS, *text, "-o", tmp_path / "two", "--workers", "2")
    assert_same(tmp_path / "two", tmp_path / "one")
    assert not (tmp_path / "two.partial").exists()


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4])
def test_the_demo_by_so_many_processes(tmp_path: Path, count: int) -> None:
    options = ("--bits", "4", "--group-size", "64", "--tokens", "65536")  # four shards
    moepress("quantize", "demo", *options, "-o", tmp_path / "one")
    moepress("quantize", "demo", *options, "-o", tmp_path / "more", "--workers", count)
    assert_same(tmp_path / "more", tmp_path / "one")


@pytest.mark.slow
def test_an_array_of_three_in_any_order_on_the_demo(tmp_path: Path) -> None:
    options = ("--bits", "4", "--group-size", "64", "--tokens", "65536")
    moepress("quantize", "demo", *options, "-o", tmp_path / "one")
    moepress("plan-work", "demo", "--store", tmp_path / "store", *options)
    for number in (2, 0, 1):
        moepress("work", "--store", tmp_path / "store", "--shard", f"{number}/3", "--threads", "1")
    moepress("work", "--store", tmp_path / "store", "-o", tmp_path / "array")
    assert_same(tmp_path / "array", tmp_path / "one")


def test_sittings_do_not_go_with_workers(model: Path, tmp_path: Path) -> None:
    code, _, errors = command("quantize", model, "-o", tmp_path / "out", "--workers", "2", "--max-pieces", "1")
    assert code == 2
    assert "--max-pieces is for one process" in errors
