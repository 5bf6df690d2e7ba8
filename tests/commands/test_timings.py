"""`--timings FILE`: rows for every layer and phase, that add up, and outputs that do not know of it."""

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors import safe_open
from stage_runs import add_tokenizer, command, content

from moepress import __version__
from moepress.compress.gptq import pieces

LAYERS = 3  # of the tiny model: a dense one, and two of 16 experts
PIECE_BYTES = 6 * 7680 + 1  # six experts in a piece
OF_MOE_LAYERS = {
    "read",
    "read beside",
    "forward",
    "Hessian",
    "load",
    "solve",
    "pack",
    "write",
    "hidden states",
    "check",
}
OF_MOE_LAYERS |= {"release", "other", "factor", "columns", "losses"}


@pytest.fixture
def model(tiny_copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pieces, "PIECE_BYTES", PIECE_BYTES)
    folder = tiny_copy("deepseek_v3", dtype=torch.bfloat16)
    add_tokenizer(folder)
    return folder


def calibrated(name: str, model: Path, *more: object) -> list[object]:
    text = model.parent / "text.txt"
    text.write_text("".join(random.Random(0).choices("abcdefgh ABCDEFGH.,;", k=4000)))
    return [name, model, "--calibration", text, "--tokens", "256", "--window", "16", *more]


def timed(arguments: Iterable[object], file: Path) -> dict[str, Any]:
    """What a command writes about its time."""
    code, _, errors = command(*arguments, "--timings", file)
    assert code == 0, errors
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def phases_of(found: dict[str, Any], layer: int | None) -> set[str]:
    return {row["phase"] for row in found["rows"] if row["layer"] == layer}


def total(found: dict[str, Any], key: str, phase: str) -> float:
    return sum(float(row[key]) for row in found["rows"] if row["phase"] == phase)


def stored_bytes(model: Path, wanted: Callable[[str], bool]) -> int:
    """By the safetensors library: the bytes of the tensors of these names."""
    size = 0
    for file in model.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            size += sum(tensors.get_tensor(n).nbytes for n in tensors.keys() if wanted(n))  # noqa: SIM118
    return size


def routed(name: str) -> bool:
    return ".mlp.experts." in name


def assert_sound(found: dict[str, Any], name: str) -> None:
    assert (found["moepress"], found["command"], found["device"]) == (__version__, name, "cpu")
    assert found["threads"] == torch.get_num_threads()
    assert found["peak_rss_bytes"] > 50 << 20
    assert "peak_device_bytes" not in found
    for row in found["rows"]:
        assert row.keys() == {"layer", "phase", "seconds", "flops", "bytes", "background"}
        assert min(row["seconds"], row["flops"], row["bytes"]) >= 0
        assert row["background"] == (row["phase"] == "read beside")
    spent = sum(row["seconds"] for row in found["rows"] if not row["background"])
    taken = 0.02  # by other processes, in a run of a third of a second
    assert 0.98 * found["wall_seconds"] - taken <= spent <= found["wall_seconds"]


@pytest.mark.parametrize("fp8", [False, True])
def test_quantize_tells_where_its_time_went(model: Path, tmp_path: Path, fp8: bool) -> None:
    if fp8:
        tiny_models.to_fp8(model)
    arguments = calibrated("quantize", model, "--group-size", "32", "--device", "cpu", "--match", "own")  # one stream
    assert command(*arguments, "-o", tmp_path / "plain")[0] == 0
    found = timed([*arguments, "-o", tmp_path / "out"], tmp_path / "timings.json")
    assert content(tmp_path / "out") == content(tmp_path / "plain")
    assert_sound(found, "quantize")
    assert {"start", "embed", "check", "write", "other"} <= phases_of(found, None)
    assert {"read", "forward", "write", "hidden states", "release", "check"} <= phases_of(found, 0)
    for layer in range(1, LAYERS):
        assert phases_of(found, layer) >= OF_MOE_LAYERS
    assert total(found, "bytes", "read beside") == stored_bytes(model, routed)
    assert total(found, "bytes", "write") == stored_bytes(tmp_path / "out", lambda _name: True)
    assert total(found, "bytes", "hidden states") == (LAYERS - 1) * 256 * 64 * 4


def test_flops_are_those_of_the_shapes(model: Path, tmp_path: Path) -> None:
    arguments = calibrated("quantize", model, "--group-size", "32", "--include", "none", "-o", tmp_path / "out")
    arguments += ["--match", "own"]
    found = timed([*arguments, "--device", "cpu"], tmp_path / "timings.json")
    by_layer = {row["layer"]: row["flops"] for row in found["rows"] if row["phase"] == "forward"}
    hidden, tokens, window, top_k, heads = 64, 256, 16, 4, 4
    attention = hidden * 48 + 48 * heads * 32 + hidden * (32 + 16) + 32 * heads * (16 + 16) + heads * 16 * hidden
    scores = window * heads * (32 + 16)
    dense = 2 * tokens * (attention + scores + 3 * 128 * hidden)
    # Of the routed experts down alone: what gate and up give was computed, and counted, for the Hessian of down.
    chosen = 2 * tokens * (attention + scores + 16 * hidden + (3 + top_k) * 64 * hidden)
    assert by_layer == {0: dense, 1: chosen, 2: chosen}


def test_a_run_in_sittings_is_timed_sitting_by_sitting(model: Path, tmp_path: Path) -> None:
    arguments = calibrated("quantize", model, "--group-size", "32", "--include", "shared", "--include", "lm_head")
    arguments += ["--match", "own"]  # the original's experts are read again in every sitting
    assert command(*arguments, "-o", tmp_path / "plain")[0] == 0
    out = tmp_path / "out"
    first = timed([*arguments, "-o", out, "--max-pieces", "3"], tmp_path / "first.json")
    assert not out.exists()
    assert_sound(first, "quantize")
    assert phases_of(first, 1) >= {"solve", "write"}
    assert not phases_of(first, 2)
    rest = timed([*arguments, "-o", out, "--resume"], tmp_path / "rest.json")
    assert_sound(rest, "quantize")
    assert not phases_of(rest, 0)
    assert content(out) == content(tmp_path / "plain")
    assert total(first, "bytes", "read beside") + total(rest, "bytes", "read beside") == stored_bytes(model, routed)


def test_profile_tells_where_its_time_went(model: Path, tmp_path: Path) -> None:
    arguments = calibrated("profile", model, "--device", "cpu")
    assert command(*arguments, "-o", tmp_path / "plain")[0] == 0
    found = timed([*arguments, "-o", tmp_path / "out"], tmp_path / "timings.json")
    assert content(tmp_path / "out") == content(tmp_path / "plain")
    assert_sound(found, "profile")
    assert {"start", "embed", "check", "other"} <= phases_of(found, None)
    for layer in range(1, LAYERS):
        wanted = {"forward", "read", "read beside", "observe", "write", "hidden states", "release", "check", "other"}
        assert phases_of(found, layer) >= wanted
    assert 0 < total(found, "bytes", "read beside") <= stored_bytes(model, routed)  # experts without tokens stay unread


def test_prune_tells_where_its_time_went(model: Path, tmp_path: Path) -> None:
    assert command(*calibrated("profile", model), "-o", tmp_path / "profile")[0] == 0
    arguments = ["prune", model, "--profile", tmp_path / "profile", "--keep", "0.5"]
    assert command(*arguments, "-o", tmp_path / "plain")[0] == 0
    found = timed([*arguments, "-o", tmp_path / "out"], tmp_path / "timings.json")
    assert content(tmp_path / "out") == content(tmp_path / "plain")
    assert_sound(found, "prune")
    assert phases_of(found, None) >= {"read", "write", "check", "other"}
    written = stored_bytes(tmp_path / "out", lambda _name: True)
    assert total(found, "bytes", "read") == total(found, "bytes", "write") == written


@pytest.mark.parametrize("name", ["profile", "prune", "quantize", "run"])
@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("out/timings.json", "lies inside"),
        ("out.partial/timings.json", "lies inside"),
        ("out", "lies inside"),
        ("copy-deepseek_v3/timings.json", "lies inside"),
        ("nowhere/timings.json", "not a file in a folder that exists"),
        (".", "not a file in a folder that exists"),
    ],
)
def test_a_place_that_cannot_be_is_refused_before_any_work(
    model: Path, tmp_path: Path, name: str, file: str, message: str
) -> None:
    before = content(tmp_path)
    code, _, errors = command(name, model, "-o", tmp_path / "out", "--timings", tmp_path / file)
    assert code == 2
    assert message in errors
    assert content(tmp_path) == before


def test_a_dry_run_is_not_timed(model: Path, tmp_path: Path) -> None:
    code, _, errors = command(*calibrated("profile", model), "-o", tmp_path / "out", "--dry-run", "--timings", "t.json")
    assert code == 2
    assert "leave out --timings" in errors


def test_a_run_that_fails_leaves_no_timings(model: Path, tmp_path: Path) -> None:
    arguments = calibrated("quantize", model, "--group-size", "31", "-o", tmp_path / "out")
    assert command(*arguments, "--timings", tmp_path / "timings.json")[0] == 2
    assert not (tmp_path / "timings.json").exists()
