"""Rules about ONNX graphs: what kernels of ONNX Runtime take, and where weights may lie. All were tried on its CPU."""

from collections.abc import Iterator

from moepress.converters.onnx.folder import MODEL
from moepress.validation.rules.facts import Facts
from moepress.validation.rules.findings import Effect, Happens, Problem, Runtime, first
from moepress.validation.rules.onnx_facts import Graph, Node

QMOE_BITS, MATMUL_BITS = (2, 3, 4, 8), (2, 4, 8)
_QMOE_FC3, _QMOE_ROUTER_WEIGHTS, _MATMUL_ZERO_POINTS, _MATMUL_ORDER = 8, 14, 3, 4
_EXPORT = "export again with `moepress export --to onnx`"


def _nodes(facts: Facts, operator: str) -> list[Node]:
    return [node for node in facts.graph.nodes if node.operator == operator] if facts.graph else []


def _onnx(effect: Effect, text: str) -> Happens:
    return {Runtime.ONNXRUNTIME: (effect, text)}


def places(facts: Facts) -> Iterator[Problem]:
    """Weights lie in plain files of the model's own folder, as long as the graph says."""
    if facts.graph is None:
        return
    graph: Graph = facts.graph
    for name, end in graph.ends.items():
        if name not in graph.sizes:
            what = f"{MODEL} names {name!r}, which is no file in the folder"
        elif name in graph.linked:
            what = f"{name} is a link, or has several names"
        elif graph.sizes[name] < end:
            what = f"{name} has {graph.sizes[name]} bytes and {MODEL} wants {end}"
        else:
            continue
        yield Problem(
            what=what,
            happens=_onnx(Effect.REFUSES, "does not load weights from there (onnx refuses links, too)"),
            mend="copy all files of the folder themselves, or " + _EXPORT,
        )
        return


def expert_bits(facts: Facts) -> Iterator[Problem]:
    """QMoE and MatMulNBits have kernels for these bits."""
    for operator, taken, key in (("QMoE", QMOE_BITS, "expert_weight_bits"), ("MatMulNBits", MATMUL_BITS, "bits")):
        wrong = [node for node in _nodes(facts, operator) if node.numbers.get(key, 4) not in taken]
        if wrong:
            yield Problem(
                what=f"{wrong[0].name} ({operator}) has {wrong[0].numbers.get(key)} bits",
                happens=_onnx(Effect.REFUSES, f"has kernels for {', '.join(map(str, taken))} bits"),
                mend="quantize with 2, 4 or 8 bits and export again",
            )
    old = [node for node in _nodes(facts, "QMoE") if node.numbers.get("expert_weight_bits") == 3]
    if old:
        yield Problem(
            what=f"{old[0].name} (QMoE) has 3 bits",
            happens=_onnx(Effect.REFUSES, "version 1.31 does not take it; 1.32 does"),
            mend="run it in 1.32, or quantize with 2, 4 or 8 bits and export again",
        )


def interleaved_rows(facts: Facts) -> Iterator[Problem]:
    """Experts' gate and up rows are interleaved in fc1."""
    for node in (*_nodes(facts, "QMoE"), *_nodes(facts, "MoE")):
        separate = node.operator == "QMoE" and node.has_input(_QMOE_FC3)
        if node.numbers.get("swiglu_fusion", 0) != 1 or separate:
            yield Problem(
                what=f"{node.name} ({node.operator}) has swiglu_fusion = {node.numbers.get('swiglu_fusion', 0)}"
                + (" and a separate fc3" if separate else ""),
                happens=_onnx(Effect.REFUSES, "its CPU kernel takes interleaved rows only (1, without fc3)"),
                mend=_EXPORT,
            )
            return


def raw_weights(facts: Facts) -> Iterator[Problem]:
    """QMoE's codes are marked as they are: not packed for a kernel."""
    for node in _nodes(facts, "QMoE"):
        if node.numbers.get("weights_prepacked", -1) != 0:
            yield Problem(
                what=f"{node.name} (QMoE) has weights_prepacked = {node.numbers.get('weights_prepacked', -1)}",
                happens=_onnx(Effect.WRONG, "takes the codes for packed: -1 on CUDA, 1 on the CPU of 1.32"),
                mend=_EXPORT,
            )
            return


def own_routing(facts: Facts) -> Iterator[Problem]:
    """Routing does not rest on QMoE's router_weights."""
    for node in _nodes(facts, "QMoE"):
        if node.has_input(_QMOE_ROUTER_WEIGHTS):
            yield Problem(
                what=f"{node.name} (QMoE) has the input router_weights",
                happens=_onnx(Effect.WRONG, "CUDA ignores it and routes by router_probs; the CPU does not"),
                mend=_EXPORT + ", which does the routing in plain ONNX",
            )
            return


def no_order(facts: Facts) -> Iterator[Problem]:
    """MatMulNBits has no g_idx."""
    for node in _nodes(facts, "MatMulNBits"):
        if node.has_input(_MATMUL_ORDER):
            effect, text = Effect.REFUSES, "refuses g_idx for 2 and 8 bits"
            if node.numbers.get("bits", 4) == 4:
                effect, text = Effect.SLOWER, "leaves its fast path on CUDA"
            if node.has_input(_MATMUL_ZERO_POINTS):
                effect, text = Effect.WRONG, "drops the zero points beside a g_idx without a word"
            yield Problem(what=f"{node.name} (MatMulNBits) has g_idx", happens=_onnx(effect, text), mend=_EXPORT)
            return


def packed_shape(facts: Facts) -> Iterator[Problem]:
    """MatMulNBits' codes have three dimensions."""
    for node in _nodes(facts, "MatMulNBits"):
        if 1 in node.dims and len(node.dims[1]) != 3:
            yield Problem(
                what=f"{node.name} (MatMulNBits) has codes of shape {list(node.dims[1])}",
                happens=_onnx(Effect.REFUSES, "wants [rows, blocks, bytes]"),
                mend=_EXPORT,
            )
            return


def caches(facts: Facts) -> Iterator[Problem]:
    """genai_config.json states the cache that the graph has, keys as wide as values."""
    if facts.graph is None or facts.graph.genai is None or not facts.graph.caches:
        return
    found = facts.graph.caches
    uneven = [n for n, cache in found.items() if n.endswith(".key") and found.get(f"{n[:-4]}.value") != cache]
    model = facts.graph.genai.get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    stated = decoder if isinstance(decoder, dict) else {}
    heads, size = (stated.get(key) for key in ("num_key_value_heads", "head_size"))
    wrong = [n for n, cache in found.items() if cache != (heads, size)]
    if uneven or wrong:
        what = f"genai_config.json states a cache of {heads} heads of {size} values, and {first(wrong, 1)} has another"
        if uneven:
            what = f"{first(uneven, 1)} and its values have caches of different shapes"
        yield Problem(
            what=what,
            happens=_onnx(Effect.REFUSES, "onnxruntime-genai gives every cache the shape of its config"),
            mend=_EXPORT,
        )
