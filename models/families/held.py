"""Model types of which more than names is known: what only a comparison with transformers tells."""

HELD_AGAINST_TRANSFORMERS = frozenset(
    {"deepseek_v3", "deepseek_v2", "qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "glm4_moe", "glm4_moe_lite", "gpt_oss"}
)
"""Those whose ONNX graphs `tests/converters/onnx` holds against transformers' own logits.

A graph is built by tensors and by what modules compute. Neither shows everything that a forward pass may do between
them, so a type that looks the same is no reason to believe it.
"""
