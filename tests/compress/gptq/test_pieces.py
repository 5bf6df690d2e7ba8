"""quantize in sittings: --max-pieces stops cleanly, --resume goes on, and the bytes are those of one run."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from r1_models import small_r1
from stage_runs import add_tokenizer, command, content

from moepress.compress.gptq import pieces
from moepress.compress.gptq.coded import QuantizeOptions
from moepress.compress.gptq.pieces import Allowance, SpentError, piece_names, plan_chunks
from moepress.converters.safetensors.scheme import Scheme
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.runs.output import partial_folder
from moepress.stages import quantize as stage

SMALL_PIECES = 6 * 7680 + 1  # six experts of 3 * 64 * 64 weights at 4 bits, planned as 5


def test_an_allowance_lets_so_many_pieces_through() -> None:
    allowance = Allowance(left=2)
    for _ in range(2):
        allowance.require()
        allowance.spend()
    with pytest.raises(SpentError):
        allowance.require()
    endless = Allowance(left=None)
    endless.spend()
    endless.require()


@pytest.fixture
def model(tiny_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three layers: a dense one, and two of 16 experts in 3 pieces each; 8 pieces with what lies outside of layers."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", SMALL_PIECES)
    folder = tiny_copy("deepseek_v3")
    add_tokenizer(folder)
    return folder


def quantizing(model: Path, *more: object) -> list[object]:
    text = model.parent / "text.txt"
    text.write_text("".join(random.Random(0).choices("abcdefgh ABCDEFGH.,;", k=4000)))
    scheme = ["--group-size", "32", "--tokens", "256", "--window", "16"]
    return ["quantize", model, "--calibration", text, *scheme, *more]


def sittings(arguments: Sequence[object], out: Path, count: int) -> list[dict[str, Any]]:
    """Repeat a command until its output is there; what each says in JSON."""
    said = []
    while not out.exists():
        resume = ["--resume"] if said else []
        code, printed, errors = command(*arguments, "-o", out, "--max-pieces", count, "--json", *resume)
        assert code == 0, errors
        said.append(json.loads(printed))
        if not said[-1]["finished"]:
            done = f"{said[-1]['pieces_done']} of {said[-1]['pieces']} pieces are done"
            assert errors.splitlines()[-1] == f"Note: {done}; repeat the command with --resume to go on."
            assert not out.exists()
            assert not (partial_folder(out) / "lock.json").exists()
        assert len(said) < 30
    return said


@pytest.mark.parametrize(("count", "include"), [(1, ()), (3, ("--include", "shared", "--include", "lm_head")), (8, ())])
def test_a_run_in_sittings_ends_with_the_bytes_of_one(
    model: Path, tmp_path: Path, count: int, include: tuple[str, ...]
) -> None:
    arguments = quantizing(model, *include)
    code, printed, errors = command(*arguments, "-o", tmp_path / "whole", "--json")
    assert code == 0, errors
    whole = json.loads(printed)
    assert (whole["finished"], whole["pieces_done"], whole["pieces"]) == (True, 8, 8)
    said = sittings(arguments, tmp_path / "out", count)
    assert [row["pieces_done"] for row in said] == [min(n, 8) for n in range(count, 8 + count, count)]
    assert said[-1] == whole
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not partial_folder(tmp_path / "out").exists()


def test_a_resume_without_a_limit_does_the_rest(model: Path, tmp_path: Path) -> None:
    arguments = quantizing(model)
    code, _, _ = command(*arguments, "-o", tmp_path / "whole")
    assert code == 0
    code, printed, errors = command(*arguments, "-o", tmp_path / "out", "--max-pieces", "5")
    assert (code, printed) == (0, "")
    assert errors.splitlines()[-1] == "Note: 5 of 8 pieces are done; repeat the command with --resume to go on."
    code, _, errors = command(*arguments, "-o", tmp_path / "out")
    assert code == 2
    assert "pass --resume to go on" in errors
    code, _, errors = command(*arguments, "-o", tmp_path / "out", "--resume")
    assert code == 0, errors
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_resume_with_pieces_of_another_size_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = quantizing(model)
    assert command(*arguments, "-o", tmp_path / "out", "--max-pieces", "2")[0] == 0
    monkeypatch.setattr(stage, "PIECE_BYTES", 1 << 30)
    code, _, errors = command(*arguments, "-o", tmp_path / "out", "--resume")
    assert code == 2
    assert "the size of pieces is another one" in errors


def test_pieces_of_r1_are_a_few_experts(tmp_path: Path) -> None:
    source = open_checkpoint(small_r1(tmp_path / "r1"))
    wide = {name: shape for name, shape in source.shapes.items() if ".experts.0." in name}
    assert len(wide) == 6
    for name in wide:  # R1's widths, in a source of headers
        source.shapes[name] = (7168, 2048) if "down_proj" in name else (2048, 7168)
    scheme = Scheme(bits=4, group_size=128)
    options = QuantizeOptions(scheme=scheme, scale_dtype=torch.bfloat16, stored_dtype=torch.bfloat16)
    chunks = plan_chunks(source, 3, dict.fromkeys(source.outline.moe_layers, 256), options)
    assert chunks[0] == [[]]
    assert [len(part) for part in chunks[1]] == [9] * 28 + [4]
    assert [expert for part in chunks[1] for expert in part] == list(range(256))
    names = piece_names(chunks)
    assert list(names)[-1] == "outer"
    assert names["layer-2-28"] == "model-00059-of-00060.safetensors"


def test_a_made_r1_goes_all_the_way_in_sittings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp8 in, profile, plan, prune, quantize in sittings; a plan fits its model whatever was done with that before."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1 << 17)
    model, text = small_r1(tmp_path / "r1", vocab_size=2048), tmp_path / "text.txt"
    text.write_text("The cat sat on the mat, and the dog said no. " * 200)
    given = ["--calibration", text, "--tokens", "512", "--window", "64"]
    steps = [
        ["profile", model, "-o", tmp_path / "profile", *given],
        ["plan", tmp_path / "profile", "--experts", "16", "--group-size", "32", "-o", tmp_path / "plan.json"],
        ["prune", model, "--plan", tmp_path / "plan.json", "-o", tmp_path / "pruned"],
    ]
    for step in steps:
        code, _, errors = command(*step)
        assert code == 0, errors
    arguments = ["quantize", model, "--plan", tmp_path / "plan.json", *given]
    said = sittings(arguments, tmp_path / "pressed", 3)
    assert len(said) > 2
    assert said[-1]["experts"] == 16
    again = ["quantize", tmp_path / "pruned", "--group-size", "32", *given, "-o", tmp_path / "again"]
    code, _, errors = command(*again)
    assert code == 0, errors
    one, two = content(tmp_path / "pressed"), content(tmp_path / "again")
    shards = {name for name in one if name.endswith(".safetensors")}
    assert {name: one[name] for name in shards} == {name: two[name] for name in shards}
