"""Single nodes of an export in sessions of their own, beside torch's truth: QMoE and GroupQueryAttention in fp16.

Letters: T tokens, D hidden size, F expert width, E experts, K chosen, G blocks, S new tokens.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from moepress.converters.onnx.folder import MODEL
from moepress.converters.onnx.graph import CONTRIB, Graph, write_weights
from moepress.converters.onnx.runtime import require_onnx, require_onnxruntime, session_options
from moepress.converters.onnx.weights import interleaved, packed_rows
from moepress.models.storage.tensors import tensor_entry

BITS = 4
FILE = "weights.data"
ON_HOST = ("total",)  # what a kernel reads on the host, wherever it computes


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where things run: ONNX Runtime's provider and device, torch's device for truths, and the hardware's name."""

    provider: str
    device: str
    torch_device: torch.device
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """The experts of one layer.

    Attributes:
        codes_up: int8 [E, 2F, D], gate above up.
        scales_up: fp16 [E, 2F, G].
        codes_down: int8 [E, D, F].
        scales_down: fp16 [E, D, G].
        block: columns that share a scale.
    """

    codes_up: Tensor
    scales_up: Tensor
    codes_down: Tensor
    scales_down: Tensor
    block: int

    @property
    def experts(self) -> int:
        return len(self.codes_up)


def draw_layer(experts: int, hidden: int, width: int, block: int) -> Layer:
    """Random experts that keep the size of what passes through."""
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        codes = torch.randint(-8, 8, (experts, rows, columns), dtype=torch.int8, generator=generator)
        scales = 0.5 + torch.rand(experts, rows, columns // block, generator=generator)
        return codes, (scales * columns**-0.5 / 4.6).half()  # 4.6: deviation of the codes

    up, down = matrix(2 * width, hidden), matrix(hidden, width)
    return Layer(codes_up=up[0], scales_up=up[1], codes_down=down[0], scales_down=down[1], block=block)


def dense(codes_OI: Tensor, scales_OG: Tensor, device: torch.device) -> Tensor:
    """One matrix in fp32 on the device."""
    grouped = codes_OI.to(device).float().unflatten(1, (scales_OG.shape[1], -1))
    return (grouped * scales_OG.to(device).float()[:, :, None]).flatten(1)


def true_experts(layer: Layer, value_TD: Tensor, chosen_TK: Tensor, weights_TK: Tensor, device: torch.device) -> Tensor:
    """sum of w * down(silu(gate x) * up x) in fp32, expert by expert."""
    value, out = value_TD.to(device).float(), torch.zeros(value_TD.shape, device=device)
    for expert in chosen_TK.unique().tolist():
        tokens, place = (chosen_TK == expert).nonzero(as_tuple=True)
        mine = value[tokens.to(device)]
        gate, up = dense(layer.codes_up[expert], layer.scales_up[expert], device).chunk(2)
        middle = torch.nn.functional.silu(mine @ gate.T) * (mine @ up.T)
        result = middle @ dense(layer.codes_down[expert], layer.scales_down[expert], device).T
        out.index_add_(0, tokens.to(device), result * weights_TK[tokens, place].to(device)[:, None])
    return out.cpu()


def qmoe_model(layer: Layer, folder: Path, top_k: int, poisoned: Sequence[int] = ()) -> Path:
    """One QMoE node with the attributes of an export; experts in `poisoned` have NaN scales."""
    onnx = require_onnx()
    helper = onnx.helper
    graph, experts, hidden = Graph(), layer.experts, layer.codes_down.shape[1]

    def twins(tensor: Tensor) -> list[Tensor]:
        return [interleaved(part.chunk(2)) for part in tensor]

    scales_down = layer.scales_down.clone()
    scales_down[list(poisoned)] = float("nan")
    parts = {
        "fc1_codes": torch.stack([packed_rows(codes, BITS) for codes in twins(layer.codes_up)]),
        "fc1_scales": torch.stack(twins(layer.scales_up)),
        "fc2_codes": torch.stack([packed_rows(codes, BITS) for codes in layer.codes_down]),
        "fc2_scales": scales_down,
    }
    names = [graph.weight(FILE, tensor_entry(name, tensor)) for name, tensor in parts.items()]
    graph.named(
        "QMoE",
        ["x", "rows", names[0], names[1], "", names[2], names[3]],
        "/mlp/QMoE",
        "y",
        domain=CONTRIB,
        k=top_k,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
        normalize_routing_weights=1,
        expert_weight_bits=BITS,
        block_size=layer.block,
        weights_prepacked=0,
        accuracy_level=0,
    )
    half = onnx.TensorProto.FLOAT16
    inputs = [helper.make_tensor_value_info(n, half, ["T", w]) for n, w in (("x", hidden), ("rows", experts))]
    return _write(graph, inputs, [helper.make_tensor_value_info("y", half, ["T", hidden])], folder)


def attention_model(heads: int, size: int, scale: float, folder: Path) -> Path:
    """One GroupQueryAttention node with the attributes of an export of latent attention."""
    onnx = require_onnx()
    helper = onnx.helper
    graph = Graph()
    graph.nodes.append(
        helper.make_node(
            "GroupQueryAttention",
            ["q", "k", "k", "past_key", "past_value", "seqlens", "total"],
            ["y", "present_key", "present_value"],
            name="/attn/GroupQueryAttention",
            domain=CONTRIB,
            num_heads=heads,
            kv_num_heads=1,
            scale=scale,
            local_window_size=-1,
        )
    )
    half, info = onnx.TensorProto.FLOAT16, helper.make_tensor_value_info
    inputs = [info("q", half, [1, "S", heads * size]), info("k", half, [1, "S", size])]
    inputs += [info(f"past_{part}", half, [1, 1, "P", size]) for part in ("key", "value")]
    inputs += [info("seqlens", onnx.TensorProto.INT32, [1]), info("total", onnx.TensorProto.INT32, [])]
    outputs = [info("y", half, [1, "S", heads * size])]
    outputs += [info(f"present_{part}", half, [1, 1, "N", size]) for part in ("key", "value")]
    return _write(graph, inputs, outputs, folder)


def torch_attention(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Causal attention of all heads over one head of keys, which are the values too.

    Args:
        query: [1, heads, S, size].
        keys: [1, 1, N, size], the last S of them those of the queries.
        scale: of the products.
    """
    new, total = query.shape[2], keys.shape[2]
    mask = None if new == 1 else torch.ones(new, total, dtype=torch.bool, device=keys.device).tril(total - new)
    keys = keys.expand(-1, query.shape[1], -1, -1)
    return torch.nn.functional.scaled_dot_product_attention(query, keys, keys, attn_mask=mask, scale=scale)


def torch_milliseconds(run: Callable[[], Any], device: torch.device, repetitions: int) -> float:
    """Median time of a call, after one that is thrown away."""
    taken = []
    for _ in range(repetitions + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(1000 * (time.perf_counter() - start))
    return median(taken[1:])


def _write(graph: Graph, inputs: Sequence[Any], outputs: Sequence[Any], folder: Path) -> Path:
    """The graph and its weights in a folder; returns the model's file."""
    folder.mkdir(parents=True)
    for name, entries in graph.files.items():
        write_weights(folder / name, entries)
    (folder / MODEL).write_bytes(graph.build(inputs, outputs, "node").SerializeToString())
    return folder / MODEL


def open_node(file: Path, place: Place) -> Any:
    """A session; a node that the provider has no kernel for is an error, it does not go to the CPU in silence."""
    options = session_options()
    options.intra_op_num_threads = torch.get_num_threads()
    if place.device != "cpu":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return require_onnxruntime().InferenceSession(str(file), options, providers=[place.provider])


def timed(session: Any, place: Place, feed: Mapping[str, Any], repetitions: int) -> tuple[list[Any], float]:
    """The outputs, and the median milliseconds of a call whose inputs and outputs stay on the device."""
    runtime, binding, taken = require_onnxruntime(), session.io_binding(), []
    for name, array in feed.items():
        device = "cpu" if name in ON_HOST or not array.size else place.device
        binding.bind_ortvalue_input(name, runtime.OrtValue.ortvalue_from_numpy(array, device, 0))
    for output in session.get_outputs():
        binding.bind_output(output.name, place.device)
    for _ in range(repetitions + 1):
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        taken.append(1000 * (time.perf_counter() - start))
    return binding.copy_outputs_to_cpu(), median(taken[1:])


def relative_error(found: Any, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    difference = torch.as_tensor(found).float() - truth.float()
    return float(difference.norm() / truth.float().norm())
