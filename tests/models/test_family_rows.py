"""Every row of the family table is held against transformers' own model of that family."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from stage_runs import masked
from torch import Tensor

from moepress.errors import InvalidInputError
from moepress.models.families.attention import register
from moepress.models.families.family import Part, part_of
from moepress.models.families.hf_config import ALIASES
from moepress.models.families.router import router_of
from moepress.models.families.routing import route
from moepress.models.families.skeleton import build_skeleton
from moepress.models.families.table import FAMILIES
from moepress.models.forward.streamed import StreamedModel
from moepress.models.forward.tensor_check import check_tensors
from moepress.models.forward.walk import Limits, Scratch, forward
from moepress.models.storage.checkpoint import Checkpoint, Source, open_checkpoint
from moepress.models.storage.experts import PrunedSource, prune_source, read_expert

CPU = torch.device("cpu")
AMPLE, TIGHT = 1 << 30, 1000  # bytes; with the second one every buffer lies in a file
every_key = pytest.mark.parametrize("key", tiny_models.KEYS)
every_form = pytest.mark.parametrize("fused", [False, True], ids=["per-expert", "fused"])


@pytest.fixture(scope="session")
def truth(tiny_model: Callable[..., Path]) -> Callable[[str], Any]:
    """transformers' model of a key, loaded once."""
    loaded: dict[str, Any] = {}

    def get(key: str) -> Any:
        if key not in loaded:
            loaded[key] = tiny_models.reference(tiny_model(key))
        return loaded[key]

    return get


def tokens_for(model: Any) -> Tensor:
    return tiny_models.windows(model.config.vocab_size)


def true_logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(tokens).logits
    return logits


def streamed_hidden(source: Source, tokens: Tensor, folder: Path, *, memory: int = AMPLE, batch: int = 2) -> Tensor:
    scratch = Scratch(folder, memory)
    limits = Limits(memory_bytes=memory, batch_windows=batch)
    hidden = forward(StreamedModel(source, device=CPU, dtype=torch.float32), tokens, scratch, limits).clone()
    scratch.close()
    return hidden


def streamed_logits(source: Source, tokens: Tensor, folder: Path, *, memory: int = AMPLE, batch: int = 2) -> Tensor:
    hidden = streamed_hidden(source, tokens, folder, memory=memory, batch=batch)
    with torch.inference_mode():
        return StreamedModel(source, device=CPU, dtype=torch.float32).head()(hidden)


def assert_close(ours: Tensor, theirs: Tensor, relative: float = 1e-4) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == torch.float32
    difference, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert difference < relative * scale, f"differs by {difference:.3g} where the largest value is {scale:.3g}"


def check(folder: Path) -> Checkpoint:
    checkpoint = open_checkpoint(folder)
    check_tensors(checkpoint.family, checkpoint.config, checkpoint.outline.shape, checkpoint.shapes, folder=folder)
    return checkpoint


def balanced_keep(source: Source, per_group: int, seed: int = 3) -> dict[int, list[int]]:
    """The same number of random experts in each router group, different ones in every layer."""
    shape, generator = source.outline.shape, torch.Generator().manual_seed(seed)
    size = shape.experts // shape.groups
    return {
        layer: [
            group * size + expert
            for group in range(shape.groups)
            for expert in sorted(torch.randperm(size, generator=generator)[:per_group].tolist())
        ]
        for layer in source.outline.moe_layers
    }


def test_every_family_of_the_table_has_a_tiny_model() -> None:
    assert {recipe.family for recipe in tiny_models.TINY.values()} == set(FAMILIES) - set(ALIASES)


@every_key
@every_form
def test_the_patterns_cover_the_state_dict_exactly(tiny_model: Callable[..., Path], key: str, fused: bool) -> None:
    checkpoint = check(tiny_model(key, fused=fused))
    assert checkpoint.family.name == tiny_models.TINY[key].family
    assert checkpoint.config["architectures"] == [checkpoint.family.architecture]
    assert len(checkpoint.shards) > 1
    for layer in checkpoint.outline.moe_layers:
        for name in checkpoint.family.router_names(layer):
            module_name = checkpoint.family.module_name(name)
            assert {name, module_name} & checkpoint.shapes.keys()
    if not fused:
        routed = {
            name
            for layer in checkpoint.outline.moe_layers
            for expert in range(checkpoint.shape.experts)
            for name in checkpoint.family.expert_names(layer, expert)
        }
        layers = checkpoint.shape.layers
        assert routed == {n for n in checkpoint.shapes if part_of(checkpoint.family, n, layers) is Part.ROUTED}


@every_key
@every_form
def test_no_tensor_may_be_missing_and_none_may_be_added(tiny_model: Callable[..., Path], key: str, fused: bool) -> None:
    checkpoint = open_checkpoint(tiny_model(key, fused=fused))
    model = build_skeleton(checkpoint.config)

    def refusal(shapes: dict[str, tuple[int, ...]]) -> str:
        with pytest.raises(InvalidInputError) as caught:
            check_tensors(
                checkpoint.family,
                checkpoint.config,
                checkpoint.outline.shape,
                shapes,
                folder="here",
                model=model,
            )
        return str(caught.value)

    for name in checkpoint.shapes:
        assert f"{name} is missing" in refusal({n: s for n, s in checkpoint.shapes.items() if n != name})
    surplus = "model.layers.1.mlp.surplus.weight"
    assert f"{surplus} belongs to no part" in refusal({**checkpoint.shapes, surplus: (1,)})
    narrow = next(n for n in checkpoint.shapes if n.endswith("layers.1.self_attn.o_proj.weight"))
    assert f"{narrow} has shape [3, 3]" in refusal({**checkpoint.shapes, narrow: (3, 3)})


@every_key
def test_our_view_of_the_router_equals_the_models_own(
    tiny_model: Callable[..., Path], truth: Callable[[str], Any], key: str
) -> None:
    checkpoint = open_checkpoint(tiny_model(key))
    router = router_of(checkpoint.family, checkpoint.config, checkpoint.outline.shape)
    inputs = torch.randn(500, checkpoint.shape.hidden, generator=torch.Generator().manual_seed(5))
    for layer in checkpoint.outline.moe_layers:
        gate = truth(key).model.layers[layer].mlp.gate
        with torch.inference_mode():
            logits, weights, chosen = gate(inputs)
        bias = getattr(gate, "e_score_correction_bias", None)
        assert checkpoint.family.rule.bias == (bias is not None)
        assert bias is None or bias.abs().min() > 0
        ours_chosen, ours_weights = route(router, logits, bias)
        assert ours_chosen.dtype == torch.int64
        assert ours_weights.dtype == torch.float32
        assert torch.equal(ours_chosen.sort().values, chosen.sort().values)
        empty = torch.zeros(len(inputs), checkpoint.shape.experts)
        torch.testing.assert_close(
            empty.scatter(1, ours_chosen, ours_weights), empty.scatter(1, chosen, weights), rtol=1e-5, atol=1e-7
        )


@every_key
@every_form
@pytest.mark.parametrize(("memory", "batch"), [(AMPLE, 2), (TIGHT, 16)], ids=["in-memory", "in-files"])
def test_streamed_logits_equal_those_of_transformers(
    tiny_model: Callable[..., Path],
    truth: Callable[[str], Any],
    tmp_path: Path,
    key: str,
    fused: bool,
    memory: int,
    batch: int,
) -> None:
    model, tokens = truth(key), tokens_for(truth(key))
    source = open_checkpoint(tiny_model(key, fused=fused))
    logits = streamed_logits(source, tokens, tmp_path, memory=memory, batch=batch)
    assert_close(logits, true_logits(model, tokens))
    assert list(tmp_path.iterdir()) == []


@every_key
@every_form
def test_an_expert_reads_as_the_rows_of_the_fused_weights(
    tiny_model: Callable[..., Path], truth: Callable[[str], Any], key: str, fused: bool
) -> None:
    source = open_checkpoint(tiny_model(key, fused=fused))
    layer = source.outline.moe_layers[-1]
    experts = truth(key).model.layers[layer].mlp.experts
    last = read_expert(source, layer, source.shape.experts - 1)
    assert torch.equal(torch.cat([last.gate, last.up]), experts.gate_up_proj[-1])
    assert torch.equal(last.down, experts.down_proj[-1])


@every_key
@every_form
def test_a_pruned_model_equals_the_original_with_masked_experts(
    tiny_model: Callable[..., Path], truth: Callable[[str], Any], tmp_path: Path, key: str, fused: bool
) -> None:
    model, source = truth(key), open_checkpoint(tiny_model(key, fused=fused))
    shape, tokens = source.shape, tokens_for(truth(key))
    keep = balanced_keep(source, 3 if shape.groups > 1 else shape.experts * 3 // 4)
    pruned = prune_source(source, keep)
    assert pruned.outline.shape.experts == len(next(iter(keep.values()))) < shape.experts
    with masked(model, keep):
        expected = true_logits(model, tokens)
    assert_close(streamed_logits(pruned, tokens, tmp_path), expected)
    assert (expected - true_logits(model, tokens)).abs().max() > 1e-2 * expected.abs().max()


@every_key
def test_keeping_every_expert_changes_nothing(tiny_model: Callable[..., Path], tmp_path: Path, key: str) -> None:
    source = open_checkpoint(tiny_model(key))
    pruned = prune_source(source, {layer: list(range(source.shape.experts)) for layer in source.outline.moe_layers})
    assert pruned.config == source.config
    assert pruned.shapes == source.shapes
    assert all(torch.equal(pruned.read(name), source.read(name)) for name in source.shapes)
    tokens = tiny_models.windows(source.shape.vocabulary)
    assert torch.equal(streamed_hidden(pruned, tokens, tmp_path), streamed_hidden(source, tokens, tmp_path))


@pytest.mark.parametrize("key", ["deepseek_v3", "deepseek_v2"])
def test_a_degrouped_source_keeps_an_uneven_choice(tiny_model: Callable[..., Path], tmp_path: Path, key: str) -> None:
    source = open_checkpoint(tiny_model(key))
    pruned = prune_source(source, {layer: [0, 1, 2, 5, 15] for layer in source.outline.moe_layers}, degroup=True)
    assert (pruned.config["n_group"], pruned.config["topk_group"], pruned.config["n_routed_experts"]) == (1, 1, 5)
    assert isinstance(pruned, PrunedSource)
    tokens = tiny_models.windows(source.shape.vocabulary, count=2)
    assert torch.isfinite(streamed_logits(pruned, tokens, tmp_path)).all()


@every_key
def test_attention_is_causal(tiny_model: Callable[..., Path], tmp_path: Path, key: str) -> None:
    source = open_checkpoint(tiny_model(key))
    tokens = tiny_models.windows(source.shape.vocabulary, count=3)
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 7) % source.shape.vocabulary
    before, after = streamed_hidden(source, tokens, tmp_path), streamed_hidden(source, other, tmp_path)
    assert_close(after[:, :-1], before[:, :-1], 1e-5)
    assert (after[:, -1] - before[:, -1]).abs().max() > 0.1


@every_key
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_first_experts_get_what_transformers_gives_them(
    tiny_model: Callable[..., Path], key: str, dtype: torch.dtype
) -> None:
    folder = tiny_model(key, dtype=torch.bfloat16)
    source = open_checkpoint(folder)
    # In 16 bit kernels round differently, so there the reference gets ours; test_attention.py compares the two.
    attention = "sdpa" if dtype == torch.float32 else register()
    model = tiny_models.reference(folder, dtype, attention=attention)
    streamed = StreamedModel(source, device=CPU, dtype=dtype)
    first, tokens = min(streamed.moe_layers), tokens_for(model)
    seen: list[Any] = []
    experts = model.model.layers[first].mlp.experts
    experts.register_forward_hook(lambda _module, arguments, keywords, _out: seen.extend(arguments), with_kwargs=True)
    with torch.inference_mode():
        model(tokens)
        hidden = streamed.embed(tokens)
        for layer in range(first):
            streamed.load_layer(layer)
            hidden, none = streamed.run_layer(layer, hidden)
            assert none is None
        module = streamed.load_layer(first)
        output, routed = streamed.run_layer(first, hidden)
    assert routed is not None
    assert output.dtype == routed.inputs.dtype == routed.residual.dtype == dtype
    assert routed.residual.shape == (tokens.numel(), source.shape.hidden)
    assert routed.logits.shape == (tokens.numel(), source.shape.experts)
    for ours, theirs in zip((routed.inputs, routed.chosen, routed.weights), seen, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs.reshape(ours.shape))
    for name, buffer in module.named_buffers():
        if name.endswith("e_score_correction_bias"):
            assert buffer.dtype == torch.float32
            assert torch.equal(buffer, source.read(f"model.layers.{first}.{name}"))
            assert not torch.equal(buffer, buffer.bfloat16().float())


@pytest.mark.parametrize("key", ["deepseek_v3", "deepseek_v2_lite"])
def test_a_config_in_the_form_of_the_hub_gives_the_same_logits(
    tiny_copy: Callable[..., Path], truth: Callable[[str], Any], tmp_path: Path, key: str
) -> None:
    folder = tiny_copy(key)
    yarn = open_checkpoint(folder).config["rope_parameters"]
    scaling = {k: v for k, v in yarn.items() if k not in {"rope_type", "rope_theta"}} | {"type": "yarn"}
    tiny_models.edit_config(
        folder,
        rope_parameters=...,
        rope_scaling=scaling,
        rope_theta=10000,
        dtype=...,
        torch_dtype="float32",
        auto_map={"AutoConfig": "configuration_deepseek.DeepseekConfig"},
    )
    source = check(folder)
    tokens = tokens_for(truth(key))
    assert_close(streamed_logits(source, tokens, tmp_path), true_logits(truth(key), tokens))


def test_a_qwen3_config_of_the_hub_states_num_experts(tiny_copy: Callable[..., Path]) -> None:
    folder = tiny_copy("qwen3_moe")
    assert "num_experts" not in open_checkpoint(folder).config  # transformers 5 writes num_local_experts
    tiny_models.edit_config(folder, num_local_experts=..., num_experts=16)
    source = check(folder)
    pruned = prune_source(source, {layer: [0, 3, 4, 9] for layer in source.outline.moe_layers})
    assert pruned.config["num_experts"] == 4
    assert "num_local_experts" not in pruned.config


def test_multi_token_prediction_layers_are_left_aside(
    tiny_copy: Callable[..., Path], truth: Callable[[str], Any], tmp_path: Path
) -> None:
    folder = tiny_copy("deepseek_v3")
    tiny_models.add_mtp(folder)
    source = check(folder)
    assert source.outline.moe_layers == (1, 2)
    assert part_of(source.family, "model.layers.3.eh_proj.weight", 3) is Part.MTP
    tokens = tokens_for(truth("deepseek_v3"))
    assert_close(streamed_logits(source, tokens, tmp_path), true_logits(truth("deepseek_v3"), tokens))


def test_an_fp8_model_streams_as_its_dequantized_weights(tiny_copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_copy("deepseek_v3")
    tiny_models.to_fp8(folder)
    source = check(folder)
    assert source.block == (48, 40)
    assert not [name for name in source.shapes if "scale_inv" in name]
    plain = tiny_copy("moonlight").parent / "dequantized"
    plain.mkdir()
    (plain / "config.json").write_text((folder / "config.json").read_text())
    tiny_models.edit_config(plain, quantization_config=...)
    tiny_models.rewrite(plain, lambda tensors: tensors.update({n: source.read(n) for n in source.shapes}))
    tokens = tiny_models.windows(256, count=2)
    expected = true_logits(tiny_models.reference(plain), tokens)
    assert_close(streamed_logits(source, tokens, tmp_path), expected)
