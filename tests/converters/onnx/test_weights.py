"""Codes and weights as ONNX operators want them: read back here bit by bit, and held against the folder."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_runs
import pytest
import tiny_models
import torch
from onnx_runs import Models, attributes_of, coded_folder, graph_of, initializers_of, random_codes, to_onnx

from moepress.converters.onnx.folder import open_onnx
from moepress.converters.onnx.weights import Weights, block_size, cast, interleaved, packed_rows, require_whole
from moepress.converters.safetensors.artifact import Artifact, open_artifact, open_source
from moepress.converters.safetensors.scheme import Scheme
from moepress.errors import InvalidInputError, UnsupportedError
from moepress.models.families.family import Part

WIDE: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 192, "num_hidden_layers": 1, "num_local_experts": 4}


@pytest.fixture(scope="module")
def models(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Models:
    return onnx_runs.models_of(tiny_model, tmp_path_factory)


def unpacked(packed: np.ndarray, bits: int) -> np.ndarray:  # type: ignore[type-arg]
    """Stored bytes [..., B] to signed codes [..., B * 8 / bits]: a stream of bits, the least significant first."""
    stream = (packed[..., None] >> np.arange(8, dtype=np.uint8)) & 1
    fields = stream.reshape(*packed.shape[:-1], -1, bits).astype(np.int64)
    return (fields << np.arange(bits)).sum(axis=-1) - (1 << bits - 1)  # type: ignore[no-any-return]


def codes_and_scales(artifact: Artifact, name: str, block: int) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """What the folder has: codes [O, I], and the scale of every block of columns [O, I / block]."""
    codes, scales = artifact.codes(name)
    columns = np.arange(0, codes.shape[1], block) * scales.shape[1] // codes.shape[1]
    return codes.numpy().astype(np.int64), scales.numpy()[:, columns]


def check_codes(folder: Path, out: Path) -> dict[str, int]:
    """Hold every matrix of an export against the folder; how many nodes of which kind there were."""
    artifact, weights = open_artifact(folder), initializers_of(out)
    seen = {"QMoE": 0, "MatMulNBits": 0}
    for node in graph_of(out).graph.node:
        if node.op_type not in seen:
            continue
        seen[node.op_type] += 1
        facts = attributes_of(node)
        if node.op_type == "MatMulNBits":
            name, block = node.input[1].removesuffix("_codes"), facts["block_size"]
            codes, scales = codes_and_scales(artifact, name, block)
            assert weights[node.input[1]].shape == (len(codes), codes.shape[1] // block, block * facts["bits"] // 8)
            found = unpacked(weights[node.input[1]], facts["bits"]).reshape(codes.shape)
            assert np.array_equal(found, codes), name
            assert np.array_equal(weights[node.input[2]], scales), name
            assert len(node.input) == 3  # no zero points, no g_idx
        else:
            check_experts(artifact, weights, node, facts)
    return seen


def check_experts(artifact: Artifact, weights: dict[str, Any], node: Any, facts: dict[str, Any]) -> None:
    layer = int(node.name.split(".")[1].partition("/")[0])
    bits, block = facts["expert_weight_bits"], facts["block_size"]
    fc1, fc1_scales, bias, fc2, fc2_scales = node.input[2:7]
    assert bias == ""
    for expert in range(len(weights[fc1])):
        gate, up, down = artifact.family.expert_names(layer, expert)
        rows = unpacked(weights[fc1][expert], bits)
        for first, name in enumerate((gate, up)):  # rows gate 0, up 0, gate 1, up 1, ...
            codes, scales = codes_and_scales(artifact, name, block)
            assert np.array_equal(rows[first::2], codes), name
            assert np.array_equal(weights[fc1_scales][expert, first::2], scales), name
        codes, scales = codes_and_scales(artifact, down, block)
        assert np.array_equal(unpacked(weights[fc2][expert], bits), codes), down
        assert np.array_equal(weights[fc2_scales][expert], scales), down
    assert artifact.family.expert_names(layer, len(weights[fc1]))[0] not in artifact.shapes


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("group_size", "block"), [(16, 16), (32, 32), (48, 16), (64, 64), (96, 32), (-1, 64)])
def test_codes_and_scales_pass_unchanged(models: Models, bits: int, group_size: int, block: int) -> None:
    folder = models.coded("mixtral", Scheme(bits=bits, group_size=group_size), **WIDE)
    out = models.onnx(folder, accuracy_level=4)  # at level 0 Linears of 8 bits are written plain
    assert check_codes(folder, out) == {"QMoE": 1, "MatMulNBits": 4}
    blocks = {f["block_size"] for n in graph_of(out).graph.node if (f := attributes_of(n)) and "block_size" in f}
    assert blocks == {block}


@pytest.mark.parametrize("key", tiny_models.KEYS)
def test_solved_codes_of_every_family_pass_unchanged(models: Models, key: str) -> None:
    folder = models.quantized(key)
    artifact = open_artifact(folder)
    seen = check_codes(folder, models.onnx(folder))
    assert seen["QMoE"] == len(artifact.outline.moe_layers)
    beside = [n for n in artifact.shapes if artifact.is_quantized(n) and ".experts." not in n]
    assert seen["MatMulNBits"] == len(beside) > 0


def test_a_loop_of_experts_holds_the_same_codes(models: Models) -> None:
    folder = models.coded("mixtral", Scheme(bits=2, group_size=48), **WIDE)
    assert check_codes(folder, models.onnx(folder, kernel="loop")) == {"QMoE": 0, "MatMulNBits": 4 + 4 * 3}


def test_an_fp16_graph_holds_the_same_codes_and_rounded_scales(models: Models) -> None:
    folder = models.coded("mixtral", Scheme(bits=4, group_size=48), **WIDE)
    exact, half = (initializers_of(models.onnx(folder, preset=preset)) for preset in ("cpu", "cuda"))
    for name, values in exact.items():
        if values.dtype == np.uint8:
            assert np.array_equal(half[name], values)
        if name.endswith("_scales"):
            assert half[name].dtype == np.float16
            assert np.array_equal(half[name], values.astype(np.float16))


def test_layers_may_have_schemes_of_their_own(models: Models, tmp_path: Path) -> None:
    def scheme(module: str) -> Scheme:
        return Scheme(bits=8, group_size=32) if ".layers.0." in module else Scheme(bits=4, group_size=16)

    folder = coded_folder(models.tiny("mixtral"), tmp_path / "coded", scheme, [Part.ROUTED, Part.ATTENTION])
    out = to_onnx(folder, tmp_path / "onnx", accuracy_level=4)
    assert check_codes(folder, out) == {"QMoE": 3, "MatMulNBits": 12}
    nodes = {n.name: attributes_of(n) for n in graph_of(out).graph.node}
    assert [nodes[f"/model/layers.{n}/mlp/QMoE"]["expert_weight_bits"] for n in range(3)] == [8, 4, 4]
    assert [nodes[f"/model/layers.{n}/mlp/QMoE"]["block_size"] for n in range(3)] == [32, 16, 16]
    assert nodes["/model/layers.0/attn/q_proj/MatMulNBits"]["bits"] == 8


def test_linears_of_eight_bits_are_written_plain_where_activations_stay_in_fp32(models: Models) -> None:
    """The same numbers: ONNX Runtime multiplies codes of 8 bits out for every call there."""
    folder = models.coded("mixtral", Scheme(bits=8, group_size=32), **WIDE)
    plain, coded = models.onnx(folder), models.onnx(folder, accuracy_level=4)
    assert check_codes(folder, plain) == {"QMoE": 1, "MatMulNBits": 0}
    assert any("lie in fp32, with the same numbers" in note for note in open_onnx(plain).summary["notes"])
    assert not any("lie in fp32" in note for note in open_onnx(coded).summary["notes"])
    exact = replace(open_artifact(folder), exact=True)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert np.array_equal(initializers_of(plain)[name], exact.read(name).numpy())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_rows_are_streams_of_bits(bits: int) -> None:
    codes, _scales = random_codes((5, 48), Scheme(bits=bits, group_size=16), torch.Generator().manual_seed(bits))
    packed = packed_rows(codes, bits)
    assert packed.shape == (5, 48 * bits // 8)
    assert np.array_equal(unpacked(packed.numpy(), bits), codes.numpy())


def test_known_bytes() -> None:
    """4 bits: the first code in the low nibble; -8 is 0, 0 is 8, 7 is 15."""
    row = torch.tensor([[-8, 7, 0, 1] + [0] * 12], dtype=torch.int8)
    assert packed_rows(row, 4)[0, :3].tolist() == [0xF0, 0x98, 0x88]
    row = torch.tensor([[-2, -1, 0, 1] + [0] * 12], dtype=torch.int8)
    assert packed_rows(row, 2)[0, :2].tolist() == [0b11100100, 0b10101010]


def test_rows_are_interleaved() -> None:
    gate, up = torch.tensor([[1, 1], [2, 2]]), torch.tensor([[-1, -1], [-2, -2]])
    assert interleaved((gate, up)).tolist() == [[1, 1], [-1, -1], [2, 2], [-2, -2]]
    assert interleaved((gate,)) is gate


def test_the_block_is_the_largest_that_lies_whole_in_the_groups_of_all_matrices() -> None:
    assert block_size(Scheme(bits=4, group_size=256), 256, 512) == 128
    assert block_size(Scheme(bits=4, group_size=-1), 256, 96) == 32
    assert block_size(Scheme(bits=8, group_size=80), 160) == 16
    with pytest.raises(UnsupportedError, match="Groups of 24 columns"):
        block_size(Scheme(bits=4, group_size=24), 48)
    with pytest.raises(UnsupportedError, match="3-bit codes can not be exported"):
        block_size(Scheme(bits=3, group_size=32), 64)


def test_what_fp16_cannot_hold_is_refused_by_name() -> None:
    def half(value: float, **options: bool) -> torch.Tensor:
        return cast(torch.tensor([1.0, value]), torch.float16, "the.name", **options)

    assert half(65504.0)[1] == 65504.0
    assert half(1e-9)[1] == 0.0  # a weight may vanish, a scale may not
    assert half(0.0, scales=True)[1] == 0.0
    for value, options in ((65536.0, {}), (-1e6, {}), (1e-9, {"scales": True})):
        with pytest.raises(UnsupportedError, match=r"the\.name holds values that fp16 can not"):
            half(value, **options)


def test_missing_tensors_are_named(tiny_model: Callable[..., Path]) -> None:
    source = open_source(tiny_model("mixtral"))
    require_whole(source, ["model.norm.weight"])
    with pytest.raises(InvalidInputError, match=r"lacks a\.weight, b\.weight;"):
        require_whole(source, ["model.norm.weight", "a.weight", "b.weight"])


@pytest.mark.parametrize("key", ["mixtral", "qwen3_moe"])
def test_fused_experts_on_disk_are_those_of_separate_ones(tiny_model: Callable[..., Path], key: str) -> None:
    separate, fused = (
        Weights(source=open_source(tiny_model(key, **o)), dtype=torch.float32) for o in ({}, {"fused": True})
    )
    assert fused.expert_shape(1) == separate.expert_shape(1)
    for part in ("gate_up", "down"):
        rows = [w.dense_experts(1, 8, part, "experts") for w in (separate, fused)]
        assert rows[0].shape == rows[1].shape
        assert b"".join(map(bytes, rows[0].data())) == b"".join(map(bytes, rows[1].data()))
