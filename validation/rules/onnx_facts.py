"""What a graph of model.onnx says of itself, for the rules of ONNX Runtime: nodes, where weights lie, caches."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepress.converters.onnx.folder import GENAI_CONFIG, MODEL, read_model
from moepress.models.storage.folder import read_json
from moepress.models.storage.inside import in_hub_cache

_EXTERNAL = 1
_OPERATORS = ("QMoE", "MatMulNBits", "MoE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node that runs on expert weights or codes.

    Attributes:
        name: in the graph.
        operator: QMoE, MatMulNBits or MoE.
        numbers: its integer attributes.
        inputs: names, empty where one is left out.
        dims: dimensions of those inputs that are weights, by place.
    """

    name: str
    operator: str
    numbers: Mapping[str, int]
    inputs: tuple[str, ...]
    dims: Mapping[int, tuple[int, ...]]

    def has_input(self, place: int) -> bool:
        """Whether an input that may be left out is there."""
        return len(self.inputs) > place and self.inputs[place] != ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """A decoder's graph.

    Attributes:
        nodes: those of QMoE, MatMulNBits and MoE.
        ends: file of weights, as the graph names it -> bytes that it must have.
        sizes: those that are plain files in the folder -> bytes that they have.
        linked: those of them that are links, or have several names; those of the hub's cache do not count.
        caches: name of a cache input -> heads and values of a head.
        genai: genai_config.json; None where there is none.
    """

    nodes: tuple[Node, ...]
    ends: Mapping[str, int]
    sizes: Mapping[str, int]
    linked: frozenset[str]
    caches: Mapping[str, tuple[int, int]]
    genai: Mapping[str, Any] | None


def read_graph(folder: Path) -> Graph:
    """The graph of a folder, without its weights.

    Raises:
        InvalidInputError: model.onnx is not a graph.
        UnsupportedError: onnx is not installed.
    """
    graph = read_model(folder / MODEL).graph
    ends = _ends(graph)
    files = {name: folder / name for name in ends if _is_plain(name) and (folder / name).is_file()}
    dims = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    return Graph(
        nodes=tuple(_node(node, dims) for node in graph.node if node.op_type in _OPERATORS),
        ends=ends,
        sizes={name: file.stat().st_size for name, file in files.items()},
        linked=frozenset(name for name, file in files.items() if _is_linked(file)),
        caches={v.name: _cache(v) for v in graph.input if v.name.startswith("past_key_values.")},
        genai=read_json(folder / GENAI_CONFIG) if (folder / GENAI_CONFIG).is_file() else None,
    )


def _is_linked(file: Path) -> bool:
    """ONNX Runtime takes the links of the hub's cache."""
    return (file.is_symlink() or file.stat().st_nlink > 1) and not in_hub_cache(file)


def _is_plain(name: str) -> bool:
    return name not in {"", ".", ".."} and not {"/", "\\", ":", "\0"} & set(name)


def _ends(graph: Any) -> dict[str, int]:
    ends: dict[str, int] = {}
    for tensor in graph.initializer:
        if tensor.data_location == _EXTERNAL:
            place = {row.key: row.value for row in tensor.external_data}
            parts = [place.get(key) or "0" for key in ("offset", "length")]
            end = sum(int(part) for part in parts) if all(p.isdecimal() and len(p) < 19 for p in parts) else 1 << 62
            name = place.get("location", "")
            ends[name] = max(ends.get(name, 0), end)
    return ends


def _node(node: Any, dims: Mapping[str, tuple[int, ...]]) -> Node:
    inputs = tuple(node.input)
    return Node(
        name=node.name,
        operator=node.op_type,
        numbers={a.name: a.i for a in node.attribute if a.type == 2},  # AttributeProto.INT
        inputs=inputs,
        dims={place: dims[name] for place, name in enumerate(inputs) if name in dims},
    )


def _cache(value: Any) -> tuple[int, int]:
    axes = value.type.tensor_type.shape.dim
    return (axes[1].dim_value, axes[3].dim_value) if len(axes) == 4 else (0, 0)
