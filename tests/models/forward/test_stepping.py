"""A layer that stands still before its Linears gives what running it from its start for each of them gives."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch

from moepress.compress.gptq.include import Include, linear_groups
from moepress.models.forward.stepping import Stepping
from moepress.models.forward.streamed import StreamedModel
from moepress.models.forward.walk import Limits, Scratch, Stream, first_step, open_stream
from moepress.models.storage.checkpoint import open_checkpoint

PARTS = (Include.ATTENTION, Include.SHARED, Include.DENSE)
LIMITS = Limits(memory_bytes=1 << 30, batch_windows=2)


def stream_of(folder: Path, scratch: Path) -> Stream:
    model = StreamedModel(open_checkpoint(folder), device=torch.device("cpu"), dtype=torch.float32)
    windows = tiny_models.windows(model.shape.vocabulary, count=5)
    return open_stream(model, windows, Scratch(scratch, LIMITS.memory_bytes), LIMITS, observe=False)


def inner(stream: Stream, layer: int, name: str) -> str:
    return stream.model.family.module_name(name).split(f"layers.{layer}.", 1)[1].removesuffix(".weight")


def halved(stream: Stream, name: str) -> torch.Tensor:
    return stream.model.source.read(name).float() / 2


@pytest.mark.parametrize("key", ["deepseek_v3", "moonlight", "qwen2_moe", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("layer", [0, 1])
def test_stepping_gives_what_starting_again_gives(
    tiny_model: Callable[..., Path], tmp_path: Path, key: str, layer: int
) -> None:
    stepped, again = stream_of(tiny_model(key), tmp_path), stream_of(tiny_model(key), tmp_path)
    source, layers = stepped.model.source, stepped.model.shape.layers
    groups = linear_groups(source, layer, layers, PARTS)
    stops = [[inner(stepped, layer, name) for name in group.names] for group in groups]
    stepped.model.load_layer(layer)
    replaced: dict[str, torch.Tensor] = {}
    threads = threading.active_count()
    with torch.inference_mode(), Stepping(stepped, layer, stops) as steps:
        for group, names in zip(groups, stops, strict=True):
            found = [part.clone() for part in steps.inputs()]
            module = again.model.load_layer(layer, replaced)
            seen: list[torch.Tensor] = []
            hook = module.get_submodule(names[0]).register_forward_pre_hook(lambda _m, a, seen=seen: seen.append(a[0]))
            for batch in again.hidden.split(LIMITS.batch_windows):
                again.model.run_layer(layer, batch)
            hook.remove()
            assert len(seen) == len(found) == 3
            assert all(torch.equal(a, b) for a, b in zip(found, seen, strict=True))
            for name, place in zip(group.names, names, strict=True):
                replaced[name] = halved(stepped, name)
                steps.replace(place, replaced[name])
        routed = steps.finish()
    assert threading.active_count() == threads
    with torch.inference_mode():
        again.model.load_layer(layer, replaced)
        assert first_step(again, layer) == routed
    assert torch.equal(stepped.hidden, again.hidden)
    if routed:
        assert torch.equal(stepped.inputs, again.inputs)
        assert torch.equal(stepped.chosen, again.chosen)
        assert torch.equal(stepped.weights, again.weights)


def walk_through(stream: Stream) -> None:
    with Stepping(stream, 0, [["self_attn.q_proj"]]) as steps:
        list(steps.inputs())
        steps.finish()


def test_an_error_in_the_layer_is_raised_and_no_thread_is_left(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    stream = stream_of(tiny_model("mixtral"), tmp_path)
    module = stream.model.load_layer(0)
    threads = threading.active_count()

    def fails(*_: object) -> None:
        raise ValueError("broken layer")

    hook = module.get_submodule("self_attn.o_proj").register_forward_pre_hook(fails)
    with pytest.raises(ValueError, match="broken layer"):
        walk_through(stream)
    hook.remove()
    assert threading.active_count() == threads


def test_stops_out_of_order_are_an_error(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    stream = stream_of(tiny_model("mixtral"), tmp_path)
    stream.model.load_layer(0)
    stops = [["self_attn.o_proj"], ["self_attn.q_proj"]]
    with pytest.raises(RuntimeError, match="before"), Stepping(stream, 0, stops) as steps:
        list(steps.inputs())
