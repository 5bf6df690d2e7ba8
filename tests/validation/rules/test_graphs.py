"""Rules about ONNX graphs: each violation is planted in a real export, and found by its rule with its effect."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from check_folders import Copies, Outputs, edit_json, found

from moepress.errors import InvalidInputError
from moepress.validation.rules.findings import Effect, Runtime

REFUSES, WRONG = {Runtime.ONNXRUNTIME: Effect.REFUSES}, {Runtime.ONNXRUNTIME: Effect.WRONG}


@pytest.fixture
def folder(outputs: Outputs, tmp_path: Path) -> Path:
    return Copies(outputs=outputs, folder=tmp_path)("onnx")


def edit_graph(folder: Path, operator: str, change: Callable[[Any], object]) -> None:
    """Let `change` edit the first node of an operator."""
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    change(next(node for node in model.graph.node if node.op_type == operator))
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def set_number(name: str, value: int) -> Callable[[Any], object]:
    def change(node: Any) -> None:
        for attribute in [a for a in node.attribute if a.name == name]:
            node.attribute.remove(attribute)
        node.attribute.append(onnx.helper.make_attribute(name, value))

    return change


def add_input(place: int) -> Callable[[Any], object]:
    def change(node: Any) -> None:
        node.input.extend([""] * (place + 1 - len(node.input)))
        node.input[place] = "planted"

    return change


def test_weights_that_are_missing_or_too_short_or_linked(folder: Path, tmp_path: Path) -> None:
    file = sorted(folder.glob("model.layer-*.data"))[0]
    data = file.read_bytes()
    file.unlink()
    assert found(folder, "onnx-places") == REFUSES
    file.write_bytes(data[:-1])
    assert found(folder, "onnx-places") == REFUSES
    (tmp_path / "elsewhere").write_bytes(data)
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidInputError, match="is a link that leads out of the folder"):
        found(folder, "onnx-places")


@pytest.mark.parametrize(("operator", "key"), [("QMoE", "expert_weight_bits"), ("MatMulNBits", "bits")])
@pytest.mark.parametrize("bits", [3, 5])
def test_bits_without_a_kernel(folder: Path, operator: str, key: str, bits: int) -> None:
    edit_graph(folder, operator, set_number(key, bits))
    assert found(folder, "onnx-bits") == REFUSES


def test_rows_that_are_not_interleaved(folder: Path) -> None:
    edit_graph(folder, "QMoE", set_number("swiglu_fusion", 2))
    assert found(folder, "onnx-interleaved-rows") == REFUSES


def test_a_separate_third_matrix(folder: Path) -> None:
    edit_graph(folder, "QMoE", add_input(8))
    assert found(folder, "onnx-interleaved-rows") == REFUSES


@pytest.mark.parametrize("value", [-1, 1])
def test_codes_that_are_called_packed(folder: Path, value: int) -> None:
    edit_graph(folder, "QMoE", set_number("weights_prepacked", value))
    assert found(folder, "onnx-raw-codes") == WRONG


def test_routing_by_router_weights(folder: Path) -> None:
    edit_graph(folder, "QMoE", add_input(14))
    assert found(folder, "onnx-routing") == WRONG


def test_an_order_of_columns(folder: Path) -> None:
    edit_graph(folder, "MatMulNBits", add_input(4))
    assert found(folder, "onnx-no-g-idx") == {Runtime.ONNXRUNTIME: Effect.SLOWER}
    edit_graph(folder, "MatMulNBits", add_input(3))
    assert found(folder, "onnx-no-g-idx") == WRONG


def test_codes_of_two_dimensions(folder: Path) -> None:
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    codes = next(node for node in model.graph.node if node.op_type == "MatMulNBits").input[1]
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == codes)
    rows, blocks, size = tensor.dims
    del tensor.dims[:]
    tensor.dims.extend([rows, blocks * size])
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    assert found(folder, "onnx-codes-shape") == REFUSES


def test_a_cache_that_genai_would_make_in_another_shape(folder: Path) -> None:
    edit_json(folder / "genai_config.json", lambda values: values["model"]["decoder"].update(head_size=48))
    assert found(folder, "onnx-cache") == REFUSES
