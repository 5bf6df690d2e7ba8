"""A graph in the making: places of weights, files as streams, names."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moepress.converters.onnx.graph import ALIGNMENT, IR_VERSION, OPSET, Graph, file_bytes, layout, write_weights
from moepress.models.storage.writer import Entry


def entry(name: str, values: np.ndarray, chunks: int = 1) -> Entry:  # type: ignore[type-arg]
    data = values.tobytes()
    dtype = {"float32": "F32", "float16": "F16", "uint8": "U8"}[values.dtype.name]

    def parts() -> Iterator[bytes]:
        step = -(-len(data) // chunks)
        return (data[at : at + step] for at in range(0, len(data), step))

    return Entry(name=name, dtype=dtype, shape=values.shape, bytes=len(data), data=parts)


def adding(*weights: tuple[str, Entry]) -> tuple[Graph, onnx.ModelProto]:
    """x plus every weight in turn."""
    graph, value = Graph(), "x"
    for number, (file, weight) in enumerate(weights):
        value = graph.node("Add", [value, graph.weight(file, weight)], f"/add.{number}")
    graph.named("Identity", [value], "/out", "y")
    info = onnx.helper.make_tensor_value_info
    ends = [info(name, onnx.TensorProto.FLOAT, ["n"]) for name in "xy"]
    return graph, graph.build(ends[:1], ends[1:], "adding")


def test_weights_in_two_files_are_those_that_a_session_adds(tmp_path: Path) -> None:
    values = [np.arange(n, n + 3, dtype=np.float32) for n in (1, 10, 100)]
    graph, model = adding(*zip(["a.data", "b.data", "a.data"], map(entry, "abc", values, (1, 2, 3)), strict=True))
    for name, entries in graph.files.items():
        write_weights(tmp_path / name, entries)
        assert (tmp_path / name).stat().st_size == file_bytes(entries)
    onnx.save(model, tmp_path / "model.onnx")
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": np.zeros(3, dtype=np.float32)})[0]
    assert found.tolist() == sum(values).tolist()  # type: ignore[attr-defined]


def test_versions_and_names_are_in_the_model() -> None:
    _graph, model = adding(("a.data", entry("a", np.zeros(3, dtype=np.float32))))
    assert (model.ir_version, model.producer_name) == (IR_VERSION, "moepress") == (11, "moepress")
    assert (
        {o.domain: o.version for o in model.opset_import}
        == {"": OPSET, "com.microsoft": 1}
        == {"": 23, "com.microsoft": 1}
    )
    assert [node.name for node in model.graph.node] == ["/add.0", "/out"]
    assert model.graph.node[1].input[0] == "/add.0/output_0"


def test_places_in_the_graph_follow_from_the_sizes_alone() -> None:
    def never() -> Iterator[bytes]:
        raise AssertionError("weights are read when files are written, not before")

    big = 1 << 33  # more than protobuf holds
    rows = [Entry(name=n, dtype="U8", shape=(size,), bytes=size, data=never) for n, size in (("a", big + 1), ("b", 5))]
    _graph, model = adding(*(("a.data", row) for row in rows))
    places = [{p.key: p.value for p in tensor.external_data} for tensor in model.graph.initializer]
    assert places == [
        {"location": "a.data", "offset": "0", "length": str(big + 1)},
        {"location": "a.data", "offset": str(big + ALIGNMENT), "length": "5"},
    ]
    assert file_bytes(rows) == big + ALIGNMENT + 5
    assert model.ByteSize() < 1000


@given(st.lists(st.integers(1, 3 * ALIGNMENT), min_size=1, max_size=8))
def test_weights_lie_on_pages_of_their_own_in_order(sizes: list[int]) -> None:
    rows = [Entry(name=str(n), dtype="U8", shape=(s,), bytes=s, data=lambda: iter(())) for n, s in enumerate(sizes)]
    placed = layout(rows)
    assert [row for row, _begin in placed] == rows
    assert all(begin % ALIGNMENT == 0 for _row, begin in placed)
    for (row, begin), (_next, after) in itertools.pairwise(placed):
        assert begin + row.bytes <= after < begin + row.bytes + ALIGNMENT


def test_a_weight_of_another_size_than_promised_is_caught(tmp_path: Path) -> None:
    short = Entry(name="short", dtype="U8", shape=(4,), bytes=4, data=lambda: iter((b"abc",)))
    with pytest.raises(AssertionError, match="short: size differs"):
        write_weights(tmp_path / "a.data", [short])


def test_constants_and_shared_nodes_are_made_once() -> None:
    graph = Graph()
    assert graph.integers(1, -1) == graph.integers(1, -1)
    assert graph.integers(1) != graph.integers(-1)
    assert len(graph.constants) == 3
    for _ in range(2):
        assert graph.shared("/s", lambda name: graph.node("Shape", ["x"], name)) == "/s/output_0"
    assert len(graph.nodes) == 1
    assert graph.node("TopK", ["x", "k"], "/top", outputs=2) == graph.output("/top", 0)
    assert list(graph.nodes[-1].output) == ["/top/output_0", "/top/output_1"]


def test_bfloat16_weights_are_marked_as_such() -> None:
    values = torch.tensor([1.5, -2.0], dtype=torch.bfloat16).view(torch.uint8).numpy()
    row = Entry(name="b", dtype="BF16", shape=(2,), bytes=4, data=lambda: iter((values.tobytes(),)))
    _graph, model = adding(("a.data", row))
    assert model.graph.initializer[0].data_type == onnx.TensorProto.BFLOAT16
