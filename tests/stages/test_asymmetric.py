"""`quantize --asymmetric`, from the command line to each layout, each held against arithmetic that is not ours."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from byte_tokenizer import byte_tokenizer
from compressed_tensors import QuantizationConfig
from compressed_tensors.compressors import PackedQuantizationCompressor
from stage_runs import command
from torch import Tensor

from moepress.compress.budget.sizes import matrix_bytes
from moepress.converters.safetensors.artifact import Artifact, open_artifact
from moepress.converters.safetensors.scheme import Scheme
from moepress.validation.rules.check import check_folder
from moepress.validation.rules.findings import Runtime

Pressed = Callable[[int], Path]


@pytest.fixture(scope="module")
def pressed(tmp_path_factory: pytest.TempPathFactory) -> Pressed:
    """`pressed(bits)`: a tiny Qwen3 with attention and experts so, in bf16; not to be changed."""
    folder, made = tmp_path_factory.mktemp("asymmetric"), dict[int, Path]()
    model = tiny_models.make("qwen3_moe", folder / "model", dtype=torch.bfloat16)
    byte_tokenizer(model, merges=True)

    def get(bits: int) -> Path:
        if bits not in made:
            made[bits] = folder / f"pressed-{bits}"
            words = ("--bits", bits, "--group-size", 32, "--include", "attention", "--tokens", 1024)
            code, _, said = command("quantize", model, "--asymmetric", *words, "-o", made[bits])
            assert code == 0, said
        return made[bits]

    return get


def coded(artifact: Artifact) -> list[str]:
    return [name for name in artifact.shapes if artifact.is_quantized(name)]


def exactly(artifact: Artifact, name: str) -> Tensor:
    """(q - zero) * scale in fp64."""
    (codes, scales), zeros = artifact.codes(name), artifact.zeros(name)
    assert zeros is not None
    steps = codes.double().unflatten(1, (scales.shape[1], -1)) - zeros.double()[..., None]
    return (steps * scales.double()[..., None]).flatten(1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_folder_is_what_compressed_tensors_takes_it_for(pressed: Pressed, bits: int) -> None:
    folder = pressed(bits)
    artifact, tensors = open_artifact(folder), tiny_models.load_tensors(folder)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    theirs = QuantizationConfig.model_validate(config).config_groups["group_0"]
    assert theirs.weights is not None
    assert (theirs.weights.symmetric, artifact.scheme.symmetric) == (False, False)
    used: set[int] = set()
    for name in coded(artifact):
        module = name.removesuffix("weight")
        own = {n.removeprefix(module): tensor for n, tensor in tensors.items() if n.startswith(module)}
        assert torch.equal(PackedQuantizationCompressor.decompress(own, theirs)["weight"], artifact.read(name)), name
        zeros = artifact.zeros(name)
        assert zeros is not None
        used |= set(zeros.unique().tolist())
        size = sum(tensor.nbytes for tensor in own.values())
        assert size == matrix_bytes(*artifact.shapes[name], artifact.scheme)
    assert len(used) > 2
    note = json.loads((folder / "moepress.json").read_text())
    assert note["scheme"] == {"bits": bits, "group_size": 32, "symmetric": False}
    assert note["solver"]["signed"] is False


def test_less_is_lost_than_with_scales_of_either_sign(pressed: Pressed, tmp_path: Path) -> None:
    model = pressed(4).parent / "model"
    words = ("--bits", 4, "--group-size", 32, "--include", "attention", "--tokens", 1024)
    assert command("quantize", model, *words, "-o", tmp_path / "signed")[0] == 0
    errors = [
        sum(json.loads((folder / "moepress.json").read_text())["layer_error"].values())
        for folder in (tmp_path / "signed", pressed(4))
    ]
    assert errors[1] < errors[0]


def test_transformers_does_not_load_such_experts_and_check_says_so(pressed: Pressed) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(RuntimeError, match="conversion of the weights"):
        AutoModelForCausalLM.from_pretrained(pressed(4))
    for bits, refused in ((4, {Runtime.TRANSFORMERS}), (8, {Runtime.TRANSFORMERS, Runtime.VLLM})):
        found = check_folder(pressed(bits), list(Runtime)).findings
        assert {row.runtime for row in found if row.rule == "symmetric"} == refused
        assert not any(row.rule in ("codes-complete", "tensors-complete", "negative-scales") for row in found)


def test_a_folder_without_some_zero_points_is_found_and_not_read(pressed: Pressed, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(pressed(4), tmp_path / "spoiled")
    artifact = open_artifact(folder)
    names = [name for name in coded(artifact) if "layers.1." in name]
    gone = {f"{name.removesuffix('weight')}weight_zero_point" for name in names}
    tiny_models.rewrite(folder, lambda tensors: [tensors.pop(name, None) for name in gone] and None)
    found = {row.rule for row in check_folder(folder, [Runtime.VLLM]).findings}
    assert {"experts-complete", "codes-complete"} <= found
    code, _, said = command("export", folder, "--to", "gptq", "-o", tmp_path / "gptq")
    assert (code, "weight_zero_point" in said) == (4, True)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_holds_the_same_weights_and_goes_back(pressed: Pressed, bits: int, tmp_path: Path) -> None:
    assert command("export", pressed(bits), "--to", "gptq", "-o", tmp_path / "gptq")[0] == 0
    artifact, other = open_artifact(pressed(bits)), open_artifact(tmp_path / "gptq")
    assert other.scheme == artifact.scheme
    assert json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())["sym"] is False
    tensors = tiny_models.load_tensors(tmp_path / "gptq")
    for name in coded(artifact):
        module = name.removesuffix(".weight")
        codes_OI = stream_of(tensors[f"{module}.qweight"].T, bits)
        stored_GO = stream_of(tensors[f"{module}.qzeros"], bits)
        steps = codes_OI - (stored_GO.T + 1).repeat_interleave(32, dim=1)
        scales = tensors[f"{module}.scales"].double().T.repeat_interleave(32, dim=1)
        torch.testing.assert_close(steps * scales, exactly(artifact, name), rtol=1e-3, atol=1e-9)
        assert torch.equal(other.codes(name)[0], artifact.codes(name)[0])
        assert torch.equal(other.zeros(name), artifact.zeros(name))  # type: ignore[arg-type]
    back = tmp_path / "back"
    assert command("export", tmp_path / "gptq", "--to", "compressed-tensors", "-o", back)[0] == 0
    again = open_artifact(back)
    for name in coded(artifact)[:20]:
        assert torch.equal(again.zeros(name), artifact.zeros(name))  # type: ignore[arg-type]


def stream_of(rows: Tensor, bits: int) -> Tensor:
    """Codes of words whose rows are streams of bits, fp64."""
    raw = np.ascontiguousarray(rows.numpy()).view(np.uint8)
    fields = np.unpackbits(raw, axis=-1, bitorder="little")
    fields = fields[..., : fields.shape[-1] // bits * bits].reshape(*rows.shape[:-1], -1, bits)
    return torch.from_numpy((fields.astype(np.float64) * (1 << np.arange(bits))).sum(-1))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mlx_has_a_bias_for_every_zero_point(pressed: Pressed, bits: int, tmp_path: Path) -> None:
    code, shown, said = command("export", pressed(bits), "--to", "mlx", "-o", tmp_path / "mlx", "--json")
    assert code == 0, said
    assert "Biases, zero points times scales, are rounded" in shown
    artifact, tensors = open_artifact(pressed(bits)), tiny_models.load_tensors(tmp_path / "mlx")
    for place, leaf in enumerate(("gate_proj", "up_proj", "down_proj")):
        stem = f"model.layers.1.mlp.switch_mlp.{leaf}"
        words, scales, biases = (tensors[f"{stem}.{part}"] for part in ("weight", "scales", "biases"))
        codes = stream_of(words, bits)[..., : scales.shape[-1] * 32]
        grouped = codes.unflatten(-1, (-1, 32))
        found = (grouped * scales.double()[..., None] + biases.double()[..., None]).flatten(-2)
        for expert in range(len(found)):
            wanted = exactly(artifact, artifact.family.expert_names(1, expert)[place])
            rounding = (biases[expert].double().abs() / 256).repeat_interleave(32, dim=1)
            assert bool(((found[expert] - wanted).abs() <= rounding + 1e-9).all())


def test_mlx_has_no_room_for_zero_points_of_eight_bits(pressed: Pressed, tmp_path: Path) -> None:
    code, _, said = command("export", pressed(8), "--to", "mlx", "-o", tmp_path / "mlx")
    assert (code, "whose biases have the dtype of scales" in said) == (5, True)


@pytest.mark.parametrize("kernel", ["qmoe", "loop"])
@pytest.mark.parametrize("bits", [4, 8])
def test_onnx_runtime_computes_the_same_logits(pressed: Pressed, bits: int, kernel: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from onnx_runs import graph_of, onnx_logits, own_logits, relative_error, to_onnx, tokens_of

    out = to_onnx(pressed(bits), tmp_path / "onnx", kernel=kernel)
    tokens = tokens_of(pressed(bits))
    assert relative_error(onnx_logits(out, tokens), own_logits(pressed(bits), tokens)) < 1e-5
    inputs = {len(node.input) for node in graph_of(out).graph.node if node.op_type in ("QMoE", "MatMulNBits")}
    plain = bits == 8  # attention and the like: see `converters.onnx.parts.is_faster_plain`
    assert inputs == ({13} if plain and kernel == "qmoe" else {4, 13} if kernel == "qmoe" else {4})


@pytest.mark.parametrize("bits", [2, 4])
def test_a_gguf_file_has_q4_1_and_eight_bits_are_refused(pressed: Pressed, bits: int, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    code, _, said = command("export", pressed(bits), "--to", "gguf", "-o", tmp_path / "model.gguf")
    assert code == 0, said
    artifact, reader = open_artifact(pressed(bits)), gguf.GGUFReader(tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for place, leaf in enumerate(("gate", "up", "down")):
        tensor = tensors[f"blk.1.ffn_{leaf}_exps.weight"]
        assert tensor.tensor_type.name == "Q4_1"
        found = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type)).double()
        for expert in range(len(found)):
            name = artifact.family.expert_names(1, expert)[place]
            step = artifact.scales(name).double().abs().repeat_interleave(32, dim=1)
            assert bool(((found[expert] - exactly(artifact, name)).abs() <= 2**-7 * step).all())
    code, _, said = command("export", pressed(8), "--to", "gguf", "-o", tmp_path / "none.gguf")
    assert (code, "8 bits with zero points" in said) == (5, True)


def test_what_the_option_does_not_go_with_is_said(tmp_path: Path) -> None:
    for words, said in (
        (("quantize", "demo", "--grid", "q4_0"), "codes of integers"),
        (("run", "demo", "--grid", "q4_0", "--to", "gguf", "--dry-run"), "codes of integers"),
        (("run", "demo", "--budget", "4MB", "--dry-run"), "does not go with --budget"),
        (("run", "demo", "--bits", "8", "--to", "gguf", "--group-size", "64", "--dry-run"), "8 bits with zero points"),
    ):
        code, _, heard = command(*words, "--asymmetric", "-o", tmp_path / "out")
        assert code in (2, 5), words
        assert said in heard, heard


def test_a_run_that_stops_and_goes_on_ends_with_the_same_bytes(pressed: Pressed, tmp_path: Path) -> None:
    words = ("quantize", pressed(4).parent / "model", "--asymmetric", "--bits", 4, "--group-size", 32)
    words = (*words, "--include", "attention", "--tokens", 1024, "--max-pieces", 2, "--resume", "-o", tmp_path / "out")
    for _ in range(8):
        if (tmp_path / "out" / "config.json").is_file():
            break
        assert command(*words)[0] == 0
    for file in sorted(pressed(4).glob("*.safetensors")):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_bits_per_weight_count_zero_points() -> None:
    assert Scheme(bits=4, group_size=64).bits_per_weight(128) == 4.25
    assert Scheme(bits=4, group_size=64, symmetric=False).bits_per_weight(128) == 4.3125
