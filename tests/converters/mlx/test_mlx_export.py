"""Folders for mlx-lm: words, scales and biases by the layout's own arithmetic, and mlx-lm itself where it is there."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from byte_tokenizer import byte_tokenizer
from stage_runs import command
from torch import Tensor

from moepress.converters.safetensors.artifact import open_artifact
from moepress.validation.rules.check import check_folder
from moepress.validation.rules.findings import Runtime

KEYS = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3")


def pressed(key: str, folder: Path, *arguments: str) -> Path:
    model = tiny_models.make(key, folder / "model")
    byte_tokenizer(model)
    out = folder / "pressed"
    code, _, said = command("quantize", model, "-o", out, "--tokens", "1024", *arguments)
    assert code == 0, said
    return out


def affine(words: Tensor, scales: Tensor, biases: Tensor, bits: int, group: int) -> Tensor:
    """MLX's arithmetic: a row is one little-endian stream of codes; W = code * scale + bias by group."""
    raw = words.numpy().view(np.uint8)
    stream = np.unpackbits(raw, axis=-1, bitorder="little")
    columns = scales.shape[-1] * group
    codes = (stream[..., : columns * bits].reshape(*stream.shape[:-1], columns, bits) << np.arange(bits)).sum(-1)
    wide = torch.from_numpy(codes.astype(np.float32)).unflatten(-1, (-1, group))
    return (wide * scales.float()[..., None] + biases.float()[..., None]).flatten(-2)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("key", KEYS)
def test_every_matrix_is_codes_times_scales(key: str, bits: int, tmp_path: Path) -> None:
    source = pressed(key, tmp_path, "--bits", str(bits), "--group-size", "32")
    assert command("export", source, "--to", "mlx", "-o", tmp_path / "mlx")[0] == 0
    tensors, artifact = tiny_models.load_tensors(tmp_path / "mlx"), open_artifact(source)
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())["quantization"]
    own = {name: row["bits"] for name, row in config.items() if isinstance(row, dict)}
    experts = [
        name
        for name in (n.removesuffix(".scales") for n in tensors if "switch_mlp" in n)
        if name + ".scales" in tensors
    ]
    assert {own.get(name, config["bits"]) for name in experts} == {bits}
    others = [n.removesuffix(".scales") for n in tensors if n.endswith(".scales") and "switch_mlp" not in n]
    assert {own.get(name, config["bits"]) for name in others} <= {8}  # attention and the like, where groups fit
    seen = 0
    for layer in artifact.outline.moe_layers:
        for place, leaf in enumerate(("gate_proj", "up_proj", "down_proj")):
            module = next(n for n in tensors if f"layers.{layer}." in n and n.endswith(f"switch_mlp.{leaf}.weight"))
            stem = module.removesuffix(".weight")
            found = affine(tensors[module], tensors[f"{stem}.scales"], tensors[f"{stem}.biases"], bits, 32)
            for expert in range(artifact.outline.shape.experts):
                codes, scales = artifact.codes(artifact.family.expert_names(layer, expert)[place])
                wanted = (codes.float().unflatten(1, (-1, 32)) * scales.float()[..., None]).flatten(1)
                torch.testing.assert_close(found[expert], wanted, rtol=0, atol=1e-7)
                seen += 1
    assert seen


def test_groups_of_a_row_are_repeated_and_odd_ones_refused(tmp_path: Path) -> None:
    source = pressed("qwen3_moe", tmp_path, "--bits", "4", "--group-size", "-1")
    assert command("export", source, "--to", "mlx", "-o", tmp_path / "mlx")[0] == 0
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert config["quantization"]["group_size"] in (32, 64, 128)
    other = pressed("qwen3_moe", tmp_path / "other", "--bits", "4", "--group-size", "16")
    code, _, said = command("export", other, "--to", "mlx", "-o", tmp_path / "none")
    assert (code, "Groups of 16" in said) == (5, True)


def test_check_knows_what_mlx_lm_does_with_a_folder(tmp_path: Path) -> None:
    def effect(folder: Path) -> list[str]:
        return [f.effect.value for f in check_folder(folder, [Runtime.MLX]).findings if f.rule == "mlx-layout"]

    three = pressed("deepseek_v3", tmp_path / "3", "--bits", "3", "--group-size", "32")
    four = pressed("deepseek_v3", tmp_path / "4", "--bits", "4", "--group-size", "32", "--include", "none")
    mixed = pressed("deepseek_v3", tmp_path / "8", "--bits", "4,shared=8", "--group-size", "32")
    qwen = pressed("qwen3_moe", tmp_path / "q", "--bits", "4", "--group-size", "32")
    assert command("export", qwen, "--to", "mlx", "-o", tmp_path / "mlx")[0] == 0
    assert [effect(folder) for folder in (three, four, mixed, qwen, tmp_path / "mlx")] == [
        *(["silently wrong"], [], ["silently wrong"], ["refuses"], [])
    ]


@pytest.mark.parametrize("words", ["3", "4", "8", "4 --include shared", "4 --asymmetric", "3 --asymmetric"])
@pytest.mark.parametrize("key", KEYS)
def test_mlx_lm_computes_the_same_logits(key: str, words: str, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    from transformers import AutoModelForCausalLM

    source = pressed(key, tmp_path, "--group-size", "32", "--bits", *words.split())
    assert command("export", source, "--to", "mlx", "-o", tmp_path / "mlx")[0] == 0
    model, _ = utils.load_model(tmp_path / "mlx", strict=True)
    model.set_dtype(mx.float32)
    windows = torch.randint(2, 250, (2, 24), generator=torch.Generator().manual_seed(0))
    found = torch.from_numpy(np.array(model(mx.array(windows.numpy())).astype(mx.float32)))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    _exact(base, source)
    with torch.inference_mode():
        wanted = base(windows).logits
    difference = (torch.log_softmax(found, -1) - torch.log_softmax(wanted, -1)).abs().max()
    assert float(difference) < 1e-4


def test_validate_and_generate_take_the_folder(tmp_path: Path) -> None:
    pytest.importorskip("mlx.core")
    pytest.importorskip("mlx_lm.utils")
    arguments = ("--bits", "4", "--group-size", "32", "--tokens", "2048")
    assert command("quantize", "demo", "-o", tmp_path / "pressed", *arguments)[0] == 0
    assert command("export", tmp_path / "pressed", "--to", "mlx", "-o", tmp_path / "mlx")[0] == 0
    options = ("--no-throughput", "--max-windows", "1", "--json")
    code, said, errors = command("validate", tmp_path / "pressed", tmp_path / "mlx", *options)
    assert code == 0, errors
    rows = json.loads(said)["quality"]["rows"]
    divergence = [row["paired"]["kl"]["value"] for row in rows if row["paired"]]
    assert max(divergence) < 1e-5
    prompt = ("def read_file(path):", "--max-new-tokens", "8")
    ours, theirs = (command("generate", tmp_path / name, *prompt)[1] for name in ("pressed", "mlx"))
    assert ours == theirs


def _exact(model: torch.nn.Module, folder: Path) -> None:
    """Put the exact products of codes, less zero points, and scales into transformers' model."""
    artifact = open_artifact(folder)
    state = model.state_dict()
    for name in artifact.shapes:
        if not artifact.is_quantized(name):
            continue
        codes, scales = artifact.codes(name)
        zeros = artifact.zeros(name)
        above = codes.float().unflatten(1, (scales.shape[1], -1)) - (0 if zeros is None else zeros.float()[..., None])
        dense = (above * scales.float()[..., None]).flatten(1)
        place = artifact.family.expert_of(name)
        if place is None:
            state[artifact.family.module_name(name)].copy_(dense)
            continue
        layer, expert, _ = place
        part = artifact.family.expert_names(layer, expert).index(name)
        prefix = f"model.layers.{layer}.{artifact.family.experts_module}"
        if part == 2:
            state[f"{prefix}.down_proj"][expert].copy_(dense)
        else:
            half = state[f"{prefix}.gate_up_proj"][expert].chunk(2)[part]
            half.copy_(dense)
