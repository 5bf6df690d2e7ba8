"""Model types of which more than their tensors is known: what only a comparison with transformers tells."""

HELD_AGAINST_TRANSFORMERS = frozenset(
    {
        *("deepseek_v2", "deepseek_v3", "dots1", "glm4_moe", "glm4_moe_lite", "gpt_oss", "minimax_m2", "mixtral"),
        *("olmoe", "qwen2_moe", "qwen3_moe", "solar_open"),
    }
)
"""Those whose ONNX graphs `tests/converters/onnx` holds against transformers' own logits, and whose code was read.

A graph is built by tensors and by what modules compute, and neither shows all that a forward pass does between them.
Types that look the same and are not: ernie4_5_moe rotates other pairs, exaone_moe does not rotate in some layers, and
mistral4 scales queries by their place in long texts, which a short comparison would not have shown.
"""
