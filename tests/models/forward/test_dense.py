"""load_dense: with our weights, transformers' model is the one that it loads itself, however they are stored."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from stage_runs import CPU, assert_near, keep_of, logits_of, quantized_folder, streamed_logits
from torch import Tensor

from moepress.compress.gptq.include import Include
from moepress.converters.safetensors.artifact import open_source
from moepress.errors import InvalidInputError, MoepressError
from moepress.models.forward import dense
from moepress.models.forward.dense import dense_bytes, load_dense
from moepress.models.storage.checkpoint import Source, SourceView, open_checkpoint
from moepress.models.storage.experts import prune_source
from moepress.stages.export import export_stage
from moepress.stages.places import Output

WINDOWS = tiny_models.windows(256, count=2, length=20)


def loaded(source: Source, dtype: torch.dtype = torch.float32) -> Any:
    return load_dense(source, device=CPU, dtype=dtype)


@pytest.mark.parametrize("key", tiny_models.KEYS)
def test_logits_are_those_of_transformers(tiny_model: Callable[..., Path], key: str) -> None:
    folder = tiny_model(key)
    ours, theirs = loaded(open_source(folder)), tiny_models.reference(folder)
    assert not ours.training
    assert torch.equal(logits_of(ours, WINDOWS), logits_of(theirs, WINDOWS))


@pytest.mark.parametrize("fused", [False, True], ids=["one by one", "fused"])
@pytest.mark.parametrize("key", tiny_models.KEYS)
def test_a_bfloat16_model_has_the_tensors_and_dtypes_of_transformers(
    tiny_model: Callable[..., Path], key: str, fused: bool
) -> None:
    folder = tiny_model(key, dtype=torch.bfloat16, fused=fused)
    ours = loaded(open_source(folder), torch.bfloat16)
    theirs = tiny_models.reference(folder, torch.bfloat16)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    for name, tensor in other.items():
        assert mine[name].dtype == tensor.dtype, name
        assert torch.equal(mine[name], tensor), name
    assert torch.equal(logits_of(ours, WINDOWS), logits_of(theirs, WINDOWS))


def test_tied_embeddings_are_one_tensor_and_count_once(tiny_model: Callable[..., Path]) -> None:
    model = loaded(open_source(tiny_model("qwen2_moe")))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    stored = sum(t.numel() for n, t in model.state_dict().items() if n != "lm_head.weight")
    assert dense_bytes(model, torch.float32) == 4 * stored


@pytest.mark.parametrize("key", ["deepseek_v3", "qwen2_moe", "mixtral"])
def test_a_quantized_folder_gives_the_logits_of_the_streamed_model_in_both_layouts(
    tiny_model: Callable[..., Path], tmp_path: Path, key: str
) -> None:
    source = open_checkpoint(tiny_model(key))
    keep = keep_of(source, source.shape.experts // 2)
    include = [] if key == "deepseek_v3" else [Include.ATTENTION]  # a matrix there has 48 rows, and GPTQ packs 32
    quantized_folder(tiny_model(key), WINDOWS, tmp_path / "ct", keep=keep, include=include)
    export_stage(str(tmp_path / "ct"), Output(folder=tmp_path / "gptq"), "gptq")  # type: ignore[arg-type]
    for name in ("ct", "gptq"):
        artifact = open_source(tmp_path / name)
        streamed = streamed_logits(artifact, WINDOWS, tmp_path / f"scratch-{name}")
        assert_near(logits_of(loaded(artifact), WINDOWS), streamed, 1e-5)


def test_fp8_weights_and_a_layer_for_multi_token_prediction(tiny_copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_copy("deepseek_v3")
    tiny_models.add_mtp(folder)
    tiny_models.to_fp8(folder)
    source = open_source(folder)
    model = loaded(source)
    assert len(model.model.layers) == 3  # the fourth one in the folder is no decoder layer
    assert_near(logits_of(model, WINDOWS), streamed_logits(source, WINDOWS, tmp_path), 1e-5)


def test_a_source_seen_through_a_keep_list(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    base = open_checkpoint(tiny_model("qwen3_moe"))
    source = prune_source(base, keep_of(base, 8))
    model = loaded(source)
    assert model.model.layers[0].mlp.experts.down_proj.shape[0] == 8
    assert_near(logits_of(model, WINDOWS), streamed_logits(source, WINDOWS, tmp_path), 1e-5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched(SourceView):
    """A source that knows which of the experts' matrices that it gave are still held by someone."""

    given: list[weakref.ref[Tensor]] = field(default_factory=list)
    held: list[int] = field(default_factory=list)

    def read(self, name: str) -> Tensor:
        tensor = self.base.read(name)
        if ".experts." in name:
            self.given.append(weakref.ref(tensor))
            self.held.append(sum(known() is not None for known in self.given))
        return tensor


def test_no_more_than_one_expert_is_held_beside_the_model(tiny_model: Callable[..., Path]) -> None:
    source = Watched(base=open_checkpoint(tiny_model("deepseek_v3")))
    loaded(source)
    assert len(source.given) == 2 * 16 * 3
    assert max(source.held) == 3  # gate, up and down


def test_a_model_that_does_not_fit_is_refused_before_a_weight_is_read(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Watched(base=open_checkpoint(tiny_model("mixtral")))
    needed = dense_bytes(tiny_models.build("mixtral"), torch.float32)
    monkeypatch.setattr(dense, "free_memory_bytes", lambda device: needed - 1)
    with pytest.raises(MoepressError, match=r"needs .* GiB in float32, and .* GiB are free \(cpu\); use --dtype bf"):
        loaded(source)
    assert source.given == []
    loaded(source, torch.bfloat16)  # half the size
    monkeypatch.setattr(dense, "free_memory_bytes", lambda device: needed)
    loaded(source)


def test_free_memory_is_what_the_system_says() -> None:
    assert 1 << 20 < dense.free_memory_bytes(CPU) < 1 << 50


def test_a_folder_that_lacks_a_tensor_is_refused(tiny_copy: Callable[..., Path]) -> None:
    folder = tiny_copy("olmoe")
    tiny_models.rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.experts.5.up_proj.weight"))
    with pytest.raises(InvalidInputError, match=r"experts\.5\.up_proj\.weight is missing"):
        loaded(open_source(folder))
