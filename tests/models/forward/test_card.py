"""The rows of a layer's tokens on the device of the model; here that is the CPU too, so that both ways can be run."""

from pathlib import Path

import every_family
import pytest
import tiny_models
import torch

from moepress.models.forward import walk
from moepress.models.forward.card import moved, on_card
from moepress.models.forward.streamed import StreamedModel
from moepress.models.forward.walk import Limits, Scratch, Stream, open_stream
from moepress.models.storage.checkpoint import open_checkpoint

CPU = torch.device("cpu")
LIMITS = Limits(memory_bytes=1 << 30, batch_windows=2)


def model_of(folder: Path, key: str) -> StreamedModel:
    every_family.save(every_family.build(key), folder)
    return StreamedModel(open_checkpoint(folder), device=CPU, dtype=torch.float32)


def hidden_of(model: StreamedModel, windows: torch.Tensor, folder: Path) -> torch.Tensor:
    scratch = Scratch(folder, LIMITS.memory_bytes)
    try:
        return walk.forward(model, windows, scratch, LIMITS).clone()
    finally:
        scratch.close()


@pytest.mark.parametrize("key", ["qwen3_moe", "gemma4"])
def test_experts_add_the_same_to_rows_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    model = model_of(tmp_path / "model", key)
    windows = tiny_models.windows(model.config.vocab_size)
    plain, streams = hidden_of(model, windows, tmp_path), list[Stream]()

    def always(stream: Stream) -> object:
        streams.append(stream)
        return moved([stream])

    monkeypatch.setattr(walk, "on_card", always)
    assert torch.equal(hidden_of(model, windows, tmp_path), plain)
    assert len(streams) == len(model.moe_layers)


def test_rows_are_the_streams_own_again_whatever_happens(tmp_path: Path) -> None:
    model, scratch = model_of(tmp_path / "model", "qwen3_moe"), Scratch(tmp_path, LIMITS.memory_bytes)
    stream = open_stream(model, tiny_models.windows(model.config.vocab_size), scratch, LIMITS, observe=False)
    inputs, hidden, before = stream.inputs, stream.hidden, stream.hidden.clone()
    with on_card(stream):
        assert stream.inputs is inputs  # nothing moves where the model is on the CPU

    def stop() -> None:
        with moved([stream]):
            assert stream.hidden.data_ptr() != hidden.data_ptr()
            stream.flat().add_(1)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop()
    assert (stream.inputs is inputs, stream.hidden is hidden) == (True, True)
    assert torch.equal(hidden, before)
    with moved([stream]):
        stream.flat().add_(1)
    assert torch.equal(hidden, before + 1)
    scratch.close()
