"""What every part of a decoder graph is made of: the state of building, and Linears, norms and gated MLPs.

Tokens are rows: hidden states are [T, D] with T = batch * sequence, so Linears, routers and experts need no reshape.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from moepress.converters.onnx.graph import CONTRIB, Graph
from moepress.converters.onnx.weights import Weights, block_size

Kernel = Literal["qmoe", "loop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """A graph being built from a folder.

    Attributes:
        graph: what is built.
        weights: where weights come from, and the graph's dtype.
        model: transformers' model of that config on the meta device: eps, scalings, windows and head sizes are its own.
        kernel: how routed experts run.
        accuracy_level: of MatMulNBits and QMoE on the CPU: 0 keeps activations in fp32, 4 makes them int8.
    """

    graph: Graph
    weights: Weights
    model: Any
    kernel: Kernel
    accuracy_level: int

    @property
    def onnx_dtype(self) -> int:
        """The graph's dtype as ONNX numbers it."""
        return 1 if self.weights.dtype == torch.float32 else 10

    def cast(self, value: str, to: int, name: str) -> str:
        """A Cast node."""
        return self.graph.node("Cast", [value], name, to=to)

    def has(self, name: str) -> bool:
        """Whether the folder has that tensor, with anything in it: a shared expert may have no width."""
        return 0 not in self.weights.source.shapes.get(name, (0,))


def is_faster_plain(weights: Weights, name: str, accuracy_level: int) -> bool:
    """Whether a Linear of a layer is better written as the fp32 numbers that its codes stand for.

    ONNX Runtime 1.32 multiplies codes of 8 bits out anew for every call where activations stay in fp32 on the CPU: half
    as fast as plain weights, with the same numbers. Experts, which are most of a model, and lm_head keep theirs.
    """
    if not weights.is_quantized(name) or accuracy_level or weights.dtype != torch.float32:
        return False
    family = weights.source.family
    inside = family.layer_of(name) is not None and family.expert_of(name) is None
    return inside and weights.scheme_of(name).bits == 8


def linear(build: Build, file: str, disk_name: str, value: str, scope: str) -> str:
    """A Linear with its bias where there is one: [T, I] to [T, O], quantized or not.

    Args:
        build: the state.
        file: of its weights.
        disk_name: name of the weight, ending in `.weight`.
        value: the input.
        scope: name prefix of its nodes.
    """
    graph, weights = build.graph, build.weights
    if weights.is_quantized(disk_name) and not is_faster_plain(weights, disk_name, build.accuracy_level):
        rows, columns = weights.source.shapes[disk_name]
        scheme = weights.scheme_of(disk_name)
        inputs = [value, *(graph.weight(file, entry) for entry in weights.matrix(disk_name, disk_name))]
        out = graph.node(
            "MatMulNBits",
            inputs,
            f"{scope}/MatMulNBits",
            domain=CONTRIB,
            N=rows,
            K=columns,
            bits=scheme.bits,
            block_size=block_size(scheme, columns),
            accuracy_level=build.accuracy_level,
        )
    else:
        weight = graph.weight(file, weights.plain(disk_name, disk_name))
        out = graph.node("Gemm", [value, weight], f"{scope}/Gemm", transB=1)
    bias = disk_name.removesuffix("weight") + "bias"
    if build.has(bias):
        out = graph.node("Add", [out, graph.weight(file, weights.plain(bias, bias))], f"{scope}/Add")
    return out


def rms_norm(build: Build, file: str, disk_name: str, eps: float, value: str, scope: str) -> str:
    """RMS norm over the last axis."""
    weight = build.graph.weight(file, build.weights.plain(disk_name, disk_name))
    return build.graph.node("RMSNormalization", [value, weight], f"{scope}/RMSNormalization", axis=-1, epsilon=eps)


def silu(graph: Graph, value: str, scope: str) -> str:
    """x * sigmoid(x)."""
    return graph.node("Mul", [value, graph.node("Sigmoid", [value], f"{scope}/Sigmoid")], f"{scope}/Silu")


def gated_mlp(build: Build, file: str, prefix: str, value: str, scope: str) -> str:
    """down(silu(gate(x)) * up(x)), for dense layers and shared experts; `prefix` is the name before `gate_proj`."""
    gate = linear(build, file, f"{prefix}.gate_proj.weight", value, f"{scope}/gate_proj")
    up = linear(build, file, f"{prefix}.up_proj.weight", value, f"{scope}/up_proj")
    middle = build.graph.node("Mul", [silu(build.graph, gate, scope), up], f"{scope}/Mul")
    return linear(build, file, f"{prefix}.down_proj.weight", middle, f"{scope}/down_proj")


def reshape(graph: Graph, value: str, shape: str, name: str) -> str:
    """A Reshape; 0 in the shape keeps that axis."""
    return graph.node("Reshape", [value, shape], name)
