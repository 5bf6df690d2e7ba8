"""Scales of either sign, from the command line to each layout, and for who takes no others."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stage_runs import command

QUANTIZE = ("quantize", "demo", "--bits", "4", "--group-size", "64", "--tokens", "2048")


def share_of_negative(folder: Path, suffix: str) -> float:
    negative = every = 0
    for file in folder.glob("*.safetensors"):
        for name, scales in load_file(file).items():
            if name.endswith(suffix):
                negative, every = negative + int((scales < 0).sum()), every + scales.numel()
    return negative / every


@pytest.fixture(scope="module")
def pressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo in 4 bits; not to be changed."""
    folder = tmp_path_factory.mktemp("signed") / "pressed"
    code, _, said = command(*QUANTIZE, "-o", folder)
    assert code == 0, said
    return folder


def test_half_of_the_scales_are_negative_and_every_layout_has_the_same_weights(pressed: Path, tmp_path: Path) -> None:
    from moepress.converters.safetensors.artifact import open_artifact

    assert 0.4 < share_of_negative(pressed, "weight_scale") < 0.6
    assert command("export", pressed, "--to", "gptq", "-o", tmp_path / "gptq")[0] == 0
    assert 0.4 < share_of_negative(tmp_path / "gptq", ".scales") < 0.6
    one, other = open_artifact(pressed), open_artifact(tmp_path / "gptq")
    names = [name for name in one.shapes if one.is_quantized(name)]
    for name in names[:20]:
        assert torch.equal(one.codes(name)[0], other.codes(name)[0])
        assert torch.equal(one.codes(name)[1].float(), other.codes(name)[1].float())


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq"])
def test_check_names_the_option_that_corrupts_them_and_does_not_fail(
    layout: str, pressed: Path, tmp_path: Path
) -> None:
    folder = pressed
    if layout == "gptq":
        folder = tmp_path / "gptq"
        assert command("export", pressed, "--to", "gptq", "-o", folder)[0] == 0
    code, shown, said = command("check", folder, "--runtime", "vllm", "--json")
    assert code == 0, said
    found = [row for row in json.loads(shown)["findings"] if row["rule"] == "negative-scales"]
    assert [(row["runtime"], row["effect"]) for row in found] == [("vllm", "wrong with an option")]
    assert "VLLM_MARLIN_INPUT_DTYPE=int8" in found[0]["happens"]


def test_one_sign_may_be_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "pressed"
    code, _, said = command(*QUANTIZE, "-o", out, "--positive-scales")
    assert code == 0, said
    assert share_of_negative(out, "weight_scale") == 0
    found = json.loads(command("check", out, "--runtime", "vllm", "--json")[1])["findings"]
    assert not any(row["rule"] == "negative-scales" for row in found)
    code, _, said = command("quantize", "demo", "--grid", "q4_0", "--positive-scales", "-o", tmp_path / "x")
    assert code == 2
    assert "codes of integers" in said
    words = ("run", "demo", "--grid", "q4_0", "--positive-scales", "--to", "gguf", "-o", tmp_path / "y", "--dry-run")
    assert command(*words)[0] == 2
