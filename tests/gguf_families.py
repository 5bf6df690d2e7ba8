"""Derived families that llama.cpp runs, tiny."""

from typing import Any

DERIVED: dict[str, dict[str, Any]] = {
    "glm4_moe": {},
    "glm4_moe_lite": {},
    "gpt_oss": {
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {  # without `truncate: false`, of which llama.cpp does not know
            "rope_type": "yarn",
            "rope_theta": 150_000.0,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 64,
        },
    },
    "minimax_m2": {},
    "qwen3_next": {"mlp_only_layers": []},
    "qwen3_5_moe": {
        "mlp_only_layers": [],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [1, 1, 0],
        },
    },
}
"""Families that are derived: model type -> what its tiny config has otherwise."""
