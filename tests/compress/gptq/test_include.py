"""Which Linears are quantized besides the experts, in which order, and which ones never are."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models

from moepress.compress.gptq.include import Include, linear_groups, unquantized_modules
from moepress.models.families.family import Part, part_of
from moepress.models.storage.checkpoint import open_checkpoint

EVERYTHING = tuple(Include)
every_key = pytest.mark.parametrize("key", tiny_models.KEYS)


def leaves(folder: Path, layer: int, *include: Include) -> list[tuple[str, ...]]:
    groups = linear_groups(open_checkpoint(folder), layer, 3, include)
    return [tuple(name.split(f"layers.{layer}.")[1].removesuffix(".weight") for name in g.names) for g in groups]


def test_nothing_is_included_unless_asked_for(tiny_model: Callable[..., Path]) -> None:
    assert leaves(tiny_model("deepseek_v3"), 1) == []


def test_attention_comes_in_the_order_of_the_data(tiny_model: Callable[..., Path]) -> None:
    attention = Include.ATTENTION
    assert leaves(tiny_model("mixtral"), 0, attention) == [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
    ]
    assert leaves(tiny_model("deepseek_v3"), 0, attention) == [
        ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
        ("self_attn.q_b_proj",),
        ("self_attn.o_proj",),
    ]
    assert leaves(tiny_model("moonlight"), 0, attention) == [
        ("self_attn.q_proj", "self_attn.kv_a_proj_with_mqa"),
        ("self_attn.o_proj",),
    ]


def test_shared_and_dense_parts_are_told_apart(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("deepseek_v3")
    assert leaves(folder, 0, Include.SHARED) == []
    assert leaves(folder, 0, Include.DENSE) == [("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]
    assert leaves(folder, 1, Include.DENSE) == []
    assert leaves(folder, 1, Include.SHARED) == [
        ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
        ("mlp.shared_experts.down_proj",),
    ]
    assert leaves(tiny_model("qwen2_moe"), 0, Include.SHARED) == [
        ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
        ("mlp.shared_expert.down_proj",),
    ]


@every_key
@pytest.mark.parametrize("include", [(), (Include.ATTENTION,), EVERYTHING], ids=["experts", "attention", "everything"])
def test_every_linear_is_either_quantized_or_ignored(
    tiny_model: Callable[..., Path], key: str, include: tuple[Include, ...]
) -> None:
    source = open_checkpoint(tiny_model(key))
    quantized = {n for layer in range(3) for group in linear_groups(source, layer, 3, include) for n in group.names}
    ignored = set(unquantized_modules(source, 3, include))
    for name, shape in source.shapes.items():
        part, module = part_of(source.family, name, 3), name.removesuffix(".weight")
        if len(shape) != 2 or part in {Part.ROUTED, Part.EMBEDDINGS}:
            assert name not in quantized
            assert module not in ignored
        elif part is Part.LM_HEAD:
            assert (module in ignored) != (Include.LM_HEAD in include)
        else:
            assert (name in quantized) != (module in ignored), name
        if part in {Part.ROUTER, Part.NORMS, Part.EMBEDDINGS} or "kv_b_proj" in name:
            assert name not in quantized
    assert "lm_head" in ignored or Include.LM_HEAD in include


@every_key
def test_including_everything_leaves_only_what_runtimes_trip_over(tiny_model: Callable[..., Path], key: str) -> None:
    left = unquantized_modules(open_checkpoint(tiny_model(key)), 3, EVERYTHING)
    endings = {name.split(".", 3)[-1] for name in left}
    assert endings <= {
        "mlp.gate",
        "block_sparse_moe.gate",
        "mlp.shared_expert_gate",
        "self_attn.kv_b_proj",
        "lm_head",
    }
    assert ("lm_head" in endings) == (key == "qwen2_moe")  # tied to the embeddings, which are never quantized


def test_a_prediction_layer_is_in_no_list(tiny_copy: Callable[..., Path]) -> None:
    folder = tiny_copy("deepseek_v3")
    tiny_models.add_mtp(folder)
    assert not [n for n in unquantized_modules(open_checkpoint(folder), 3, ()) if "layers.3." in n]
