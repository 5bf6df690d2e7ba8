"""The forward pass of multi-token-prediction layers, against transformers' own modules and its own MTP model."""

from pathlib import Path

import mtp_models
import pytest
import tiny_models
import torch
from stage_runs import CPU, LIMITS, assert_near
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from moepress.models.forward.predicting import add_predicting, enter, following
from moepress.models.forward.streamed import StreamedModel
from moepress.models.forward.tensor_check import mtp_problems
from moepress.models.forward.walk import Scratch, add_experts, first_step, last_step, open_stream
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.models.storage.experts import mtp_layers
from moepress.models.storage.mtp import twin_of


def streamed(folder: Path, windows: Tensor, work: Path) -> Tensor:
    """The outputs of the last MTP layer, [N, T, D]."""
    model = StreamedModel(open_checkpoint(folder), device=CPU, dtype=torch.float32)
    layers = model.shape.layers + len(add_predicting(model))
    stream = open_stream(model, windows, Scratch(work, LIMITS.memory_bytes), LIMITS, observe=False)
    with torch.inference_mode():
        for layer in range(layers):
            if layer >= model.shape.layers:
                enter(stream, layer)
            model.load_layer(layer)
            if first_step(stream, layer):
                add_experts(stream, layer)
                last_step(stream, layer)
            model.unload_layer(layer)
    return stream.hidden.detach()


@pytest.mark.parametrize("fused", [False, True], ids=["single", "fused"])
@pytest.mark.parametrize("kind", mtp_models.KINDS)
def test_the_layer_gives_what_transformers_modules_give(kind: str, fused: bool, tmp_path: Path) -> None:
    folder, windows = mtp_models.make(kind, tmp_path / "model", fused=fused), tiny_models.windows(256)
    source = open_checkpoint(folder)
    last = source.shape.layers - 1
    assert mtp_layers(source) == (last + 1,)
    assert twin_of(source, last + 1) == last
    assert mtp_problems(source, last + 1) == []
    assert_near(streamed(folder, windows, tmp_path), mtp_models.predicted(folder, windows)[0], 1e-5)


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe"])
def test_it_is_the_layer_that_transformers_drafts_with(kind: str, tmp_path: Path) -> None:
    folder, windows = mtp_models.make(kind, tmp_path / "model"), tiny_models.windows(256)
    main = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    drafting = MtpModel(main, 1).eval()
    layer, joint = mtp_models.own_tensors(folder)
    state = {f"mtp_block.{name}": tensor for name, tensor in mtp_models.fused_experts(layer).items()}
    state |= {f"{name}.weight": tensor for name, tensor in joint.items() if name != "shared_head.norm"}
    drafting.layers[0].load_state_dict(state | {"post_norm.weight": joint["shared_head.norm"]})
    positions = torch.arange(1, windows.shape[1] + 1).expand(windows.shape)
    with torch.inference_mode():
        hidden = main(windows, output_hidden_states=True).hidden_states[-1]
        cache = MtpCache(config=main.config.get_mtp_config())
        expected = drafting.forward_layer(0, hidden, positions, cache, input_ids=following(windows, 1))
        found = drafting.layers[0].post_norm(streamed(folder, windows, tmp_path))
    assert_near(found, expected, 1e-5)


def test_a_second_layer_goes_on_from_the_first_through_its_norm(tmp_path: Path) -> None:
    folder, windows = mtp_models.make("deepseek_v3", tmp_path / "model"), tiny_models.windows(256)
    first = streamed(folder, windows, tmp_path)

    def again(tensors: dict[str, Tensor]) -> None:
        there = [name for name in tensors if name.startswith("model.layers.3.")]
        tensors |= {name.replace("layers.3.", "layers.4."): tensors[name].clone() for name in there}

    tiny_models.rewrite(folder, again)
    source = open_checkpoint(folder)
    assert mtp_layers(source) == (3, 4)
    model = StreamedModel(source, device=CPU, dtype=torch.float32)
    assert add_predicting(model) == add_predicting(model) == (3, 4)
    stream = open_stream(model, windows, Scratch(tmp_path, LIMITS.memory_bytes), LIMITS, observe=False)
    joint, tensors = mtp_models.own_tensors(folder)[1], tiny_models.load_tensors(folder)

    def norm(values: Tensor, weight: Tensor) -> Tensor:
        return values * (values.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight

    with torch.inference_mode():
        stream.hidden.copy_(first)
        enter(stream, 4)
        embedded = tensors["model.embed_tokens.weight"][following(windows, 2)]
        pair = (norm(embedded, joint["enorm"]), norm(norm(first, joint["shared_head.norm"]), joint["hnorm"]))
        assert_near(stream.hidden, torch.cat(pair, dim=-1) @ joint["eh_proj"].T, 1e-5)


def test_the_last_token_stands_in_where_a_window_ends() -> None:
    assert following(torch.tensor([[1, 2, 3], [4, 5, 6]]), 1).tolist() == [[2, 3, 3], [5, 6, 6]]
    assert following(torch.tensor([[1, 2, 3]]), 2).tolist() == [[3, 3, 3]]
