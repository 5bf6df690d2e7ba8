"""A mixture of experts in a graph: the router in plain ONNX and fp32, the experts in QMoE, MoE or a loop of matrices.

QMoE and MoE route by themselves, and not alike on CPU and CUDA: what the weights of unchosen experts or the
normalisation attribute do differs. So the graph routes, and hands over rows whose own softmax is the answer:

    router_probs = -1e4 everywhere, log(w) - max log(w) at the chosen experts       (softmax of it is w / sum w)
    output       = QMoE(x, router_probs) * sum w                                    (where the sum is not 1)

Letters: T tokens, E experts of the layer, K chosen, G groups, M the largest group. Source of the rules: `RouterRule`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moepress.converters.onnx.expressible import router_tensors
from moepress.converters.onnx.graph import CONTRIB
from moepress.converters.onnx.modules import Activation, activation_of
from moepress.converters.onnx.parts import Build, gated_mlp, linear, reshape
from moepress.converters.onnx.weights import Matrix, Projection, block_size, require_whole
from moepress.errors import InvalidInputError, UnsupportedError
from moepress.models.families.router import Router, router_of
from moepress.models.storage.experts import is_fused, router_disk_names

FAR = -1e4  # exp(-1e4) is 0 in fp32, and fp16 holds it
_PROJECTIONS: tuple[tuple[Projection, str], ...] = (("gate_up", "fc1"), ("down", "fc2"))
_TINY = 1e-30  # log of a weight that underflowed


@dataclass(frozen=True, slots=True, kw_only=True)
class _Routing:
    """chosen: int64 [T, K]; weights: fp32 [T, K]; scores: fp32 [T, E]; sums_to_one: whether a token's weights do."""

    chosen: str
    weights: str
    scores: str
    sums_to_one: bool


def moe_block(build: Build, file: str, layer: int, value: str) -> str:
    """Routed and shared experts of one layer: normed [T, D] to [T, D]."""
    graph, scope = build.graph, f"/model/layers.{layer}/mlp"
    experts = count_experts(build, layer)
    source = build.weights.source
    router = router_of(source.family, source.config, source.outline.shape)
    routing = _route(build, file, layer, experts, router, value)
    experts_of = _fused if build.kernel == "qmoe" else _loop
    out = experts_of(build, file, layer, experts, value, routing)
    shared = _shared(build, file, layer, value)
    return out if shared is None else graph.node("Add", [out, shared], f"{scope}/AddShared")


def count_experts(build: Build, layer: int) -> int:
    """Experts of a layer, by its router; every layer may have its own number.

    Raises:
        InvalidInputError: the router and the experts that are there do not match.
    """
    source, family = build.weights.source, build.weights.source.family
    experts = source.shapes[router_disk_names(source, layer)[0]][0]
    if is_fused(source, layer):
        return experts
    require_whole(source, [name for e in range(experts) for name in family.expert_names(layer, e)])
    if family.expert_names(layer, experts)[0] in source.shapes:
        raise InvalidInputError(
            f"{source.folder}: layer {layer} has more experts than the {experts} rows of its router; restore it."
        )
    return experts


def _route(build: Build, file: str, layer: int, experts: int, router: Router, value: str) -> _Routing:
    """Chosen experts and their weights, as the model's own router gives them."""
    graph, scope = build.graph, f"/model/layers.{layer}/mlp/router"
    tensors, weights = router_tensors(build.weights.source, layer), build.weights
    given = [tensors.weight, *([tensors.bias] if tensors.bias else [])]
    exact = build.cast(value, 1, f"{scope}/input") if build.onnx_dtype != 1 else value
    tables = [graph.weight(file, weights.plain(name, name, dtype=torch.float32)) for name in given]
    logits = graph.node("Gemm", [exact, *tables], f"{scope}/Gemm", transB=1)
    if router.scoring == "sigmoid":
        scores = graph.node("Sigmoid", [logits], f"{scope}/Sigmoid")
    elif router.scoring == "sqrtsoftplus":
        scores = graph.node("Sqrt", [graph.node("Softplus", [logits], f"{scope}/Softplus")], f"{scope}/Sqrt")
    else:
        scores = graph.node("Softmax", [logits], f"{scope}/Softmax", axis=-1)
    choice = scores
    if tensors.correction:
        bias = graph.weight(file, weights.plain(tensors.correction, tensors.correction, dtype=torch.float32))
        choice = graph.node("Add", [scores, bias], f"{scope}/AddBias")
    if router.group_score is not None and router.groups > 1:
        choice = _in_groups(build, scope, experts, router, choice)
    count = graph.integers(min(router.top_k, experts))
    graph.node("TopK", [choice, count], f"{scope}/TopK", outputs=2, axis=-1, sorted=1)
    chosen = graph.output(f"{scope}/TopK", 1)
    shares = graph.node("GatherElements", [scores, chosen], f"{scope}/weights", axis=1)
    if router.renormalise:
        total = graph.node("ReduceSum", [shares, graph.integers(1)], f"{scope}/sum", keepdims=1)
        guarded = graph.node("Add", [total, _number(build, "tiny_sum", 1e-20)], f"{scope}/sum_guarded")
        shares = graph.node("Div", [shares, guarded], f"{scope}/normalized")
    if router.scale != 1.0:
        shares = graph.node("Mul", [shares, _number(build, f"scale_{router.scale}", router.scale)], f"{scope}/scaled")
    exact_sum = router.renormalise and router.scale == 1.0
    return _Routing(chosen=chosen, weights=shares, scores=scores, sums_to_one=exact_sum)


def _in_groups(build: Build, scope: str, experts: int, router: Router, choice: str) -> str:
    """Choice scores with -1e4 outside of the groups that a token may use.

    Raises:
        UnsupportedError: the experts do not fall into groups of one size, so nobody knows which group each is in.
    """
    graph, groups = build.graph, router.groups
    if experts % groups or router.top_groups * (experts // groups) < min(router.top_k, experts):
        raise UnsupportedError(
            f"{experts} experts in {groups} router groups can not be routed; prune to a legal count, or with "
            "--groups degroup."
        )
    size = experts // groups
    best = min(2, size) if router.group_score == "top2" else 1
    grouped = reshape(graph, choice, graph.integers(-1, groups, size), f"{scope}/groups")
    top = graph.node("TopK", [grouped, graph.integers(best)], f"{scope}/GroupBest", outputs=2, axis=-1)
    group_scores = graph.node("ReduceSum", [top, graph.integers(2)], f"{scope}/group_scores", keepdims=0)
    graph.node("TopK", [group_scores, graph.integers(router.top_groups)], f"{scope}/GroupTopK", outputs=2, axis=-1)
    index = graph.output(f"{scope}/GroupTopK", 1)
    closed = _filled(build, group_scores, FAR, f"{scope}/closed")
    open_values = _filled(build, graph.output(f"{scope}/GroupTopK"), 0.0, f"{scope}/open_values")
    offsets = graph.node("ScatterElements", [closed, index, open_values], f"{scope}/offsets", axis=1)
    wide = graph.node("Unsqueeze", [offsets, graph.integers(2)], f"{scope}/offsets_wide")
    allowed = graph.node("Add", [grouped, wide], f"{scope}/allowed")
    return reshape(graph, allowed, graph.integers(-1, experts), f"{scope}/ungrouped")


def _filled(build: Build, like: str, number: float, name: str) -> str:
    """A tensor of the same shape with one number everywhere; its shape stays known, as `Expand` would not keep it."""
    zero = build.graph.node("Mul", [like, _number(build, "zero", 0.0)], f"{name}_zero")
    return build.graph.node("Add", [zero, _number(build, f"fill_{number}", number)], name)


def _number(build: Build, name: str, number: float) -> str:
    return build.graph.constant(f"/constants/{name}", np.array(number, dtype=np.float32))


def _fused(build: Build, file: str, layer: int, experts: int, value: str, routing: _Routing) -> str:
    """One QMoE (codes) or MoE (dense weights) node."""
    graph, scope = build.graph, f"/model/layers.{layer}/mlp"
    source = build.weights.source
    quantized = _are_codes(build, layer, experts)
    rows = _router_rows(build, layer, routing)
    top_k = source.outline.shape.top_k
    common: dict[str, Any] = {
        "domain": CONTRIB,
        "k": min(top_k, experts),
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "normalize_routing_weights": 1,
        **_swiglu(activation_at(build, layer)),
    }
    if quantized:
        codes, packing = _codes(build, file, layer, experts)
        out = graph.node("QMoE", [value, rows, *codes], f"{scope}/QMoE", **common, **packing)
    else:
        prefix = f"model.layers.{layer}.mlp.experts"
        parts = [
            graph.weight(file, build.weights.dense_experts(layer, experts, part, f"{prefix}.{name}"))
            for part, name in _PROJECTIONS
        ]
        biases = _biases(build, file, layer, experts)
        out = graph.node("MoE", [value, rows, parts[0], biases[0], parts[1], biases[1]], f"{scope}/MoE", **common)
    if routing.sums_to_one:
        return out
    total = graph.node("ReduceSum", [routing.weights, graph.integers(1)], f"{scope}/weight_sum", keepdims=1)
    if build.onnx_dtype != 1:
        total = build.cast(total, build.onnx_dtype, f"{scope}/weight_sum_cast")
    return graph.node("Mul", [out, total], f"{scope}/scaled")


def activation_at(build: Build, layer: int) -> Activation:
    """What the experts of a layer do between their matrices."""
    model, family = build.model, build.weights.source.family
    found = activation_of(model.get_submodule(f"model.layers.{layer}.{family.experts_module}"), model.config)
    assert found is not None, "refused before"
    return found


def _swiglu(activation: Activation) -> dict[str, float]:
    """An activation as attributes of QMoE and MoE."""
    limit = {} if activation.limit is None else {"swiglu_limit": activation.limit}
    return {"activation_alpha": activation.alpha, "activation_beta": activation.beta, **limit}


def _are_codes(build: Build, layer: int, experts: int) -> bool:
    """Whether the experts of a layer are codes.

    Raises:
        UnsupportedError: some are and some are not.
    """
    if is_fused(build.weights.source, layer):
        return False
    names = [name for e in range(experts) for name in build.weights.source.family.expert_names(layer, e)]
    codes = sum(map(build.weights.is_quantized, names))
    if 0 < codes < len(names):
        raise UnsupportedError(
            f"Layer {layer} has {codes} expert matrices in codes and {len(names) - codes} dense ones, and a node takes "
            "one kind; export with --experts loop."
        )
    return codes > 0


def _router_rows(build: Build, layer: int, routing: _Routing) -> str:
    """Rows [T, E] in the graph's dtype whose softmax is the chosen experts' share of the weights."""
    graph, scope = build.graph, f"/model/layers.{layer}/mlp/router"
    positive = graph.node("Max", [routing.weights, _number(build, "tiny", _TINY)], f"{scope}/positive")
    logs = graph.node("Log", [positive], f"{scope}/Log")
    most = graph.node("ReduceMax", [logs, graph.integers(1)], f"{scope}/most", keepdims=1)
    relative = graph.node("Sub", [logs, most], f"{scope}/relative")
    base = _filled(build, routing.scores, FAR, f"{scope}/far")
    rows = graph.node("ScatterElements", [base, routing.chosen, relative], f"{scope}/rows", axis=1)
    return rows if build.onnx_dtype == 1 else build.cast(rows, build.onnx_dtype, f"{scope}/rows_cast")


def _codes(build: Build, file: str, layer: int, experts: int) -> tuple[list[str], dict[str, Any]]:
    """Weights of a QMoE node, in the order of its inputs, and the attributes that say how they are packed.

    Raises:
        UnsupportedError: the matrices of the layer have different widths.
    """
    weights, prefix = build.weights, f"model.layers.{layer}.mlp.experts"
    names = [weights.source.family.expert_names(layer, e) for e in range(experts)]
    schemes = {weights.scheme_of(name) for own in names for name in own}
    bits = {scheme.bits for scheme in schemes}
    if len({scheme.symmetric for scheme in schemes}) > 1:
        raise UnsupportedError(
            f"Layer {layer} has experts with and without zero points, and a QMoE has one kind; export with "
            "--experts loop."
        )
    if len(bits) > 1:
        raise UnsupportedError(
            f"Layer {layer} has experts of {' and '.join(map(str, sorted(bits)))} bits, and a QMoE has one width; "
            "export with --experts loop."
        )
    width, hidden = weights.expert_shape(layer)
    block = min(block_size(scheme, hidden, width) for scheme in schemes)
    fc1 = weights.expert_matrices([(gate, up) for gate, up, _ in names], f"{prefix}.fc1", block)
    fc2 = weights.expert_matrices([(down,) for *_, down in names], f"{prefix}.fc2", block)
    (codes1, scales1, *zeros1), (codes2, scales2, *zeros2) = (
        [build.graph.weight(file, entry) for entry in entries] for entries in (fc1, fc2)
    )
    attributes = {
        "expert_weight_bits": bits.pop(),
        "block_size": block,
        "weights_prepacked": 0,  # codes as they are; the default means packed for CUTLASS
        "accuracy_level": build.accuracy_level,
    }
    biases = _biases(build, file, layer, experts)
    zeros = ["", "", "", *zeros1, *zeros2] if zeros1 else []  # there is no fc3
    return [codes1, scales1, biases[0], codes2, scales2, biases[1], *zeros], attributes


def _biases(build: Build, file: str, layer: int, experts: int) -> tuple[str, str]:
    """Biases of fc1 and fc2, or "" twice where the experts have none."""
    weights, prefix = build.weights, f"model.layers.{layer}.mlp.experts"
    if not weights.expert_biases(layer):
        return "", ""
    rows = [weights.biases_of_experts(layer, experts, part, f"{prefix}.{name}_bias") for part, name in _PROJECTIONS]
    return build.graph.weight(file, rows[0]), build.graph.weight(file, rows[1])


def _loop(build: Build, file: str, layer: int, experts: int, value: str, routing: _Routing) -> str:
    """Every expert as matrices of its own, for its own tokens; for widths and providers that have no QMoE."""
    graph, scope = build.graph, f"/model/layers.{layer}/mlp"
    activation = activation_at(build, layer)
    weights = routing.weights
    if build.onnx_dtype != 1:
        weights = build.cast(weights, build.onnx_dtype, f"{scope}/weights_cast")
    out = graph.node("Mul", [value, _zero(build)], f"{scope}/zeros")
    first = graph.constant("/constants/first", np.array(0, np.int64))
    for expert in range(experts):
        own = f"{scope}/experts.{expert}"
        mine = graph.node("Equal", [routing.chosen, graph.integers(expert)], f"{own}/Equal")
        places = graph.node("NonZero", [mine], f"{own}/NonZero")
        pairs = graph.node("Transpose", [places], f"{own}/pairs", perm=[1, 0])
        tokens = graph.node("Gather", [places, first], f"{own}/tokens", axis=0)
        inputs = graph.node("Gather", [value, tokens], f"{own}/inputs", axis=0)
        gate, up = (_project(build, file, layer, expert, part, inputs, own) for part in ("gate", "up"))
        middle = _between(build, activation, gate, up, own)
        result = _project(build, file, layer, expert, "down", middle, own)
        share = graph.node("GatherND", [weights, pairs], f"{own}/share")
        column = graph.node("Unsqueeze", [share, graph.integers(1)], f"{own}/share_column")
        weighted = graph.node("Mul", [result, column], f"{own}/weighted")
        rows = graph.node("Unsqueeze", [tokens, graph.integers(1)], f"{own}/rows")
        out = graph.node("ScatterND", [out, rows, weighted], f"{own}/ScatterND", reduction="add")
    return out


def _project(build: Build, file: str, layer: int, expert: int, part: Matrix, value: str, scope: str) -> str:
    """One matrix of one expert, with its bias, from a tensor of its own or a row of a layer's."""
    weights, scope = build.weights, f"{scope}/{part}_proj"
    name = weights.source.family.expert_names(layer, expert)[("gate", "up", "down").index(part)]
    if not is_fused(weights.source, layer):
        return linear(build, file, name, value, scope)
    entries = weights.fused_matrix(layer, expert, part, name)
    return build.graph.node(
        "Gemm", [value, *(build.graph.weight(file, entry) for entry in entries)], f"{scope}/Gemm", transB=1
    )


def _between(build: Build, activation: Activation, gate: str, up: str, scope: str) -> str:
    """`Activation` in plain ONNX."""
    graph = build.graph

    def number(value: float) -> str:
        name = f"/constants/swiglu_{value}_{_numpy(build).__name__}"
        return graph.constant(name, np.array(value, dtype=_numpy(build)))

    if activation.limit is not None:
        most, least = number(activation.limit), number(-activation.limit)
        gate = graph.node("Clip", [gate, "", most], f"{scope}/gate_clip")
        up = graph.node("Clip", [up, least, most], f"{scope}/up_clip")
    if activation.beta:
        up = graph.node("Add", [up, number(activation.beta)], f"{scope}/up_beta")
    steep = gate if activation.alpha == 1.0 else graph.node("Mul", [gate, number(activation.alpha)], f"{scope}/steep")
    gated = graph.node("Mul", [gate, graph.node("Sigmoid", [steep], f"{scope}/Sigmoid")], f"{scope}/Silu")
    return graph.node("Mul", [gated, up], f"{scope}/Mul")


def _numpy(build: Build) -> type[np.floating]:
    return np.float32 if build.onnx_dtype == 1 else np.float16


def _zero(build: Build) -> str:
    kind = _numpy(build)
    return build.graph.constant(f"/constants/zero_{np.dtype(kind).name}", np.array(0, dtype=kind))


def _shared(build: Build, file: str, layer: int, value: str) -> str | None:
    """Shared experts where the layer has them: as they are (DeepSeek), or behind a sigmoid gate (Qwen2)."""
    disk, scope = f"model.layers.{layer}.mlp", f"/model/layers.{layer}/mlp"
    for name in ("shared_experts", "shared_expert"):
        if build.has(f"{disk}.{name}.gate_proj.weight"):
            out = gated_mlp(build, file, f"{disk}.{name}", value, f"{scope}/{name}")
            if not build.has(f"{disk}.{name}_gate.weight"):
                return out
            gate = linear(build, file, f"{disk}.{name}_gate.weight", value, f"{scope}/{name}_gate")
            return build.graph.node(
                "Mul",
                [out, build.graph.node("Sigmoid", [gate], f"{scope}/{name}_gate/Sigmoid")],
                f"{scope}/{name}/gated",
            )
    return None
