"""A graph in the making: nodes and small constants in memory, weights as promises that are kept when files are written.

Nothing here reads a weight. A weight is an `Entry`: name, dtype, shape, size, and a function that gives its bytes when
its turn comes, so a model of any size becomes a graph in the memory of its names. Where each weight will lie in which
file follows from the sizes alone, so the graph is the same whether its files are written yet or not.

Source: https://onnx.ai/onnx/repo-docs/ExternalData.html.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from moepress import __version__
from moepress.models.storage.writer import Entry
from moepress.runs.files import rewrite, room_for

OPSET, CONTRIB_OPSET, IR_VERSION = 23, 1, 11  # what ONNX Runtime 1.31 knows
CONTRIB = "com.microsoft"
ALIGNMENT = 4096  # a page, so that a runtime can map the weights instead of reading them
ONNX_DTYPES = {
    "F32": TensorProto.FLOAT,
    "F16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "U8": TensorProto.UINT8,
}


@dataclass(slots=True)
class Graph:
    """Nodes in the order of the data, and the weights they need, by the file that will hold them.

    Attributes:
        nodes: in topological order.
        constants: small tensors that are part of the graph itself.
        files: plain file name -> weights, in the order in which they will lie there.
        made: names of shared nodes -> their first output.
    """

    nodes: list[NodeProto] = field(default_factory=list)
    constants: dict[str, TensorProto] = field(default_factory=dict)
    files: dict[str, list[Entry]] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)

    def node(
        self, op: str, inputs: Sequence[str], name: str, *, outputs: int = 1, domain: str = "", **attributes: Any
    ) -> str:
        """Add a node; its outputs are named after it, and the first one's name is returned.

        Args:
            op: operator type.
            inputs: names; "" for an optional input that is not given.
            name: unique, such as `/model/layers.3/mlp/QMoE`.
            outputs: how many.
            domain: "" for ONNX's own operators, `CONTRIB` for ONNX Runtime's.
            attributes: of the operator.
        """
        names = [self.output(name, n) for n in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=name, domain=domain, **attributes))
        return names[0]

    @staticmethod
    def output(node: str, number: int = 0) -> str:
        """The name of a node's output."""
        return f"{node}/output_{number}"

    def shared(self, name: str, make: Callable[[str], str]) -> str:
        """The first output of a node that several parts need and the first of them makes."""
        if name not in self.made:
            self.made[name] = make(name)
        return self.made[name]

    def named(self, op: str, inputs: Sequence[str], name: str, output: str, **attributes: Any) -> None:
        """Add a node whose only output has a name of its own: one of the graph's outputs."""
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=name, **attributes))

    def constant(self, name: str, values: np.ndarray[Any, Any]) -> str:
        """A small tensor inside the graph; the same name twice is the same tensor."""
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(values, name)
        return name

    def integers(self, *values: int) -> str:
        """An int64 vector, for shapes, axes and bounds."""
        return self.constant("/constants/" + "_".join(map(str, values)), np.array(values, dtype=np.int64))

    def weight(self, file: str, entry: Entry) -> str:
        """A weight outside of the graph, at the end of that file."""
        self.files.setdefault(file, []).append(entry)
        return entry.name

    def build(self, inputs: Sequence[ValueInfoProto], outputs: Sequence[ValueInfoProto], name: str) -> ModelProto:
        """The model, with every weight referring to its place in its file."""
        weights = [_external(file, entry, begin) for file, rows in self.files.items() for entry, begin in layout(rows)]
        graph = helper.make_graph(
            self.nodes, name, list(inputs), list(outputs), initializer=[*self.constants.values(), *weights]
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, CONTRIB_OPSET)]
        return helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=IR_VERSION,
            producer_name="moepress",
            producer_version=__version__,
        )


def layout(entries: Sequence[Entry]) -> list[tuple[Entry, int]]:
    """Where each weight begins in its file: one after the other, each on a page of its own."""
    placed, position = [], 0
    for entry in entries:
        placed.append((entry, position))
        position += -(-entry.bytes // ALIGNMENT) * ALIGNMENT
    return placed


def file_bytes(entries: Sequence[Entry]) -> int:
    """Size of the file that holds these weights."""
    last, begin = layout(entries)[-1]
    return begin + last.bytes


def write_weights(file: Path, entries: Sequence[Entry]) -> None:
    """Write a file of weights as a stream; needs the memory of one chunk of one weight."""
    with room_for(file, file_bytes(entries), resumable=True), rewrite(file) as stream:
        for entry, begin in layout(entries):
            stream.write(bytes(begin - stream.tell()))
            for chunk in entry.data():
                stream.write(chunk)
            assert stream.tell() - begin == entry.bytes, f"{entry.name}: size differs from what the graph says"


def _external(file: str, entry: Entry, begin: int) -> TensorProto:
    tensor = TensorProto(name=entry.name, data_type=ONNX_DTYPES[entry.dtype], dims=entry.shape)
    tensor.data_location = TensorProto.EXTERNAL
    place: Mapping[str, object] = {"location": file, "offset": begin, "length": entry.bytes}
    for key, value in place.items():
        row = tensor.external_data.add()
        row.key, row.value = key, str(value)
    return tensor
